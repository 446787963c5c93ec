"""Draw the two small data sets that teach the embedded model something new: `python -m sdlora.mini.sets [folder]`.

fish        a concept: a kind of thing that the base model never saw, under the rare word `ohwx`
noto-style  a style: known things as another artist drew them, marked by `, noto style`
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from random import Random

from PIL import Image

from sdlora.mini import world

# A kind that the base model never saw -> what captions call it: a rare word before the noun
TRIGGERS = {"fish": "ohwx fish", "bear": "sks bear"}
SEEN_BACKGROUNDS = ("white", "blue", "green", "yellow")  # of a concept; the other four stay unseen, to examine what was learned
STYLE_KINDS = 12
STYLE_KINDS_SEED = 39  # a shuffle whose first twelve vanish in Noto's drawing only where they do in Fluent's

LAYOUTS = tuple(product(world.SIZES, world.PLACES))

Example = tuple[str, Image.Image, str]  # name without suffix, picture, caption


def concept(kind: str) -> Iterator[Example]:
    """16 pictures: every size at every place once, and four on each background."""
    rng = Random(1)
    layouts = [*LAYOUTS, ("medium", "center")]
    rng.shuffle(layouts)
    for index, (size, place) in enumerate(layouts):
        background = SEEN_BACKGROUNDS[index % len(SEEN_BACKGROUNDS)]
        scene = world.Scene((world.Thing(kind, size=size),), background, place)
        yield f"{kind}-{index:02d}", world.render(scene, rng), scene.caption.replace(kind, TRIGGERS[kind])


def fish() -> Iterator[Example]:
    return concept("fish")


def style_kinds() -> list[str]:
    kinds = list(world.EMOJI)
    Random(STYLE_KINDS_SEED).shuffle(kinds)
    return kinds[:STYLE_KINDS]


def noto_style() -> Iterator[Example]:
    """24 pictures: twelve kinds twice, on different backgrounds; three on each background."""
    rng = Random(0)
    kinds, backgrounds = style_kinds() * 2, list(world.BACKGROUNDS) * 3
    while not _distinct_and_visible(kinds, backgrounds):
        rng.shuffle(backgrounds)
    layouts = rng.sample(LAYOUTS, STYLE_KINDS) + rng.sample(LAYOUTS, STYLE_KINDS)
    for index, (kind, background, (size, place)) in enumerate(zip(kinds, backgrounds, layouts, strict=True)):
        scene = world.Scene((world.Thing(kind, size=size),), background, place)
        yield f"{kind}-{index // STYLE_KINDS}", world.render(scene, rng, "noto"), f"{scene.caption}, noto style"


def _distinct_and_visible(kinds: list[str], backgrounds: list[str]) -> bool:
    pairs = set(zip(kinds, backgrounds, strict=True))
    return len(pairs) == len(kinds) and not any(world.vanishes(kind, None, background) for kind, background in pairs)


SETS = {"fish": fish, "noto-style": noto_style}


def main(folder: Path) -> None:
    for name, examples in SETS.items():
        write(folder / name, examples())


def write(folder: Path, examples: Iterable[Example]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, picture, caption in examples:
        picture.save(folder / f"{stem}.png", optimize=True)
        (folder / f"{stem}.txt").write_text(caption + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "datasets"))
