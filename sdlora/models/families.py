"""Load a base model, whichever family it is of."""

from __future__ import annotations

from dataclasses import replace

import torch

from sdlora.diffusion.schedule import NoiseSchedule
from sdlora.models import memory, sources
from sdlora.models.family import Family, Model
from sdlora.models.sd import SD1, SD2
from sdlora.models.sdxl import SDXL

FAMILIES: dict[str, Family] = {family.name: family for family in (SD1, SD2, SDXL)}


def load(
    base: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    clip_skip: int = 1,
    chunks: int = 1,
    prompt_weights: bool = False,
    vae: str | None = None,
    prediction_type: str | None = None,
) -> tuple[Family, Model]:
    """`base`, `vae`: see sources.load. Prompts are encoded up to the `clip_skip`-th last layer, in so many chunks. Text encoders and UNet
    in `dtype`, the VAE in fp32: SD 1.x's overflows in fp16 and loses tones in bf16. Raises WeightsError."""
    program_bytes = memory.process_bytes()
    found = sources.load(base, dtype, vae=vae, prediction_type=prediction_type)
    family = FAMILIES[found.family]
    for module in (*found.text_encoders, found.unet, found.vae):
        module.requires_grad_(False).eval().to(device)
    names = sources.PARTS[found.family]
    schedule = NoiseSchedule(found.scheduler.alphas_cumprod.to(device), found.scheduler.config.prediction_type)
    config = {**found.scheduler.config, "clip_sample": False}  # a pixel-space habit that pipelines warn of
    model = Model(
        family=family.name,
        parts={"unet": found.unet, **dict(zip(names, found.text_encoders, strict=True))},
        vae=found.vae,
        tokenizers=dict(zip(names, found.tokenizers, strict=True)),
        noise_schedule=schedule,
        scheduler_config=config,
        dtype=dtype,
        device=device,
        program_bytes=program_bytes,
        notes=found.notes,
        clip_skip=clip_skip,
        chunks=chunks,
        prompt_weights=prompt_weights,
    )
    return family, replace(model, idle=family.idle(model))
