"""The world: captions say what is drawn, and what is drawn can be seen."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sdlora.mini import world
from sdlora.mini.world import Scene, Thing

EVERYTHING = (*world.SHAPES, *world.FILES)


def things_alone(picture: Image.Image, background: str) -> NDArray[np.bool_]:
    """Where the picture differs from its background, (H, W)."""
    different: NDArray[np.bool_] = (np.asarray(picture) != np.array(world.BACKGROUNDS[background])).any(2)
    return different


def middle(picture: Image.Image, background: str) -> tuple[float, float]:
    rows, columns = np.nonzero(things_alone(picture, background))
    return float(columns.min() + columns.max() + 1) / 2, float(rows.min() + rows.max() + 1) / 2


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (Scene((Thing("circle", "red"),), "white"), "a red circle on a white background"),
        (Scene((Thing("apple"),), "gray"), "an apple on a gray background"),
        (Scene((Thing("heart", "orange", "large"),), "blue", "left"), "a large orange heart on the left on a blue background"),
        (Scene((Thing("star", "orange"),), "pink", "top"), "an orange star at the top on a pink background"),
        (Scene((Thing("fish", None, "small"),), "black", "bottom"), "a small fish at the bottom on a black background"),
        (Scene((Thing("octopus"), Thing("ring", "blue")), "green"), "an octopus and a blue ring on a green background"),
    ],
)
def test_caption_says_the_scene_and_nothing_else(scene: Scene, caption: str) -> None:
    assert scene.caption == caption


def test_nothing_vanishes_in_a_sampled_scene() -> None:
    rng = Random(1)
    for _ in range(400):
        scene = world.sample_scene(rng, EVERYTHING, pairs=0.5)
        picture = world.render(scene, rng)
        far = np.linalg.norm(np.asarray(picture, dtype=float) - np.array(world.BACKGROUNDS[scene.background]), axis=2) > 40
        halves = (far[:, :32], far[:, 32:]) if len(scene.things) == 2 else (far,)
        assert all(half.sum() > 40 for half in halves), scene.caption


def test_a_thing_of_the_backgrounds_colour_vanishes() -> None:
    assert world.vanishes("square", "white", "white")
    assert world.vanishes("ring", "black", "black")
    assert not world.vanishes("square", "blue", "blue")  # the background's blue is a pale one
    assert not world.vanishes("square", "red", "white")


def test_the_seed_decides_the_picture() -> None:
    scene = Scene((Thing("fox"), Thing("star", "red")), "yellow")
    first, again, *others = (np.asarray(world.render(scene, Random(seed))) for seed in (3, 3, 4, 5, 6))
    assert np.array_equal(first, again)
    assert any(not np.array_equal(first, other) for other in others)


def test_things_stay_inside_the_picture() -> None:
    rng = Random(2)
    for size, side in world.SIZES.items():
        for place in world.PLACES:
            for _ in range(20):
                picture = world.render(Scene((Thing("square", "red", size),), "white", place), rng)
                rows, columns = np.nonzero(things_alone(picture, "white"))
                # Whole, but for one pixel that the largest jitter can push over the edge.
                assert side - 2 <= np.ptp(columns) + 1 <= side + 1
                assert side - 2 <= np.ptp(rows) + 1 <= side + 1


def test_place_moves_the_thing_as_said() -> None:
    for size, side in world.SIZES.items():
        away = 32 - side // 2 - world.MARGIN  # px between the middle of the picture and a thing at its border
        for place, (x, y) in {
            "center": (32, 32),
            "left": (32 - away, 32),
            "right": (32 + away, 32),
            "top": (32, 32 - away),
            "bottom": (32, 32 + away),
        }.items():
            for seed in range(8):
                picture = world.render(Scene((Thing("square", "green", size),), "pink", place), Random(seed))
                assert middle(picture, "pink") == pytest.approx((x, y), abs=world.JITTER + 1)


def test_a_pair_stands_side_by_side_and_apart() -> None:
    for seed in range(20):
        picture = world.render(Scene((Thing("square", "red"), Thing("square", "blue")), "white"), Random(seed))
        pixels = np.asarray(picture)
        columns = np.flatnonzero(things_alone(picture, "white").any(0))
        gaps = np.flatnonzero(np.diff(columns) > 1)
        assert len(gaps) == 1
        left, right = columns[: gaps[0] + 1], columns[gaps[0] + 1 :]
        assert tuple(pixels[32, int(left.mean())]) == world.COLOURS["red"]
        assert tuple(pixels[32, int(right.mean())]) == world.COLOURS["blue"]


def test_a_shape_is_of_its_colour() -> None:
    for colour, shade in world.COLOURS.items():
        picture = world.render(Scene((Thing("circle", colour),), "gray"), Random(0))
        assert picture.getpixel((32, 32)) == shade
        assert picture.getpixel((1, 1)) == world.BACKGROUNDS["gray"]


def test_styles_draw_the_same_thing_differently() -> None:
    for kind in world.FILES:
        fluent, noto = (np.asarray(world.sprite(kind, None, 30, style)) for style in ("fluent", "noto"))
        assert fluent.shape != noto.shape or not np.array_equal(fluent, noto)


def test_a_resolution_only_scales_the_picture() -> None:
    scene = Scene((Thing("house"),), "blue", "right")
    once, twice = (world.render(scene, Random(7), resolution=side) for side in (64, 128))
    assert twice.size == (128, 128)
    halved = np.asarray(twice.resize((64, 64), Image.Resampling.BOX), dtype=float)
    assert np.abs(halved - np.asarray(once, dtype=float)).mean() < 4


def test_held_out_captions_are_a_fixed_tenth() -> None:
    rng = Random(5)
    captions = {scene.caption: scene for scene in (world.sample_scene(rng) for _ in range(6000))}
    share = sum(world.held_out(scene) for scene in captions.values()) / len(captions)
    assert share == pytest.approx(26 / 256, abs=0.02)
    assert all(world.held_out(scene) == world.held_out(Scene(scene.things, scene.background, scene.place)) for scene in captions.values())


def test_held_out_kinds_are_drawn_only_when_asked_for() -> None:
    rng = Random(6)
    usual = {thing.kind for _ in range(2000) for thing in world.sample_scene(rng).things}
    assert usual == {*world.SHAPES, *world.EMOJI}
    asked = {thing.kind for _ in range(40) for thing in world.sample_scene(rng, tuple(world.HELD_OUT)).things}
    assert asked == set(world.HELD_OUT)


def test_a_pair_is_of_two_kinds_and_of_medium_size() -> None:
    rng = Random(8)
    for _ in range(200):
        scene = world.sample_scene(rng, pairs=1.0)
        assert len({thing.kind for thing in scene.things}) == 2
        assert {thing.size for thing in scene.things} == {"medium"}
        assert scene.place == "center"
