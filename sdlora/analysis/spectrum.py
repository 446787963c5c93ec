"""Left singular vectors: all of a base weight's, which are computed once and kept on disk, and the largest of what a LoRA makes of it.

**Without a decomposition of its own.** Let W0 = U diag(s) V^T be the base weight (O, I) and W = W0 + A B what a LoRA of rank R makes of it.
Q spans what A has outside of U (nothing where O <= I). In the basis E = [U Q] the matrix W W^T, whose eigenvectors are W's left singular
vectors, is diagonal but for a part of rank 2R:

    E^T W W^T E = diag(s^2, 0) + X P^T + P X^T + P B B^T P^T = D + L M L^T,   P = E^T A,  X = E^T W0 B^T,  L = [X P],  M = [0 1; 1 B B^T].

Its largest eigenvectors come from Davidson's method (1975): the small matrix that the basis so far leaves of it is solved, and what each
vector lacks, divided by theta - D, joins the basis; as D is all but the whole matrix, five to seven rounds reach rounding error. The basis
begins with L and with the coordinates of the 2 (k + R) largest s: as sigma_k(W) >= sigma_{k+R}(W0) (Weyl), no eigenvector that is asked
for can lie in the other coordinates alone. Whether none was missed is then counted by Sylvester's law of inertia. A layer of 1280 x 1280
takes 0.03 s so, and 1.5 s by a decomposition. And an eigenvector's entries in this basis are the cosines with the base's own vectors.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from sdlora.data.cache import TensorCache, fingerprint
from sdlora.lora.change import Change, Factors
from sdlora.tensors import tensor_bytes

VERSION = 1  # part of the key: raise it when `spectrum` comes to compute something else
FLUSH_BYTES = 2**28  # of spectra in memory before they are written
RANK_TOLERANCE = 1e-6  # share of the largest singular value below which one counts as zero: squares of doubles tell no less apart
CONVERGED = 1e-10  # norm of an eigenvector's remainder over the largest eigenvalue


class Spectrum(NamedTuple):
    """Of a weight (O, ...) as a matrix (O, I): its left singular vectors, largest first, as many as its rank K."""

    u: Tensor  # (O, K) fp32
    s: Tensor  # (K,) fp64


class Directions(NamedTuple):
    """The largest left singular vectors of an adapted weight."""

    u: Tensor  # (O, k) fp64
    s: Tensor  # (k,) fp64, largest first
    cosines: Tensor  # (k, K) in 0..1: |cosine| with each left singular vector of the base


def spectrum(weight: Tensor) -> Spectrum:
    """From the eigenvectors of the smaller Gram matrix, in fp64."""
    matrix = weight.double().flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)  # ascending
    s = squares.flip(0).clamp(min=0).sqrt()
    rank = max(1, int((s > RANK_TOLERANCE * s[0]).sum()))
    vectors, s = vectors.flip(1)[:, :rank], s[:rank]
    return Spectrum((vectors if wide else matrix @ (vectors / s.clamp(min=torch.finfo(s.dtype).tiny))).float(), s)


class Spectra:
    """Spectra of base weights, from the cache or computed into it."""

    def __init__(self, cache: TensorCache) -> None:
        self._cache, self._unsaved = cache, 0

    def of(self, weight: Tensor) -> Spectrum:
        """A key is the weight's bytes: fine-tuned models share what they have in common."""
        key = fingerprint(VERSION, str(weight.dtype), list(weight.shape), hashlib.sha256(tensor_bytes(weight)).hexdigest())
        entry = self._cache.get(key)
        if entry is None:
            found = spectrum(weight)
            self._cache.put(key, found._asdict())
            self._unsaved += found.u.nbytes
            if self._unsaved >= FLUSH_BYTES:
                self.flush()
            return found
        return Spectrum(entry["u"], entry["s"])

    def flush(self) -> None:
        self._cache.flush()
        self._unsaved = 0


def directions(base: Tensor, spectrum_of_base: Spectrum, change: Change, top: int) -> Directions:
    """The `top` largest left singular vectors of a base weight that is changed so. What is no plain low rank is decomposed in full."""
    if change.factors is not None and change.weight is None and change.dora_scale is None:
        return _of_low_rank(base, spectrum_of_base, change.factors, top)
    found = spectrum(base.float() + change.delta(base))
    u = found.u[:, :top].double()
    return Directions(u, found.s[:top], (u.T @ spectrum_of_base.u.double()).abs())


