"""The noise schedule: how much signal is left at each timestep, and what the model is asked to predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class NoiseSchedule:
    alphas_cumprod: Tensor  # (1000,) share of the signal's variance
    prediction_type: PredictionType

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio, alpha_bar / (1 - alpha_bar): (B,) -> (B,)."""
        a = self.alphas_cumprod[timesteps]
        return a / (1 - a)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """q(x_t | x_0), DDPM eq. 4: (B, C, h, w)."""
        signal, rest = self._shares(timesteps)
        return signal * latents + rest * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should output: the noise, or v = sqrt(a) noise - sqrt(1 - a) x_0 (Salimans & Ho 2022)."""
        if self.prediction_type == "epsilon":
            return noise
        signal, rest = self._shares(timesteps)
        return signal * noise - rest * latents

    def _shares(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        a = self.alphas_cumprod[timesteps][:, None, None, None]
        return a.sqrt(), (1 - a).sqrt()

    def with_zero_terminal_snr(self) -> NoiseSchedule:
        """Shift and scale sqrt(alphas_cumprod) so that the last timestep is pure noise and the first stays as it is (Lin et al. 2023,
        algorithm 1). For v-prediction: there epsilon would be asked of an input that tells nothing of the picture."""
        roots = self.alphas_cumprod.double().sqrt()
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        return NoiseSchedule(roots.square().to(self.alphas_cumprod), self.prediction_type)

    def to(self, device: torch.device) -> NoiseSchedule:
        return NoiseSchedule(self.alphas_cumprod.to(device), self.prediction_type)
