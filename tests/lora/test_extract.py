"""The difference of two checkpoints as a LoRA: all of it at full rank, the nearest below, and an honest account of the rest."""

import math
from pathlib import Path

import pytest
import torch
from originals import build_original
from safetensors.torch import save_file
from tiny import build_model

from sdlora.errors import ConfigError, WeightsError
from sdlora.lora.checkpoints import Checkpoint, open_checkpoint
from sdlora.lora.extract import Remainder, extract
from sdlora.lora.resize import Limit

EVERYTHING = ["everything"]


def pair(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> tuple[Checkpoint, Checkpoint]:
    one, two = (build_original(folder / f"{seed}.safetensors", family, dtype, seed) for seed in (1, 2))
    return open_checkpoint(one.path), open_checkpoint(two.path)


def read(base: Checkpoint, tuned: Checkpoint, parameter: str) -> torch.Tensor:
    return tuned.read(parameter).float() - base.read(parameter).float()


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_at_full_rank_it_is_the_difference(tmp_path: Path, family: str) -> None:
    base, tuned = pair(tmp_path, family)
    found, remainder = {}, Remainder()
    for module, change, cut in extract(base, tuned, EVERYTHING, Limit(), None, remainder):
        found[module] = factors = change.factors
        assert factors is not None
        difference = read(base, tuned, f"{module}.weight")
        torch.testing.assert_close(factors.delta().view_as(difference), difference, rtol=1e-5, atol=1e-6)
        assert factors.down.shape[1:] == difference.shape[1:] and cut.error < 1e-5
    matrices = {name for name in base.modules() if len(base.shape(f"{name}.weight")) > 1 and "embeddings." not in name}
    assert found.keys() == matrices and not remainder.same
    assert all("norm" in name or "bias" in name or "embeddings." in name for name in remainder.others)
    rest = math.fsum(float(read(base, tuned, name).square().sum()) for name in remainder.others)
    assert remainder.squares == pytest.approx(rest)


def test_below_it_is_the_nearest_of_its_rank(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "sd1")
    for module, change, cut in extract(base, tuned, ["attention"], Limit(rank=2), None, Remainder()):
        factors, difference = change.factors, read(base, tuned, f"{module}.weight")
        singular = torch.linalg.svdvals(difference)
        assert factors is not None and cut.rank == 2 and cut.error == pytest.approx(float(singular[2:].norm() / singular.norm()), rel=1e-4)
        assert float((factors.delta() - difference).norm()) == pytest.approx(float(singular[2:].norm()), rel=1e-4)
    cuts = [cut for *_, cut in extract(base, tuned, ["attention"], Limit(kept=0.9), None, Remainder())]
    assert all(cut.error**2 <= 0.1 + 1e-6 for cut in cuts) and len({cut.rank for cut in cuts}) > 1


def test_layers_are_those_that_were_asked_for(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "sdxl")

    def modules(*selectors: str) -> list[str]:
        return [module for module, *_ in extract(base, tuned, selectors, Limit(rank=1), None, Remainder())]

    assert {name.split(".")[0] for name in modules("attention+ff")} == {"unet", "text_encoder", "text_encoder_2"}
    assert all(name.startswith("unet.mid_block.") for name in modules("mid"))
    assert modules("text_encoder_2.projection") == ["text_encoder_2.text_projection"]
    assert modules("*.conv_in") == ["unet.conv_in"]
    with pytest.raises(ConfigError, match=r"'down\.7' matches no layer"):
        modules("attention", "down.7")


def test_what_rounding_alone_can_do_is_no_difference(tmp_path: Path) -> None:
    base = build_original(tmp_path / "a.safetensors", "sd1")
    tuned = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in base.tensors.items()}
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    tuned[key] = (base.tensors[key] * 1.01).half()
    save_file(tuned, tmp_path / "b.safetensors")
    checkpoints = open_checkpoint(base.path), open_checkpoint(tmp_path / "b.safetensors")
    remainder = Remainder()
    found = [module for module, *_ in extract(*checkpoints, EVERYTHING, Limit(), None, remainder)]
    assert found == ["unet.mid_block.attentions.0.proj_in"] and len(remainder.same) > 50
    with pytest.raises(WeightsError, match="there is nothing to extract"):
        list(extract(*checkpoints, EVERYTHING, Limit(), 0.02, Remainder()))
    assert len(list(extract(*checkpoints, EVERYTHING, Limit(), 0.0, Remainder()))) == 1 + len(remainder.same)


def test_checkpoints_of_two_kinds_have_nothing_to_compare(tmp_path: Path) -> None:
    base = open_checkpoint(build_original(tmp_path / "a.safetensors", "sd1").path)
    other = open_checkpoint(build_original(tmp_path / "b.safetensors", "sd2").path)
    with pytest.raises(WeightsError, match=r"family sd1 and .* of sd2"):
        list(extract(base, other, EVERYTHING, Limit(), None, Remainder()))
    larger = open_checkpoint(build_model(tmp_path / "tiny"))
    with pytest.raises(WeightsError, match="of the shape that"):
        list(extract(base, larger, EVERYTHING, Limit(), None, Remainder()))