def _of_low_rank(base: Tensor, of_base: Spectrum, factors: Factors, top: int) -> Directions:
    matrix, u = base.float().flatten(1), of_base.u.double()
    a = factors.up.double().flatten(1) * (factors.alpha / factors.down.shape[0])  # (O, R)
    b = factors.down.double().flatten(1)  # (R, I)
    p, x = u.T @ a, u.T @ (matrix @ b.T.float()).double()  # (K, R)
    squares, basis = of_base.s.square(), u
    if u.shape[1] < u.shape[0]:
        q, rest = torch.linalg.qr(a - u @ p)  # (O, R), (R, R)
        basis = torch.cat([u, q], dim=1)
        p = torch.cat([p, rest])
        x, squares = (torch.cat([of_u, of_u.new_zeros(len(rest), *of_u.shape[1:])]) for of_u in (x, squares))
    # in the order of their squares, as the entries of Q's part are the last
    values, vectors = largest_eigenvectors(squares, torch.cat([x, p], dim=1), b @ b.T, top)
    return Directions(basis @ vectors, values.clamp(min=0).sqrt(), vectors[: u.shape[1]].abs().T)


def largest_eigenvectors(d: Tensor, low: Tensor, gram: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Of diag(d) + L M L^T with d (n,) falling, L = `low` = [X P] (n, 2R) and M = [0 1; 1 `gram`]: the `top` largest eigenvalues (k,),
    largest first, and their eigenvectors (n, k). All fp64."""
    rank = len(gram)
    eye = torch.eye(rank).to(gram)
    m = torch.cat([torch.cat([torch.zeros_like(gram), eye], dim=1), torch.cat([eye, gram], dim=1)])
    top = min(top, len(d))
    first = min(len(d), 2 * (top + rank))  # coordinates that are in the basis themselves
    values, vectors = _davidson(d, low, m, top, first)
    if first < len(d) and _count_above(float(values[-1]) * (1 - 1e-9), d, low, gram) != top:  # one missed, or equal ones
        values, vectors = _davidson(d, low, m, top, len(d))
    return values, vectors


def _davidson(d: Tensor, low: Tensor, m: Tensor, top: int, first: int) -> tuple[Tensor, Tensor]:
    """Ends when all is found, at the latest when the basis is whole."""
    rest, low_rest = d[first:], low[first:]
    basis = torch.linalg.qr(low_rest).Q  # (n - first, B) beside the first coordinates
    while True:
        seen = torch.cat([low[:first], basis.T @ low_rest])  # (first + B, 2R): L in the basis
        small = seen @ m @ seen.T
        small[:first, :first] += d[:first].diag()
        small[first:, first:] += basis.T @ (rest[:, None] * basis)
        values, vectors = (of.flip(-1)[..., :top] for of in torch.linalg.eigh(small))
        pulled = low_rest @ (m @ (seen.T @ vectors))  # (n - first, k)
        inside = basis @ vectors[first:]
        remainder = (rest[:, None] - values) * inside + pulled
        if basis.shape[1] == len(rest) or float(remainder.norm(dim=0).max()) <= CONVERGED * abs(float(values[0])):
            return values, torch.cat([vectors[:first], inside])
        # a distance of zero is that of a vector which is found: what joins then does no harm
        distance = (values - rest[:, None]).clamp(min=CONVERGED * abs(float(values[0])))
        joined = torch.cat([basis, torch.nn.functional.normalize(pulled / distance, dim=0)], dim=1)
        basis = torch.linalg.qr(joined).Q


def _count_above(theta: float, d: Tensor, low: Tensor, gram: Tensor) -> int:
    """How many eigenvalues of diag(d) + L M L^T lie above theta, by the inertia of [[D - theta, L], [L^T, -M^-1]] taken apart in both ways
    (Haynsworth 1968); M has as many negative eigenvalues as positive ones."""
    eye = torch.eye(len(gram)).to(gram)
    inverse = torch.cat([torch.cat([-gram, eye], dim=1), torch.cat([eye, torch.zeros_like(gram)], dim=1)])
    small = -inverse - low.T @ (low / (d - theta)[:, None])
    return int((d > theta).sum()) + int((torch.linalg.eigvalsh(small) > 0).sum()) - len(gram)
