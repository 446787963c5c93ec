"""Where a checkpoint keeps each parameter: single files in their original layout, and folders in diffusers'.

Original files call the UNet's blocks by one running number, and OpenCLIP's text encoders (SD 2.x, SDXL's second) keep query, key and
value of an attention in one matrix, the one below the other, and their projection transposed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sdlora.errors import WeightsError
from sdlora.lora.targets import readable_name
from sdlora.tensorfile import Header, read_header, read_tensor

UNET_PREFIX = "model.diffusion_model."
# Family -> part -> what its keys begin with. A file is of the first family of which it has every text encoder.
TEXT_ENCODER_PREFIXES = {
    "sdxl": {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
}
FAMILIES_OF_FOLDERS = {"StableDiffusionPipeline": ("sd1", "sd2"), "StableDiffusionXLPipeline": ("sdxl",)}

UNET_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
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
    family = next((name for name, parts in TEXT_ENCODER_PREFIXES.items() if all(_has(header, p) for p in parts.values())), None)
    if family is None or not _has(header, UNET_PREFIX):
        raise WeightsError(f"{path} is not a checkpoint of SD 1.x, SD 2.x or SDXL with its UNet and text encoders.")
    places = {}
    for key in header.entries:
        if key.startswith(UNET_PREFIX) and (own := diffusers_path(key.removeprefix(UNET_PREFIX))) is not None:
            places[f"unet.{own}"] = Place(path, key)
        for part, prefix in TEXT_ENCODER_PREFIXES[family].items():
            if key.startswith(prefix):
                inner = key.removeprefix(prefix)
                found = open_clip_places(path, key, inner) if prefix.endswith("model.") else [(inner, Place(path, key))]
                places |= {readable_name(part, name): place for name, place in found}
    return Checkpoint(path, family, {path: header}, places)


def _has(header: Header, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in header.entries)


def diffusers_path(path: str) -> str | None:
    """A parameter's path in an original UNet -> its path in diffusers'; None for what is no part of the network.

    `input_blocks.4.1.proj_in.weight` -> `down_blocks.1.attentions.0.proj_in.weight`. Levels have three running numbers each: on the way
    down two blocks and what makes the picture smaller, on the way up three blocks, the last also making it larger.
    """
    module, _, end = path.rpartition(".")
    if module in UNET_ENDS:
        return f"{UNET_ENDS[module]}.{end}"
    if found := re.fullmatch(r"middle_block\.([012])\.(.+)", module):
        number, inner = int(found[1]), found[2]
        return f"mid_block.attentions.0.{inner}.{end}" if number == 1 else f"mid_block.resnets.{number // 2}.{RESNET[inner]}.{end}"
    if not (found := re.fullmatch(r"(input|output)_blocks\.(\d+)\.\d\.(.+)", module)):
        return None
    down, inner = found[1] == "input", found[3]
    level, number = divmod(int(found[2]) - down, 3)
    block = f"{'down' if down else 'up'}_blocks.{level}"
    if inner in ("op", "conv"):
        return f"{block}.{'downsamplers' if down else 'upsamplers'}.0.conv.{end}"
    return f"{block}.resnets.{number}.{RESNET[inner]}.{end}" if inner in RESNET else f"{block}.attentions.{number}.{inner}.{end}"


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
        else:
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
