"""Attention's backward pass in blocks gives the gradients of the whole, and stands in for PyTorch's where it is quicker alone."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from sdlora.models import attention
from sdlora.models.attention import BlockwiseAttention, BlockwiseProcessor, attend, attend_with_products

SHAPES = {
    "one block": (1, 2, 64, 48, 16),
    "ends of blocks": (2, 3, 150, 70, 8),
    "fewer keys than numbers": (1, 2, 48, 7, 16),
    "more heads than are taken together": (1, 5, 96, 64, 8),
}


def heads_of(shape: tuple[int, ...], sharpness: float) -> list[Tensor]:
    """Query, key, value and gradient, lying as layers of a UNet leave them."""
    batch, heads, queries, keys, size = shape
    torch.manual_seed(0)
    made = (torch.randn(batch, count, heads, size) for count in (queries, keys, keys, queries))
    query, *others = (tensor.to(torch.bfloat16).transpose(1, 2) for tensor in made)
    return [query * sharpness, *others]


def gradients(way: object, query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    given = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    return torch.autograd.grad(way(*given), given, grad)  # type: ignore[operator]


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gradients_are_those_of_the_whole(shape: tuple[int, ...], sharpness: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_KEYS", 32)
    monkeypatch.setattr(attention, "MOST_QUERIES", 40)
    monkeypatch.setattr(attention, "UNCUT_QUERIES", 40)
    monkeypatch.setattr(attention, "WEIGHTS_A_THREAD", 2 * 32 * 40 // torch.get_num_threads())
    given = heads_of(shape, sharpness)
    exact = gradients(F.scaled_dot_product_attention, *(tensor.float() for tensor in given))
    theirs, ours = (gradients(way, *given) for way in (F.scaled_dot_product_attention, BlockwiseAttention.apply))
    for found, plain, wanted in zip(ours, theirs, exact, strict=True):
        assert found.dtype == torch.bfloat16 and found.shape == wanted.shape
        # both kernels round to bf16 what they multiply, and what a lone weight's gradient cancels against
        assert (found.float() - wanted).norm() <= 2 * max((plain.float() - wanted).norm(), 3e-3 * wanted.norm())


def test_a_weight_far_below_the_others_is_zero_and_gradients_stay_finite() -> None:
    query = torch.tensor([[[[30.0], [-30.0]]]], dtype=torch.bfloat16)
    key, value = torch.tensor([[[[20.0], [-20.0]]]], dtype=torch.bfloat16), torch.tensor([[[[1.0], [2.0]]]], dtype=torch.bfloat16)
    of_query, of_key, of_value = gradients(BlockwiseAttention.apply, query, key, value, torch.ones_like(query))
    assert of_value.flatten().tolist() == [1.0, 1.0] and not of_query.any() and not of_key.any()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each query that went through blocks."""
    seen: list[int] = []
    plain = BlockwiseAttention.apply

    def apply(query: Tensor, *others: Tensor) -> Tensor:
        seen.append(query.shape[2])
        return plain(query, *others)  # type: ignore[no-untyped-call, no-any-return]

    monkeypatch.setattr(BlockwiseAttention, "apply", apply)
    return seen


def test_only_what_is_long_and_learns_in_bf16_goes_through_blocks(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LEAST_TOKENS", 32)
    monkeypatch.setattr(attention, "LEAST_SIZE", 8)
    long, short = (torch.randn(1, 1, count, 8, dtype=torch.bfloat16) for count in (32, 31))
    narrow = torch.randn(1, 1, 32, 7, dtype=torch.bfloat16)
    for query, key in [(long, short), (short, long), (narrow, narrow), (long.float(), long.float()), (long.to("meta"), long.to("meta"))]:
        assert attend(query, key, key).shape == query.shape
    with torch.no_grad():
        attend(long, long, long)
    assert not asked
    assert torch.equal(attend(long, long, long), F.scaled_dot_product_attention(long, long, long)) and asked == [32]


@pytest.fixture
def with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)


@pytest.mark.parametrize("of_prompt", [False, True])
def test_a_layer_gives_what_it_gave(of_prompt: bool, with_amx: None, asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LEAST_TOKENS", 32)
    monkeypatch.setattr(attention, "LEAST_SIZE", 8)
    torch.manual_seed(0)
    layer = Attention(24, 20 if of_prompt else None, heads=3, dim_head=8).to(torch.bfloat16)
    given = [torch.randn(2, 40, 24, dtype=torch.bfloat16), *([torch.randn(2, 36, 20, dtype=torch.bfloat16)] if of_prompt else [])]
    before = layer(*given)
    attend_with_products(nn.Sequential(layer))
    assert isinstance(layer.processor, BlockwiseProcessor)
    assert torch.equal(layer(*given), before) and asked == [40]
    mask = torch.zeros(2, len(given[-1][0]), dtype=torch.bfloat16)
    assert torch.equal(layer(*given, attention_mask=mask), before) and asked == [40]  # PyTorch's, which knows masks


@pytest.mark.parametrize(
    "layer",
    [
        Attention(8, heads=1, dim_head=8, rescale_output_factor=2.0),
        Attention(8, heads=1, dim_head=8, residual_connection=True),
        Attention(8, heads=1, dim_head=8, norm_num_groups=2),
        Attention(8, heads=1, dim_head=8, qk_norm="layer_norm"),
        Attention(32, heads=1, dim_head=8, spatial_norm_dim=4),
    ],
)
def test_a_layer_with_more_to_it_stays_as_it_is(layer: Attention, with_amx: None) -> None:
    attend_with_products(nn.Sequential(layer))
    assert type(layer.processor) is AttnProcessor2_0


def test_without_units_for_products_all_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    layer = Attention(8, heads=1, dim_head=8)
    attend_with_products(nn.Sequential(layer))
    assert type(layer.processor) is AttnProcessor2_0
