"""How much each sample's error counts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: Literal["epsilon", "v_prediction"]) -> Tensor:
    """Min-SNR-gamma (Hang et al. 2023): min(snr, gamma) / snr for epsilon, / (snr + 1) for v. (B,) -> (B,); gamma 0: all ones."""
    if gamma == 0:
        return torch.ones_like(snr)
    return snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1)


def sample_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, in fp32: (B, C, h, w) -> (B,)."""
    return (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))


def denoising_loss(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean over the batch of each sample's weighted mean squared error, in fp32."""
    return (weight * sample_errors(predicted, target)).mean()
