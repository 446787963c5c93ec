"""Adapted layers: a frozen module, and what is trained beside it.

Every kind applies its update beside the base weight and never in it: so the base model is there at any time, exactly, and an update
too small for the base weight's bf16 is not rounded away.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlora.lora.change import Change, Factors, input_norms, product_norm
from sdlora.lora.inits import Start


class Dropouts(NamedTuple):
    """Shares, 0..1. Each is drawn anew for a batch, and what stays is scaled up so that the mean is kept."""

    input: float = 0.0  # of the numbers that down reads (Hu et al. 2021)
    rank: float = 0.0  # of a sample's hidden ranks (kohya's rank_dropout)
    module: float = 0.0  # chance that the layer's update is left out altogether (kohya's module_dropout), without scaling up


class Adapter(nn.Module):
    """Stands in for `base`; while `enabled` is off it is `base`. Kinds derive from it."""

    rank: int | None = None  # of the update; None where every number of the weight is trained

    def __init__(self, base: nn.Module, train_bias: bool = False):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.enabled = True
        self.drop_seed: int | None = None  # set while a batch is trained with dropout, see `set_drop_seeds`
        bias = base.bias if train_bias else None
        self.bias_delta = nn.Parameter(torch.zeros_like(bias, dtype=torch.float32)) if isinstance(bias, Tensor) else None

    @property
    def weight_shape(self) -> torch.Size:
        """Of the base weight: (O, I), (O, I, kh, kw), or (C,) of a norm."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """x as the base takes it; the base's dtype and the autocast dtype rule the arithmetic."""
        if not self.enabled:
            return self.base(x)  # type: ignore[no-any-return]
        result = self.adapted(x)
        if self.bias_delta is not None:
            bias = self.bias_delta.to(result.dtype)
            result = result + (bias[:, None, None] if isinstance(self.base, nn.Conv2d) else bias)
        return result

    @abstractmethod
    def adapted(self, x: Tensor) -> Tensor:
        """The base's output with the update, without the change of the bias."""

    @abstractmethod
    def change(self) -> Change:
        """The update as files hold it: exact, fp32 on the CPU."""

    def trained(self) -> dict[str, nn.Parameter]:
        """What is learned, by its role: down, up, alpha, magnitude, delta, square, weight_delta, bias_delta."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad and not name.startswith("base.")}

    @property
    def trained_numbers(self) -> int:
        """How many numbers of this layer are learned."""
        return sum(p.numel() for p in self.trained().values())

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint needs; `load_state` takes it back."""
        own = [*self.named_parameters(), *self.named_buffers()]
        return {name: tensor.detach() for name, tensor in own if not name.startswith("base.")}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        own = self.state()
        if own.keys() != tensors.keys():
            raise KeyError(f"expected {sorted(own)}, found {sorted(tensors)}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def through(self, x: Tensor, weight: Tensor) -> Tensor:
        """x through another weight of the base's shape, without bias."""
        weight = weight.to(x.dtype)
        if isinstance(self.base, nn.Conv2d):
            if is_pointwise(self.base):
                return pointwise(x, weight)
            return F.conv2d(x, weight, stride=self.base.stride, padding=self.base.padding, dilation=self.base.dilation)
        return F.linear(x, weight)

    def bias_change(self) -> Tensor | None:
        return None if self.bias_delta is None else self.bias_delta.detach().float().cpu().clone()


class LoraLayer(Adapter):
    """base(x) + scale * up(down(x)).  Hu et al. 2021, with alpha a parameter; scale = alpha * scale_of_one.

    `initial_down`, `initial_up` hold what is taken off again for inits that do not start from zero: (down, scaled up) at the start.
    `folded` is what earlier rounds have learned, where training merges from time to time (ReLoRA, Lialin et al. 2023).
    """

    base: nn.Linear | nn.Conv2d
    rank: int

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d,
        start: Start,
        alpha: float,
        scale_of_one: float,
        *,
        learned_alpha: bool,
        dropouts: Dropouts = Dropouts(),  # noqa: B008 - a constant
        train_bias: bool = False,
        folds: bool = False,
    ):
        super().__init__(base, train_bias)
        if isinstance(base, nn.Conv2d) and base.groups != 1:
            raise NotImplementedError("no Stable Diffusion layer that LoRAs adapt is a grouped convolution")
        self.rank = start.down.shape[0]
        self.scale_of_one = scale_of_one
        self.dropouts = dropouts
        device = base.weight.device
        down, up = self._shaped(start)
        self.down = nn.Parameter(down, requires_grad=start.train_down)
        self.up = nn.Parameter(up)
        self.alpha = nn.Parameter(torch.tensor(float(alpha), device=device), requires_grad=learned_alpha)
        self.initial_down: Tensor | None
        self.initial_up: Tensor | None
        self.folded: Tensor | None
        self.register_buffer("initial_down", self.down.detach().clone() if start.subtract else None)
        self.register_buffer("initial_up", (self.up.detach() * (alpha * scale_of_one)).clone() if start.subtract else None)
        self.register_buffer("folded", _zeros_as(base.weight) if folds else None)

    def _shaped(self, start: Start) -> tuple[Tensor, Tensor]:
        weight = self.base.weight
        down, up = start.down.view(self.rank, *weight.shape[1:]), start.up
        if weight.dim() == 4:
            up = up[:, :, None, None]
        return down.to(weight.device).clone(), up.to(weight.device).contiguous().clone()

    @property
    def scale(self) -> Tensor:
        return self.alpha * self.scale_of_one

    def adapted(self, x: Tensor) -> Tensor:
        return self.base(x) + self.update(x)  # type: ignore[no-any-return]

    def update(self, x: Tensor) -> Tensor:
        """What is added to the base's output."""
        down, up = self._matrices()
        draws = None if self.drop_seed is None else torch.Generator(x.device).manual_seed(self.drop_seed)
        read = x
        if draws is not None and self.dropouts.input:
            read = x * _mask(x.shape, self.dropouts.input, draws, x)
        is_convolution = isinstance(self.base, nn.Conv2d)
        hidden = self.through(read, down)
        if draws is not None and self.dropouts.rank:
            ranks = _mask((x.shape[0], self.rank), self.dropouts.rank, draws, hidden)
            if self.initial_down is not None:
                ranks = torch.cat([ranks, ranks], dim=1)  # of start and subtracted start alike
            hidden = hidden * (ranks[:, :, None, None] if is_convolution else ranks.view(-1, *[1] * (x.dim() - 2), ranks.shape[1]))
        up = up.to(hidden.dtype)
        update = pointwise(hidden, up) if is_convolution else F.linear(hidden, up)
        if draws is not None and self.dropouts.module:
            update = update * (torch.rand((), generator=draws, device=x.device) >= self.dropouts.module)
        return update if self.folded is None else update + self.through(x, self.folded)

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """Down, and up with the scale in it: of twice the rank where the start U D is subtracted from the product u d, as
        (u - U) d + U (d - D). The differences are taken here, in fp32: rounded to bf16 first, what was learned would be lost in them."""
        if self.initial_down is None or self.initial_up is None:
            return self.down, self.up * self.scale
        down = torch.cat([self.down, self.down - self.initial_down])
        return down, torch.cat([self.up * self.scale - self.initial_up, self.initial_up], dim=1)

    @torch.no_grad()
    def factors(self) -> Factors:
        """The matrices in training as a file holds them, exact for every init; what was folded is not in them."""
        down, up = self.down, self.up
        alpha = self.alpha.item() * self.scale_of_one * self.rank  # in the files' own convention, scale = alpha / R
        if self.initial_down is not None:
            down, up = self._matrices()  # type: ignore[assignment]
            alpha = float(down.shape[0])
        return Factors(down.detach().float().cpu().contiguous().clone(), up.detach().float().cpu().contiguous().clone(), alpha)

    def change(self) -> Change:
        if self.folded is None:
            return Change(factors=self.factors(), bias=self.bias_change())
        return Change(weight=self.folded.cpu() + self.factors().delta(), bias=self.bias_change())

    @torch.no_grad()
    def fold(self, start: Start) -> None:
        """Put what was learned into `folded` and begin anew from `start`; alpha stays. Raises ValueError where that is not prepared."""
        if self.folded is None or start.subtract:
            raise ValueError("the layer was made without `folds`, or starts from its weight")
        self.folded += self.factors().delta().to(self.folded.device)
        down, up = self._shaped(start)
        self.down.copy_(down)
        self.up.copy_(up)

    @torch.no_grad()
    def limit_norm(self, most: float) -> None:
        """Scale the matrices down where the Frobenius norm of scale * up @ down exceeds `most` (kohya's scale_weight_norms)."""
        norm = self.scale.abs() * product_norm(self.up, self.down)
        ratio = (most / norm.clamp(min=most)).sqrt()
        self.up.mul_(ratio if self.down.requires_grad else ratio.square())
        if self.down.requires_grad:
            self.down.mul_(ratio)


