"""Which layers of a model are adapted, and how adapters get into it.

A layer's readable name is its module's path behind `unet.` or `text_encoder.`, as diffusers and WebUI files spell it:
`unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q`, `text_encoder.text_model.encoder.layers.0.self_attn.q_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn

from sdlora.lora.layers import LoraLayer

# Layer groups by the end of a module's path.
UNET_GROUPS: dict[str, str] = {
    "attention": r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    "feed_forward": r"\.ff\.net\.(0\.proj|2)",
    "projection": r"\.attentions\.\d+\.(proj_in|proj_out)",
    "resnet": r"\.resnets\.\d+\.(conv1|conv2|conv_shortcut)",
    "resample": r"\.(downsamplers|upsamplers)\.0\.conv",
    "time": r"\.resnets\.\d+\.time_emb_proj",
    "input_output": r"^\.(conv_in|conv_out|time_embedding\.linear_[12])",
}
TEXT_ENCODER_GROUPS: dict[str, str] = {
    "attention": r"\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",
    "feed_forward": r"\.mlp\.(fc1|fc2)",
}


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


def inject(model: nn.Module, targets: Mapping[str, str], make: Callable[[str, nn.Linear | nn.Conv2d], LoraLayer]) -> dict[str, LoraLayer]:
    """Put an adapter before each target module; returns them by readable name."""
    layers = {}
    for name, path in targets.items():
        parent = model.get_submodule(path.rpartition(".")[0])
        key = path.rpartition(".")[2]
        base = getattr(parent, key)
        assert isinstance(base, nn.Linear | nn.Conv2d)
        layers[name] = make(name, base)
        setattr(parent, key, layers[name])
    return layers


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A generator of the layer's own: adapting one layer more or less changes no other layer's start."""
    import hashlib

    digest = hashlib.blake2b(f"init {seed} {name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
