"""The components of a base model, from a folder in diffusers' layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import sdlora.mini
from sdlora.errors import WeightsError

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@dataclass(frozen=True)
class Components:
    family: str  # "sd1", "sd2", "sdxl"
    unet: Any
    vae: Any  # in fp32
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    scheduler: Any
    notes: tuple[str, ...] = ()  # what was assumed
    zero_terminal_snr: bool = False


def load(base: str, dtype: torch.dtype, *, vae: str | None = None, prediction_type: str | None = None) -> Components:
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
    if name not in PIPELINES:
        raise WeightsError(f"model.base: {folder} is for {name}; sdlora trains {', '.join(PIPELINES)}.")
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise WeightsError(f"model.base: {folder} is not a Stable Diffusion folder in diffusers' layout: it has no {', '.join(missing)}.")
    is_xl = name == PIPELINES[1]
    try:
        tokenizers = [CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)]
        encoders = [CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True, dtype=dtype)]
        if is_xl:
            tokenizers.append(CLIPTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True))
            second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", local_files_only=True, dtype=dtype)
            encoders.append(second)
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True, torch_dtype=dtype)
        own_vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True, torch_dtype=torch.float32)
        scheduler = DDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(f"model.base: cannot load {folder}: {reason}") from error
    if unet.config.in_channels != 4:
        raise WeightsError(
            f"model.base: {folder} is an inpainting or other special UNet ({unet.config.in_channels} input channels, not 4)."
        )
    family = "sdxl" if is_xl else "sd2" if unet.config.cross_attention_dim == 1024 else "sd1"
    return Components(family, unet, own_vae, tuple(encoders), tuple(tokenizers), scheduler)
