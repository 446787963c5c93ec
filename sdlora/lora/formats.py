"""LoRA files: the names, shapes and metadata that A1111, Forge, ComfyUI, diffusers and kohya's scripts read.

A module becomes `<prefix>_<path with . as _>` with `.lora_down.weight`, `.lora_up.weight` and a 0-dim `.alpha`; a reader applies
W + strength * alpha / R * up @ down with R = down.shape[0].

Files hold one alpha for all layers, and what a layer learned beyond it is multiplied into its `up`. The product is the same, but
diffusers (seen in 0.42) applies the most frequent alpha to all attention and text-encoder layers, without a word, where alphas
differ. The learned alphas themselves stand in the metadata, under LEARNED_ALPHAS.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from sdlora.errors import TrainingError, WeightsError
from sdlora.lora.layers import Factors
from sdlora.lora.targets import readable_name

LEARNED_ALPHAS = "sdlora_learned_alphas"  # JSON: module's name in the file -> alpha
PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}


def webui_name(name: str) -> str:
    """`unet.mid_block.attentions.0.proj_in` -> `lora_unet_mid_block_attentions_0_proj_in`."""
    part, _, path = name.partition(".")
    return f"{PREFIXES[part]}_{path.replace('.', '_')}"


def to_tensors(factors: Mapping[str, Factors], alpha: float) -> dict[str, Tensor]:
    """Readable names -> the tensors of a WebUI file, fp32, with this alpha for every layer."""
    tensors = {}
    for name, (down, up, own) in factors.items():
        key = webui_name(name)
        tensors[f"{key}.lora_down.weight"] = down.float().contiguous()
        tensors[f"{key}.lora_up.weight"] = (up.float() * (own / alpha)).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def save(path: Path, factors: Mapping[str, Factors], alpha: float, metadata: Mapping[str, str]) -> None:
    """Write a WebUI file atomically and durably. Raises TrainingError rather than export a number that is not finite."""
    tensors = to_tensors(factors, alpha)
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise TrainingError(f"{path.name} is not exported: {broken[0]} holds numbers that are not finite; lower the learning rate.")
    data = serialise(tensors, dict(metadata))
    body = 8 + int.from_bytes(data[:8], "little")
    data = serialise(tensors, {**metadata, "sshs_model_hash": hashlib.sha256(data[body:]).hexdigest()})
    write_atomically(path, data)


def write_atomically(path: Path, data: bytes) -> None:
    """The file is the old one or the new one, never a part; readable by others, which safetensors' own writer is not."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path) -> tuple[dict[str, Factors], dict[str, str]]:
    """Factors by WebUI name (without suffix), and metadata. A missing alpha means scale 1. Raises WeightsError."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise WeightsError(f"There is no file {path}.") from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable .safetensors file: {error}.") from None
    factors = {}
    for key in sorted({k.partition(".")[0] for k in tensors}):
        down, up = tensors.pop(f"{key}.lora_down.weight", None), tensors.pop(f"{key}.lora_up.weight", None)
        alpha = tensors.pop(f"{key}.alpha", None)
        if down is None or up is None:
            continue
        factors[key] = Factors(down.float(), up.float(), float(down.shape[0] if alpha is None else alpha))
    if tensors or not factors:
        raise WeightsError(f"{path} is not a plain LoRA in the WebUI format: {', '.join(sorted(tensors)[:3]) or 'it is empty'}.")
    return factors, metadata


def read_alphas(path: Path) -> dict[str, float]:
    """WebUI name -> the alpha that the run behind a file learned, or what the file says where it is not one of ours."""
    factors, metadata = load(path)
    alphas = {name: own.alpha for name, own in factors.items()}
    try:
        learned = json.loads(metadata.get(LEARNED_ALPHAS, "{}"))
        alphas |= {name: float(alpha) for name, alpha in learned.items() if name in alphas}
    except (ValueError, TypeError, AttributeError):
        raise WeightsError(f"{path}: its metadata {LEARNED_ALPHAS} is damaged.") from None
    return alphas


@torch.no_grad()
def merge(parts: Mapping[str, nn.Module], factors: Mapping[str, Factors], strength: float = 1.0) -> None:
    """Add a file's update to the weights in place, as WebUIs do. Raises WeightsError when the model has no such layer."""
    modules = {
        webui_name(readable_name(part, path)): module
        for part, model in parts.items()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    for key, (down, up, alpha) in factors.items():
        module = modules.get(key)
        if module is None:
            raise WeightsError(f"The LoRA does not fit this model: it adapts {key}, which the model lacks.")
        weight = module.weight
        if weight.numel() != up.shape[0] * down.flatten(1).shape[1]:
            raise WeightsError(f"The LoRA does not fit this model: {key} has another shape.")
        delta = strength * alpha / down.shape[0] * (up.flatten(1) @ down.flatten(1))
        weight += delta.view_as(weight).to(weight)
