"""Starts of the matrices: what each promises of its product, its singular values, and its distribution."""

from typing import Any

import peft
import pytest
import torch

from sdlora.lora.inits import INITS, down_zero, gaussian, kaiming, milora, olora, orthogonal, orthonormal, pissa


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("name", INITS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (8, 5)])
def test_shapes_and_zero_update(name: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=generator())
    start = INITS[name](weight, 6, 2.0, generator())
    assert start.down.shape == (6, shape[1])
    assert start.up.shape == (shape[0], 6)
    if not start.subtract:
        torch.testing.assert_close(start.up @ start.down, torch.zeros(shape), atol=1e-6, rtol=0)
    assert start.up.any() or start.down.any()


def test_kaiming_is_uniform_within_its_bound() -> None:
    down = kaiming(torch.empty(4, 100), 64, 1.0, generator()).down
    assert down.abs().max() <= 0.1
    assert down.var() == pytest.approx(0.2**2 / 12, rel=0.05)


def test_gaussian_has_deviation_one_over_rank() -> None:
    assert gaussian(torch.empty(4, 400), 8, 1.0, generator()).down.std() == pytest.approx(1 / 8, rel=0.05)


def test_orthonormal_rows_are_frozen_with_singular_values_one() -> None:
    start = orthonormal(torch.empty(4, 30), 8, 1.0, generator())
    assert not start.train_down
    torch.testing.assert_close(start.down @ start.down.T, torch.eye(8), atol=1e-5, rtol=0)


def test_pissa_starts_from_the_largest_singular_triplets() -> None:
    weight = torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0]))
    start = pissa(weight, 2, 0.5, generator())
    torch.testing.assert_close(0.5 * start.up @ start.down, torch.diag(torch.tensor([5.0, 3.0, 0, 0])), atol=1e-5, rtol=0)


def test_milora_starts_from_the_smallest_singular_triplets() -> None:
    weight = torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0]))
    start = milora(weight, 2, 0.5, generator())
    torch.testing.assert_close(0.5 * start.up @ start.down, torch.diag(torch.tensor([0, 0, 2.0, 1.0])), atol=1e-5, rtol=0)


@pytest.mark.parametrize("init", [pissa, milora])
def test_a_negative_scale_gives_the_same_product(init: Any) -> None:
    weight = torch.randn(6, 9, generator=generator())
    one, other = init(weight, 3, 0.5, generator()), init(weight, 3, -0.5, generator())
    torch.testing.assert_close(-0.5 * other.up @ other.down, 0.5 * one.up @ one.down)


def test_olora_is_the_head_of_the_qr_decomposition() -> None:
    weight = torch.randn(6, 9, generator=generator())
    start = olora(weight, 4, 1.0, generator())
    torch.testing.assert_close(start.up.T @ start.up, torch.eye(4), atol=1e-5, rtol=0)
    whole = olora(weight, 6, 1.0, generator())
    torch.testing.assert_close(whole.up @ whole.down, weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("ours", "theirs"), [(pissa, "pissa"), (olora, "olora")])
def test_the_product_is_that_of_peft(ours: Any, theirs: str) -> None:
    base = torch.nn.Sequential(torch.nn.Linear(9, 6, bias=False))
    weight = base[0].weight.detach().clone()
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=theirs))
    layer = adapted.base_model.model[0]
    start = ours(weight, 4, 1.0, generator())
    expected = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(start.up @ start.down, expected.detach(), atol=1e-5, rtol=0)


def test_orthogonal_reads_what_down_does_not_write() -> None:
    start = orthogonal(torch.empty(12, 10), 5, 1.0, generator())
    assert torch.linalg.matrix_rank(start.down) == 3 and torch.linalg.matrix_rank(start.up) == 2
    alone = orthogonal(torch.empty(12, 10), 1, 1.0, generator())
    assert alone.down.any() and not alone.up.any()


def test_down_zero_draws_up_within_its_bound() -> None:
    start = down_zero(torch.empty(400, 10), 16, 1.0, generator())
    assert not start.down.any()
    assert start.up.abs().max() <= 0.25
    assert start.up.var() == pytest.approx(0.5**2 / 12, rel=0.05)


def test_same_generator_same_start() -> None:
    weight = torch.randn(9, 9)
    for init in INITS.values():
        assert torch.equal(init(weight, 3, 1.0, generator()).down, init(weight, 3, 1.0, generator()).down)
