"""Wide convolutions over few pixels are products, with the outputs and gradients of oneDNN's; all others are oneDNN's."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sdlora.models import convolutions
from sdlora.models.convolutions import PointwiseConv2d, WideConv2d, as_products
from sdlora.models.memory import in_onednn

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
    as_products(layer)
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


@pytest.mark.parametrize("shape", [(1, 4, 32, 17), (9, 4, 8, 8)], ids=["of one picture", "of a batch"])
def test_many_pixels_are_left_to_onednn(all_are_wide: None, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "Product", None)
    layer, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(shape)
    for found, plain in zip(outputs_and_gradients(widened(layer), x), outputs_and_gradients(layer, x), strict=True):
        assert found.is_contiguous() and (found - plain).norm() <= 1e-5 * plain.norm()
    with pytest.raises(AttributeError):
        widened(layer)(x[:, :, :8, :4])


def test_a_weight_that_learns_gets_its_gradient(all_are_wide: None) -> None:
    layer, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(1, 4, 5, 5)
    wide = widened(layer).requires_grad_()
    for module in (layer, wide):
        module(x).sin().sum().backward()
    assert wide.weight.grad is not None and layer.weight.grad is not None
    assert (wide.weight.grad - layer.weight.grad).norm() <= 1e-5 * layer.weight.grad.norm()


needs_bf16 = pytest.mark.skipif(not in_onednn(torch.bfloat16), reason="bf16 is slow beyond use on this CPU")


def errors(layer: nn.Conv2d, x: Tensor) -> tuple[list[float], list[float]]:
    """Of output and gradient, in shares: of the layer as products in bf16, and as it is."""
    exact = outputs_and_gradients(copy.deepcopy(layer).float(), x.float())
    products = copy.deepcopy(layer).requires_grad_(False)
    as_products(products)
    assert type(products) is not nn.Conv2d

    def of(module: nn.Module) -> list[float]:
        pairs = zip(outputs_and_gradients(module, x), exact, strict=True)
        return [float((found.float() - wanted).norm() / wanted.norm()) for found, wanted in pairs]

    return of(products), of(layer)


@needs_bf16
def test_bf16_is_rounded_hardly_more_often_than_by_onednn(all_are_wide: None) -> None:
    torch.manual_seed(0)
    for found, plain in zip(*errors(nn.Conv2d(64, 64, 3, padding=1).bfloat16(), torch.randn(1, 64, 8, 8).bfloat16()), strict=True):
        assert found <= 1.5 * plain


@needs_bf16
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_pointwise_layers_of_bf16_are_products_however_many_the_pixels(bias: bool, batch: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 32, 1, bias=bias).bfloat16()
    for found, plain in zip(*errors(layer, torch.randn(batch, 64, 32, 24).bfloat16()), strict=True):
        assert found <= 1.1 * plain


def test_under_autocast_it_computes_in_its_precision(all_are_wide: None) -> None:
    layer, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert widened(layer)(x).dtype == torch.bfloat16


def test_only_what_gains_changes_its_class_and_nothing_its_names() -> None:
    bf16 = {"dtype": torch.bfloat16}
    wide, pointwise = [WideConv2d, nn.Conv2d], [PointwiseConv2d, nn.Conv2d]
    layers = [
        (nn.Conv2d(1280, 1280, 3), WideConv2d),
        (nn.Conv2d(640, 1280, 3), WideConv2d),
        (nn.Conv2d(640, 1279, 3), nn.Conv2d),
        (nn.Conv2d(2560, 1280, 3, stride=2), WideConv2d),
        (nn.Conv2d(2560, 2560, 3, groups=2), nn.Conv2d),
        (nn.Conv2d(2560, 1280, 3, dilation=2), nn.Conv2d),
        (nn.Conv2d(2560, 1280, 3, padding="same"), nn.Conv2d),
        (nn.Conv2d(2560, 1280, 3, **bf16), wide[not in_onednn(torch.bfloat16)]),
        (nn.Conv2d(32, 16, 1), nn.Conv2d),
        (nn.Conv2d(32, 16, 1, **bf16), pointwise[not in_onednn(torch.bfloat16)]),
        (nn.Conv2d(32, 16, 1, stride=2, **bf16), nn.Conv2d),
        (nn.Conv2d(32, 16, 1, padding=1, **bf16), nn.Conv2d),
        (nn.Linear(10, 10), nn.Linear),
    ]
    net = nn.Sequential(*(layer for layer, _ in layers))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    as_products(net)
    assert [type(layer) for layer in net] == [kind for _, kind in layers]
    after = net.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_weight_is_put_into_order_in_its_own_memory() -> None:
    weight = torch.randn(6, 4, 3, 2)
    moved = convolutions.to_channels_last(weight.clone())
    assert torch.equal(moved, weight) and moved.is_contiguous(memory_format=torch.channels_last)
    kept = weight.clone()
    assert convolutions.to_channels_last(kept).data_ptr() == kept.data_ptr()
