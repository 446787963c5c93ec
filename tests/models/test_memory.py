"""The ledger's peak, by hand and against what training really keeps; and that it stands in for autocast and attention rightly."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdlora.lora.inits import INITS
from sdlora.lora.layers import LoraLayer
from sdlora.models import memory

FP32, BF16 = torch.float32, torch.bfloat16


def meta(*shape: int, **options: Any) -> Tensor:
    return torch.empty(shape, device="meta", **options)


def test_what_is_freed_counts_no_more() -> None:
    def run() -> None:
        x = meta(30)
        for _ in range(9):
            x = x.exp()

    assert memory.peak_bytes(run, "cpu", FP32) == 2 * 30 * 4  # each exp's input and output


def test_what_was_there_before_does_not_count_nor_do_views() -> None:
    before = meta(10, 30)
    assert memory.peak_bytes(lambda: before.t().flatten(0, 0)[2:], "cpu", FP32) == 0
    assert memory.peak_bytes(lambda: before + before.t().t(), "cpu", FP32) == 10 * 30 * 4


def test_an_operation_that_was_seen_before_makes_what_it_made_before() -> None:
    def run() -> list[Tensor]:
        x, numbers = meta(4, 6, 8), meta(4, dtype=torch.long)
        first, second = torch.ops.aten.native_layer_norm(x, [8], None, None, 1e-5)[:2]
        return [x * 2, numbers * 2, numbers * 2.0, x.transpose(0, 1), first, second, torch.cat([x, x])]

    for _ in range(2):
        with memory.Ledger(memory.nothing):
            made = run()
        assert [(tuple(t.shape), t.dtype) for t in made] == [
            ((4, 6, 8), FP32),
            ((4,), torch.long),
            ((4,), FP32),
            ((6, 4, 8), FP32),
            ((4, 6, 8), FP32),
            ((4, 6, 1), FP32),
            ((8, 6, 8), FP32),
        ]
        assert made[3].stride() == (8, 48, 1)


def test_what_autograd_keeps_and_gradients_count() -> None:
    layers = nn.Sequential(*(nn.Sigmoid() for _ in range(5))).to("meta")

    def forward() -> Tensor:
        total: Tensor = layers(meta(100, requires_grad=True)).sum()
        return total

    kept = 4 * (100 + 5 * 100)  # the leaf, and each sigmoid's result
    assert memory.peak_bytes(forward, "cpu", FP32) == kept + 4
    # the first step back: the sum's gradient of one number, expanded, and the last sigmoid's of 100
    assert memory.peak_bytes(lambda: forward().backward(), "cpu", FP32) == kept + 4 + 4 + 400 + 400 - 400


def test_checkpoints_keep_inputs_and_compute_again() -> None:
    block = nn.Sequential(*(nn.Sigmoid() for _ in range(10))).to("meta")

    def run(call: Callable[[Tensor], Tensor]) -> None:
        x = meta(1000, requires_grad=True)
        for _ in range(4):
            x = call(x)
        x.sum().backward()

    calls = (block, partial(checkpoint, block, use_reentrant=False))
    whole, again = (memory.peak_bytes(partial(run, call), "cpu", FP32) / 4000 for call in calls)
    # The leaf, each sigmoid's result, and two gradients, of a sigmoid's result and of what it was given.
    assert whole == pytest.approx(1 + 4 * 10 + 2, abs=0.01)
    # The leaf, each block's result, the last block's sigmoids again, and two gradients, or one while the last result is there twice.
    assert again == pytest.approx(1 + 4 + 10 + 1, abs=0.01)


@pytest.mark.parametrize(("device", "norm"), [("cpu", BF16), ("cuda", FP32)])
def test_it_casts_as_autocast_does(device: str, norm: torch.dtype) -> None:
    linear, conv = nn.Linear(8, 8, device="meta"), nn.Conv2d(4, 4, 3, device="meta")
    with memory.Autocast(device, BF16):
        assert linear(meta(2, 8)).dtype == conv(meta(2, 4, 8, 8)).dtype == (meta(3, 3) @ meta(3, 3)).dtype == BF16
        assert F.group_norm(meta(2, 4, 8, dtype=BF16), 2).dtype == F.layer_norm(meta(2, 8, dtype=BF16), (8,)).dtype == norm
        assert (meta(3) + meta(3)).dtype == FP32
    with memory.Autocast(device, FP32):
        assert linear(meta(2, 8)).dtype == F.group_norm(meta(2, 4, 8), 2).dtype == FP32


def test_on_a_cpu_it_casts_as_the_real_one() -> None:
    x = torch.randn(2, 8, 6, 6)
    modules = [nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.Softmax(-1)]
    real, shadow = nn.Sequential(*modules), memory.on_meta(nn.Sequential(*modules), FP32)
    of_real, of_shadow = [], []
    for net, found in ((real, of_real), (shadow, of_shadow)):
        for module in net:
            module.register_forward_hook(lambda module, given, result, found=found: found.append(result.dtype))
    with torch.autocast("cpu", BF16):
        real(x)
    with memory.Autocast("cpu", BF16):
        shadow(x.to("meta"))
    assert of_real == of_shadow and {FP32, BF16} >= set(of_real)


def test_attention_keeps_no_matrix_of_tokens_by_tokens() -> None:
    tokens, width = 512, 16
    heads = [meta(1, 2, tokens, width, requires_grad=True) for _ in range(3)]
    taken = memory.peak_bytes(lambda: F.scaled_dot_product_attention(*heads, attn_mask=meta(tokens, tokens)), "cpu", FP32)
    mask, result, sums = tokens * tokens, 2 * tokens * width, 2 * tokens
    assert taken == 4 * (mask + result + sums)


@pytest.mark.parametrize(("known", "copies"), [(True, 3 * 4 * 100 + 2 * 4 * 9 + 3 * 2 * 100), (False, 3 * 4 * 9 * 100)])
def test_a_convolution_on_a_cpu_takes_copies_or_unfolds_its_input(known: bool, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "in_onednn", lambda dtype: known)
    conv = nn.Conv2d(4, 2, 3, padding=1, device="meta").requires_grad_(False)
    x = meta(3, 4, 10, 10)
    taken = {device: memory.peak_bytes(lambda: conv(x), device, FP32) for device in ("cpu", "cuda")}
    assert taken == {"cuda": 4 * 3 * 2 * 100, "cpu": 4 * (3 * 2 * 100 + copies)}


def test_a_copy_on_meta_takes_the_precision_asked_for_but_in_adapters() -> None:
    start = INITS["pissa"](torch.randn(6, 5), 2, 1.0, torch.Generator().manual_seed(0))
    layer = LoraLayer(nn.Linear(5, 6), start, 1.0, 1.0, learned_alpha=True)
    net = nn.Sequential(layer, nn.Linear(6, 6).requires_grad_(False))
    shadow = memory.on_meta(net, BF16)
    assert {name: (p.device.type, p.requires_grad, p.dtype) for name, p in shadow.named_parameters()} == {
        name: ("meta", p.requires_grad, BF16 if "base" in name or name.startswith("1") else FP32) for name, p in net.named_parameters()
    }
    assert shadow[0].initial_down.dtype == FP32 and shadow[0].initial_down.is_meta
    assert memory.weight_bytes(shadow) == 2 * (5 * 6 + 6 + 6 * 6 + 6) + 4 * (2 * (10 + 12) + 1)
    assert not any(p.is_meta for p in net.parameters())
