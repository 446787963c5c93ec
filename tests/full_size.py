"""The families at full size: on the meta device, without weights, for estimates; and on disk, with random ones."""

import json
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig

from sdlora.adapt import adapt
from sdlora.config import Config
from sdlora.diffusion.schedule import NoiseSchedule
from sdlora.footprint import Work
from sdlora.lora.inits import Start
from sdlora.models import families
from sdlora.models.device import DTYPES
from sdlora.models.family import Model
from sdlora.models.packed import pack
from sdlora.models.sources import CONFIGS, PADDING, PARTS, TEXT_ENCODERS
from sdlora.models.tokenizer import clip_tokenizer


def work_on_meta(family: str, config: Config, side: int, *, device: str = "cuda", reads_prompts: bool = False) -> Work:
    """What a step has to do on a device that need not be there, with pictures of `side` x `side` px."""
    own, dtype, names = CONFIGS / family, DTYPES[config.train.precision], PARTS[family]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(own / "unet")).to(dtype)
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(own / "vae"))
        encoders = [TEXT_ENCODERS[part](CLIPTextConfig.from_pretrained(own / part)).to(dtype) for part in names]
    for module in (unet, vae, *encoders):
        module.requires_grad_(False).eval()
    if config.model.base_precision != "same" or config.model.offload:
        pack(unet, config.model.base_precision, config.model.offload)
    scheduler = DDPMScheduler.from_config(DDPMScheduler.load_config(own / "scheduler"))
    model = Model(
        family=family,
        parts={"unet": unet, **dict(zip(names, encoders, strict=True))},
        vae=vae,
        tokenizers={part: clip_tokenizer(PADDING.get((family, part))) for part in names},
        noise_schedule=NoiseSchedule(scheduler.alphas_cumprod, "epsilon"),
        scheduler_config={},
        dtype=dtype,
        device=torch.device(device),
        chunks=config.data.max_tokens // 75,
    )
    model = replace(model, idle=families.FAMILIES[family].idle(model))
    with shapes_alone():
        layers = adapt(model, config).layers
    return Work(config, model, list(layers), (side, side), reads_prompts)


def shapes_alone() -> AbstractContextManager[Any]:
    """Adapters start without numbers."""

    def start(name: str, base: Any, rank: int, *rest: object, **options: object) -> Start:
        weight = base.weight.flatten(1)
        return Start(torch.empty(rank, weight.shape[1], device="meta"), torch.empty(len(weight), rank, device="meta"))

    return patch("sdlora.adapt.start_of", start)


def build(family: str, folder: Path) -> Path:
    """In bf16 but for the VAE, in diffusers' layout: 2 GB of "sd1", 7 of "sdxl"."""
    own = CONFIGS / family
    torch.set_default_dtype(torch.bfloat16)
    try:
        UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(own / "unet")).save_pretrained(folder / "unet")
        for part in PARTS[family]:
            TEXT_ENCODERS[part](CLIPTextConfig.from_pretrained(own / part)).save_pretrained(folder / part)
            clip_tokenizer(PADDING.get((family, part))).save_pretrained(folder / part.replace("text_encoder", "tokenizer"))
    finally:
        torch.set_default_dtype(torch.float32)
    AutoencoderKL.from_config(AutoencoderKL.load_config(own / "vae")).save_pretrained(folder / "vae")
    DDPMScheduler.from_config(DDPMScheduler.load_config(own / "scheduler")).save_pretrained(folder / "scheduler")
    name = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return folder
