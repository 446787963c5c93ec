"""LoRA files: what A1111, Forge, ComfyUI, diffusers and other trainers write is read, and what they read is written.

A plain LoRA has `.lora_down.weight`, `.lora_up.weight` and a 0-dim `.alpha` behind each layer's stem (lora/names.py); a reader applies
W + strength * alpha / R * up @ down with R = down.shape[0]. Other changes, in files that were asked for (LyCORIS' names): `.dora_scale`
beside the three; `.diff` and `.diff_b`, added to weight and bias; `.w_norm` and `.b_norm`, the same of a norm. diffusers' own files have
`.lora_A.weight` and `.lora_B.weight` and no alpha. Further encodings are read and never written, see encodings.py.

WebUI files hold one alpha for all layers, and what a layer learned beyond it is multiplied into its `up`. The product is the same, but
diffusers (seen in 0.42) applies the most frequent alpha to all attention and text-encoder layers, without a word, where alphas
differ. The learned alphas themselves stand in the metadata, under LEARNED_ALPHAS.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdlora.errors import TrainingError, WeightsError
from sdlora.lora.change import Change
from sdlora.lora.encodings import decode
from sdlora.lora.names import WEBUI, readable
from sdlora.lora.targets import readable_name
from sdlora.lora.tensor_file import PRECISIONS, write
from sdlora.tensors import finite, opened, reading

LEARNED_ALPHAS = "sdlora_learned_alphas"  # JSON: layer's stem in the file -> alpha
LEARNED_SCALES = "sdlora_learned_scales"  # the same -> what the product of the matrices was multiplied by in training
PEFT_CONFIG = "lora_adapter_metadata"  # JSON: options of peft, in files of diffusers
FOLDABLE = nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm


# ---------------------------------------------------------------- writing


def webui_tensors(name: str, change: Change, family: str, alpha: float) -> dict[str, Tensor]:
    """What a WebUI file holds of one layer, fp32, with this alpha where it is of low rank."""
    stem = WEBUI[family](name)
    tensors: dict[str, Tensor | None] = {}
    if change.factors is not None:
        down, up, own = change.factors
        tensors["lora_down.weight"] = down
        tensors["lora_up.weight"] = up.float() * (own / alpha)
        tensors["alpha"] = torch.tensor(alpha)
    is_norm = change.weight is not None and change.weight.dim() == 1
    tensors["dora_scale"] = change.dora_scale
    tensors["w_norm" if is_norm else "diff"] = change.weight
    tensors["b_norm" if is_norm else "diff_b"] = change.bias
    return {f"{stem}.{suffix}": tensor.float().contiguous() for suffix, tensor in tensors.items() if tensor is not None}


def diffusers_tensors(name: str, change: Change, family: str, alpha: float) -> dict[str, Tensor]:
    """What diffusers saves of one layer, fp32. It has no alpha: `lora_B` carries the scale. Raises WeightsError for what is not plain."""
    if not change.is_plain or change.factors is None:
        raise WeightsError(f"diffusers reads plain LoRAs alone, and {name} is none: write a WebUI file, or reduce it to a rank first.")
    down, up, own = change.factors
    return {
        f"{name}.lora_A.weight": down.float().contiguous(),
        f"{name}.lora_B.weight": (up.float() * (own / down.shape[0])).contiguous(),
    }


# Name of a format -> (readable name, change, family, alpha) -> tensors by key.
FORMATS: dict[str, Callable[[str, Change, str, float], dict[str, Tensor]]] = {
    "webui": webui_tensors,
    "diffusers": diffusers_tensors,
}


def to_tensors(changes: Mapping[str, Change], alpha: float, family: str = "sd1", to: str = "webui") -> dict[str, Tensor]:
    """Changes by readable name -> the tensors of a file, fp32."""
    return {key: tensor for name, change in changes.items() for key, tensor in FORMATS[to](name, change, family, alpha).items()}


def save(
    path: Path,
    changes: Mapping[str, Change],
    alpha: float,
    metadata: Mapping[str, str],
    *,
    family: str = "sd1",
    to: str = "webui",
    precision: str = "fp32",
) -> None:
    """Write changes by readable name atomically and durably. Raises TrainingError rather than export a number that is not finite, and
    WeightsError where the precision cannot hold one."""
    alpha = _rounded(alpha, precision)
    tensors = to_tensors(changes, alpha, family, to)
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise TrainingError(f"{path.name} is not exported: {broken[0]} holds numbers that are not finite; lower the learning rate.")
    write(path, tensors.items(), metadata, precision)


def _rounded(alpha: float, precision: str) -> float:
    """As the file can hold it, so that `up` makes up for the rest; 1 for what it would hold as 0."""
    return torch.tensor(alpha).to(PRECISIONS[precision]).item() or 1.0


class Converted(NamedTuple):
    """What a file was written anew as."""

    layers: int
    family: str
    precision: str
    alpha: float  # of every layer; diffusers' files have it in their matrices


def convert(source: Path, target: Path | None, *, to: str = "webui", precision: str | None = None, family: str | None = None) -> Converted:
    """Write `source` anew as one of FORMATS, a layer at a time. Layers that have the file's most frequent alpha keep every bit.

    target: None to compute and check, and write nothing. precision: None for the source's own. family: where the source does not show
    it. Raises WeightsError, also rather than leave out what is not understood.
    """
    with open_lora(source) as file:
        file.refuse_unread()
        family = family or file.family
        if family is None:
            raise WeightsError(f"{source} does not show which family it is for: say sd1, sd2 or sdxl.")
        precision = precision or file.precision
        alpha = _rounded(file.usual_alpha, precision)
        # Where alphas are multiplied into the matrices, peft's options must not scale them again.
        metadata = {key: value for key, value in file.metadata.items() if key != PEFT_CONFIG}
        if "ss_network_alpha" in metadata:
            metadata["ss_network_alpha"] = f"{alpha:g}"
        layers = (FORMATS[to](name, file.change(name), family, alpha) for name in file.layers)
        write(target, (item for tensors in layers for item in tensors.items()), metadata, precision)
        return Converted(len(file.layers), family, precision, alpha)


# ---------------------------------------------------------------- reading

# What a tensor is to its layer, by the end of its key. Down and up in the words of kohya, of diffusers of all times, and of peft, which
# may put an adapter's name before `weight`.
_KEY = re.compile(
    r"(?P<stem>.+?)(?:"
    r"(?P<down>(?:\.lora_down|\.lora_A|[._]lora\.down|\.lora_linear_layer\.down)(?:\.\w+)?\.weight)|"
    r"(?P<up>(?:\.lora_up|\.lora_B|[._]lora\.up|\.lora_linear_layer\.up)(?:\.\w+)?\.weight)|"
    r"(?P<magnitude>\.lora_magnitude_vector(?:\.\w+)*)|"
    r"\.(?P<own>lora_mid\.weight|alpha|dora_scale|diff|diff_b|w_norm|b_norm|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)))"
)


@dataclass(frozen=True)
class LoraFile:
    """A file that is read a layer at a time."""

    path: Path
    metadata: dict[str, str]
    layers: dict[str, dict[str, str]]  # readable name -> what a tensor is -> its key
    unread: list[str]  # keys that are not understood
    _tensors: Any = field(repr=False)

    def change(self, name: str) -> Change:
        """fp32. Raises WeightsError for a layer whose tensors do not belong together."""
        with reading(self.path):
            tensors = {role: finite(self.path, key, self._tensors.get_tensor(key)) for role, key in self.layers[name].items()}
        try:
            change = decode(tensors, self._alpha_of_peft(name))
        except (RuntimeError, IndexError, TypeError):  # torch's words for matrices that cannot be multiplied, or are none
            raise WeightsError(f"{self.path}: the tensors of {self.stem(name)} have shapes that do not belong together.") from None
        if tensors or not kinds_of(change):
            keys = ", ".join(self.layers[name][role] for role in tensors or self.layers[name])
            raise WeightsError(f"{self.path}: {keys} lacks the tensors that belong to it.")
        kernel = kernel_of(name, self.family)
        if change.weight is not None and change.weight.dim() == 2 and change.weight.shape[1] % math.prod(kernel) == 0:
            return replace(change, weight=change.weight.view(len(change.weight), -1, *kernel))
        return change

    def stem(self, name: str) -> str:
        """As the file spells it."""
        found = _KEY.fullmatch(next(iter(self.layers[name].values())))
        assert found is not None
        return found["stem"]

    def shape(self, name: str, role: str) -> tuple[int, ...]:
        return tuple(self._tensors.get_slice(self.layers[name][role]).get_shape())

    def refuse_unread(self) -> None:
        """Raises WeightsError."""
        if self.unread or not self.layers:
            some = ", ".join(self.unread[:3]) + (f" and {len(self.unread) - 3} more" if len(self.unread) > 3 else "")
            raise WeightsError(f"{self.path} is not a LoRA that is understood: {some or 'it is empty'}.")

    @cached_property
    def family(self) -> str | None:
        """Which it is for, as far as it shows."""
        if any(name.startswith(("text_encoder_2.", "unet.add_embedding.")) or ".transformer_blocks.1." in name for name in self.layers):
            return "sdxl"
        for name in self.layers:
            role = next((role for role in ("down", "diff") if role in self.layers[name]), None)
            width = self.shape(name, role)[1] if role is not None and len(self.shape(name, role)) > 1 else None
            if re.search(r"\.attn2\.to_[kv]$", name) and width in CONTEXT_WIDTHS:
                return CONTEXT_WIDTHS[width]
            if re.search(r"^text_encoder\..*\.q_proj$", name) and width == 1024:
                return "sd2"
        said = [self.metadata.get(key, "") for key in ("ss_base_model_version", "modelspec.architecture")]
        return next((family for family, starts in SAID.items() if any(text.startswith(starts) for text in said)), None)

    @property
    def precision(self) -> str:
        """The most frequent, of those that we write."""
        kinds = Counter(self._tensors.get_slice(key).get_dtype() for keys in self.layers.values() for key in keys.values())
        return {"F16": "fp16", "BF16": "bf16"}.get(kinds.most_common(1)[0][0], "fp32")

    @property
    def usual_alpha(self) -> float:
        """The most frequent one that is not 0; a layer without one has its rank."""
        alphas: Counter[float] = Counter()
        for name, keys in self.layers.items():
            if "down" in keys:
                own = self._tensors.get_tensor(keys["alpha"]) if "alpha" in keys else None
                alpha = self._alpha_of_peft(name) if own is None or own.numel() != 1 else float(own)
                alphas[float(self.shape(name, "down")[0]) if alpha is None else alpha] += 1
        return next((alpha for alpha, _ in alphas.most_common() if alpha), 1.0)

    def _alpha_of_peft(self, name: str) -> float | None:
        """What peft's options say, in this file's convention of alpha / R."""
        if "down" not in self.layers[name]:
            return None
        part, _, path = name.partition(".")
        config = self._peft_config
        of_part = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")} or config
        if "lora_alpha" not in of_part:
            return None
        patterns = of_part.get("alpha_pattern") or {}
        try:
            # peft takes them for regular expressions, but diffusers writes paths; an expression of a stranger's could take for ever.
            alpha = float(next((a for end, a in patterns.items() if f".{path}".endswith(f".{end}")), of_part["lora_alpha"]))
        except (ValueError, TypeError, AttributeError, OverflowError):
            alpha = math.nan
        if not math.isfinite(alpha):
            raise WeightsError(f"{self.path}: its metadata {PEFT_CONFIG} is damaged.")
        return alpha * math.sqrt(self.shape(name, "down")[0]) if of_part.get("use_rslora") else alpha

    @cached_property
    def _peft_config(self) -> dict[str, Any]:
        try:
            config = json.loads(self.metadata.get(PEFT_CONFIG, "{}"))
        except (ValueError, RecursionError):
            raise WeightsError(f"{self.path}: its metadata {PEFT_CONFIG} is damaged.") from None
        return config if isinstance(config, dict) else {}


CONTEXT_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # D of the text embeddings that cross-attention reads
# How `ss_base_model_version` and `modelspec.architecture` begin.
SAID: dict[str, tuple[str, ...]] = {
    "sd1": ("sd_v1", "stable-diffusion-v1"),
    "sd2": ("sd_v2", "stable-diffusion-v2"),
    "sdxl": ("sdxl_", "stable-diffusion-xl"),
}


def kernel_of(name: str, family: str | None) -> tuple[int, ...]:
    """Of a layer in a Stable Diffusion UNet: () for what is no convolution. Some encodings lose it."""
    if re.search(r"\.(conv1|conv2|(down|up)samplers\.0\.conv|conv_in|conv_out)$", name):
        return (3, 3)
    is_projection = re.search(r"\.attentions\.\d+\.proj_(in|out)$", name) is not None
    return (1, 1) if name.endswith(".conv_shortcut") or (is_projection and family == "sd1") else ()


@contextmanager
def open_lora(path: Path) -> Iterator[LoraFile]:
    """Raises WeightsError for what is not a .safetensors file."""
    with reading(path):
        file = opened(path)
    with file as tensors:
        layers: dict[str, dict[str, str]] = {}
        unread = []
        for key in sorted(tensors.keys()):
            found = _KEY.fullmatch(key)
            name = readable(found["stem"]) if found else None
            role = (found["own"] or str(found.lastgroup)) if found else ""
            if name is None or role in layers.get(name, {}):
                unread.append(key)
            else:
                layers.setdefault(name, {})[role] = key
        yield LoraFile(path, dict(tensors.metadata() or {}), layers, unread, tensors)


def load(path: Path) -> tuple[dict[str, Change], dict[str, str]]:
    """Changes by readable name, fp32, and metadata. A missing alpha means scale 1. Raises WeightsError, also rather than leave out what
    is not understood."""
    with open_lora(path) as file:
        file.refuse_unread()
        return {name: file.change(name) for name in file.layers}, file.metadata


# ---------------------------------------------------------------- who reads what

# What programs make of each kind of tensor that a plain LoRA lacks. Measured: each program's own loader, the weight that it applied
# compared with the file's meaning.
READERS: dict[str, str] = {
    "dora_scale": "DoRA is right in ComfyUI, Forge, A1111 and InvokeAI, in SD.Next on attention only; diffusers and kohya's scripts "
    "apply it wrongly",
    "dora_scale of outputs": "DoRA on the output axis is right in SD.Next on attention only; all other programs apply it wrongly",
    "diff": "full deltas are right in ComfyUI, Forge, A1111 and InvokeAI, in SD.Next on attention only; diffusers refuses the file, and "
    "kohya's scripts ignore them",
    "diff_b": "biases are right in ComfyUI and Forge; A1111 and InvokeAI ignore them beside a LoRA and refuse them alone; diffusers "
    "refuses the file, SD.Next fails, kohya's scripts ignore them",
    "w_norm": "norms are right in ComfyUI, Forge, A1111 and InvokeAI; SD.Next applies them wrongly, diffusers refuses the file, and "
    "kohya's scripts ignore them",
}


def kinds_of(change: Change) -> set[str]:
    """Those of READERS that a change has, and "lora"."""
    is_norm = change.weight is not None and change.weight.dim() == 1
    of_outputs = change.dora_scale is not None and change.dora_scale.shape[0] > 1
    has = {
        "lora": change.factors is not None,
        "dora_scale": change.dora_scale is not None and not of_outputs,
        "dora_scale of outputs": of_outputs,
        "diff": change.weight is not None and not is_norm,
        "diff_b": change.bias is not None and not is_norm,
        "w_norm": is_norm,
    }
    return {kind for kind, it_has in has.items() if it_has}


def who_reads(changes: Iterable[Change]) -> list[str]:
    """A line for each kind of change that not every program reads rightly."""
    kinds = set().union(*map(kinds_of, changes))
    return [line for kind, line in READERS.items() if kind in kinds]


# ---------------------------------------------------------------- what a run learned


def read_alphas(path: Path) -> dict[str, float]:
    """Readable name -> the alpha that the run behind a file learned, or what the file says where it is not one of ours."""
    changes, metadata = load(path)
    alphas = {name: change.factors.alpha for name, change in changes.items() if change.factors is not None}
    return alphas | _learned(path, metadata, LEARNED_ALPHAS, changes)


def read_scales(path: Path) -> dict[str, float]:
    """Readable name -> the scale that the run behind a file learned, whatever its rank, or alpha / R where the file is not one of ours."""
    changes, metadata = load(path)
    scales = {name: factors.alpha / factors.down.shape[0] for name, change in changes.items() if (factors := change.factors) is not None}
    return scales | _learned(path, metadata, LEARNED_SCALES, changes)


def learned_alphas(path: Path, metadata: Mapping[str, str], names: Iterable[str]) -> dict[str, float]:
    """Of these layers, what the run behind a file says that it learned; none of other trainers' files. Raises WeightsError where that is
    damaged."""
    return _learned(path, metadata, LEARNED_ALPHAS, names)


def _learned(path: Path, metadata: Mapping[str, str], key: str, names: Iterable[str]) -> dict[str, float]:
    try:
        values = {readable(stem): float(value) for stem, value in json.loads(metadata.get(key, "{}")).items()}
        if not all(map(math.isfinite, values.values())):
            raise ValueError
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise WeightsError(f"{path}: its metadata {key} is damaged.") from None
    return {name: values[name] for name in names if name in values}


# ---------------------------------------------------------------- into a model


def modules_by_name(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Every module that a file may change, by readable name."""
    return {
        readable_name(part, path): module
        for part, model in parts.items()
        for path, module in model.named_modules()
        if isinstance(module, FOLDABLE)
    }


