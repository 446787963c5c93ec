"""Pictures to latents and back, the same in every family."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from sdlora.models.family import Model


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
