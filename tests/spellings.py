"""Every name that a layer has in some program's files, made from its readable one; what reads them goes the other way."""

import re

from sdlora.lora.names import ANY_PREFIX, BARE, OLD, PEFT, WEBUI, sgm_path

OLD_BACK = {theirs: ours for ours, theirs in OLD.items()}


def spellings(name: str, family: str) -> list[str]:
    """Every stem by which a known program writes this layer, the canonical one first."""
    part, _, path = name.partition(".")
    head, _, last = path.rpartition(".")
    if part == "unet":
        paths, old = [path, sgm_path(path, family)], []
        if ".attn" in path:
            old = [re.sub(r"(\.attn\d)\.", r"\1.processor.", path.removesuffix(".0"))]
    else:
        paths = [path, path.removeprefix("text_model.")]  # which transformers >= 5.6 leaves out
        old = [f"{head}.{OLD_BACK[last]}"] if last in OLD_BACK else []
    stems = [f"{prefix}{of.replace('.', '_') if prefix.endswith('_') else of}" for prefix in ANY_PREFIX[part] for of in paths]
    named = [f"{part}.{of}" for of in (*paths, *old)]
    bare = [*paths, *old] if part in BARE else []
    return list(dict.fromkeys([WEBUI[family](name), *stems, *named, *bare, *(PEFT + stem for stem in (*named, *bare))]))
