"""One adapted layer: a frozen Linear or Conv2d, and the low-rank update that is trained beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlora.lora.inits import INITS
from sdlora.lora.scaling import SCALINGS


class Factors(NamedTuple):
    """The update as WebUI files write it: delta = alpha / R * up.flatten(1) @ down.flatten(1), with R = down.shape[0]."""

    down: Tensor  # (R, I) or (R, I, kh, kw)
    up: Tensor  # (O, R) or (O, R, 1, 1)
    alpha: float


class LoraLayer(nn.Module):
    """Stands in for `base`: base(x) + scale * up(down(x)).  Hu et al. 2021, with alpha a parameter; scale = alpha / rank, or as
    `scaling` says.

    `initial` holds what is taken off again for inits that do not start from zero: (down, scaled up) at the start.
    """

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d,
        rank: int,
        alpha: float,
        init: str,
        learned_alpha: bool,
        generator: torch.Generator,
        scaling: str = "standard",
    ):
        super().__init__()
        if isinstance(base, nn.Conv2d) and base.groups != 1:
            raise NotImplementedError("no Stable Diffusion layer that LoRAs adapt is a grouped convolution")
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.scale_of_one = SCALINGS[scaling](rank)
        self.enabled = True
        start = INITS[init](base.weight.detach().float().cpu().flatten(1), rank, alpha * self.scale_of_one, generator)
        down, up = start.down.view(rank, *base.weight.shape[1:]), start.up
        if base.weight.dim() == 4:
            up = up[:, :, None, None]
        device = base.weight.device
        self.down = nn.Parameter(down.to(device), requires_grad=start.train_down)
        self.up = nn.Parameter(up.contiguous().to(device))
        self.alpha = nn.Parameter(torch.tensor(float(alpha), device=device), requires_grad=learned_alpha)
        self.initial_down: Tensor | None
        self.initial_up: Tensor | None
        self.register_buffer("initial_down", self.down.detach().clone() if start.subtract else None)
        self.register_buffer("initial_up", (self.up.detach() * (alpha * self.scale_of_one)).clone() if start.subtract else None)

    @property
    def scale(self) -> Tensor:
        return self.alpha * self.scale_of_one

    @property
    def trained_numbers(self) -> int:
        """How many numbers of this layer are learned."""
        return sum(p.numel() for p in (self.down, self.up, self.alpha) if p.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) or (B, I, H, W); the base's dtype and the autocast dtype rule the arithmetic."""
        result: Tensor = self.base(x)
        if not self.enabled:
            return result
        down: Tensor = self.down
        up: Tensor = self.up * self.scale
        if self.initial_down is not None and self.initial_up is not None:
            # One product of twice the rank: start and subtracted start then cancel before they are rounded.
            down, up = torch.cat([down, self.initial_down]), torch.cat([up, -self.initial_up], dim=1)
        if isinstance(self.base, nn.Conv2d):
            hidden = F.conv2d(x, down.to(x.dtype), stride=self.base.stride, padding=self.base.padding, dilation=self.base.dilation)
            return result + F.conv2d(hidden, up.to(hidden.dtype))
        hidden = F.linear(x, down.to(x.dtype))
        return result + F.linear(hidden, up.to(hidden.dtype))

    @torch.no_grad()
    def factors(self) -> Factors:
        """The update as plain matrices, exact for every init, fp32 on the CPU."""
        down: Tensor = self.down
        up: Tensor = self.up
        alpha = self.alpha.item() * self.scale_of_one * self.rank  # in the files' own convention, scale = alpha / R
        if self.initial_down is not None and self.initial_up is not None:
            up = torch.cat([up * self.scale, -self.initial_up], dim=1)
            down = torch.cat([down, self.initial_down])
            alpha = float(down.shape[0])
        return Factors(down.float().cpu().contiguous(), up.float().cpu().contiguous(), alpha)

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint needs; `load_state` takes it back."""
        tensors = {"down": self.down.detach(), "up": self.up.detach(), "alpha": self.alpha.detach()}
        if self.initial_down is not None and self.initial_up is not None:
            tensors |= {"initial_down": self.initial_down, "initial_up": self.initial_up}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        own = self.state()
        if own.keys() != tensors.keys():
            raise KeyError(f"expected {sorted(own)}, found {sorted(tensors)}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


@contextmanager
def disabled(layers: Iterable[LoraLayer]) -> Iterator[None]:
    """The base model as it was: exactly, since adapters never change its weights."""
    layers = list(layers)
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
