"""What files hold of a layer: its meaning by hand, and the nearest file of lower rank."""

import pytest
import torch

from sdlora.lora.change import Change, Factors, Triplets, channel_norms, input_norms, triplets_of_matrix, truncate


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_deltas_by_hand() -> None:
    base = torch.tensor([[3.0, 0.0], [4.0, 2.0]])
    factors = Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [2.0]]), 0.5)
    assert Change(factors).delta(base).tolist() == [[0, 0], [1, 0]]
    assert Change(weight=torch.ones(2, 2)).delta(base).tolist() == [[1, 1], [1, 1]]
    assert Change(bias=torch.ones(2)).delta(base).tolist() == [[0, 0], [0, 0]]
    assert input_norms(base).tolist() == [[5, 2]]
    # DoRA: columns of base + delta are (3, 5) and (0, 2); their lengths become 10 and 2.
    dora = Change(factors, dora_scale=torch.tensor([[10.0, 2.0]]))
    root = 34**0.5
    torch.testing.assert_close(dora.delta(base), torch.tensor([[30 / root - 3, 0.0], [50 / root - 4, 0.0]]))
    assert not dora.is_plain and Change(factors).is_plain and not Change(factors, bias=torch.ones(2)).is_plain


@pytest.mark.parametrize("shape", [(12, 8), (6, 4, 3, 3)])
def test_the_norm_is_that_of_the_delta(shape: tuple[int, ...]) -> None:
    factors = Factors(random(5, *shape[1:]), random(shape[0], 5, *[1] * (len(shape) - 2)), -2.0)
    assert factors.norm() == pytest.approx(float(factors.delta().norm()), rel=1e-5)
    by_hand = Factors(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]]), -0.5)
    assert by_hand.norm() == pytest.approx(5.0)


def test_a_channel_of_zeros_stays_zero() -> None:
    base = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    dora = Change(Factors(torch.zeros(1, 2), torch.ones(2, 1), 1.0), dora_scale=torch.tensor([[0.5, 5**0.5]]))
    torch.testing.assert_close(dora.delta(base), torch.zeros(2, 2))


def test_input_norms_of_a_convolution() -> None:
    torch.testing.assert_close(input_norms(torch.ones(3, 2, 2, 2)), torch.full((1, 2, 1, 1), 12**0.5))


@pytest.mark.parametrize("shape", [(12, 8), (6, 4, 3, 3)])
def test_truncation_is_the_nearest_of_its_rank(shape: tuple[int, ...]) -> None:
    base, weight = random(*shape), 0.1 * random(*reversed(shape)).reshape(shape)
    singular = torch.linalg.svdvals(weight.flatten(1))
    for rank in (1, 3):
        factors, error = truncate(Change(weight=weight), base, rank)
        assert factors.down.shape == (rank, *shape[1:]) and factors.up.shape[:2] == (shape[0], rank)
        assert error == pytest.approx(float(singular[rank:].norm() / singular.norm()), rel=1e-4)
        assert float((factors.delta() - weight).norm() / weight.norm()) == pytest.approx(error, rel=1e-4)


def test_without_a_rank_as_many_as_keep_the_energy() -> None:
    # singular values 3, 0.1, 0.01: the second holds 1.1e-3 of the energy, the third 1.1e-5
    weight = torch.diag(torch.tensor([3.0, 0.1, 0.01]))
    factors, error = truncate(Change(weight=weight), torch.zeros(3, 3))
    assert factors.down.shape[0] == 2 and error == pytest.approx(0.01 / (9.0101**0.5), rel=1e-3)
    assert truncate(Change(weight=weight), torch.zeros(3, 3), kept=0.99)[0].down.shape[0] == 1
    nothing, error = truncate(Change(weight=torch.zeros(3, 3)), torch.zeros(3, 3))
    assert nothing.down.shape == (1, 3) and not nothing.delta().any() and error == 0


@pytest.mark.parametrize("shape", [(12, 8), (6, 4, 3, 3)])
def test_a_lora_is_truncated_as_its_product_would_be(shape: tuple[int, ...]) -> None:
    factors = Factors(random(5, *shape[1:]), random(shape[0], 5, *[1] * (len(shape) - 2)), -2.0)
    small, error = truncate(Change(factors), torch.zeros(shape), 2)
    dense, same = truncate(Change(weight=factors.delta()), torch.zeros(shape), 2)
    assert error == pytest.approx(same, rel=1e-4)
    torch.testing.assert_close(small.delta(), dense.delta(), atol=1e-4, rtol=1e-4)
    exact, nothing = truncate(Change(factors), torch.zeros(shape), 5)
    torch.testing.assert_close(exact.delta(), factors.delta(), atol=1e-4, rtol=1e-4)
    assert nothing < 1e-6


def test_doras_size_of_outputs_by_hand() -> None:
    base = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    change = Change(Factors(torch.zeros(1, 2), torch.ones(2, 1), 1.0), dora_scale=torch.tensor([[10.0], [1.0]]))
    torch.testing.assert_close(change.delta(base), torch.tensor([[3.0, 4.0], [0.0, -1.0]]))
    assert channel_norms(torch.ones(3, 2, 2, 2), (3, 1, 1, 1)).flatten().tolist() == pytest.approx([8**0.5] * 3)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 4, 3, 3)])
def test_triplets_of_a_matrix_are_those_of_its_svd(shape: tuple[int, ...]) -> None:
    matrix = random(*shape)
    u, s, vh = triplets_of_matrix(matrix)
    torch.testing.assert_close(s, torch.linalg.svdvals(matrix.flatten(1)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((u * s) @ vh, matrix.flatten(1), atol=1e-5, rtol=1e-5)
    for vectors in (u.T, vh):
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(s)), atol=1e-4, rtol=0)


def test_the_fewest_ranks_that_keep_a_share() -> None:
    # energies 16, 9, 4, 1 of 30: one rank keeps 53 %, two 83 %, three 97 %
    triplets = Triplets(torch.eye(4), torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.eye(4))
    assert [triplets.rank_for(kept) for kept in (0.0, 0.5, 0.6, 0.84, 0.97, 1.0)] == [1, 1, 2, 3, 4, 4]
    factors, error = triplets.factors(2, (4, 4))
    assert factors.alpha == 2 and error == pytest.approx((5 / 30) ** 0.5)
    torch.testing.assert_close(factors.delta(), torch.diag(torch.tensor([4.0, 3.0, 0.0, 0.0])))
    assert triplets.factors(9, (4, 4))[0].down.shape == (4, 4)
