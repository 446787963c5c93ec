"""LoRA files: the names, shapes and metadata that A1111, Forge, ComfyUI, diffusers and kohya's scripts read.

A module becomes `<prefix>_<path with . as _>`. A plain LoRA has `.lora_down.weight`, `.lora_up.weight` and a 0-dim `.alpha`; a reader
applies W + strength * alpha / R * up @ down with R = down.shape[0]. Other changes, in files that were asked for (LyCORIS' names):
`.dora_scale` (1, I) beside the three; `.diff` and `.diff_b`, added to weight and bias; `.w_norm` and `.b_norm`, the same of a norm.

Files hold one alpha for all layers, and what a layer learned beyond it is multiplied into its `up`. The product is the same, but
diffusers (seen in 0.42) applies the most frequent alpha to all attention and text-encoder layers, without a word, where alphas
differ. The learned alphas themselves stand in the metadata, under LEARNED_ALPHAS.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save as serialise
from torch import Tensor, nn

from sdlora.errors import TrainingError, WeightsError
from sdlora.files import write_durably
from sdlora.lora.change import Change, Factors
from sdlora.lora.targets import readable_name
from sdlora.tensorfile import read

LEARNED_ALPHAS = "sdlora_learned_alphas"  # JSON: module's name in the file -> alpha
LEARNED_SCALES = "sdlora_learned_scales"  # the same -> what the product of the matrices was multiplied by in training
PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}
FOLDABLE = nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm


def webui_name(name: str) -> str:
    """`unet.mid_block.attentions.0.proj_in` -> `lora_unet_mid_block_attentions_0_proj_in`."""
    part, _, path = name.partition(".")
    return f"{PREFIXES[part]}_{path.replace('.', '_')}"


def to_tensors(changes: Mapping[str, Change], alpha: float) -> dict[str, Tensor]:
    """Readable names -> the tensors of a WebUI file, fp32, with this alpha for every low-rank layer."""
    return {key: tensor for name, change in changes.items() for key, tensor in layer_tensors(webui_name(name), change, alpha).items()}


def layer_tensors(stem: str, change: Change, alpha: float) -> dict[str, Tensor]:
    """The tensors of one layer, whose name in the file is `stem`."""
    tensors = {}
    if change.factors is not None:
        down, up, own = change.factors
        tensors[f"{stem}.lora_down.weight"] = down.float().contiguous()
        tensors[f"{stem}.lora_up.weight"] = (up.float() * (own / alpha)).contiguous()
        tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    is_norm = change.weight is not None and change.weight.dim() == 1
    for suffix, tensor in (
        ("dora_scale", change.dora_scale),
        ("w_norm" if is_norm else "diff", change.weight),
        ("b_norm" if is_norm else "diff_b", change.bias),
    ):
        if tensor is not None:
            tensors[f"{stem}.{suffix}"] = tensor.float().contiguous()
    return tensors


# What programs make of each kind of tensor that a plain LoRA lacks. Measured: each program's own loader, the weight that it applied
# compared with the file's meaning.
READERS: dict[str, str] = {
    "dora_scale": "DoRA is right in ComfyUI, Forge, A1111 and InvokeAI, in SD.Next on attention only; diffusers and kohya's scripts "
    "apply it wrongly",
    "diff": "full deltas are right in ComfyUI, Forge, A1111 and InvokeAI, in SD.Next on attention only; diffusers refuses the file, and "
    "kohya's scripts ignore them",
    "diff_b": "biases are right in ComfyUI and Forge; A1111 and InvokeAI ignore them beside a LoRA and refuse them alone; diffusers "
    "refuses the file, SD.Next fails, kohya's scripts ignore them",
    "w_norm": "norms are right in ComfyUI, Forge, A1111 and InvokeAI; SD.Next applies them wrongly, diffusers refuses the file, and "
    "kohya's scripts ignore them",
}


def who_reads(changes: Iterable[Change]) -> list[str]:
    """A line for each kind of change that not every program reads rightly."""
    suffixes = {key.rpartition(".")[2] for key in to_tensors({f"unet.{n}": change for n, change in enumerate(changes)}, 1.0)}
    return [line for suffix, line in READERS.items() if suffix in suffixes]


def save(path: Path, changes: Mapping[str, Change], alpha: float, metadata: Mapping[str, str]) -> None:
    """Write a WebUI file atomically and durably. Raises TrainingError rather than export a number that is not finite."""
    tensors = to_tensors(changes, alpha)
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise TrainingError(f"{path.name} is not exported: {broken[0]} holds numbers that are not finite; lower the learning rate.")
    data = serialise(tensors, dict(metadata))
    body = 8 + int.from_bytes(data[:8], "little")
    data = serialise(tensors, {**metadata, "sshs_model_hash": hashlib.sha256(data[body:]).hexdigest()})
    write_durably(path, data)


def load(path: Path) -> tuple[dict[str, Change], dict[str, str]]:
    """Changes by WebUI name (without suffix), and metadata. A missing alpha means scale 1. Raises WeightsError."""
    tensors, metadata = read(path)
    changes = {}
    for key in sorted({k.partition(".")[0] for k in tensors}):

        def take(*suffixes: str, key: str = key) -> Tensor | None:
            found = [tensors.pop(f"{key}.{suffix}").float() for suffix in suffixes if f"{key}.{suffix}" in tensors]
            return found[0] if found else None

        factors = None
        if f"{key}.lora_down.weight" in tensors and f"{key}.lora_up.weight" in tensors:
            down, up, alpha = take("lora_down.weight"), take("lora_up.weight"), take("alpha")
            assert down is not None and up is not None
            if down.dim() < 2 or up.dim() < 2 or not 0 < down.shape[0] == up.shape[1] or (alpha is not None and alpha.numel() != 1):
                raise WeightsError(f"{path}: the matrices of {key} do not fit together.")
            factors = Factors(down, up, float(down.shape[0] if alpha is None else alpha))
        if factors is None and f"{key}.dora_scale" in tensors:
            raise WeightsError(f"{path}: {key} has DoRA's magnitude and not the matrices that belong to it.")
        change = Change(factors, take("dora_scale"), take("diff", "w_norm"), take("diff_b", "b_norm"))
        if factors is not None or change.weight is not None or change.bias is not None:
            changes[key] = change
    if tensors or not changes:
        raise WeightsError(f"{path} is not a LoRA in the WebUI format: {', '.join(sorted(tensors)[:3]) or 'it is empty'}.")
    return changes, metadata


def read_alphas(path: Path) -> dict[str, float]:
    """WebUI name -> the alpha that the run behind a file learned, or what the file says where it is not one of ours."""
    changes, metadata = load(path)
    alphas = {name: change.factors.alpha for name, change in changes.items() if change.factors is not None}
    return alphas | _learned(path, metadata, LEARNED_ALPHAS, changes)


def read_scales(path: Path) -> dict[str, float]:
    """WebUI name -> the scale that the run behind a file learned, whatever its rank, or alpha / R where the file is not one of ours."""
    changes, metadata = load(path)
    scales = {name: factors.alpha / factors.down.shape[0] for name, change in changes.items() if (factors := change.factors) is not None}
    return scales | _learned(path, metadata, LEARNED_SCALES, changes)


def _learned(path: Path, metadata: Mapping[str, str], key: str, changes: Mapping[str, Change]) -> dict[str, float]:
    try:
        found = {name: float(value) for name, value in json.loads(metadata.get(key, "{}")).items() if name in changes}
        if not all(map(math.isfinite, found.values())):
            raise ValueError
        return found
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise WeightsError(f"{path}: its metadata {key} is damaged.") from None


def modules_by_name(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Every module that a file may change, by its name in files."""
    return {
        webui_name(readable_name(part, path)): module
        for part, model in parts.items()
        for path, module in model.named_modules()
        if isinstance(module, FOLDABLE)
    }


@torch.no_grad()
def merge(parts: Mapping[str, nn.Module], changes: Mapping[str, Change], strength: float = 1.0) -> None:
    """Apply a file's changes to the weights in place, as WebUIs do. Raises WeightsError when the model has no such layer."""
    modules = modules_by_name(parts)
    for key, change in changes.items():
        module = modules.get(key)
        if module is None:
            raise WeightsError(f"The LoRA does not fit this model: it adapts {key}, which the model lacks.")
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        factors = change.factors
        if (
            (
                factors is not None
                and (factors.up.shape[1] != factors.down.shape[0] or weight.flatten(1).shape != (len(factors.up), factors.down[0].numel()))
            )
            or (change.dora_scale is not None and change.dora_scale.shape != (1, weight.shape[1], *[1] * (weight.dim() - 2)))
            or (change.weight is not None and weight.shape != change.weight.shape)
            or (change.bias is not None and (not isinstance(bias, Tensor) or bias.shape != change.bias.shape))
        ):
            raise WeightsError(f"The LoRA does not fit this model: {key} has another shape.")
        weight += (strength * change.delta(weight)).to(weight)
        if change.bias is not None and isinstance(bias, Tensor):
            bias += (strength * change.bias).to(bias)
