"""Where a checkpoint keeps each parameter: single files in their original layout, and folders in diffusers'.

Original files call the UNet's blocks by one running number, and OpenCLIP's text encoders (SD 2.x, SDXL's second) keep query, key and
value of an attention in one matrix, the one below the other, and their projection transposed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sdlora.errors import WeightsError
from sdlora.lora.names import diffusers_path
from sdlora.lora.targets import readable_name
from sdlora.tensors import Header, read_header, read_tensor

UNET_PREFIX = "model.diffusion_model."
# Family -> part -> what its keys begin with. A file is of the first family of which it has every text encoder.
TEXT_ENCODER_PREFIXES = {
    "sdxl": {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
}
FAMILIES_OF_FOLDERS = {"StableDiffusionPipeline": ("sd1", "sd2"), "StableDiffusionXLPipeline": ("sdxl",)}

OPEN_CLIP = {
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}
OPEN_CLIP_ENDS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection.weight": "text_projection.weight",  # a second name, which ComfyUI too takes for one that is not transposed
}


class Place(NamedTuple):
    """Where a parameter is stored."""

    file: Path
    key: str
    third: int | None = None  # of the key's rows
    transposed: bool = False

    def of(self, stored: Tensor) -> Tensor:
        """The parameter as a view of what is stored under the key."""
        view = stored if self.third is None else stored.chunk(3)[self.third]
        return view.T if self.transposed else view


@dataclass(frozen=True)
class Checkpoint:
    path: Path  # a file, or a folder
    family: str  # sd1, sd2, sdxl
    headers: dict[Path, Header]  # of every file with weights that a LoRA can change
    places: dict[str, Place]  # by readable name of the parameter: `unet.conv_in.weight`

    def shape(self, parameter: str) -> tuple[int, ...]:
        file, key, third, transposed = self.places[parameter]
        first, *rest = self.headers[file].entries[key].shape
        shape = (first if third is None else first // 3, *rest)
        return shape[::-1] if transposed else shape

    def read(self, parameter: str) -> Tensor:
        place = self.places[parameter]
        with place.file.open("rb") as file:
            return place.of(read_tensor(file, self.headers[place.file], place.key))

    def prediction_type(self) -> str | None:
        """epsilon or v_prediction; None for a single file that does not say: one of SD 2.x may be either."""
        if self.path.is_dir():
            config = json.loads((self.path / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
            return str(config.get("prediction_type", "epsilon"))
        header = self.headers[self.path]
        if says_v(header.entries, header.metadata):
            return "v_prediction"
        return None if self.family == "sd2" else "epsilon"

    def modules(self) -> list[str]:
        """Readable names of all that has a weight."""
        return [name.removesuffix(".weight") for name in self.places if name.endswith(".weight")]


def open_checkpoint(path: Path) -> Checkpoint:
    """Read what lies where, and no weight. Raises WeightsError."""
    if path.is_dir():
        return _open_folder(path)
    if path.suffix != ".safetensors" and path.exists():
        raise WeightsError(f"{path} is no .safetensors file: convert it first, with a program that you trust to open it.")
    header = read_header(path)
    family, places = places_of(path, header.entries)
    return Checkpoint(path, family, {path: header}, places)


def places_of(path: Path, keys: Collection[str]) -> tuple[str, dict[str, Place]]:
    """The family of a single file with these keys, and where it keeps each parameter, by its readable name. Raises WeightsError."""

    def has(*prefixes: str) -> bool:
        return all(any(key.startswith(prefix) for key in keys) for prefix in prefixes)

    if any(key.endswith((".lora_down.weight", ".lora_A.weight", ".lora_up.weight")) for key in keys):
        raise WeightsError(f"{path} is a LoRA, not a checkpoint: it changes a model, and is none.")
    if not has(UNET_PREFIX):
        raise WeightsError(
            f"{path} is not a checkpoint of SD 1.x, SD 2.x or SDXL in its original layout: nothing in it begins {UNET_PREFIX}"
        )
    family = next((name for name, parts in TEXT_ENCODER_PREFIXES.items() if has(*parts.values())), None)
    if family is None and has("conditioner.embedders.0.model."):
        raise WeightsError(f"{path} is SDXL's refiner, which LoRAs are not trained for: give the base model.")
    if family is None:
        raise WeightsError(f"{path} lacks a text encoder of SD 1.x, SD 2.x or SDXL: give a whole checkpoint, not the UNet alone.")
    places = {}
    for key in keys:
        if key.startswith(UNET_PREFIX):
            module, _, end = key.removeprefix(UNET_PREFIX).rpartition(".")
            places[f"unet.{diffusers_path(module)}.{end}"] = Place(path, key)
        for part, prefix in TEXT_ENCODER_PREFIXES[family].items():
            if key.startswith(prefix):
                inner = key.removeprefix(prefix)
                found = open_clip_places(path, key, inner) if prefix.endswith("model.") else [(inner, Place(path, key))]
                places |= {readable_name(part, name): place for name, place in found}
    return family, places


def says_v(keys: Collection[str], metadata: Mapping[str, str]) -> bool:
    """Whether a single file says that its model predicts v: by the mark that trainers leave among the tensors, or in its modelspec."""
    return "v_pred" in keys or metadata.get("modelspec.prediction_type") == "v"


def open_clip_places(file: Path, key: str, path: str) -> Iterator[tuple[str, Place]]:
    """What OpenCLIP keeps under a key, by transformers' paths."""
    if path in OPEN_CLIP_ENDS:
        yield OPEN_CLIP_ENDS[path], Place(file, key)
    elif path == "text_projection":
        yield "text_projection.weight", Place(file, key, transposed=True)
    elif found := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", path):
        number, inner, end = found.groups()
        layer = f"text_model.encoder.layers.{number}"
        if inner == "attn.in_proj":
            yield from ((f"{layer}.self_attn.{of}_proj.{end}", Place(file, key, third)) for third, of in enumerate("qkv"))
        elif inner in OPEN_CLIP:
            yield f"{layer}.{OPEN_CLIP[inner]}.{end}", Place(file, key)


def _open_folder(folder: Path) -> Checkpoint:
    try:
        name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        families = FAMILIES_OF_FOLDERS[name]
        activation = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))["hidden_act"]
    except (OSError, ValueError, KeyError):
        raise WeightsError(f"{folder} is not a folder of SD 1.x, SD 2.x or SDXL in diffusers' layout.") from None
    # the two generations differ in their text encoder: OpenAI's CLIP has an activation of its own
    family = families[-1] if activation == "gelu" else families[0]
    headers, places = {}, {}
    for part in ("unet", *TEXT_ENCODER_PREFIXES[family]):
        for file in weight_files(folder / part):
            headers[file] = read_header(file)
            for key in headers[file].entries:
                places[readable_name(part, key)] = Place(file, key)
    return Checkpoint(folder, family, headers, places)


def weight_files(folder: Path) -> list[Path]:
    """Of a part in diffusers' layout: one file, or the pieces that an index names. Raises WeightsError."""
    stem = "diffusion_pytorch_model" if folder.name == "unet" else "model"
    for variant in ("", ".fp16"):
        whole, index = folder / f"{stem}{variant}.safetensors", folder / f"{stem}.safetensors.index{variant}.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
    raise WeightsError(f"{folder} has no weights as .safetensors; convert them first, with a program that you trust to open them.")
