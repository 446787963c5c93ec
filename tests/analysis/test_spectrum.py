"""Singular vectors of adapted weights: what the short way finds is what a full decomposition finds."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdlora.analysis import spectrum as module
from sdlora.analysis.spectrum import Spectra, Spectrum, directions, largest_eigenvectors, spectrum
from sdlora.data.cache import TensorCache
from sdlora.lora.change import Change, Factors

SHAPES = [(40, 40), (40, 90), (90, 40), (24, 8, 3, 3), (64, 4, 3, 3), (200, 220), (220, 150)]


def random(shape: tuple[int, ...], seed: int, fall: float = 0.0) -> Tensor:
    """A base weight; the larger `fall`, the faster its singular values do."""
    matrix = torch.randn(shape[0], int(torch.tensor(shape[1:]).prod()), generator=torch.Generator().manual_seed(seed))
    return (matrix * torch.linspace(1, 0, matrix.shape[1]).mul(-fall).exp().flip(0)).view(shape)


def lora(shape: tuple[int, ...], rank: int, size: float, seed: int) -> Change:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator)
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) * torch.logspace(0, -2, rank).view(
        1, -1, *[1] * (len(shape) - 2)
    )
    return Change(Factors(down, up * size, 3.0))


def by_svd(base: Tensor, adapted: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Largest |cosine| of each of the top left singular vectors with any of the base's, and the singular values: by the definition."""
    of_base = torch.linalg.svd(base.double().flatten(1), full_matrices=False).U
    u, s, _ = torch.linalg.svd(adapted.double().flatten(1), full_matrices=False)
    return (u[:, :top].T @ of_base).abs().amax(dim=1), s[:top]


@pytest.mark.parametrize("shape", SHAPES)
def test_counts_are_those_of_the_full_decomposition(shape: tuple[int, ...]) -> None:
    counts = set()
    for seed in range(12):
        rank, size, fall = (1, 4, 16)[seed % 3], (0.003, 0.03, 0.3, 1.0)[seed % 4], (0.0, 3.0)[seed % 2]
        base, change = random(shape, seed, fall), lora(shape, rank, size, seed + 100)
        found = directions(base, spectrum(base), change, 10)
        wanted, values = by_svd(base, base.double() + change.delta(base).double(), 10)
        torch.testing.assert_close(found.cosines.amax(dim=1), wanted, atol=2e-4, rtol=0)
        torch.testing.assert_close(found.s, values, rtol=1e-5, atol=0)
        for threshold in (0.3, 0.5, 0.8):
            assert (found.cosines.amax(dim=1) < threshold).sum() == (wanted < threshold).sum()
        counts.add(int((wanted < 0.5).sum()))
    assert len(counts) > 1  # the cases differ


def test_the_vectors_are_those_of_the_adapted_weight() -> None:
    for shape in SHAPES:
        base, change = random(shape, 1), lora(shape, 4, 0.3, 2)
        found = directions(base, spectrum(base), change, 6)
        adapted = (base + change.delta(base)).double().flatten(1)
        torch.testing.assert_close((found.u.T @ adapted).norm(dim=1), found.s, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.u.T @ found.u, torch.eye(6).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [60, 200])
def test_eigenvectors_of_a_diagonal_and_a_low_rank(n: int) -> None:
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        d = torch.rand(n, generator=generator).double().sort(descending=True).values
        d = torch.zeros_like(d) if seed == 6 else torch.ones_like(d) if seed == 7 else d  # many equal ones
        low, b = (torch.randn(*of, generator=generator).double() * seed / n for of in ((n, 6), (3, 30)))
        m = torch.cat([torch.cat([torch.zeros(3, 3), torch.eye(3)], 1), torch.cat([torch.eye(3).double(), b @ b.T], 1)])
        whole = d.diag() + low @ m @ low.T
        values, vectors = largest_eigenvectors(d, low, b @ b.T, 5)
        torch.testing.assert_close(values, torch.linalg.eigvalsh(whole).flip(0)[:5], atol=1e-9, rtol=0)
        torch.testing.assert_close(whole @ vectors, vectors * values, atol=1e-8, rtol=0)
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(5).double(), atol=1e-9, rtol=0)


def test_what_is_no_low_rank_is_decomposed() -> None:
    base, delta = random((30, 20), 0), random((30, 20), 1) * 0.3
    found = directions(base, spectrum(base), Change(weight=delta), 10)
    wanted, values = by_svd(base, base + delta, 10)
    torch.testing.assert_close(found.cosines.amax(dim=1), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.s, values, rtol=1e-5, atol=0)


def test_a_base_of_lower_rank_has_as_many_vectors() -> None:
    base = torch.zeros(6, 4)
    base[0, 0], base[1, 1] = 3.0, 1.0
    found = spectrum(base)
    assert found.u.shape == (6, 2) and found.s.tolist() == [3.0, 1.0]


def test_spectra_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [random((12, 8), seed) for seed in range(3)]
    spectra = Spectra(TensorCache(tmp_path, "a"))
    computed = [spectra.of(weight) for weight in weights]
    spectra.flush()

    def refuse(weight: Tensor) -> Spectrum:
        raise AssertionError("it is there")

    monkeypatch.setattr(module, "spectrum", refuse)
    again = Spectra(TensorCache(tmp_path, "b"))
    for weight, before in zip(weights, computed, strict=True):
        assert all(torch.equal(*pair) for pair in zip(again.of(weight), before, strict=True))
    for other in (weights[0].half(), weights[0].view(12, 2, 2, 2), weights[0] + 1):
        with pytest.raises(AssertionError, match="it is there"):
            again.of(other)
