"""Frozen weights that take less of a device's memory: kept in fewer bits than they compute with, or in the machine's own memory. They are
made whole for each use, in the forward pass and again in the backward pass, so that nothing keeps them whole in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from sdlora.errors import ConfigError

BLOCK = 64  # numbers that share one scale in NF4, as in QLoRA


class Encoding(NamedTuple):
    pack: Callable[[Tensor], tuple[Tensor, ...]]  # a weight (O, ...) -> what is kept of it
    unpack: Callable[..., Tensor]  # what was kept, and the weight's shape and dtype -> the weight, but for rounding


class Packed(nn.Module):
    """A layer whose weight is computed whenever it is asked for."""

    at: Tensor  # empty: shows where the weight is computed with, and in which precision

    def keep(self, weight: Tensor, encoding: Encoding, offloaded: bool) -> None:
        self.shape, self.encoding, self.offloaded = weight.shape, encoding, offloaded
        self.register_buffer("at", weight.new_empty(0), persistent=False)
        kept = encoding.pack(weight)
        self.names = [f"kept_{number}" for number in range(len(kept))]
        for name, tensor in zip(self.names, kept, strict=True):
            self.register_buffer(name, tensor)

    def kept(self) -> list[Tensor]:
        return [self.get_buffer(name) for name in self.names]

    @property
    def weight(self) -> Tensor:
        return self.encoding.unpack(*(tensor.to(self.at.device) for tensor in self.kept()), self.shape, self.at.dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Applied.apply(x, self)  # type: ignore[no-untyped-call]
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Where the module goes, an offloaded weight does not go."""
        stay = {name: self._buffers.pop(name) for name in self.names if self.offloaded}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(stay)
        return self

    def compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def pull_back(self, grad: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of this shape from that of the output."""
        raise NotImplementedError


class PackedLinear(Packed, nn.Linear):  # type: ignore[override]  # a weight that nobody can set
    def compute(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def pull_back(self, grad: Tensor, shape: torch.Size) -> Tensor:
        return grad @ self.weight.to(grad.dtype)


class PackedConv2d(Packed, nn.Conv2d):  # type: ignore[override]
    def compute(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)

    def pull_back(self, grad: Tensor, shape: torch.Size) -> Tensor:
        weight = self.weight.to(grad.dtype)
        result: Tensor = conv2d_input(shape, weight, grad, self.stride, self.padding, self.dilation)
        return result


class Applied(torch.autograd.Function):
    """A packed layer's output; for the backward pass it keeps the layer in the place of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear | PackedConv2d) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        return layer.compute(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.pull_back(grad, ctx.shape).to(ctx.dtype), None


def pack(unet: nn.Module, precision: str, offloaded: bool) -> None:
    """Keep the weights of all Linear and Conv2d layers in the UNet's blocks in `precision`, a key of ENCODINGS; `offloaded` ones stay where
    they are when the UNet goes to a device. Raises ConfigError where a library is missing."""
    encoding = ENCODINGS[precision]
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name.startswith(BLOCKS):
            weight = module.weight.detach()
            del module.weight
            module.__class__ = PackedLinear if isinstance(module, nn.Linear) else PackedConv2d
            module.keep(weight, encoding, offloaded)  # type: ignore[operator]
    for tensor in [*unet.parameters(), *unet.buffers()]:
        tensor.data = tensor.data.clone()  # or a view of its file would hold all of it


BLOCKS = (
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
)  # all but a percent of a UNet; what reads time and noise, and writes noise, stays exact


def numbers_in(module: nn.Module) -> int:
    """How many weights and biases a module has, packed ones among them."""
    packed = sum(part.shape.numel() for part in module.modules() if isinstance(part, Packed))
    return packed + sum(parameter.numel() for parameter in module.parameters())


def bytes_elsewhere(module: nn.Module) -> int:
    """Of weights that are offloaded."""
    return sum(tensor.nbytes for part in module.modules() if isinstance(part, Packed) and part.offloaded for tensor in part.kept())


# ---------------------------------------------------------------- encodings


def _as_is(weight: Tensor) -> tuple[Tensor]:
    return (weight,)


def _cast(kept: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return kept.to(dtype)


def _in_bf16(weight: Tensor) -> tuple[Tensor]:
    return (weight.to(torch.bfloat16),)


def _in_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 (Micikevicius et al. 2022), three bits behind the point and none larger than 448; each output channel has its own scale."""
    scale = _largest(weight) / 448
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


def _in_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """127 steps to either side; each output channel has its own scale."""
    scale = _largest(weight) / 127
    return (weight.float() / scale).round().to(torch.int8), scale


def _scaled(kept: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return (kept.float() * scale).to(dtype)


def _largest(weight: Tensor) -> Tensor:
    """Of each output channel, (O, 1) or (O, 1, 1, 1)."""
    return weight.float().abs().amax(tuple(range(1, weight.dim())), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def _in_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The 16 quantiles of a normal distribution, of blocks that share a scale (Dettmers et al. 2023, QLoRA)."""
    packed, state = _bitsandbytes().quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return packed, state.absmax


def _from_nf4(packed: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    functional = _bitsandbytes()
    state = functional.QuantState(absmax=scale, shape=shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    result: Tensor = functional.dequantize_4bit(packed, state)
    return result


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional
    except ModuleNotFoundError:
        raise ConfigError(
            "model.base_precision = 'nf4' needs bitsandbytes: pip install 'sdlora[bitsandbytes]', or set it to 'fp8' or 'int8'."
        ) from None
    return bitsandbytes.functional


ENCODINGS: dict[str, Encoding] = {
    "same": Encoding(_as_is, _cast),
    "bf16": Encoding(_in_bf16, _cast),
    "fp8": Encoding(_in_fp8, _scaled),
    "int8": Encoding(_in_int8, _scaled),
    "nf4": Encoding(_in_nf4, _from_nf4),
}
