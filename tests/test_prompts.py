"""Embeddings of the base text encoder: from disk where they are known, without adapters, and the same as computed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build_model

from sdlora.config import Config
from sdlora.data.cache import TensorCache
from sdlora.data.captions import CaptionRules
from sdlora.data.dataset import Example
from sdlora.items import Item
from sdlora.models import families
from sdlora.models.family import Family, Model, PromptEmbeds
from sdlora.objective import GENERIC_PROMPTS, prompts_of
from sdlora.prompts import BasePrompts

PROMPTS = ["a cat", "a dog, big", "", "a cat"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Model]:
    return families.load(str(build_model(tmp_path_factory.mktemp("model") / "tiny")), torch.float32, torch.device("cpu"))


def test_from_disk_they_are_the_same_bits_and_the_encoder_is_not_asked(tmp_path: Path, loaded: tuple[Family, Model]) -> None:
    family, model = loaded
    with torch.no_grad():
        expected = family.encode_prompts(model, PROMPTS).prompt_embeds
    first = BasePrompts(TensorCache(tmp_path, "tiny"), family, model, [])
    assert [event.done for event in first.fill(PROMPTS)] == [3]
    assert torch.equal(first(PROMPTS).prompt_embeds, expected)
    asked: list[Any] = []

    def encode(model: Model, prompts: Sequence[str]) -> PromptEmbeds:
        asked.append(prompts)
        return family.encode_prompts(model, prompts)

    second = BasePrompts(TensorCache(tmp_path, "tiny"), replace(family, encode_prompts=encode), model, [])
    assert not list(second.fill(PROMPTS)) and torch.equal(second(PROMPTS).prompt_embeds, expected) and not asked
    unknown = second(["a cat", "bird"]).prompt_embeds  # a shuffled caption, say: computed, and kept in memory only
    assert asked == [["bird"]] and torch.equal(unknown[0], expected[0]) and not unknown.requires_grad
    assert len(TensorCache(tmp_path, "tiny")._index()) == 3


def test_prompts_that_a_run_is_sure_to_ask_for() -> None:
    def of(text_is_trained: bool = False, rules: CaptionRules = CaptionRules(), **options: dict[str, Any]) -> list[str]:  # noqa: B008
        item = Item(Example(Path("a.png"), "a cat, big", (8, 8), "x"), None, False, rules=rules)  # type: ignore[arg-type]
        return prompts_of(Config.model_validate(options), [item], text_is_trained)

    assert of() == ["a cat, big"]
    assert of(rules=CaptionRules(dropout=0.1)) == ["a cat, big", ""]
    assert of(rules=CaptionRules(suffix=", photo")) == ["a cat, big, photo"]
    assert of(rules=CaptionRules(shuffle=True)) == []
    assert of(True) == of(loss={"prior": 1}) == ["a cat, big", *GENERIC_PROMPTS]
