"""Lower ranks within a limit, and what they cost."""

import pytest
import torch
from torch import Tensor

from sdlora.lora.change import Change, Factors
from sdlora.lora.resize import Cut, Limit, resize, total_error

SHAPES = [(12, 8), (6, 4, 3, 3)]


def lora(shape: tuple[int, ...], rank: int = 5) -> Change:
    generator = torch.Generator().manual_seed(rank)
    down = torch.randn(rank, *shape[1:], generator=generator)
    return Change(Factors(down, torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator), 2.0))


def delta(change: Change) -> Tensor:
    assert change.shape is not None
    return change.delta(torch.zeros(change.shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("full", [False, True])
def test_all_ranks_are_the_same_lora(shape: tuple[int, ...], full: bool) -> None:
    change = Change(weight=delta(lora(shape))) if full else lora(shape)
    same, cut = resize("a", change, Limit(rank=8))
    assert cut is not None and same.factors is not None and same.weight is None
    assert float((delta(same) - delta(change)).norm() / delta(change).norm()) < 1e-6
    assert cut.error < 1e-6 and cut.norm == pytest.approx(float(delta(change).norm()), rel=1e-5)
    assert (cut.before, cut.rank) == (min(8, shape[0]), min(8, shape[0])) if full else (5, 5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_told_is_that_of_the_delta(shape: tuple[int, ...]) -> None:
    change = lora(shape)
    for limit in (Limit(rank=2), Limit(kept=0.8), Limit(rank=1, kept=0.99), Limit(kept=1 - 0.3**2)):
        short, cut = resize("a", change, limit)
        assert cut is not None and short.factors is not None and cut.rank == short.factors.down.shape[0]
        assert float((delta(short) - delta(change)).norm() / delta(change).norm()) == pytest.approx(cut.error, rel=1e-4)
        assert cut.rank == limit.rank or cut.error**2 <= 1 - limit.kept + 1e-9
    assert cut.error <= 0.3


def test_ranks_follow_the_layers() -> None:
    flat = Change(weight=torch.eye(4))
    steep = Change(weight=torch.diag(torch.tensor([10.0, 1.0, 0.5, 0.1])))
    ranks = [cut.rank for change in (flat, steep) if (cut := resize("a", change, Limit(kept=0.95))[1])]
    assert ranks == [4, 1]


def test_biases_stay_and_norms_are_left_alone() -> None:
    bias = torch.ones(12)
    short, _ = resize("a", Change(lora((12, 8)).factors, bias=bias), Limit(rank=1))
    assert short.bias is bias
    norm = Change(weight=torch.ones(3), bias=torch.ones(3))
    assert resize("a", norm, Limit(rank=1)) == (norm, None)


def test_errors_add_up_by_squares() -> None:
    # 0.6 of 3 and nothing of 4: 1.8 of 5
    assert total_error([Cut("a", 4, 2, 3.0, 0.6), Cut("b", 4, 4, 4.0, 0.0)]) == pytest.approx(0.36)
    assert total_error([]) == 0 and total_error([Cut("a", 1, 1, 0.0, 0.0)]) == 0
