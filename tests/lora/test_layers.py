"""The adapted layer: its formula by hand, no change at the start, exact export, gradients where they belong."""

import pytest
import torch
from torch import nn

from sdlora.lora.inits import INITS
from sdlora.lora.layers import LoraLayer, disabled


def bases() -> list[tuple[nn.Linear | nn.Conv2d, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        (nn.Linear(12, 20), torch.randn(2, 7, 12)),
        (nn.Conv2d(6, 10, 1), torch.randn(2, 6, 5, 5)),
        (nn.Conv2d(6, 10, 3, stride=2, padding=1), torch.randn(2, 6, 8, 8)),
    ]


def layer_for(base: nn.Linear | nn.Conv2d, init: str, alpha: float = 3.0) -> LoraLayer:
    return LoraLayer(base, 4, alpha, init, True, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", range(3))
def test_output_is_unchanged_at_the_start(init: str, kind: int) -> None:
    base, x = bases()[kind]
    torch.testing.assert_close(layer_for(base, init)(x), base(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", range(3))
def test_factors_give_the_trained_output(init: str, kind: int) -> None:
    base, x = bases()[kind]
    layer = layer_for(base, init)
    with torch.no_grad():
        for matrix in (layer.down, layer.up):
            matrix += torch.randn(matrix.shape, generator=torch.Generator().manual_seed(5)) * 0.3
        layer.alpha.fill_(-1.7)  # a learned alpha may even turn negative
    down, up, alpha = layer.factors()
    merged = type(base)(*((12, 20) if kind == 0 else (6, 10, base.kernel_size[0], base.stride[0], base.padding[0])))  # type: ignore
    with torch.no_grad():
        merged.weight.copy_(base.weight + (alpha / down.shape[0] * up.flatten(1) @ down.flatten(1)).view_as(base.weight))
        merged.bias.copy_(base.bias)
        torch.testing.assert_close(merged(x), layer(x), atol=2e-5, rtol=1e-5)
        assert (merged(x) - base(x)).abs().max() > 0.05


def test_hand_computed_number() -> None:
    base = nn.Linear(2, 1, bias=False)
    layer = LoraLayer(base, 1, 0.5, "kaiming", True, torch.Generator())
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.down.copy_(torch.tensor([[3.0, -1.0]]))
        layer.up.fill_(2.0)
    x = torch.tensor([[1.0, 1.0]])
    assert float(layer(x)) == pytest.approx(3 + 0.5 * 2 * 2)
    layer(x).sum().backward()
    assert float(layer.alpha.grad) == pytest.approx(4.0)  # d/d alpha of alpha / 1 * up * down(x)
    assert base.weight.grad is None


def test_disabled_gives_the_base_exactly_and_restores() -> None:
    base, x = bases()[0]
    layer = layer_for(base, "pissa")
    with torch.no_grad():
        layer.up += 1
    with disabled([layer]):
        assert torch.equal(layer(x), base(x))
    assert not torch.allclose(layer(x), base(x))


@pytest.mark.parametrize("init", INITS)
def test_only_what_the_init_trains_gets_a_gradient(init: str) -> None:
    base, x = bases()[0]
    layer = layer_for(base, init)
    layer(x).square().sum().backward()
    assert (layer.down.grad is None) == (init == "orthonormal")
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in (layer.down, layer.up))


def test_state_round_trip() -> None:
    base, x = bases()[0]
    layer, other = layer_for(base, "pissa"), layer_for(base, "pissa", alpha=9.0)
    with torch.no_grad():
        layer.up += 0.1
    other.load_state(layer.state())
    assert torch.equal(layer(x), other(x))
    with pytest.raises(KeyError):
        layer_for(base, "kaiming").load_state(layer.state())


@pytest.mark.parametrize("init", INITS)
def test_rank_stabilised_factors_are_exact(init: str) -> None:
    base, x = bases()[0]
    layer = LoraLayer(base, 9, 6.0, init, True, torch.Generator().manual_seed(1), "rank_stabilised")
    assert float(layer.scale.detach()) == pytest.approx(6 / 3)
    with torch.no_grad():
        layer.up += 0.1
        down, up, alpha = layer.factors()
        torch.testing.assert_close(base(x) + x @ (alpha / down.shape[0] * up @ down).T, layer(x), atol=2e-5, rtol=1e-5)
