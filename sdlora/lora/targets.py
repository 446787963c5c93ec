"""Which layers of a model are adapted, how a user names them, and how adapters get into the model.

A layer's readable name is its module's path behind `unet.` or `text_encoder.`, as diffusers and WebUI files spell it:
`unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q`, `text_encoder.text_model.encoder.layers.0.self_attn.q_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import nn

from sdlora.errors import ConfigError
from sdlora.lora.layers import Adapter

Value = TypeVar("Value")
Made = TypeVar("Made", bound=Adapter)

# Layer groups by the end of a module's path.
UNET_GROUPS: dict[str, str] = {
    "attention": r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    "feed_forward": r"\.ff\.net\.(0\.proj|2)",
    "projection": r"\.attentions\.\d+\.(proj_in|proj_out)",
    "resnet": r"\.resnets\.\d+\.(conv1|conv2|conv_shortcut)",
    "resample": r"\.(downsamplers|upsamplers)\.0\.conv",
    "time": r"\.resnets\.\d+\.time_emb_proj",
    "input_output": r"^\.(conv_in|conv_out|(time|add)_embedding\.linear_[12])",
}
TEXT_ENCODER_GROUPS: dict[str, str] = {
    "attention": r"\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",
    "feed_forward": r"\.mlp\.(fc1|fc2)",
    "projection": r"^\.text_projection",
}

# Sets of groups under one name, as other trainers offer them. What a group lacks in a model, it lacks: SD 1.x projects by 1x1
# convolutions, SD 2.x and SDXL by linear layers.
PRESETS: dict[str, tuple[str, ...]] = {
    "attention+ff": ("attention", "feed_forward", "projection"),  # kohya's default
    "all-linear": ("attention", "feed_forward", "projection", "time"),
    "all-linear+conv": ("attention", "feed_forward", "projection", "time", "resnet", "resample"),  # kohya's with conv_dim
    "everything": tuple(UNET_GROUPS),
}


# Parts of a model under one name.
WHOLE: dict[str, tuple[str, ...]] = {
    "unet": ("unet",),
    "down": ("unet.down_blocks",),
    "mid": ("unet.mid_block",),
    "up": ("unet.up_blocks",),
    "te": ("text_encoder", "text_encoder_2"),
    "te1": ("text_encoder",),
    "te2": ("text_encoder_2",),
}
SHORT = {"text_encoder": "te", "text_encoder_2": "te2"}  # of a part, before the number of a block


def groups_of(names: Collection[str]) -> list[str]:
    """Groups for a list of groups and presets, each once."""
    return list(dict.fromkeys(group for name in names for group in PRESETS.get(name, (name,))))


def readable_name(part: str, path: str) -> str:
    """transformers >= 5.6 drops `text_model` from CLIPTextModel's paths; names keep it, as all files do."""
    if part.startswith("text_encoder") and not path.startswith(("text_model.", "text_projection")):
        path = f"text_model.{path}"
    return f"{part}.{path}"


def find_targets(part: str, model: nn.Module, groups: Collection[str]) -> dict[str, str]:
    """Readable name -> module path of every Linear and Conv2d in `groups`, in the model's own order."""
    patterns = UNET_GROUPS if part == "unet" else TEXT_ENCODER_GROUPS
    wanted = re.compile("|".join(f"(?:{patterns[group]})$" for group in groups)) if groups else None
    return {
        readable_name(part, path): path
        for path, module in model.named_modules()
        if wanted and isinstance(module, nn.Linear | nn.Conv2d) and wanted.search(f".{path}")
    }


def find_norms(part: str, model: nn.Module) -> dict[str, str]:
    """Readable name -> module path of every norm with a weight and a bias of its own."""
    return {
        readable_name(part, path): path
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm | nn.GroupNorm) and module.weight is not None and module.bias is not None
    }


def inject(model: nn.Module, targets: Mapping[str, str], make: Callable[[str, nn.Module], Made]) -> dict[str, Made]:
    """Put an adapter before each target module; returns them by readable name."""
    layers = {}
    for name, path in targets.items():
        parent = model.get_submodule(path.rpartition(".")[0])
        key = path.rpartition(".")[2]
        layers[name] = make(name, getattr(parent, key))
        setattr(parent, key, layers[name])
    return layers


# ---------------------------------------------------------------- values by layer


def by_layer(option: str, names: Sequence[str], values: Mapping[str, Value], own: Mapping[str, Value]) -> dict[str, Value]:
    """`values`, overruled by the last entry of `own` that names a layer. Raises ConfigError for an entry that names none: what a user
    set and nobody uses is a mistake."""
    found = dict(values)
    for selector, value in own.items():
        matched = [name for name in names if selects(selector, name)]
        if not matched:
            example = f"; names look like {names[0]} (see run.log)" if names else ", as none is"
            raise ConfigError(f"{option}: {selector!r} matches no adapted layer{example}.")
        found |= dict.fromkeys(matched, value)
    return found


def selects(selector: str, name: str) -> bool:
    """Whether a glob, a block (`down.0`, `mid`, `te2.0-5`, see block_globs) or a group (`attention`, `unet.resnet`) names this layer."""
    part, _, path = name.partition(".")
    of_part, _, group = selector.rpartition(".")
    patterns = UNET_GROUPS if part == "unet" else TEXT_ENCODER_GROUPS
    if group in patterns and of_part in ("", part):
        return re.search(f"(?:{patterns[group]})$", f".{path}") is not None
    return any(fnmatchcase(name, glob) for glob in block_globs(selector))


def block_globs(text: str) -> list[str]:
    """Shorthand for a block as globs: `down.0`, `mid`, `up.1-3`, `te.0-5`, `te2.0-5`, or all of `down`, `up`, `unet`, `te1`, `te2`, and
    `te` for every text encoder; anything else is a glob already."""
    if text in WHOLE:
        return [f"{path}.*" for path in WHOLE[text]]
    found = re.fullmatch(r"(down|up|te2?)\.(\d+)(?:-(\d+))?", text)
    if not found:
        return [text]
    block, first, last = found.groups()
    encoder = next((part for part, short in SHORT.items() if short == block), None)
    path = f"{encoder}.text_model.encoder.layers" if encoder else f"unet.{block}_blocks"
    return [f"{path}.{number}.*" for number in range(int(first), int(last or first) + 1)]


def block_of(name: str) -> str:
    """The block of a layer, as `block_globs` takes it: `down.0`, `mid`, `te2.11`; of a layer in none, its part: `unet`, `te`, `te2`."""
    found = re.match(r"(?:unet\.(down|mid|up)_blocks?|(text_encoder(?:_2)?)\.text_model\.encoder\.layers)(?:\.(\d+))?\.", name)
    if found is None:
        part = name.partition(".")[0]
        return SHORT.get(part, part)
    side, encoder, number = found.groups()
    return ".".join(filter(None, [side or SHORT[encoder], number]))


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A generator of the layer's own: adapting one layer more or less changes no other layer's start."""
    import hashlib

    digest = hashlib.blake2b(f"init {seed} {name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
