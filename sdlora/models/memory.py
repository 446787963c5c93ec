"""Estimate the peak memory of a training step before it is taken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def pooled_size(unet_config: Any) -> int:
    """P of SDXL's pooled embedding: what its UNet reads beside the six numbers of a picture's sizes; 0 where it reads neither."""
    if unet_config.addition_embed_type != "text_time":
        return 0
    return int(unet_config.projection_class_embeddings_input_dim - 6 * unet_config.addition_time_embed_dim)


def weight_bytes(*modules: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for module in modules for t in [*module.parameters(), *module.buffers()])


def saved_bytes(module: nn.Module, run: Callable[[Any], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `run(module)`, counted on the meta device: nothing is computed.

    Parameters and buffers are not counted. `run` gets a meta copy of the module and feeds it meta tensors.
    """
    shadow = copy.deepcopy(module).to("meta")
    own = {t.untyped_storage()._cdata for t in [*shadow.parameters(), *shadow.buffers()]}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = tensor  # held, so that no storage's address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(shadow)
    return sum(t.untyped_storage().nbytes() for t in seen.values())