class DoraLayer(LoraLayer):
    """W' = magnitude * V / |V| with V = base + update, the norm over each input channel (Liu et al. 2024, DoRA, eq. 5): direction and
    size of a channel's weights are learned apart. The norm counts as a constant in the backward pass (their section 4.3).

    |V| divides input channels, so the input can be scaled: V(x * gain) with gain = magnitude / |V|, here as base(x) + base weight (x *
    (gain - 1)) + update(x * gain), since a gain near 1 would be rounded to 1 in bf16.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, start: Start, alpha: float, scale_of_one: float, **options: object):
        super().__init__(base, start, alpha, scale_of_one, **options)  # type: ignore[arg-type]
        self.magnitude = nn.Parameter(input_norms(base.weight.detach()).flatten())  # (I,)

    def adapted(self, x: Tensor) -> Tensor:
        gain = self._gain()
        turned = self.through(x * (gain - 1).to(x.dtype), self.base.weight)
        return self.base(x) + turned + self.update(x * gain.to(x.dtype))  # type: ignore[no-any-return]

    def _gain(self) -> Tensor:
        """(I,) for rows of inputs, (I, 1, 1) for pictures."""
        with torch.no_grad():
            down, up = self._matrices()
            norms = input_norms(self.base.weight.float() + (up.flatten(1) @ down.flatten(1)).view(self.weight_shape)).flatten()
        gain = self.magnitude / norms
        return gain[:, None, None] if isinstance(self.base, nn.Conv2d) else gain

    def change(self) -> Change:
        magnitude = self.magnitude.detach().float().cpu().clone()
        shape = (1, -1, *[1] * (len(self.weight_shape) - 2))
        return Change(factors=self.factors(), dora_scale=magnitude.view(shape), bias=self.bias_change())


class FullLayer(Adapter):
    """base(x) + delta(x), with a trained number for each of the weight's: full fine-tuning of this layer, the reference for the rest."""

    base: nn.Linear | nn.Conv2d

    def __init__(self, base: nn.Linear | nn.Conv2d, train_bias: bool = False):
        super().__init__(base, train_bias)
        self.delta = nn.Parameter(_zeros_as(base.weight))

    def adapted(self, x: Tensor) -> Tensor:
        return self.base(x) + self.through(x, self.delta)  # type: ignore[no-any-return]

    def change(self) -> Change:
        return Change(weight=self.delta.detach().float().cpu().clone(), bias=self.bias_change())


