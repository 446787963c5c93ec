"""The scale of losses in fp16: what it does to gradients, when it moves, and that its state goes on."""

import torch
from torch import nn

from sdlora.loss_scale import RISES_AFTER, START, LossScale


def test_gradients_that_fp16_cannot_hold_come_through_and_are_the_same_to_the_bit() -> None:
    def gradient(used: bool, factor: float) -> torch.Tensor:
        scale, weight = LossScale(used), nn.Parameter(torch.tensor([1.0, -3.0]))
        loss = (weight.half() * torch.tensor(factor).half()).float().sum() * 1e-6  # the gradient passes through fp16
        scale.up(loss).backward()
        scale.down([weight])
        assert weight.grad is not None
        return weight.grad

    assert gradient(False, 0.01).eq(0).all()
    assert torch.allclose(gradient(True, 0.01), torch.full((2,), 1e-8), rtol=2e-3)
    assert torch.equal(gradient(True, 512.0), gradient(True, 512.0))
    weight = nn.Parameter(torch.randn(100))
    weight.grad = torch.randn(100)
    before, scale = weight.grad.clone(), LossScale(True)
    weight.grad.mul_(scale.value)
    scale.down([weight, nn.Parameter(torch.zeros(1))])
    assert torch.equal(weight.grad, before)


def test_it_falls_at_once_and_rises_after_a_thousand_steps() -> None:
    scale = LossScale(True)
    assert scale.lowered(finite=False) and scale.value == START / 2
    assert not any(scale.lowered(finite=True) for _ in range(RISES_AFTER - 1)) and scale.value == START / 2
    assert not scale.lowered(finite=True) and scale.value == START
    assert sum(scale.lowered(finite=False) for _ in range(40)) == 16 and scale.value == 1  # then it is not the scale's fault


def test_other_precisions_are_left_alone() -> None:
    scale, loss = LossScale(False), torch.tensor(3.0)
    assert scale.up(loss) is loss and not scale.lowered(finite=False) and scale.value == 1


def test_its_state_goes_on() -> None:
    scale, other = LossScale(True), LossScale(True)
    for finite in (False, True, True):
        scale.lowered(finite)
    other.load_state(scale.state())
    assert (other.value, other.steps) == (START / 2, 2)
