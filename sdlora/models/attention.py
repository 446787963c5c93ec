"""Attention of a UNet on a CPU, whose backward pass PyTorch's kernel computes with vectors alone. Here it is products of matrices.

Keys and queries are taken in blocks that stay in the processor's cache, as in FlashAttention-2 (Dao 2023, algorithm 2): nothing of the size
T x T is kept. The forward pass is PyTorch's kernel, and leaves of each query the logarithm of what its weights were divided by.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

# As tests/benchmarks/attention.py measured, on one thread and on two.
LEAST_TOKENS = 1024  # of queries and keys: with fewer, as with a prompt's, PyTorch's kernel is as quick
LEAST_SIZE = 32  # of a head: a tile of the processor takes so many numbers of bf16 in a row
MOST_KEYS = 1024  # of a block
MOST_QUERIES = 512  # of a block
UNCUT_QUERIES = 1024  # so many are one block all the same
WEIGHTS_A_THREAD = 2**20  # of the blocks that are in work, over heads


class BlockwiseAttention(torch.autograd.Function):
    """(B, H, T, D), (B, H, S, D), (B, H, S, D) -> (B, H, T, D), in bf16: softmax(query key^T / sqrt(D)) value."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        ctx.save_for_backward(query, key, value, result, log_sums)
        return result  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, result, log_sums = ctx.saved_tensors
        scale = 1 / math.sqrt(query.shape[-1])
        means = (grad.float() * result.float()).sum(-1)  # of each query's gradients, by its weights (their D)

        def one_beside(tensor: Tensor, count: int) -> Tensor:
            return torch.cat([tensor, tensor.new_ones(()).expand(*tensor.shape[:-1], count)], -1)

        # What is taken off each query's row, as further columns of the products. Weights come of sums in fp32: rounded to bf16, one of -9
        # could make the weight wrong by 3 %. The means are small beside what they are taken off, two numbers in bf16 hold them.
        scores_of = torch.cat([query.float() * scale, -log_sums[..., None]], -1), one_beside(key.float(), 1)
        high = means.to(grad.dtype)
        grads_of = torch.cat([grad, -high[..., None], (high - means).to(grad.dtype)[..., None]], -1), one_beside(value, 2)
        grads = in_blocks(*(tensor.contiguous().flatten(0, 1) for tensor in (*scores_of, *grads_of, query, key, grad)))
        of_query, of_key, of_value = (total.view(*query.shape[:2], *total.shape[1:]) for total in grads)
        return (of_query * scale).to(query.dtype), (of_key * scale).to(key.dtype), of_value.to(value.dtype)


def in_blocks(queries: Tensor, keys: Tensor, of_results: Tensor, values: Tensor, query: Tensor, key: Tensor, grad: Tensor) -> list[Tensor]:
    """Of N heads -> gradients of query (N, T, D) and key (N, S, D), both without the scale, and of value (N, S, D), in fp32. With
    weights = exp(keys queries^T), their gradients are weights * (values of_results^T)."""
    heads, query_count, key_count = len(query), query.shape[1], key.shape[1]
    together, rows, columns = block_of(heads, query_count, key_count)
    totals = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (query, key, key)]
    in_work = together * rows * columns
    exact, low, of_weights = (query.new_empty(in_work, dtype=dtype) for dtype in (torch.float32, query.dtype, query.dtype))
    for head in range(0, heads, together):
        some = slice(head, head + together)
        of_query, of_key, of_value = (total[some] for total in totals)
        for start in range(0, query_count, columns):
            asked = slice(start, start + columns)
            for first in range(0, key_count, rows):
                read = slice(first, first + rows)
                left, right = keys[some, read], queries[some, asked].mT
                shape = len(left), left.shape[1], right.shape[2]  # (heads, keys, queries)
                scores, weights, slopes = (buffer[: math.prod(shape)].view(shape) for buffer in (exact, low, of_weights))
                torch.bmm(left, right, out=scores)
                weights.copy_(scores.exp_())
                torch.bmm(values[some, read], of_results[some, asked].mT, out=slopes)
                slopes.mul_(weights)
                of_value[:, read] += torch.bmm(weights, grad[some, asked])
                of_key[:, read] += torch.bmm(slopes, query[some, asked])
                of_query[:, asked] += torch.bmm(slopes.mT, key[some, read])
    return totals


def block_of(heads: int, queries: int, keys: int) -> tuple[int, int, int]:
    """How many of each are in work at a time."""
    rows, columns = min(keys, MOST_KEYS), queries if queries <= UNCUT_QUERIES else MOST_QUERIES
    return min(heads, max(1, WEIGHTS_A_THREAD * torch.get_num_threads() // (rows * columns))), rows, columns


def backward_bytes(query: Tensor, key: Tensor) -> int:
    """What the backward pass takes beside its results, where it is in blocks: these, what goes into products, and sums in fp32."""
    if not (suits(query, key) and has_tiles()):
        return 0
    (batch, heads, queries, size), keys = query.shape, key.shape[2]
    in_products = (queries + keys) * (4 * (size + 1) + 2 * (size + 2)) + (2 * queries + keys) * 2 * size
    sums = (queries + 2 * keys) * 4 * size
    return batch * heads * (in_products + sums) + 8 * math.prod(block_of(batch * heads, queries, keys))


def suits(query: Tensor, key: Tensor) -> bool:
    """Whether blocks are quicker, where there are tiles."""
    return query.dtype == torch.bfloat16 and min(query.shape[2], key.shape[2]) >= LEAST_TOKENS and query.shape[3] >= LEAST_SIZE


def has_tiles() -> bool:
    """Whether the processor has units for products of matrices (AMX)."""
    return torch.cpu._is_amx_tile_supported()


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, H, T, D), (B, H, S, D) twice -> (B, H, T, D)"""
    # not on the meta device: see `backward_bytes`
    if suits(query, key) and query.device.type == "cpu" and torch.is_grad_enabled():
        return BlockwiseAttention.apply(query, key, value)  # type: ignore[no-any-return, no-untyped-call]
    return F.scaled_dot_product_attention(query, key, value)


class BlockwiseProcessor:
    """For layers that are plain: see `is_plain`."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """(B, T, C), and (B, S, E) of a prompt -> (B, T, C)"""
        if attention_mask is not None:
            plain: Tensor = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, **options)
            return plain
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = (attn.to_q(hidden_states), attn.to_k(read), attn.to_v(read))
        result = attend(*(tensor.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for tensor in heads)).transpose(1, 2).flatten(2)
        for module in attn.to_out:
            result = module(result)
        return result


def attend_with_products(unet: nn.Module) -> None:
    """From now on its attention goes back so, where the processor `has_tiles` and what is read `suits`."""
    if not has_tiles():
        return
    for module in unet.modules():
        if isinstance(module, Attention) and type(module.processor) is AttnProcessor2_0 and is_plain(module):
            module.set_processor(BlockwiseProcessor())


def is_plain(layer: Attention) -> bool:
    """Whether it is nothing but four matrices and what is between them."""
    norms = (layer.group_norm, layer.spatial_norm, layer.norm_q, layer.norm_k, layer.norm_cross)
    return not any(norms) and not layer.residual_connection and layer.rescale_output_factor == 1
