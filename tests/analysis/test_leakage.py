"""Leakage: by hand, and on a small model whose LoRA answers to some prompts more than to others."""

from pathlib import Path

import pytest
import torch
from tiny import build_model

from sdlora.analysis.leakage import NOISES, TIMESTEPS, answers, ask, changes, leakage
from sdlora.lora import formats
from sdlora.lora.change import Change, Factors
from sdlora.models import families


def test_changes_and_leakage_by_hand() -> None:
    before = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    after = torch.tensor([[[3.0, 5.0]], [[0.0, 2.0]]])
    assert changes(before, after) == pytest.approx([0.2, 0.0])
    assert leakage([0.1, 0.3], [0.4, 0.4]) == pytest.approx(0.5)
    assert leakage([0.1], [0.0]) == float("inf")


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_of_a_model_that_a_lora_changes(tmp_path: Path, name: str) -> None:
    family, model = families.load(str(build_model(tmp_path / "m", family=name)), torch.float32, torch.device("cpu"))
    prompts = ["a cat", "b"]
    asked = ask(family, model, prompts)
    before = answers(family, model, asked)
    assert before.shape[:2] == (2, len(TIMESTEPS) * NOISES)
    assert torch.equal(before, answers(family, model, asked)) and changes(before, before) == [0.0, 0.0]
    # attention of a random model is all but even, so that a direction at right angles to the mean token of "b" hardly counts there
    one, other = family.encode_prompts(model, prompts).prompt_embeds.mean(dim=1)
    apart = one - (one @ other) / (other @ other) * other
    apart /= apart.norm()
    block = "down_blocks.0" if name == "sd1" else "down_blocks.1"
    layer = f"unet.{block}.attentions.0.transformer_blocks.0.attn2.to_v"
    width = model.parts["unet"].get_submodule(layer.removeprefix("unet.")).weight.shape[0]

    def change(strength: float) -> list[float]:
        delta = {layer: Change(Factors(apart[None], torch.ones(width, 1), strength))}
        formats.merge(model.parts, delta)
        after = answers(family, model, asked)
        formats.merge(model.parts, delta, -1.0)
        return changes(before, after)

    weak, strong = change(0.01), change(0.02)
    assert 0 < weak[1] < weak[0] / 2
    assert strong[0] == pytest.approx(2 * weak[0], rel=0.1)
    assert leakage(strong[1:], strong[:1]) == pytest.approx(leakage(weak[1:], weak[:1]), rel=0.1)
