"""Convolutions of wide layers over few pixels, on a CPU, as one product of matrices.

oneDNN computes in a layout of its own and re-orders a plain weight to it at every call, forward and backward: for the 1280 x 1280 x 3 x 3
numbers of an inner block of Stable Diffusion that takes longer than to convolve 8 x 8 pixels with them. A product reads the weight as it
lies. PyTorch itself does so for inputs of up to 20,480 numbers (`use_mkldnn` in ATen/native/Convolution.cpp).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# As measured in fp32 on AVX2: with fewer weights, or more pixels, oneDNN is as quick.
LEAST_WEIGHTS = 1280 * 1280 * 9
MOST_PIXELS = 256  # of the output, over all pictures of a batch


class WideConv2d(nn.Conv2d):
    """A layer that `is_wide`."""

    def forward(self, x: Tensor) -> Tensor:
        batch, _, *sides = x.shape
        kernel, stride, padding = self.kernel_size, self.stride, self.padding
        assert isinstance(padding, tuple)
        height, width = ((side + 2 * pad - size) // step + 1 for side, pad, size, step in zip(sides, padding, kernel, stride, strict=True))
        if batch * height * width > MOST_PIXELS:
            return super().forward(x)
        columns = F.unfold(x, kernel, padding=padding, stride=stride)  # (B, I * kh * kw, h * w)
        result = self.weight.flatten(1) @ columns.transpose(0, 1).flatten(1)  # (O, B * h * w)
        if self.bias is not None:
            result = result + self.bias.to(result.dtype)[:, None]
        return result.view(-1, batch, height, width).transpose(0, 1)


def widen(model: nn.Module) -> None:
    """From now on convolutions of fp32 weights that are wide enough compute so; names and weights stay as they are."""
    for module in model.modules():
        if type(module) is nn.Conv2d and is_wide(module):
            module.__class__ = WideConv2d


def is_wide(layer: nn.Conv2d) -> bool:
    is_plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return is_plain and layer.weight.dtype == torch.float32 and layer.weight.numel() >= LEAST_WEIGHTS
