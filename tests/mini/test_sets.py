"""The two drawn data sets: the committed files are what the generator makes, and keep the promises of their READMEs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdlora.mini import sets, world
from sdlora.mini.measure import concept_scenes, prompt_of

DATASETS = Path(__file__).parents[2] / "datasets"


def background_of(caption: str) -> str:
    return caption.split(" on a ")[-1].removesuffix(", noto style").removesuffix(" background")


@pytest.mark.parametrize("name", sets.SETS)
def test_committed_files_are_what_the_generator_makes(name: str) -> None:
    examples = list(sets.SETS[name]())
    assert {p.name for p in (DATASETS / name).iterdir()} == {"README.md"} | {s + e for s, _, _ in examples for e in (".png", ".txt")}
    for stem, picture, caption in examples:
        with Image.open(DATASETS / name / f"{stem}.png") as committed:
            assert committed.mode == "RGB"
            assert np.array_equal(np.asarray(committed), np.asarray(picture)), stem
        assert (DATASETS / name / f"{stem}.txt").read_text(encoding="utf-8") == caption + "\n"


@pytest.mark.parametrize("name", sets.SETS)
def test_pictures_have_the_background_that_the_caption_names(name: str) -> None:
    for stem, picture, caption in sets.SETS[name]():
        colours = picture.getcolors(world.RESOLUTION**2)
        assert colours is not None
        assert max(colours)[1] == world.BACKGROUNDS[background_of(caption)], stem  # the commonest colour


@pytest.mark.parametrize("name", sets.SETS)
def test_captions_differ(name: str) -> None:
    captions = [caption for _, _, caption in sets.SETS[name]()]
    assert len(set(captions)) == len(captions)


@pytest.mark.parametrize(("kind", "words"), [("fish", "ohwx fish"), ("bear", "sks bear")])
def test_a_concept_is_sixteen_pictures_on_four_backgrounds_under_its_rare_word(kind: str, words: str) -> None:
    captions = [caption for _, _, caption in sets.concept(kind)]
    assert Counter(map(background_of, captions)) == {"white": 4, "blue": 4, "green": 4, "yellow": 4}
    assert all(caption.startswith((f"a {words} ", f"a small {words} ", f"a large {words} ")) for caption in captions)


def test_concepts_are_asked_for_as_they_were_taught_and_where_they_were_not_shown() -> None:
    for kind, words in sets.TRIGGERS.items():
        for scene in concept_scenes(8, 0, kind):
            assert [thing.kind for thing in scene.things] == [kind] and scene.background not in sets.SEEN_BACKGROUNDS
            assert f" {words} " in prompt_of(scene) and prompt_of(scene).replace(words, kind) == scene.caption


def test_noto_style_shows_twelve_kinds_twice_on_all_backgrounds() -> None:
    examples = list(sets.noto_style())
    captions = [caption for _, _, caption in examples]
    assert Counter(map(background_of, captions)) == {background: 3 for background in world.BACKGROUNDS}
    assert all(caption.endswith(" background, noto style") for caption in captions)
    assert Counter(stem.split("-")[0] for stem, _, _ in examples) == {kind: 2 for kind in sets.style_kinds()}
    assert len(sets.style_kinds()) == 12


def test_nothing_vanishes_in_noto_style() -> None:
    """`world.vanishes` judges Fluent's drawing: here the drawn picture itself is judged by the same measure."""
    for stem, picture, caption in sets.noto_style():
        background = world.BACKGROUNDS[background_of(caption)]
        distance = np.linalg.norm(np.asarray(picture, dtype=np.float64) - np.array(background), axis=-1)
        thing = world.sprite(stem.split("-")[0], None, 40, "noto")
        size = next((s for s in ("small", "large") if f" {s} " in caption), "medium")
        opaque_share = (np.asarray(thing)[..., 3] > 127).mean() * thing.width * thing.height / 40**2
        expected = opaque_share * world.SIZES[size] ** 2  # px the thing covers
        assert (distance >= world.VANISH_DISTANCE).sum() > (1 - world.VANISH_SHARE) * expected * 0.9, stem
