"""What a LoRA file holds and who reads it rightly, looked at one layer at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdlora.errors import WeightsError
from sdlora.lora.change import Change
from sdlora.lora.formats import READERS, LoraFile, kinds_of, open_lora
from sdlora.lora.names import WEBUI


@dataclass(frozen=True)
class LayerReport:
    """One layer's change. `norm`: Frobenius norm of what is added to its weight; of DoRA, of what the matrices add before the weight's
    channels are given their size, which only a base model could tell."""

    name: str  # readable
    kinds: tuple[str, ...]  # "lora", or those of formats.READERS
    encoding: str  # "lora", "tucker", "loha", "lokr", "diff": how it is stored
    rank: int | None
    alpha: float | None
    scale: float | None  # alpha / rank
    norm: float


@dataclass(frozen=True)
class Report:
    path: Path
    size: int  # bytes
    family: str | None  # which it is for, as far as it shows
    naming: str  # "webui", "diffusers", or "other" for names that the family's WebUI files do not have
    precision: str
    layers: tuple[LayerReport, ...]
    unread: tuple[str, ...]  # keys that are not understood
    metadata: dict[str, str]  # all of it
    about: dict[str, str]  # what people ask of it, by ABOUT's names
    tags: tuple[tuple[str, int], ...]  # of the training captions, the most frequent first
    readers: tuple[str, ...]  # in sentences: which programs do not read it rightly

    @property
    def ranks(self) -> Counter[int]:
        return Counter(layer.rank for layer in self.layers if layer.rank is not None)

    @property
    def alphas(self) -> Counter[float]:
        return Counter(layer.alpha for layer in self.layers if layer.alpha is not None)

    @property
    def kinds(self) -> Counter[str]:
        return Counter(kind for layer in self.layers for kind in layer.kinds)


# What people ask of a file -> the metadata that may say it, the best first.
ABOUT: dict[str, tuple[str, ...]] = {
    "title": ("modelspec.title", "ss_output_name"),
    "author": ("modelspec.author",),
    "licence": ("modelspec.license",),
    "date": ("modelspec.date",),
    "trigger": ("modelspec.trigger_phrase",),
    "base model": ("ss_sd_model_name",),
    "base model's kind": ("modelspec.architecture", "ss_base_model_version"),
    "base model's hash": ("ss_new_sd_model_hash", "ss_sd_model_hash"),
    "prediction": ("modelspec.prediction_type",),
    "resolution": ("modelspec.resolution", "ss_resolution"),
    "pictures": ("ss_num_train_images",),
    "folders": ("ss_dataset_dirs",),
    "steps": ("ss_steps",),
    "epochs": ("ss_num_epochs", "ss_epoch"),
    "rate": ("ss_learning_rate", "ss_unet_lr"),
    "optimizer": ("ss_optimizer",),
    "clip skip": ("ss_clip_skip",),
}


def inspect(path: Path) -> Report:
    """Raises WeightsError for what is not a .safetensors file, or holds nothing of a LoRA."""
    with open_lora(path) as file:
        if not file.layers:
            file.refuse_unread()
        layers, unread, kinds = [], list(file.unread), set()
        for name in file.layers:
            try:
                change = file.change(name)
            except WeightsError:
                unread += file.layers[name].values()
                continue
            layers.append(_layer(name, change, encoding_of(file.layers[name])))
            kinds |= kinds_of(change)
        naming = _naming(file)
        return Report(
            path=path,
            size=path.stat().st_size,
            family=file.family,
            naming=naming,
            precision=file.precision,
            layers=tuple(layers),
            unread=tuple(unread),
            metadata=file.metadata,
            about={
                what: found
                for what, keys in ABOUT.items()
                if (found := next((said for k in keys if (said := file.metadata.get(k, "None")) not in ("", "None")), ""))  # kohya's "off"
            },
            tags=tags_of(file.metadata),
            readers=tuple(readers(file.family, naming, kinds, layers)),
        )


def _layer(name: str, change: Change, encoding: str) -> LayerReport:
    factors = change.factors
    norm = factors.norm() if factors is not None else float(change.weight.norm()) if change.weight is not None else 0.0
    rank = None if factors is None else len(factors.down)
    alpha = None if factors is None else factors.alpha
    scale = None if factors is None else factors.alpha / len(factors.down)
    return LayerReport(name, tuple(sorted(kinds_of(change))), encoding, rank, alpha, scale, norm)


def encoding_of(roles: Iterable[str]) -> str:
    """How a layer is stored, from what its tensors are."""
    starts = {"lora_mid": "tucker", "hada": "loha", "lokr": "lokr", "down": "lora"}
    return next((encoding for start, encoding in starts.items() if any(role.startswith(start) for role in roles)), "diff")


def _naming(file: LoraFile) -> str:
    stem = WEBUI[file.family or "sd1"]
    if all(file.stem(name) == stem(name) for name in file.layers):
        return "webui"
    return "diffusers" if all(file.stem(name) == name for name in file.layers) else "other"


def tags_of(metadata: Mapping[str, str]) -> tuple[tuple[str, int], ...]:
    """Of the training captions, with their counts over all folders, the most frequent first; nothing where others wrote what is no table
    of counts."""
    total: Counter[str] = Counter()
    try:
        for of_folder in json.loads(metadata.get("ss_tag_frequency", "{}")).values():
            total.update({str(tag): int(count) for tag, count in of_folder.items()})
    except (ValueError, TypeError, AttributeError):
        return ()
    return tuple(total.most_common())


ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def readers(family: str | None, naming: str, kinds: Collection[str], layers: Collection[LayerReport]) -> list[str]:
    """Sentences on the programs that do not read it rightly, as measured (formats.READERS), or by their source where that is said."""
    names, encodings = {layer.name for layer in layers}, {layer.encoding for layer in layers}
    lines = [line for kind, line in READERS.items() if kind in kinds and not (kind == "diff" and "diff" not in encodings)]
    if naming == "diffusers":
        lines.append("diffusers' own names are for diffusers and ComfyUI; convert it for the other programs")
    if naming == "other":
        lines.append(
            "layers are not named as in this family's WebUI files: ComfyUI, Forge, SD.Next and kohya's scripts find them, A1111 most of "
            "them, InvokeAI ignores them, and diffusers refuses the file; convert it"
        )
    if "tucker" in encodings:
        lines.append("Tucker's form (lora_mid) is right in ComfyUI, Forge, A1111, SD.Next and InvokeAI; diffusers refuses the file")
    if encodings & {"loha", "lokr"}:
        lines.append("LoHa and LoKr are read by ComfyUI, Forge, A1111, SD.Next and InvokeAI, and by no others (by their sources)")
    if any(name.startswith(("unet.conv_in", "unet.conv_out", "unet.time_embedding")) for name in names):
        lines.append("kohya's scripts ignore the first and last convolutions and the time embedding")
    open_clip = {"sd2": "text_encoder.", "sdxl": "text_encoder_2."}.get(family or "", "none")
    attentions = {name.rpartition(".")[0] for name in names if name.startswith(open_clip) and name.endswith(ATTENTION)}
    incomplete = [attention for attention in attentions if not {f"{attention}.{of}" for of in ATTENTION} <= names]
    if incomplete:
        lines.append(f"A1111 drops {len(incomplete)} attentions of the OpenCLIP text encoder, which lack one of q, k, v and out")
    return lines
