"""Find the family of a base model, and load it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

import sdlora.mini
from sdlora.errors import WeightsError
from sdlora.models.family import Family, Model
from sdlora.models.sd import SD

# By the pipeline class that a folder's model_index.json names.
FAMILIES: dict[str, Family] = {"StableDiffusionPipeline": SD}


def load(base: str, dtype: torch.dtype, device: torch.device, *, clip_skip: int = 1, chunks: int = 1) -> tuple[Family, Model]:
    """`base`: a folder, or "mini". Prompts are encoded up to the `clip_skip`-th last layer, in so many chunks. Raises WeightsError."""
    folder = sdlora.mini.WEIGHTS_DIR if base == "mini" else Path(base)
    if not folder.exists():
        raise WeightsError(f"model.base: there is no folder {folder}; give a model folder in diffusers' layout, or 'mini'.")
    index = folder / "model_index.json"
    if not index.is_file():
        raise WeightsError(f"model.base: {folder} is not a model folder in diffusers' layout: it has no model_index.json.")
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError):
        raise WeightsError(f"model.base: {index} does not say which pipeline the model is for; it is damaged.") from None
    if name not in FAMILIES:
        raise WeightsError(f"model.base: {folder} is for {name}; sdlora trains {', '.join(FAMILIES)}.")
    family = FAMILIES[name]
    return family, replace(family.load(folder, dtype, device, clip_skip), chunks=chunks)