def merge(parts: Mapping[str, nn.Module], changes: Mapping[str, Change], strength: float = 1.0) -> None:
    """Apply a file's changes to the weights in place, as WebUIs do. Raises WeightsError when the model has no such layer."""
    _add(modules_by_name(parts), changes, strength)


@torch.no_grad()
def _add(modules: Mapping[str, nn.Module], changes: Mapping[str, Change], strength: float) -> None:
    for name, change in changes.items():
        module = modules.get(name)
        if module is None:
            raise WeightsError(f"The LoRA does not fit this model: it adapts {name}, which the model lacks.")
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        if not change.fits(weight.shape, bias.shape if isinstance(bias, Tensor) else None):
            raise WeightsError(f"The LoRA does not fit this model: {name} has another shape.")
        weight += (strength * change.delta(weight)).to(weight)
        if change.bias is not None and isinstance(bias, Tensor):
            bias += (strength * change.bias).to(bias)


class Merged:
    """A model that files are merged into. A `restorable` one keeps what its layers were, to be itself again to the bit, which taking the
    changes away would not give."""

    def __init__(self, parts: Mapping[str, nn.Module], *, restorable: bool) -> None:
        self.modules, self.restorable = modules_by_name(parts), restorable
        self.before: dict[str, dict[str, Tensor]] = {}

    def merge(self, changes: Mapping[str, Change], strength: float) -> None:
        for name in changes.keys() & self.modules.keys() - self.before.keys() if self.restorable else ():
            self.before[name] = {key: value.clone() for key, value in self.modules[name].state_dict().items()}
        _add(self.modules, changes, strength)

    def restore(self) -> None:
        for name, state in self.before.items():
            self.modules[name].load_state_dict(state)
