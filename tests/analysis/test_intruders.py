"""Intruder dimensions on weights whose singular vectors are known, and of a file on a checkpoint."""

from pathlib import Path

import pytest
import torch
from originals import build_original
from PIL import Image
from torch import Tensor

from sdlora.analysis.intruders import Layer, layers, plot_similarities
from sdlora.analysis.spectrum import Spectra, directions, spectrum
from sdlora.data.cache import TensorCache
from sdlora.errors import WeightsError
from sdlora.lora import lorafile
from sdlora.lora.change import Change, Factors
from sdlora.lora.checkpoints import open_checkpoint


def layer(base: Tensor, change: Change, top: int = 10) -> Layer:
    return Layer("unet.a", base, change, directions(base, spectrum(base), change, top))


def rank_one(size: float, left: Tensor, right: Tensor) -> Change:
    return Change(Factors(right[None], size * left[:, None], 1.0))


def test_an_unchanged_or_scaled_weight_has_none() -> None:
    base = torch.randn(12, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    assert layer(base, Change(weight=torch.zeros_like(base))).count() == 0
    assert layer(base, Change(weight=-4 * base)).count() == 0
    assert layer(base, Change(Factors(torch.zeros(2, 3, 3, 3), torch.zeros(12, 2, 1, 1), 2.0))).count() == 0


def test_a_large_direction_between_the_bases_own_is_an_intruder() -> None:
    # Base: singular vectors e0..e4 with values 5..1. The update adds 100 along (1, 1, 1, 1, 1) / sqrt(5), whose cosine with each is 0.447.
    base = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))
    direction = torch.full((5,), 5**-0.5)
    found = layer(base, rank_one(100, direction, direction), top=1)
    assert abs(float(found.similarities[0]) - 5**-0.5) < 0.02
    assert found.count() == 1 and found.count(threshold=0.4) == 0
    assert layer(base, rank_one(0.01, direction, direction), top=1).count() == 0


def test_a_direction_that_the_base_lacks_altogether_is_an_intruder() -> None:
    # Left singular vectors of a 4 x 2 base span two of four directions: a third one is orthogonal to all of them.
    base = torch.zeros(4, 2)
    base[0, 0], base[1, 1] = 2.0, 1.0
    found = layer(base, rank_one(50, torch.eye(4)[2], torch.eye(2)[0]), top=3)
    # W = columns (2, 0, 50, 0) and (0, 1, 0, 0): the largest has 2 / 50 of e0, the second is e1
    assert found.similarities.tolist() == pytest.approx([2 / (2500 + 4) ** 0.5, 1.0, 2500**0.5 / (2500 + 4) ** 0.5], abs=1e-6)
    assert found.intruders().tolist() == [True, False, False] and found.directions.s[2] == pytest.approx(0, abs=1e-6)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A LoRA of one convolution and one bias, in which one direction is far larger than all of the base's."""
    base = build_original(tmp_path / "base.safetensors", "sd1")
    weight = base.parameters["unet.mid_block.resnets.0.conv1.weight"]
    left = torch.linalg.svd(weight.flatten(1)).U.sum(dim=1) / len(weight) ** 0.5  # equally far from all of the base's
    change = Change(Factors(torch.ones(1, *weight.shape[1:]), 9 * left[:, None, None, None], 1.0))
    bias = Change(bias=torch.ones_like(base.parameters["unet.conv_in.bias"]))
    named = [("unet.mid_block.resnets.0.conv1", change), ("unet.conv_in", bias)]
    lorafile.write(tmp_path / "lora.safetensors", named, "sd1", 1.0, lambda rank: {})
    return tmp_path / "lora.safetensors"


def test_of_a_file_on_a_checkpoint(file: Path) -> None:
    checkpoint = open_checkpoint(file.with_name("base.safetensors"))
    with lorafile.opened([file], folded=False) as (lora,):
        (found,) = layers(lora, checkpoint, Spectra(TensorCache(file.with_name("cache"), "a")))
    assert found.name == "unet.mid_block.resnets.0.conv1" and found.intruders().tolist() == [True] + [False] * 9
    plot_similarities(found, file.with_name("one.png"), 64, 0.5)
    with Image.open(file.with_name("one.png")) as picture:
        assert len(picture.convert("RGB").getcolors(2**24) or ()) > 50
    assert list(file.with_name("cache").glob("*.safetensors"))


def test_a_file_for_another_model_is_refused(file: Path) -> None:
    checkpoint = open_checkpoint(file.with_name("base.safetensors"))
    wide = Change(Factors(torch.ones(1, 5), torch.ones(5, 1), 1.0))
    lorafile.write(file, [("unet.mid_block.resnets.0.conv1", wide)], "sd1", 1.0, lambda rank: {})
    with lorafile.opened([file], folded=False) as (lora,), pytest.raises(WeightsError, match=r"conv1 has another shape"):
        list(layers(lora, checkpoint, Spectra(TensorCache(file.with_name("cache"), "a"))))
