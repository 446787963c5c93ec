"""What a run trains on: pictures of a folder, placed in buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sdlora.config import Config, DataOptions
from sdlora.data.buckets import Placed, place
from sdlora.data.dataset import Example, find_examples


@dataclass(frozen=True)
class Item:
    """What one place in an epoch shows: a picture, upright or mirrored, in its bucket."""

    example: Example
    placed: Placed
    mirrored: bool
    weight: float = 1.0  # of its loss
    regularises: bool = False  # of the class and not of the subject


def find_items(config: Config) -> tuple[list[Item], list[tuple[Path, str]]]:
    """Items in the order of their names, regularisation pictures behind the training pictures; and what was skipped, with the reason.
    Raises DataError."""
    data = config.data
    found = find_examples(
        data.folder, missing_caption=data.missing_caption, trigger=data.trigger, on_bad_image=data.on_bad_image, masks=data.masks
    )
    items, skipped = _placed(found.examples, data), list(found.skipped)
    if data.regularisation_folder is not None:
        missing: Literal["empty", "error"] = "empty" if data.class_noun else "error"
        regular = find_examples(data.regularisation_folder, missing_caption=missing, trigger="", on_bad_image=data.on_bad_image)
        named = [replace(example, caption=example.caption or data.class_noun) for example in regular.examples]
        others = _placed(named, data, config.loss.regularisation, True)
        items += [others[number % len(others)] for number in range(len(items))]  # as many as training pictures, as DreamBooth has it
        skipped += regular.skipped
    return items, skipped


def _placed(examples: Sequence[Example], data: DataOptions, weight: float = 1.0, regularises: bool = False) -> list[Item]:
    sides = (False, True) if data.flip else (False,)
    return [
        Item(example, place(example.size, resolution=data.resolution, step=data.bucket_step), mirrored, weight, regularises)
        for example in examples
        for mirrored in sides
    ]