class MoraLayer(Adapter):
    """base(x) + decompress(square(compress(x))): as many numbers as a LoRA of rank R in one square matrix of far higher rank
    (Jiang et al. 2024, MoRA, arXiv 2405.12130). See `mora_delta`. Starts at zero."""

    base: nn.Linear | nn.Conv2d

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, train_bias: bool = False):
        super().__init__(base, train_bias)
        outputs, inputs = base.weight.flatten(1).shape
        side = math.isqrt((outputs + inputs) * rank)  # their eq. 4
        self.square = nn.Parameter(torch.zeros(min(side, outputs), min(side, inputs), device=base.weight.device))
        rows, columns = self.square.shape
        self.rank = min(outputs, inputs, min(rows, columns) * max(-(-outputs // rows), -(-inputs // columns)))  # at most

    def adapted(self, x: Tensor) -> Tensor:
        return self.base(x) + self.through(x, self._delta())  # type: ignore[no-any-return]

    def _delta(self) -> Tensor:
        outputs, inputs = self.weight_shape[0], self.weight_shape[1:].numel()
        return mora_delta(self.square, outputs, inputs).view(self.weight_shape)

    @torch.no_grad()
    def change(self) -> Change:
        return Change(weight=self._delta().float().cpu().clone(), bias=self.bias_change())


def mora_delta(square: Tensor, outputs: int, inputs: int) -> Tensor:
    """The (O, I) matrix that a MoRA square (a, b) stands for, by rotation (their eq. 9, "decompress by rotation").

    Inputs are cut into groups of b, outputs into groups of a, the last ones padded with zeros. Group j reads its inputs turned by
    rotary angles (Su et al. 2021) j * 10000^(-2k/b), passes them through the square, and writes output group j; where there are
    more groups of one side than of the other, the shorter side's are used again, so that every input and output takes part.
    """
    rows, columns = square.shape
    out_groups, in_groups = -(-outputs // rows), -(-inputs // columns)
    numbers = torch.arange(max(out_groups, in_groups), device=square.device)
    half = columns // 2  # an odd last column is not turned
    angles = numbers[:, None] * 10000.0 ** (-torch.arange(half, device=square.device) / max(half, 1))  # (J, half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second, rest = square[:, :half], square[:, half : 2 * half], square[:, 2 * half :]
    turned = torch.cat([first * cos + second * sin, second * cos - first * sin, rest.expand(len(numbers), -1, -1)], dim=2)  # (J, a, b)
    blocks = square.new_zeros(out_groups, in_groups, rows, columns)
    blocks = blocks.index_put((numbers % out_groups, numbers % in_groups), turned)
    return blocks.permute(0, 2, 1, 3).reshape(out_groups * rows, in_groups * columns)[:outputs, :inputs]


class NormAdapter(Adapter):
    """A norm whose weight and bias are trained on: nn.LayerNorm or nn.GroupNorm with their own two vectors."""

    base: nn.LayerNorm | nn.GroupNorm

    def __init__(self, base: nn.LayerNorm | nn.GroupNorm):
        super().__init__(base)
        self.weight_delta = nn.Parameter(torch.zeros_like(base.weight, dtype=torch.float32))
        self.bias_delta = nn.Parameter(torch.zeros_like(base.bias, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.adapted(x) if self.enabled else self.base(x)

    def adapted(self, x: Tensor) -> Tensor:
        base = self.base
        assert self.bias_delta is not None
        # in fp32: beside a weight near 1 in bf16 a small change would be rounded away
        weight, bias = base.weight.float() + self.weight_delta, base.bias.float() + self.bias_delta
        if isinstance(base, nn.LayerNorm):
            return F.layer_norm(x.float(), base.normalized_shape, weight, bias, base.eps).to(x.dtype)
        return F.group_norm(x.float(), base.num_groups, weight, bias, base.eps).to(x.dtype)

    def change(self) -> Change:
        return Change(weight=self.weight_delta.detach().float().cpu().clone(), bias=self.bias_change())


def is_pointwise(layer: nn.Conv2d) -> bool:
    """Whether a pixel of the output is a product with the one pixel of the input."""
    return layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1 and layer.padding in ((0, 0), "valid")


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """(B, I, h, w) through (O, I, 1, 1): as a product, which takes half as long in bf16 on a CPU as a convolution."""
    return (weight.flatten(1) @ x.flatten(2)).view(len(x), -1, *x.shape[2:])


def _zeros_as(weight: Tensor) -> Tensor:
    """Of its shape, in fp32, and lying in the usual order even where a wide convolution's weight does not: files hold no other."""
    return torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)


def _mask(shape: tuple[int, ...] | torch.Size, share: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """Zeros for this share, and 1 / (1 - share) for the rest."""
    return (torch.rand(shape, generator=generator, device=like.device) >= share).to(like.dtype) / (1 - share)


@contextmanager
def disabled(layers: Iterable[Adapter]) -> Iterator[None]:
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


def set_drop_seeds(layers: Iterable[Adapter], seeds: Iterable[int]) -> None:
    """What dropout draws from in the forward passes that follow. A seed stays until the next batch, so that an activation that is
    computed twice (gradient checkpointing) is the same twice."""
    for layer, seed in zip(layers, seeds, strict=True):
        layer.drop_seed = seed


def stop_dropping(layers: Iterable[Adapter]) -> None:
    """No dropout in the forward passes that follow."""
    for layer in layers:
        layer.drop_seed = None
