"""Packed layers compute what plain ones do with the rounded weight, to the bit, and nothing keeps a weight whole or takes it along."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sdlora.errors import ConfigError
from sdlora.models import memory, packed
from sdlora.models.packed import ENCODINGS, PackedConv2d, PackedLinear

FP32, BF16 = torch.float32, torch.bfloat16


def there_and_back(name: str, weight: Tensor, dtype: torch.dtype = FP32) -> Tensor:
    encoding = ENCODINGS[name]
    return encoding.unpack(*encoding.pack(weight), weight.shape, dtype)


class Blocks(nn.Module):
    """What a UNet's blocks are called, and a layer outside them."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.conv_in = nn.Linear(8, 8)
        self.down_blocks = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_blocks(self.conv_in(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "row", "kept"),
    [
        ("fp8", [448.0, 1.0, 0.0, 18.9, -21.1], [448.0, 1.0, 0.0, 18.0, -22.0]),  # 2 apart between 16 and 32
        ("int8", [127.0, 0.4, -63.6, 0.0, 1.0], [127.0, 0.0, -64.0, 0.0, 1.0]),
        ("bf16", [1.0, 1 + 2**-9, -3.0, 0.0, 1 + 2**-7], [1.0, 1.0, -3.0, 0.0, 1 + 2**-7]),
    ],
)
def test_rounding_by_hand_with_a_scale_for_each_channel(name: str, row: list[float], kept: list[float]) -> None:
    weight = torch.tensor([row, [0.0] * 5, [value * 1024 for value in row]])
    assert torch.equal(there_and_back(name, weight), torch.tensor([kept, [0.0] * 5, [value * 1024 for value in kept]]))


def test_how_far_rounding_goes() -> None:
    weight = torch.randn(16, 8, 3, 3)
    largest = weight.abs().amax((1, 2, 3), keepdim=True)
    # fp8: half of the last of three bits, or of the smallest step, 2^-9 of a scale
    assert (there_and_back("fp8", weight) - weight).abs().le(weight.abs() * 2**-4 * 1.001 + largest / 448 * 2**-10).all()
    assert (there_and_back("int8", weight) - weight).abs().le(largest / 127 / 2 * 1.001).all()
    for name in ("fp8", "int8"):
        assert there_and_back(name, weight, BF16).dtype == BF16
        assert sum(kept.nbytes for kept in ENCODINGS[name].pack(weight)) == weight.numel() + 4 * 16


def test_nf4_keeps_quantiles_of_a_normal_distribution_in_half_a_byte() -> None:
    pytest.importorskip("bitsandbytes")
    row = torch.zeros(64)
    row[:4] = torch.tensor([2.0, -2.0, 1.5, 2 * 0.0796])  # of their table 1, -1, 0.7230 (1.5 / 2 is nearest to it) and 0.0796
    found = there_and_back("nf4", torch.stack([row, 8 * row]))
    assert torch.allclose(found[0, :5], torch.tensor([2.0, -2.0, 1.4459, 0.1592, 0.0]), atol=1e-3) and torch.equal(found[1], 8 * found[0])
    weight = torch.randn(320, 4, 3, 3)
    assert there_and_back("nf4", weight, BF16).shape == weight.shape
    assert sum(kept.nbytes for kept in ENCODINGS["nf4"].pack(weight)) == weight.numel() // 2 + weight.numel() // 64 * 4
    assert (there_and_back("nf4", weight) - weight).norm() / weight.norm() < 0.1


def test_nf4_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.functional", None)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"base_precision = 'nf4' needs bitsandbytes: pip install"):
        packed.pack(Blocks(nn.Linear(8, 8)), "nf4", False)


LAYERS = {
    "linear": (nn.Linear(8, 6), (2, 5, 8)),
    "linear without bias": (nn.Linear(8, 6, bias=False), (3, 8)),
    "conv": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 5)),
    "conv with a stride": (nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 8, 6)),
    "conv of one pixel": (nn.Conv2d(4, 6, 1), (2, 4, 3, 3)),
}


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("name", ["same", "bf16", "fp8", "int8"])
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_and_gradients_are_a_plain_layers_to_the_bit(layer: nn.Module, shape: tuple[int, ...], name: str, autocast: bool) -> None:
    plain, narrow = copy.deepcopy(layer).requires_grad_(False), Blocks(copy.deepcopy(layer)).requires_grad_(False)
    plain.weight.data = there_and_back(name, plain.weight)  # type: ignore[union-attr, arg-type]
    packed.pack(narrow, name, False)
    found = []
    for net in (plain, narrow.down_blocks):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", BF16, enabled=autocast):
            out = net(x)
        out.float().square().sum().backward()
        assert out.dtype == (BF16 if autocast else FP32) and x.grad is not None
        found.append((out.detach(), x.grad))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert torch.equal(narrow.down_blocks[0].weight, plain.weight)  # type: ignore[arg-type]


def test_what_is_packed_stays_a_linear_or_convolution_and_what_is_outside_the_blocks_as_it_was() -> None:
    net = Blocks(nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv2d(8, 8, 1)).requires_grad_(False)
    numbers, outside = packed.numbers_in(net), net.conv_in.weight.clone()
    packed.pack(net, "int8", False)
    assert [type(part) for part in net.down_blocks] == [PackedLinear, nn.LayerNorm, PackedConv2d]
    assert isinstance(net.down_blocks[0], nn.Linear) and isinstance(net.down_blocks[2], nn.Conv2d)
    assert packed.numbers_in(net) == numbers and torch.equal(net.conv_in.weight, outside) and type(net.conv_in) is nn.Linear
    first, again = net.down_blocks[0], copy.deepcopy(net).down_blocks[0]
    assert torch.equal(again(x := torch.randn(1, 8)), first(x))


@pytest.mark.parametrize("name", ["same", "fp8"])
def test_no_weight_is_kept_whole_for_the_backward_pass(name: str) -> None:
    """A gigabyte of weights, of which one at a time is whole."""
    side, count = 2**12, 16
    with torch.device("meta"):
        net = Blocks(*(nn.Linear(side, side) for _ in range(count))).requires_grad_(False).to(BF16)
        net.conv_in = nn.Identity()  # type: ignore[assignment]
    packed.pack(net, name, False)
    x = torch.empty(1, side, device="meta", dtype=BF16, requires_grad=True)
    taken = memory.peak_bytes(lambda: net(x).sum().backward(), "cuda", BF16)
    whole = side * side
    assert taken < {"same": 0.1, "fp8": 4 + 4 + 2.1}[name] * whole  # decoded, scaled and rounded: bytes of each number
    assert memory.weight_bytes(net) == pytest.approx({"same": 2, "fp8": 1}[name] * count * whole, rel=1e-2)


def test_what_is_offloaded_stays_where_it_is_when_the_rest_goes_to_a_device() -> None:
    net = Blocks(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    plain = copy.deepcopy(net)
    packed.pack(net, "same", True)
    x = torch.randn(3, 8)
    assert torch.equal(net(x), plain(x))
    net.to("meta")
    first = net.down_blocks[0]
    assert isinstance(first, PackedLinear)
    assert [kept.device.type for kept in first.kept()] == ["cpu"] and first.bias is not None and first.bias.is_meta
    assert first.weight.is_meta and net(x.to("meta")).is_meta  # it is brought for its use, and no longer
    assert packed.bytes_elsewhere(net) == 2 * 8 * 8 * 4
    assert torch.equal(first.kept()[0], plain.down_blocks[0].weight)  # type: ignore[arg-type]
    assert packed.bytes_elsewhere(plain) == 0
