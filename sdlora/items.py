"""What a run trains on: pictures of its sets, placed in buckets."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from sdlora.config import Config, DataOptions, SetOptions
from sdlora.data import images
from sdlora.data.buckets import Placed, place_all, random_crops
from sdlora.data.captions import PLACEHOLDER, CaptionRules
from sdlora.data.dataset import Example, Refuse, find_examples, find_subsets, refuse
from sdlora.data.salience import most_detail
from sdlora.errors import DataError
from sdlora.files import write_durably


@dataclass(frozen=True)
class Item:
    """A picture as it is shown, upright or mirrored, in its bucket, in its colours or others; how often, and how much it counts."""

    example: Example
    placed: Placed
    mirrored: bool
    repeats: int = 1  # in an epoch
    weight: float = 1.0  # of its loss
    regularises: bool = False  # of the class and not of the subject
    rules: CaptionRules = field(default=CaptionRules())
    background: tuple[int, int, int] = images.WHITE  # behind what is transparent
    colours: int = 0  # the number of a variant, 0 for those of the file: see images.vary_colour

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """What SDXL is told of a picture (Podell et al. 2023, 2.2): its own height and width, the top and left of what is shown of it once
        it is resized, and the height and width of that, in px. Mirrored, what was cut off at the right is at the left."""
        left, top, right, _ = self.placed.crop
        (width, height), (shown_width, shown_height) = self.example.size, self.placed.bucket
        return height, width, top, self.placed.resized[0] - right if self.mirrored else left, shown_height, shown_width


def find_items(config: Config, refuse: Refuse = refuse) -> tuple[list[Item], list[tuple[Path, str]]]:
    """Items of all sets in the order of their names, those that regularise last; and what was skipped, with the reason.
    Raises DataError where there is nothing to show, and by default for whatever training refuses."""
    training: list[Item] = []
    regularising: list[Item] = []
    skipped: list[tuple[Path, str]] = []
    for options in config.data.every_set():
        subsets, left_out = find_subsets(options.folder)
        skipped += left_out
        for subset in subsets:
            found = find_examples(
                subset.folder,
                caption_column=options.caption_column,
                caption_lines=options.caption_lines,
                missing_caption=options.missing_caption,
                trigger=options.trigger,
                around=options.caption_prefix + options.caption_suffix,
                fallback=subset.caption or (options.class_noun if options.regularises else ""),
                on_bad_image=config.data.on_bad_image,
                masks=options.masks,
                max_pixels=config.data.max_pixels,
                refuse=refuse,
            )
            items = _placed(found.examples, config, options, options.repeats * subset.repeats, refuse)
            (regularising if options.regularises else training).extend(items)
            skipped += found.skipped
    if not training:
        raise DataError("data.sets: every set regularises, so there is nothing to learn; add one of your subject.")
    shown = as_often(regularising, sum(item.repeats for item in training))
    kept = {item.example.path for item in shown}
    unshown = Counter(path.parent for path in {item.example.path for item in regularising} - kept)
    for folder, count in sorted(unshown.items()):
        skipped.append((folder, f"the last {count} of its pictures: an epoch shows as many regularisation pictures as training pictures"))
    return training + shown, skipped


def as_often(items: Sequence[Item], times: int) -> list[Item]:
    """The items with such repeats that an epoch shows all of them together `times` times, as DreamBooth has it; what they had are
    their shares. Those for which nothing is left are not among them."""
    most = max((item.repeats for item in items), default=0)
    turns = [index for number in range(most) for index, item in enumerate(items) if item.repeats > number]
    if not turns:
        return []
    rounds, rest = divmod(times, len(turns))
    counts = Counter(turns[:rest])
    shares = [rounds * item.repeats + counts[index] for index, item in enumerate(items)]
    return [replace(item, repeats=repeats) for item, repeats in zip(items, shares, strict=True) if repeats]


def _placed(examples: Sequence[Example], config: Config, options: SetOptions, repeats: int, refuse: Refuse) -> list[Item]:
    data, sides = config.data, (False, True) if options.flip else (False,)
    weight = options.weight * (config.loss.regularisation if options.regularises else 1.0)
    prefix, suffix = (text.replace(PLACEHOLDER, options.trigger) for text in (options.caption_prefix, options.caption_suffix))
    background = images.colour(data.background)
    rules = CaptionRules(options.caption_dropout, options.tag_dropout, options.shuffle_tags, options.keep_tags, prefix, suffix)
    places = [(example, placed) for example in examples for placed in _places(example, data, refuse)]
    if data.crop == "salient":
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow lets threads run at once
            crops = pool.map(partial(_salient, background=background), *zip(*places, strict=True))
            places = [(example, crop) for (example, _), crop in zip(places, crops, strict=True)]
    return [
        Item(example, placed, mirrored, repeats, weight, options.regularises, rules, background, colours)
        for example, placed in places
        for mirrored in sides
        for colours in range(1 + options.colour_variants)
    ]


def _salient(example: Example, placed: Placed, background: tuple[int, int, int]) -> Placed:
    """The crop that keeps the most detail."""
    if placed.resized == placed.bucket:
        return placed
    picture = images.decode(example.path, background, at_least=placed.resized)
    whole = images.crop_to(picture, placed.resized, (0, 0, *placed.resized))
    return placed.cut_at(*most_detail(whole, placed.bucket))


def _places(example: Example, data: DataOptions, refuse: Refuse) -> list[Placed]:
    """Every resolution of a picture, and every crop of that; enlarged where that alone would give it a place."""

    def with_or_without(upscale: bool) -> list[Placed]:
        return place_all(
            example.size,
            data.resolutions or (data.resolution,),
            step=data.bucket_step,
            min_side=data.min_side,
            max_side=data.max_side,
            upscale=upscale,
        )

    try:
        places = with_or_without(data.upscale)
    except DataError as error:
        refuse(f"{example.path}: {error}")
        places = with_or_without(True)
    return places if data.crop != "random" else [crop for placed in places for crop in random_crops(placed, example.digest)]


def write_pictures(path: Path, items: Sequence[Item]) -> None:
    """What an epoch shows, a row for each way in which it shows a picture, as JSON: sizes in pixels, width before height."""
    rows = [
        {
            "file": str(item.example.path),
            "size": item.example.size,
            "bucket": item.placed.bucket,
            "resized": item.placed.resized,
            "crop": item.placed.crop,  # left, top, right, bottom
            "mirrored": item.mirrored,
            "colours": item.colours,
            "regularises": item.regularises,
            "repeats": count * item.repeats,
        }
        for item, count in Counter(items).items()
    ]
    write_durably(path, ("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n").encode())
