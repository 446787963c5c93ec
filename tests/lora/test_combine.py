"""Several LoRAs as one: exact sums, and the thinned ones by hand."""

import pytest
import torch
from torch import Tensor

from sdlora.lora.change import Change, Factors
from sdlora.lora.combine import Thinning, concatenate, drop, elect, thin_out, trim


def lora(seed: int, rank: int, shape: tuple[int, ...] = (6, 5), alpha: float = 1.5) -> Change:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator)
    return Change(Factors(down, torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator), alpha))


def delta(change: Change) -> Tensor:
    assert change.shape is not None
    return change.delta(torch.zeros(change.shape))


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3)])
def test_ranks_add_up_and_so_do_deltas(shape: tuple[int, ...]) -> None:
    one, two = lora(0, 2, shape), lora(1, 3, shape, alpha=-7)
    joined = concatenate([(one, 0.5), (two, -2.0), (lora(2, 4, shape), 0.0)])
    assert joined.factors is not None and joined.factors.down.shape[0] == 5 and joined.factors.alpha == 5
    torch.testing.assert_close(delta(joined), 0.5 * delta(one) - 2 * delta(two))


def test_full_deltas_biases_and_norms_are_added() -> None:
    full, bias = torch.randn(6, 5), torch.randn(6)
    joined = concatenate([(lora(0, 2), 1.0), (Change(weight=full, bias=bias), 0.5), (Change(bias=bias), 2.0)])
    torch.testing.assert_close(delta(joined), delta(lora(0, 2)) + 0.5 * full)
    torch.testing.assert_close(joined.bias, 2.5 * bias)


def test_drop_by_hand_and_on_average() -> None:
    matrix = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    dropped = drop(matrix, 0.75, torch.Generator().manual_seed(0))
    # of four numbers those that stay are four times as large
    assert all(found in (0.0, 4 * number) for found, number in zip(dropped.flatten(), matrix.flatten(), strict=True))
    assert torch.equal(dropped, drop(matrix, 0.75, torch.Generator().manual_seed(0)))
    assert torch.equal(drop(matrix, 0.0, torch.Generator()), matrix)
    many = drop(torch.ones(400, 500), 0.9, torch.Generator().manual_seed(1))
    assert many.unique().tolist() == [0.0, pytest.approx(10.0)]
    assert float(many.mean()) == pytest.approx(1.0, abs=0.02)  # deviation 3 / sqrt(200000) = 0.007


def test_trim_by_hand() -> None:
    matrix = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    assert trim(matrix, 0.5).tolist() == [[0, 0], [3, -4]]
    assert trim(matrix, 0.25).tolist() == [[0, 0], [0, -4]]
    assert trim(matrix, 0.01).tolist() == [[0, 0], [0, -4]]
    assert torch.equal(trim(matrix, 1.0), matrix)


def test_election_by_hand() -> None:
    one = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])
    two = torch.tensor([[3.0, -5.0], [0.0, 0.0]])
    three = torch.tensor([[-1.0, 1.0], [-1.0, 0.0]])
    # sums 3, -2, -4, 0: means of (1, 3), of (-5), of (-3, -1), of nothing
    assert elect([one, two, three]).tolist() == [[2, -5], [-2, 0]]


def test_a_layer_is_thinned_out_with_its_strengths() -> None:
    one, two = torch.tensor([[1.0, 4.0], [-3.0, 0.5]]), torch.tensor([[2.0, -1.0], [-2.0, 0.0]])
    changes = [(Change(weight=one), 2.0), (Change(weight=two), 1.0)]
    # TIES at a half: (0, 8; -6, 0) and (2, 0; -2, 0) -> 2, 8, mean of (-6, -2), 0
    assert delta(thin_out("unet.a", changes, Thinning(trim=0.5))).tolist() == [[2, 8], [-4, 0]]
    assert torch.equal(delta(thin_out("unet.a", changes, Thinning())), 2 * one + two)
    dropped = delta(thin_out("unet.a", changes, Thinning(drop=0.5, seed=1)))
    assert torch.equal(dropped, delta(thin_out("unet.a", changes, Thinning(drop=0.5, seed=1))))
    choices = [
        {x + y for x in (0.0, 4 * a) for y in (0.0, 2 * b)} for a, b in zip(one.flatten().tolist(), two.flatten().tolist(), strict=True)
    ]
    assert all(found in choice for found, choice in zip(dropped.flatten().tolist(), choices, strict=True))
    large = [(Change(weight=torch.ones(50, 50)), 1.0)]
    seeds = [delta(thin_out("unet.a", large, Thinning(drop=0.5, seed=seed))) for seed in (1, 2)]
    assert not torch.equal(*seeds) and not torch.equal(seeds[0], delta(thin_out("unet.b", large, Thinning(drop=0.5, seed=1))))


def test_norms_are_added_whatever_is_thinned_out() -> None:
    norm = Change(weight=torch.ones(3), bias=torch.ones(3))
    thin = thin_out("unet.a", [(norm, 1.0), (norm, 0.5)], Thinning(drop=0.9, trim=0.1))
    assert thin.weight is not None and thin.weight.tolist() == [1.5] * 3 and thin.bias is not None and thin.bias.tolist() == [1.5] * 3
