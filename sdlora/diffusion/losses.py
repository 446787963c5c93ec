"""How much each sample's error counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: Literal["epsilon", "v_prediction"]) -> Tensor:
    """Min-SNR-gamma (Hang et al. 2023): min(snr, gamma) / snr for epsilon, / (snr + 1) for v. (B,) -> (B,); gamma 0: all ones."""
    if gamma == 0:
        return torch.ones_like(snr)
    return snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1)


def debiased_weight(snr: Tensor, gamma: float, prediction_type: Literal["epsilon", "v_prediction"]) -> Tensor:
    """Debiased estimation (Yu et al. 2024): 1 / sqrt(snr) for epsilon, 1 / (snr + 1) for v; snr is capped at 1000 as in kohya's trainer."""
    snr = snr.clamp(max=1000)
    return snr.rsqrt() if prediction_type == "epsilon" else 1 / (snr + 1)


# (snr (B,), min-SNR's gamma, prediction type) -> (B,)
WEIGHTINGS: dict[str, Callable[[Tensor, float, Literal["epsilon", "v_prediction"]], Tensor]] = {
    "none": lambda snr, gamma, prediction_type: torch.ones_like(snr),
    "min_snr": min_snr_weight,
    "debiased": debiased_weight,
}


def huber_width(snr: Tensor, narrowest: float, schedule: Literal["constant", "snr"]) -> Tensor:
    """Where the Huber loss turns from squared to straight: (B,) -> (B,).

    'snr' (kohya's trainer): (1 - narrowest) / (1 + 1 / sqrt(snr))^2 + narrowest, so that it is close to squared where little noise
    is left, and robust where the picture must be guessed.
    """
    if schedule == "constant":
        return torch.full_like(snr, narrowest)
    return (1 - narrowest) / (1 + snr.rsqrt()).square() + narrowest


def sample_errors(predicted: Tensor, target: Tensor, width: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Error of each sample, in fp32: (B, C, h, w) -> (B,). Mean squared; with `width` c (B,) the pseudo-Huber loss
    2 c (sqrt(e^2 + c^2) - c), which is e^2 for small e. `mask` (B, 1, h, w) weights latent pixels; the mean is over all of them, as in
    kohya's trainer, so that a small subject counts less and not each of its pixels more."""
    error = predicted.float() - target.float()
    if width is None:
        errors = error.square()
    else:
        c = width[:, None, None, None]
        errors = 2 * c * ((error.square() + c.square()).sqrt() - c)
    return (errors if mask is None else errors * mask).mean(dim=(1, 2, 3))


def denoising_loss(predicted: Tensor, target: Tensor, weight: Tensor, width: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Mean over the batch of each sample's weighted error."""
    return (weight * sample_errors(predicted, target, width, mask)).mean()
