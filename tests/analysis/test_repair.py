"""Repaired LoRAs: what the singular values are afterwards, and what noise leaves."""

import math

import pytest
import torch
from torch import Tensor

from sdlora.analysis.intruders import Layer
from sdlora.analysis.repair import hard_threshold, scale_intruders, threshold_over_median
from sdlora.analysis.spectrum import directions, spectrum
from sdlora.lora.change import Change, Factors, input_norms


def layer(base: Tensor, change: Change) -> Layer:
    return Layer("unet.a", base, change, directions(base, spectrum(base), change, 10))


def random_base(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def intruding(base: Tensor, sizes: tuple[float, ...]) -> Change:
    """A LoRA with one direction for each size that is equally far from all left singular vectors of the base."""
    u = torch.linalg.svd(base.flatten(1)).U
    signs = torch.randn(len(u), len(sizes), generator=torch.Generator().manual_seed(1)).sign()
    left = torch.linalg.qr(u @ signs).Q * torch.tensor(sizes)
    down = torch.linalg.qr(torch.randn(base[0].numel(), len(sizes), generator=torch.Generator().manual_seed(2))).Q.T
    return Change(Factors(down.reshape(-1, *base.shape[1:]), left.view(*left.shape, *[1] * (base.dim() - 2)), float(len(sizes))))


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24), (24, 6, 3, 3)])
@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_intruders_singular_values_are_scaled_and_all_else_stays(shape: tuple[int, ...], scale: float) -> None:
    base = random_base(shape)
    found = layer(base, intruding(base, (60.0, 50.0, 0.1)))
    repaired, count = scale_intruders(found, 0.5, scale)
    assert count == 2 and repaired.factors is not None and repaired.factors.down.shape == (5, *shape[1:])
    before, after = ((base + change.delta(base)).double().flatten(1) for change in (found.change, repaired))
    u, s, vh = torch.linalg.svd(before, full_matrices=False)
    assert found.intruders().tolist()[:3] == [True, True, False]
    s[:2] *= scale
    torch.testing.assert_close(after, (u * s) @ vh, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(torch.linalg.svdvals(after), s.sort(descending=True).values, atol=2e-4, rtol=1e-4)


def test_a_lora_without_intruders_is_left_as_it_is() -> None:
    base = random_base((12, 12))
    change = Change(Factors(torch.ones(1, 12), 0.01 * torch.ones(12, 1), 1.0), bias=torch.ones(12))
    assert scale_intruders(layer(base, change), 0.5, 0.0) == (change, 0)


def test_what_is_not_of_low_rank_is_repaired_as_a_delta() -> None:
    base = random_base((24, 30))
    lora = intruding(base, (60.0,))
    assert lora.factors is not None
    full = Change(weight=lora.delta(base))
    dora = Change(lora.factors, dora_scale=input_norms(base + lora.delta(base)))  # sizes as they come out: the same delta
    wanted = scale_intruders(layer(base, lora), 0.5, 0.25)[0].delta(base)
    for change in (full, dora):
        repaired, count = scale_intruders(layer(base, change), 0.5, 0.25)
        assert count == 1 and repaired.dora_scale is None
        torch.testing.assert_close(repaired.delta(base), wanted, atol=1e-4, rtol=1e-4)


def test_the_thresholds_of_the_paper() -> None:
    # Gavish & Donoho 2014: omega(1) = 2.858, and 0.56 b^3 - 0.95 b^2 + 1.82 b + 1.43 is within 0.02 for 0 < b <= 1 (their eq. 5)
    assert threshold_over_median(1.0) == pytest.approx(2.858, abs=2e-3)
    for beta in (0.01, 0.1, 0.3, 0.5, 0.8, 1.0):
        assert threshold_over_median(beta) == pytest.approx(0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43, abs=0.03)
    assert threshold_over_median(1e-6) == pytest.approx(math.sqrt(2), abs=1e-2)  # of a law that is one point


@pytest.mark.parametrize("low_rank", [False, True])
def test_signal_stays_and_noise_goes(low_rank: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rank, outputs, inputs = (16, 200, 200) if low_rank else (60, 60, 100)
    noise = torch.randn(outputs, rank, generator=generator) / outputs**0.5
    noise[:, :3] *= 8  # what was learned, in three directions
    down = torch.linalg.qr(torch.randn(inputs, rank, generator=generator)).Q.T
    factors = Factors(down, noise, float(rank))
    change = Change(factors) if low_rank else Change(weight=factors.delta())
    kept, triplets, number = hard_threshold(change)
    assert number == 3 and kept is not None and kept.factors is not None and kept.factors.down.shape[0] == 3
    u, s, vh = torch.linalg.svd(factors.delta(), full_matrices=False)
    torch.testing.assert_close(kept.delta(torch.zeros(outputs, inputs)), (u[:, :3] * s[:3]) @ vh[:3], atol=1e-4, rtol=1e-3)
    assert len(triplets.s) == rank


def test_what_noise_could_make_altogether_leaves_nothing() -> None:
    flat = Change(Factors(torch.eye(4, 50), torch.eye(60, 4), 4.0))
    assert hard_threshold(flat)[0] is None
