"""The oracle: right about good and spoiled pictures of the world, silent about what it does not know."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from sdlora.mini import oracle, world
from sdlora.mini.oracle import Seen, Sighting, agrees, see
from sdlora.mini.world import Scene, Thing

VERDICTS = ("kind", "colour", "background", "place", "size", "count", "all")


def random_scenes(seed: int, count: int) -> Iterable[tuple[Scene, str, Random]]:
    rng = Random(seed)
    for _ in range(count):
        yield world.sample_scene(rng, oracle.KINDS, pairs=0.3), rng.choice(oracle.STYLES), rng


def spoiled(picture: Image.Image, rng: Random) -> Image.Image:
    """As a VAE or a sampler would: soft, noisy, a little off in colour."""
    noise = np.random.default_rng(rng.randrange(2**31))
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.7, 1.0))), dtype=float)
    soft += noise.uniform(-15, 15, 3) + noise.normal(0, rng.uniform(8, 12), soft.shape)
    return Image.fromarray(soft.clip(0, 255).round().astype(np.uint8))


def pair_seen(**left: str | None) -> Sighting:
    """A red star left of a fox on white, or what is seen instead of the star."""
    star = Seen("star", "red", "medium", "left", None, 0.0)
    return Sighting("white", (replace(star, **left), Seen("fox", None, "medium", "right", "fluent", 0.0)))  # type: ignore[arg-type]


STAR_AND_FOX = Scene((Thing("star", "red"), Thing("fox")), "white")


def test_true_renders_are_seen_right() -> None:
    verdicts = [agrees(scene, world.render(scene, rng, style)) for scene, style, rng in random_scenes(11, 150)]
    assert {name: sum(getattr(v, name) for v in verdicts) for name in VERDICTS} == dict.fromkeys(VERDICTS, 150)


def test_spoiled_renders_are_seen_right() -> None:
    verdicts = [agrees(scene, spoiled(world.render(scene, rng, style), rng)) for scene, style, rng in random_scenes(12, 120)]
    assert all(sum(getattr(v, name) for v in verdicts) >= 117 for name in VERDICTS)


@pytest.mark.parametrize("style", oracle.STYLES)
def test_every_kind_is_known_in_both_styles(style: str) -> None:
    for kind in oracle.KINDS:
        colour = "red" if kind in world.SHAPES else None
        background = next(b for b in world.BACKGROUNDS if not world.vanishes(kind, colour, b))
        (thing,) = see(world.render(Scene((Thing(kind, colour),), background), Random(0), style)).things
        assert (thing.kind, thing.colour, thing.style) == (kind, colour, None if colour else style)
        assert thing.distance < 0.03


@pytest.mark.parametrize(
    ("kinds", "most"),
    [(tuple(world.FILES), 0.06), (world.SHAPES, 0.15)],  # a circle that is off in shape is close to a square if there are no circles
    ids=["emoji", "shapes"],
)
def test_an_unknown_thing_is_mostly_none(kinds: tuple[str, ...], most: float) -> None:
    rng, wrong, count = Random(13), 0, 60
    for _ in range(count):
        scene = world.sample_scene(rng, kinds, pairs=0)
        picture = spoiled(world.render(scene, rng, rng.choice(oracle.STYLES)), rng)
        sighting = see(picture, tuple(k for k in oracle.KINDS if k != scene.things[0].kind))
        assert sighting.things  # unknown, but there
        wrong += any(thing.kind for thing in sighting.things)
    assert wrong <= most * count


def test_two_half_things_are_none() -> None:
    rng, wrong = Random(14), 0
    for _ in range(60):
        upper, lower = (np.asarray(world.render(Scene((Thing(k),), "gray"), Random(0))) for k in rng.sample(tuple(world.FILES), 2))
        wrong += any(thing.kind for thing in see(np.concatenate([upper[:32], lower[32:]])).things)
    assert wrong <= 3


def test_noise_is_no_known_thing() -> None:
    noise = np.random.default_rng(15)
    for _ in range(10):
        assert not any(thing.kind for thing in see(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)).things)
        patch = np.full((64, 64, 3), 145, dtype=np.uint8)
        patch[16:48, 16:48] = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        assert not any(thing.kind for thing in see(patch).things)


@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_an_empty_background_shows_nothing(background: str) -> None:
    empty = Image.new("RGB", (64, 64), world.BACKGROUNDS[background])
    assert see(empty) == Sighting(background, ())
    assert see(spoiled(empty, Random(16))) == Sighting(background, ())


def test_a_gray_blob_is_none_and_keeps_its_place() -> None:
    picture = Image.new("RGB", (64, 64), world.BACKGROUNDS["blue"])
    draw = ImageDraw.Draw(picture)
    draw.polygon([(4, 24), (20, 18), (32, 30), (18, 34), (28, 46), (6, 44)], fill=(120, 120, 120))
    (thing,) = see(picture).things
    assert (thing.kind, thing.colour, thing.place) == (None, None, "left")


def test_a_background_of_another_colour_is_none() -> None:
    assert see(Image.new("RGB", (64, 64), (200, 30, 30))).background is None


def test_a_third_thing_is_counted() -> None:
    picture = Image.new("RGB", (64, 64), world.BACKGROUNDS["white"])
    for kind, corner in (("fox", (2, 2)), ("car", (38, 4)), ("frog", (20, 36))):
        sprite = world.sprite(kind, None, 24)
        picture.paste(sprite, corner, sprite)
    assert sorted(str(thing.kind) for thing in see(picture).things) == ["car", "fox", "frog"]


def test_size_of_the_picture_does_not_matter() -> None:
    scene = Scene((Thing("rocket", None, "large"),), "green", "left")
    assert agrees(scene, world.render(scene, Random(1), resolution=256)).all


def test_verdict_of_a_right_sighting() -> None:
    assert agrees(STAR_AND_FOX, pair_seen()).all


@pytest.mark.parametrize(
    ("sighting", "wrong"),
    [
        (pair_seen(colour="blue"), {"colour"}),
        (pair_seen(kind="heart"), {"kind"}),
        (pair_seen(kind=None, colour=None), {"kind", "colour"}),
        (pair_seen(place="top"), {"place"}),
        (pair_seen(size="small"), {"size"}),
        (replace(pair_seen(), background="pink"), {"background"}),
        (replace(pair_seen(), background=None), {"background"}),
        (Sighting("white", pair_seen().things[:1]), {"kind", "colour", "place", "size", "count"}),
        (Sighting("white", ()), {"kind", "colour", "place", "size", "count"}),
        (Sighting("white", (*pair_seen().things, Seen(None, None, "small", "top", None, 0.5))), {"count"}),
    ],
)
def test_verdict_names_what_is_wrong(sighting: Sighting, wrong: set[str]) -> None:
    verdict = agrees(STAR_AND_FOX, sighting)
    assert {name for name in VERDICTS if not getattr(verdict, name)} == wrong | {"all"}


def test_a_swapped_pair_is_wrong_in_place_only() -> None:
    star, fox = pair_seen().things
    swapped = Sighting("white", (replace(fox, place="left"), replace(star, place="right")))
    verdict = agrees(STAR_AND_FOX, swapped)
    assert verdict.kind and verdict.colour and verdict.count and not verdict.place
