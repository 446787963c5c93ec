"""Load a base model, whichever family it is of."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from dataclasses import replace

import torch

from sdlora.data.cache import TensorCache
from sdlora.diffusion.schedule import NoiseSchedule
from sdlora.errors import ConfigError
from sdlora.models import convolutions, images, memory, packed, sources
from sdlora.models.attention import attend_with_products
from sdlora.models.device import is_away
from sdlora.models.digests import networks
from sdlora.models.family import Family, Model
from sdlora.models.sd import SD1, SD2
from sdlora.models.sdxl import SDXL

FAMILIES: dict[str, Family] = {family.name: family for family in (SD1, SD2, SDXL)}


def require_xformers(device: torch.device) -> None:
    """Raises ConfigError where it cannot run."""
    if device.type != "cuda":
        raise ConfigError(f"model.attention = 'xformers' runs on CUDA alone, and this is {device.type}: set it to 'sdpa'.")
    if importlib.util.find_spec("xformers") is None:
        raise ConfigError("model.attention = 'xformers' needs xformers: pip install 'sdlora[xformers]', or set it to 'sdpa'.")


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
    base_precision: str = "same",
    offload: bool = False,
    vae_tile: int | None = None,
    attention: str = "sdpa",
    digests: TensorCache | None = None,
    resting: Collection[str] = (),
) -> tuple[Family, Model]:
    """`base`, `vae`: see sources.load. Prompts are encoded up to the `clip_skip`-th last layer, in so many chunks. Text encoders and UNet
    in `dtype`, or as `base_precision` and `offload` say (see packed.pack), the VAE in fp32: SD 1.x's overflows in fp16 and loses tones in
    bf16. `vae_tile`: side in px of its tiles. `digests`: where those of weights are kept; `resting` parts ("vae", "text_encoder" ...) whose
    weights it knows are not read before device.on_device() asks for them. Raises WeightsError, and ConfigError for what cannot be had
    here."""
    if attention == "xformers":
        require_xformers(device)
    program_bytes = memory.process_bytes()
    found = sources.load(base, dtype, vae=vae, prediction_type=prediction_type)
    family = FAMILIES[found.family]
    parts, known = networks(found.parts, digests, resting)
    vae_network = parts.pop("vae")
    modules = (*parts.values(), found.unet, vae_network)
    for module in modules:
        module.requires_grad_(False).eval()
    if base_precision != "same" or offload:
        packed.pack(found.unet, base_precision, offload)
    if device.type == "cpu":
        convolutions.as_products(found.unet)
        attend_with_products(found.unet)
    if vae_tile is not None:
        images.tile(vae_network, vae_tile)
    if attention == "xformers":
        found.unet.enable_xformers_memory_efficient_attention()
    there = [module for module in modules if not is_away(module)]
    for module in there:
        module.to(device)
    schedule = NoiseSchedule(found.scheduler.alphas_cumprod.to(device), found.scheduler.config.prediction_type)
    config = {**found.scheduler.config, "clip_sample": False}  # a pixel-space habit that pipelines warn of
    model = Model(
        family=family.name,
        parts={"unet": found.unet, **parts},
        vae=vae_network,
        tokenizers=dict(zip(parts, found.tokenizers, strict=True)),
        noise_schedule=schedule,
        scheduler_config=config,
        dtype=dtype,
        device=device,
        program_bytes=max(program_bytes, memory.process_bytes() - memory.weight_bytes(*there)),
        notes=found.notes,
        clip_skip=clip_skip,
        chunks=chunks,
        prompt_weights=prompt_weights,
        loaders={name: part.load for name, part in found.parts.items()},
        digests=known,
    )
    return family, replace(model, idle=family.idle(model))
