"""The matched rate: how fast down and up must learn so that a layer's weight moves as far as full fine-tuning would move it.

**What is matched.** Adam moves a parameter X by its rate times u_X = m_hat / (sqrt(v_hat) + eps). Call the root mean square of u_X's
entries rho: it is 1 at the first step, where u_X is the gradient's sign, and falls to about 0.2 where gradients are noise. So full
fine-tuning at the rate eta moves a weight W (O, I) by eta ||u_W|| = eta rho sqrt(O I), in the Frobenius norm. LoRA's weight is
W + s Up Down. At the rate c for down and lambda c for up (LoRA+) it moves, to first order, by c s (lambda u_up Down + Up u_down). Both are
equally far if

    c = eta rho sqrt(O I) / (|s| ||lambda u_up Down + Up u_down||).

rho is in both parts of the fraction, so c hardly changes from step to step, and need not be computed at each of them.

**The norm** asks for no (O, I) matrix: the change is [lambda u_up, Up] [Down; u_down] = A B, and ||A B||^2 is the sum over all entries
of (A^T A) * (B B^T), both (2R, 2R).

**rho** is u_W's, which LoRA never computes. But up's gradient, s G Down^T, is W's gradient G seen through the rows of Down: as noisy as G
entry for entry, as long as Down has not turned towards G. Down's gradient, s Up^T G, is G seen through the columns of Up. Where Up
starts at zero, that gradient grows along with Up, which to Adam looks steady: its direction's rms is 0 at the first step and 1.4
to 1.5 times u_W's after fifty. So rho is the rms of whichever direction does more of the moving: u_up's where Down is the larger (kaiming,
gaussian, orthonormal), u_down's where Up is (down_zero), either where they are alike (pissa, milora, olora).

**Cases.** Up = 0: what is left is lambda u_up Down, and the same for ever where down is frozen. Down = 0: Up u_down. A convolution is the
matrix product of its flattened factors, I = inputs * kh * kw. A start that is taken off again is constant and moves nothing. The sign of s
turns the change round and leaves its norm. What a learned alpha moves comes on top.

**The bound.** No entry may move further in a step than the root mean square of the larger matrix: beyond that the neglected
c^2 s lambda u_up u_down rivals the first order, and the match means nothing. It also makes the rate finite for s near 0, as a learned alpha
may pass it. A kaiming start meets it at eta = |s| sqrt(R) / (3 I): 4e-3 for 320 inputs at rank 16 and scale 1, but 6e-5 for a convolution
of 11,520 inputs at rank 4, which can follow no higher rate. A layer without gradient gets 0.

`tests/studies/matched_rate.py` measures how well LoRA's steps match those of Adam on W from the same point. 123 of the embedded model's
170 layers have gradients far above Adam's eps. At rank 16 98 to 100 % of them are within 10 % over the first ten steps, and the median
layer within 2 %. Near eps the scale counts, since it multiplies LoRA's gradients and not W's: a few of the other layers move half or
twice as far. A full run at the same rate is another matter: where eta is large, the two soon stand elsewhere and see other gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def next_direction(parameter: Tensor, state: Mapping[str, Tensor], betas: tuple[float, float], eps: float) -> Tensor:
    """The direction m_hat / (sqrt(v_hat) + eps) of the step that Adam is about to take (Kingma & Ba 2015, algorithm 1), from the gradient
    at hand and torch.optim.AdamW's state of the parameter, empty before its first step. Both stay as they are."""
    assert parameter.grad is not None
    gradient = parameter.grad
    if not state:
        return gradient / (gradient.abs() + eps)
    step = state["step"] + 1
    mean = state["exp_avg"].lerp(gradient, 1 - betas[0]) / (1 - betas[0] ** step)
    square = state["exp_avg_sq"].lerp(gradient.square(), 1 - betas[1]) / (1 - betas[1] ** step)
    return mean / (square.sqrt() + eps)


@torch.no_grad()
def matched_rate(
    rate: float, scale: float | Tensor, down: Tensor, up: Tensor, down_direction: Tensor | None, up_direction: Tensor, up_ratio: float
) -> Tensor:
    """The rate of down (c above; up's is `up_ratio` times that) which moves the weight as far as full fine-tuning at `rate`.

    Matrices and their directions: (R, I) or (R, I, kh, kw), and (O, R) or (O, R, 1, 1); `down_direction` None: down is frozen. The result
    has no dimension and lies on their device, so that the rates of all layers can be fetched at once: `torch.stack(rates).tolist()`.
    """
    down, up, up_direction = down.flatten(1), up.flatten(1), up_direction.flatten(1)
    down_direction = torch.zeros_like(down) if down_direction is None else down_direction.flatten(1)
    left = torch.cat([up_ratio * up_direction, up], dim=1)  # (O, 2R)
    right = torch.cat([down, down_direction])  # (2R, I)
    products = (left.T @ left) * (right @ right.T)  # (2R, 2R): inner products of the rank-one matrices which add up to the change
    rank = down.shape[0]
    by_up, by_down = products[:rank, :rank].sum(), products[rank:, rank:].sum()  # squared norms of lambda u_up Down and Up u_down
    rho = torch.where(by_up >= by_down, _rms(up_direction), _rms(down_direction))
    wanted = rate * rho * math.sqrt(up.shape[0] * down.shape[1])
    return _bounded(wanted / (scale * products.sum().clamp(min=0).sqrt()).abs().clamp(min=TINY), down, up, up_ratio)


@torch.no_grad()
def expected_rate(rate: float, scale: float | Tensor, down: Tensor, up: Tensor, up_ratio: float, trains_down: bool) -> Tensor:
    """What `matched_rate` comes to for directions of independent entries, of which it then needs none:

        c = rate sqrt(O I) / (|s| sqrt(lambda^2 O ||Down||^2 + I ||Up||^2)),    without ||Up|| where down is frozen.

    For kaiming starts about rate * sqrt(3 I / R) / |s|. Exact for a frozen orthonormal down.
    """
    down, up = down.flatten(1), up.flatten(1)
    outputs, inputs = up.shape[0], down.shape[1]
    square = up_ratio**2 * outputs * down.square().sum()
    if trains_down:
        square = square + inputs * up.square().sum()
    return _bounded(rate * math.sqrt(outputs * inputs) / (scale * square.sqrt()).abs().clamp(min=TINY), down, up, up_ratio)


TINY = torch.finfo(torch.float32).tiny  # 0 / TINY is the rate of a layer that nothing moves


def _bounded(rate: Tensor, down: Tensor, up: Tensor, up_ratio: float) -> Tensor:
    """At most the rms of the larger matrix's entries, for down's rate and for up's."""
    return torch.minimum(rate, torch.maximum(_rms(down), _rms(up)) / max(1.0, up_ratio))


def _rms(matrix: Tensor) -> Tensor:
    return matrix.square().mean().sqrt()
