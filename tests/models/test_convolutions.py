"""Wide convolutions over few pixels are products, with the outputs and gradients of oneDNN's; all others are oneDNN's to the bit."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sdlora.models import convolutions
from sdlora.models.convolutions import WideConv2d, widen

LAYERS = {
    "3 x 3": (nn.Conv2d(4, 6, 3, padding=1), 7, 5),
    "stride": (nn.Conv2d(4, 6, 3, padding=1, stride=2), 8, 6),
    "stride, odd sides": (nn.Conv2d(4, 6, 3, padding=1, stride=2), 7, 5),
    "unpadded": (nn.Conv2d(4, 6, 3, stride=2, padding=0), 9, 7),
    "1 x 1": (nn.Conv2d(4, 6, 1), 3, 4),
    "without bias": (nn.Conv2d(4, 6, (3, 1), padding=(1, 0), bias=False), 5, 5),
}


@pytest.fixture
def all_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "LEAST_WEIGHTS", 1)


def widened(layer: nn.Conv2d) -> nn.Conv2d:
    layer = copy.deepcopy(layer).requires_grad_(False)
    widen(layer)
    assert type(layer) is WideConv2d
    return layer


def outputs_and_gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    out.sin().sum().backward()
    assert x.grad is not None
    return [out.detach(), x.grad]


@pytest.mark.parametrize(("layer", "height", "width"), LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_and_gradients_are_the_plain_layers(
    all_are_wide: None, layer: nn.Conv2d, height: int, width: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(batch, 4, height, width)
    expected = outputs_and_gradients(layer, x)
    monkeypatch.delattr(nn.Conv2d, "_conv_forward")  # oneDNN is not asked
    for found, plain in zip(outputs_and_gradients(widened(layer), x), expected, strict=True):
        assert found.shape == plain.shape and (found - plain).norm() <= 1e-5 * plain.norm()


def test_a_product_by_hand(all_are_wide: None) -> None:
    layer = nn.Conv2d(1, 2, (1, 2))
    layer.weight.data = torch.tensor([[[[1.0, 2.0]]], [[[3.0, -1.0]]]])
    layer.bias = nn.Parameter(torch.tensor([0.5, 0.0]))
    assert torch.equal(widened(layer)(torch.tensor([[[[1.0, 10.0, 100.0]]]])), torch.tensor([[[[21.5, 210.5]], [[-7.0, -70.0]]]]))


def test_many_pixels_are_left_to_onednn(all_are_wide: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "unfold", None)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    for shape in ((1, 4, 16, 17), (5, 4, 8, 8)):  # more than 256, over the batch
        x = torch.randn(shape)
        assert all(map(torch.equal, outputs_and_gradients(widened(layer), x), outputs_and_gradients(layer, x)))
    with pytest.raises(TypeError):
        widened(layer)(torch.randn(4, 4, 8, 8))


def test_under_autocast_it_computes_in_its_precision(all_are_wide: None) -> None:
    layer, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert widened(layer)(x).dtype == torch.bfloat16


def test_only_what_is_wide_and_plain_changes_its_class_and_nothing_its_names() -> None:
    with torch.device("meta"):
        net = nn.Sequential(
            nn.Conv2d(1280, 1280, 3),
            nn.Conv2d(1280, 1279, 3),
            nn.Conv2d(2560, 1280, 3, stride=2),
            nn.Conv2d(2560, 2560, 3, groups=2),
            nn.Conv2d(2560, 1280, 3, dilation=2),
            nn.Conv2d(2560, 1280, 3, dtype=torch.bfloat16),
            nn.Linear(10_000, 10_000),
        )
    names = list(net.state_dict())
    widen(net)
    assert [type(part) is WideConv2d for part in net] == [True, False, True, False, False, False, False]
    assert list(net.state_dict()) == names
