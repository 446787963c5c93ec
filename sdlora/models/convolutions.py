"""Convolutions as products of matrices, on a CPU: of wide layers over few pixels, and in bf16 those of 1 x 1.

oneDNN computes in a layout of its own and re-orders a plain weight to it at every call, forward and backward: for the 1280 x 1280 x 3 x 3
numbers of an inner block of Stable Diffusion that takes many times as long as to convolve 8 x 8 pixels with them. A product reads the
weight as it lies. PyTorch itself does so in fp32 for inputs of up to 20,480 numbers (`use_mkldnn` in ATen/native/Convolution.cpp).

The weights stay what they are, in PyTorch's order of "channels last", so that what a product reads or writes of a pixel lies together.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlora.lora.layers import is_pointwise, pointwise
from sdlora.models.memory import in_onednn

# As tests/benchmarks/convolutions.py measured: with fewer weights, or more pixels, oneDNN is as quick.
LEAST_WEIGHTS = 640 * 1280 * 9
MOST_PIXELS = 512  # of the output, over all pictures of a batch


class WideConv2d(nn.Conv2d):
    """A layer that `is_wide`."""

    @property
    def pads(self) -> tuple[int, ...]:
        """Zeros above and to the left, and as many below and to the right."""
        assert not isinstance(self.padding, str)
        return self.padding

    def forward(self, x: Tensor) -> Tensor:
        if len(x) * windows(x, self).numel() > MOST_PIXELS or self.weight.requires_grad:
            return super().forward(x).contiguous()
        result: Tensor = Product.apply(x, self)  # type: ignore[no-untyped-call]
        return result


class Product(torch.autograd.Function):
    """The outputs of a layer, whose weight and bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: WideConv2d) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        matrix = matrix_of(layer)
        (top, left), (down, right) = layer.pads, layer.stride
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top)).contiguous()  # (B, H, W, I)
        pieces = padded.unfold(1, layer.kernel_size[0], down).unfold(2, layer.kernel_size[1], right)  # (B, h, w, I, kh, kw)
        rows = pieces.permute(0, 1, 2, 4, 5, 3).reshape(-1, matrix.shape[1])
        bias = matrix.new_zeros(()) if layer.bias is None else layer.bias[:, None]
        result = torch.addmm(bias, matrix, rows.t())  # (O, B * h * w)
        return result.view(-1, *pieces.shape[:3]).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layer, (batch, inputs, height, width) = ctx.layer, ctx.shape
        matrix = matrix_of(layer).to(grad.dtype)
        (top, left), (down, right), (rows, columns) = layer.pads, layer.stride, layer.kernel_size
        pieces = grad.permute(0, 2, 3, 1).reshape(-1, len(matrix)) @ matrix
        pieces = pieces.view(batch, *grad.shape[2:], rows, columns, inputs)
        # nine roundings to bf16 would more than double the error
        padded = grad.new_zeros(batch, height + 2 * top, width + 2 * left, inputs, dtype=torch.float32)
        for row in range(rows):
            for column in range(columns):
                bottom, far = row + down * (grad.shape[2] - 1) + 1, column + right * (grad.shape[3] - 1) + 1
                padded[:, row:bottom:down, column:far:right] += pieces[:, :, :, row, column]
        result = padded[:, top : top + height, left : left + width].permute(0, 3, 1, 2)
        return result.to(ctx.dtype, memory_format=torch.contiguous_format), None


def matrix_of(layer: WideConv2d) -> Tensor:
    """(O, kh * kw * I)"""
    return layer.weight.permute(0, 2, 3, 1).flatten(1)


def windows(x: Tensor, layer: WideConv2d) -> torch.Size:
    """Height and width of the output."""
    sides = zip(x.shape[2:], layer.kernel_size, layer.stride, layer.pads, strict=True)
    return torch.Size((side + 2 * pad - size) // step + 1 for side, size, step, pad in sides)


class PointwiseConv2d(nn.Conv2d):
    """A layer that `is_pointwise`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return pointwise(x, self.weight)
        result = torch.baddbmm(self.bias[:, None], self.weight.flatten(1).expand(len(x), -1, -1), x.flatten(2))
        return result.view(len(x), -1, *x.shape[2:])


def as_products(model: nn.Module) -> None:
    """From now on convolutions for which that is quicker compute so; names and weights stay as they are."""
    for module in model.modules():
        if type(module) is nn.Conv2d and in_onednn(module.weight.dtype):
            if is_wide(module):
                module.__class__ = WideConv2d
                module.weight.data = to_channels_last(module.weight.data)
            elif is_pointwise(module) and module.weight.dtype == torch.bfloat16:  # in fp32 there is no difference
                module.__class__ = PointwiseConv2d


def to_channels_last(weight: Tensor) -> Tensor:
    """The same numbers in that order, in the same memory: a file that is mapped there would stay resident beside a copy."""
    weight = weight.contiguous()
    moved = weight.flatten(2).transpose(1, 2).clone(memory_format=torch.contiguous_format)  # (O, kh * kw, I)
    weight.view(moved.shape).copy_(moved)
    return weight.view(len(weight), *weight.shape[2:], -1).permute(0, 3, 1, 2)


def is_wide(layer: nn.Conv2d) -> bool:
    is_plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return is_plain and layer.weight.numel() >= LEAST_WEIGHTS
