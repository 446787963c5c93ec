"""Starts of the matrices: what each promises of its product, its singular values, and its distribution."""

import pytest
import torch

from sdlora.lora.inits import INITS, gaussian, kaiming, orthonormal, pissa


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
        assert not start.up.any()


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


def test_same_generator_same_start() -> None:
    weight = torch.randn(9, 9)
    for init in INITS.values():
        assert torch.equal(init(weight, 3, 1.0, generator()).down, init(weight, 3, 1.0, generator()).down)
