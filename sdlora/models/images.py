"""Pictures to latents and back, the same in every family."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdlora.models.family import Model


def tile(vae: Any, side: int) -> None:
    """From now on take pictures that are larger than `side` px in overlapping tiles, and one picture at a time."""
    vae.enable_tiling()
    vae.enable_slicing()
    vae.tile_sample_min_size = side
    vae.tile_latent_min_size = side // 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_images(model: Model, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W) in -1..1 -> mean and deviation of the latents' posterior (B, C, h, w), scaled to unit variance."""
    posterior = model.vae.encode(pixels.to(model.device)).latent_dist
    scale = model.vae.config.scaling_factor
    return posterior.mean * scale, posterior.std * scale


@torch.no_grad()
def decode_latents(model: Model, latents: Tensor) -> list[Image.Image]:
    """Latents (B, C, h, w) of unit variance -> RGB pictures."""
    decoded = model.vae.decode(latents.float() / model.vae.config.scaling_factor).sample
    pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu()
    return [Image.fromarray(picture.numpy()) for picture in pixels]
