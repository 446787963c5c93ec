"""The world of the embedded model: what its pictures show, what their captions say, how they are drawn.

A scene is one or two things on a flat background. A thing is a coloured shape or a flat emoji with a size and a place.
The caption says all of it and nothing else, so an oracle can check a picture against its caption exactly.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw

RESOLUTION = 64
OBJECTS_DIR = Path(__file__).parent / "objects"

RGB = tuple[int, int, int]

# Colours of shapes: saturated. Backgrounds: muted tints of their own, so that a blue heart shows on a blue background.
COLOURS: dict[str, RGB] = {
    "red": (222, 36, 36),
    "orange": (250, 140, 20),
    "yellow": (255, 222, 0),
    "green": (20, 150, 60),
    "blue": (30, 70, 220),
    "purple": (140, 30, 180),
    "black": (16, 16, 20),
    "white": (255, 255, 255),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (240, 240, 240),
    "gray": (145, 145, 145),
    "black": (45, 45, 50),
    "yellow": (245, 225, 140),
    "green": (140, 205, 150),
    "blue": (115, 170, 235),
    "purple": (165, 130, 210),
    "pink": (248, 175, 200),
}
SHAPES = ("circle", "square", "triangle", "heart", "star", "ring")

# Caption word -> file name in objects/<style>/; the file names are the keys of both emoji sets.
EMOJI: dict[str, str] = {
    "pumpkin": "jack-o-lantern",
    "apple": "red-apple",
    "watermelon": "watermelon",
    "cactus": "cactus",
    "mushroom": "mushroom",
    "sunflower": "sunflower",
    "rainbow": "rainbow",
    "umbrella": "umbrella",
    "octopus": "octopus",
    "frog": "frog",
    "panda": "panda",
    "fox": "fox",
    "rocket": "rocket",
    "car": "automobile",
    "house": "house",
    "crown": "crown",
    "gift": "wrapped-gift",
    "doughnut": "doughnut",
    "tree": "evergreen-tree",
    "strawberry": "strawberry",
    "butterfly": "butterfly",
    "penguin": "penguin",
    "pizza": "pizza",
    "avocado": "avocado",
}
# Never in the base model's training set: what LoRAs are taught. The VAE has seen them, as SD's VAE has seen everything.
HELD_OUT: dict[str, str] = {"fish": "tropical-fish", "ladybug": "lady-beetle", "bear": "teddy-bear"}
FILES = EMOJI | HELD_OUT

SIZES = {"small": 22, "medium": 30, "large": 42}  # side of the box that the thing fills, px
PLACES = ("center", "left", "right", "top", "bottom")
PAIR_SIZE = 26  # each thing of a pair, px
MARGIN = 2  # from the border of the picture, px
JITTER = 2  # largest shift of a thing from its nominal place, px

# A thing vanishes when too much of it is close to the background.
VANISH_DISTANCE = 70.0  # Euclidean RGB distance below which a pixel cannot be told from the background
VANISH_SHARE = 0.35


@dataclass(frozen=True)
class Thing:
    kind: str
    colour: str | None = None  # shapes only; an emoji brings its own
    size: str = "medium"

    @property
    def words(self) -> str:
        return " ".join(w for w in (None if self.size == "medium" else self.size, self.colour, self.kind) if w)


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]  # one, or two side by side (the first on the left)
    background: str
    place: str = "center"  # of a single thing

    @property
    def caption(self) -> str:
        nouns = [f"{'an' if t.words[0] in 'aeiou' else 'a'} {t.words}" for t in self.things]
        place = "" if self.place == "center" else f" {'on' if self.place in ('left', 'right') else 'at'} the {self.place}"
        return f"{' and '.join(nouns)}{place} on a {self.background} background"


@cache
def sprite(kind: str, colour: str | None, side: int, style: str = "fluent") -> Image.Image:
    """RGBA picture of a thing, cropped to what is visible and fitted into a box of `side` pixels."""
    if kind in FILES:
        with Image.open(OBJECTS_DIR / style / f"{FILES[kind]}.png") as file:
            picture = file.convert("RGBA")
    else:
        assert colour is not None, f"a {kind} needs a colour"
        mask = _shape_mask(kind)
        picture = Image.new("RGBA", mask.size, COLOURS[colour])
        picture.putalpha(mask)
    picture = picture.crop(picture.getchannel("A").getbbox())
    scale = side / max(picture.size)
    width, height = (max(1, round(v * scale)) for v in picture.size)
    # Premultiplied, so that transparent pixels lend no colour to the rim.
    return picture.convert("RGBa").resize((width, height), Image.Resampling.BOX).convert("RGBA")


@cache
def _shape_mask(kind: str, n: int = 480) -> Image.Image:
    mask = Image.new("L", (n, n))
    draw = ImageDraw.Draw(mask)
    angles = np.linspace(0, 2 * np.pi, 400)
    if kind == "circle":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
    elif kind == "ring":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
        draw.ellipse((n * 0.25, n * 0.25, n * 0.75, n * 0.75), fill=0)
    elif kind == "square":
        draw.rectangle((0, 0, n - 1, n - 1), fill=255)
    elif kind == "triangle":
        draw.polygon([(n / 2, 0), (0, n * 0.9), (n - 1, n * 0.9)], fill=255)
    elif kind == "star":
        tips = [(np.pi * (k / 5 - 0.5), n / 2 if k % 2 == 0 else n * 0.2) for k in range(10)]
        draw.polygon([(n / 2 + r * np.cos(a), n / 2 + r * np.sin(a)) for a, r in tips], fill=255)
    elif kind == "heart":
        x = 16 * np.sin(angles) ** 3
        y = -(13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles))
        draw.polygon([(n / 2 + a * n / 34, n * 0.46 + b * n / 34) for a, b in zip(x, y, strict=True)], fill=255)
    else:
        raise KeyError(kind)
    return mask


@cache
def vanishes(kind: str, colour: str | None, background: str) -> bool:
    """Whether too much of the thing is of the background's colour for anyone to tell what it is."""
    pixels = np.asarray(sprite(kind, colour, 40), dtype=np.float64)
    opaque = pixels[pixels[..., 3] > 127][:, :3]
    distance = np.linalg.norm(opaque - np.array(BACKGROUNDS[background]), axis=1)
    return bool((distance < VANISH_DISTANCE).mean() > VANISH_SHARE)


