"""Drift of text embeddings: by hand, and on a small model."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import WIDTH, WIDTH_2, build_model

from sdlora.analysis.drift import drifts, plot, say
from sdlora.lora import formats
from sdlora.lora.change import Change
from sdlora.models import families


def test_norms_and_directions_by_hand() -> None:
    before = (torch.tensor([[3.0, 4.0], [0.0, 2.0]]),)
    after = (torch.tensor([[0.0, 6.0], [0.0, 2.0]]),)  # norm 5 -> 6, cosine 24 / 30
    (found,) = drifts(before, after)
    assert (found.base_norm, found.norm) == (3.5, 4.0)
    assert (found.off, found.worst, found.turned) == pytest.approx((0.1, 0.2, 0.1), abs=1e-6)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_of_a_model_that_a_lora_changes(tmp_path: Path, name: str) -> None:
    family, model = families.load(str(build_model(tmp_path / "m", family=name)), torch.float32, torch.device("cpu"))
    prompts = ["a cat", "a", "dog and cat"]
    before = say(family, model, prompts)
    words = 2 * 3 + 4 + 1 + 9  # letters are tokens, and each prompt has a start and an end
    assert before[0].shape == (words, WIDTH)
    if name == "sdxl":
        assert before[1].shape == (words, WIDTH_2) and len(before[2]) == len(prompts)
    assert [(of.off, of.turned) for of in drifts(before, say(family, model, prompts))] == [(0, pytest.approx(0, abs=1e-6))] * len(before)
    weight = model.parts["text_encoder"].get_parameter(
        next(key for key, _ in model.parts["text_encoder"].named_parameters() if key.endswith("layers.0.mlp.fc1.weight"))
    )
    change = Change(weight=torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    formats.merge(model.parts, {"text_encoder.text_model.encoder.layers.0.mlp.fc1": change})
    after = say(family, model, prompts)
    first, *others = drifts(before, after)
    assert first.off > 0 and first.worst > first.off and first.turned > 1e-4
    assert all(of.turned == pytest.approx(0, abs=1e-6) for of in others)
    plot({"some": before, "others": before}, {"some": after, "others": before}, tmp_path / "norms.png", "norms")
    with Image.open(tmp_path / "norms.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24) or ()) > 50
