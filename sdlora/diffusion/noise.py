"""Noise for a sample's latents: plain, shifted by channel, or with coarse detail added."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_noise(shape: torch.Size, generator: torch.Generator, *, offset: float = 0.0, multires_discount: float = 0.0) -> Tensor:
    """Noise (C, h, w) for one sample.

    offset: offset noise (N. Guttenberg, "Diffusion with Offset Noise", 2023), which also shifts whole channels.
    multires_discount: multi-resolution noise (J. Whitaker 2023), see `multires_noise`; 0 for none.
    """
    noise = torch.randn(shape, generator=generator)
    if multires_discount:
        noise = multires_noise(noise, multires_discount, generator)
    if offset:
        noise = noise + offset * torch.randn((shape[0], 1, 1), generator=generator)
    return noise


def multires_noise(noise: Tensor, discount: float, generator: torch.Generator) -> Tensor:
    """Add noise of half the size, enlarged, times discount; of a quarter the size times discount squared; ... down to one px a side,
    and scale the sum back to unit variance. (C, h, w) -> (C, h, w)."""
    channels, height, width = noise.shape
    total, level = noise, 1
    while min(height, width) >> level >= 1:
        coarse = torch.randn((1, channels, height >> level, width >> level), generator=generator)
        total = total + discount**level * F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)[0]
        level += 1
    return total / total.std()


def perturb(noise: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Input perturbation (Ning et al. 2023): what the model sees is a little noisier than what it must predict. (C, h, w)."""
    return noise + strength * torch.randn(noise.shape, generator=generator)