def render(scene: Scene, rng: Random, style: str = "fluent", resolution: int = RESOLUTION) -> Image.Image:
    """Draw the scene; `rng` gives the small shifts that no caption mentions. RGB, resolution x resolution px."""
    zoom = resolution / RESOLUTION
    canvas = Image.new("RGB", (resolution, resolution), BACKGROUNDS[scene.background])
    for index, thing in enumerate(scene.things):
        pair = len(scene.things) == 2
        side = PAIR_SIZE if pair else SIZES[thing.size]
        drawn = sprite(thing.kind, thing.colour, round((side + rng.choice((-1, 0, 1))) * zoom), style)
        place = ("left", "right")[index] if pair else scene.place
        x, y = (centre(place, side, axis) + rng.randint(-JITTER, JITTER) for axis in "xy")
        left, top = round(x * zoom - drawn.width / 2), round(y * zoom - drawn.height / 2)
        canvas.paste(drawn, (max(0, left), max(0, top)), drawn)
    return canvas


def centre(place: str, side: int, axis: str) -> int:
    """Nominal centre along one axis of a thing that fills `side` px, in px of the 64-px picture."""
    low, high = ("left", "right") if axis == "x" else ("top", "bottom")
    reach = side // 2 + MARGIN
    return reach if place == low else RESOLUTION - reach if place == high else RESOLUTION // 2


def thing(rng: Random, kinds: tuple[str, ...], size: str) -> Thing:
    kind = rng.choice(kinds)
    return Thing(kind, rng.choice(tuple(COLOURS)) if kind in SHAPES else None, size)


def sample_scene(rng: Random, kinds: tuple[str, ...] = (*SHAPES, *EMOJI), pairs: float = 0.2) -> Scene:
    """A random scene in which nothing vanishes; a third shapes, since their colours make them many."""
    while True:
        groups = [g for g in (tuple(k for k in kinds if k in SHAPES), tuple(k for k in kinds if k in FILES)) if g]

        def draw_one(size: str, groups: list[tuple[str, ...]] = groups) -> Thing:
            return thing(rng, groups[0] if rng.random() < 0.4 else groups[-1], size)

        background = rng.choice(tuple(BACKGROUNDS))
        if rng.random() < pairs:
            scene = Scene((draw_one("medium"), draw_one("medium")), background)
            if scene.things[0].kind == scene.things[1].kind:
                continue
        else:
            size = rng.choice(("small", "medium", "medium", "large"))
            place = rng.choice(("center", "center", *PLACES[1:]))
            scene = Scene((draw_one(size),), background, place)
        if not any(vanishes(t.kind, t.colour, background) for t in scene.things):
            return scene


def held_out(scene: Scene) -> bool:
    """A fixed tenth of all captions, kept from the base model's training: the prompts it is examined on."""
    return hashlib.sha256(scene.caption.encode()).digest()[0] < 26
