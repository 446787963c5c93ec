"""Aspect-ratio buckets of constant area: where a picture of any shape lands without bars or distortion.

The idea is NovelAI's (Aspect Ratio Bucketing, 2022); a batch is drawn from one bucket only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from sdlora.errors import ConfigError, DataError

RANDOM_CROPS = 4  # of a picture: each has its latents in the cache, so there must be an end to them


@dataclass(frozen=True)
class Placed:
    """A picture resized to `resized` and cut at `crop` fills `bucket` exactly; all in pixels, width before height."""

    bucket: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int, int, int]  # left, top, right, bottom in the resized picture

    def cut_at(self, left: int, top: int) -> Placed:
        """The same, with another corner of the crop."""
        return replace(self, crop=(left, top, left + self.bucket[0], top + self.bucket[1]))


@cache
def bucket_sizes(resolution: int, step: int = 64, min_side: int | None = None, max_side: int | None = None) -> tuple[tuple[int, int], ...]:
    """Every (width, height) in multiples of `step` that comes nearest to resolution**2 pixels from below, sorted.

    The sides lie between half and twice the resolution unless told otherwise, as in NovelAI's 256 to 1024 at 512.
    """
    shortest = resolution // 2 if min_side is None else min_side
    longest = 2 * resolution if max_side is None else max_side
    sides = range(math.ceil(shortest / step) * step, longest + 1, step)
    tallest = {width: _floor(min(resolution**2 // width, longest), step) for width in sides}
    portrait = {(width, height) for width, height in tallest.items() if height in sides}
    landscape = {(height, width) for width, height in portrait}
    square = _floor(resolution, step)  # missing above where the resolution is no multiple of the step
    squares = {(square, square)} if square in sides else set()
    if not portrait and not squares:
        raise ConfigError(
            f"No bucket has sides that are multiples of {step} from {shortest} to {longest} and at most {resolution}x{resolution} pixels;"
            " use a smaller bucket step or wider limits."
        )
    return tuple(sorted(portrait | landscape | squares))


def place(
    size: tuple[int, int],
    *,
    resolution: int,
    step: int = 64,
    min_side: int | None = None,
    max_side: int | None = None,
    upscale: bool = True,
) -> Placed:
    """The bucket nearest in aspect ratio, the smallest size that covers it, and the centre crop.

    With `upscale` off a picture too small for its bucket keeps its pixels and gets the largest bucket that fits inside it.
    """
    width, height = size
    bucket = min(bucket_sizes(resolution, step, min_side, max_side), key=lambda candidate: _distance(size, candidate))
    if not upscale and (width < bucket[0] or height < bucket[1]):
        longest = 2 * resolution if max_side is None else max_side
        bucket_width = _floor(min(width, longest), step)
        bucket_height = _floor(min(height, longest, resolution**2 // max(bucket_width, 1)), step)
        if not bucket_width or not bucket_height:
            raise DataError(
                f"A picture of {width}x{height} pixels has a side below the bucket step of {step}; set data.upscale = true or leave it out."
            )
        bucket, resized = (bucket_width, bucket_height), size
    elif bucket[0] * height >= bucket[1] * width:  # the width needs the larger scale
        resized = (bucket[0], _divide(height * bucket[0], width))
    else:
        resized = (_divide(width * bucket[1], height), bucket[1])
    left, top = (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2
    return Placed(bucket, resized, (left, top, left + bucket[0], top + bucket[1]))


def place_all(
    size: tuple[int, int],
    resolutions: Sequence[int],
    *,
    step: int = 64,
    min_side: int | None = None,
    max_side: int | None = None,
    upscale: bool = True,
) -> list[Placed]:
    """The picture at every resolution whose bucket it fills without being enlarged, and in any case at the lowest; low ones first."""
    low, *high = sorted(set(resolutions))
    lowest = place(size, resolution=low, step=step, min_side=min_side, max_side=max_side, upscale=upscale)
    higher = [place(size, resolution=resolution, step=step, min_side=min_side, max_side=max_side) for resolution in high]
    return [lowest, *(placed for placed in higher if enlargement(size, placed) <= 1)]


def enlargement(size: tuple[int, int], placed: Placed) -> float:
    """By how much a picture of `size` is scaled up, or down where it is below 1."""
    return max(placed.resized[0] / size[0], placed.resized[1] / size[1])


def random_crops(placed: Placed, seed: str) -> list[Placed]:
    """RANDOM_CROPS windows, drawn evenly from all that fit. Always as many, alike where there is no room, so that every picture counts
    the same; on a seed that follows from the picture, so that another run finds them in its cache."""
    rng = random.Random(f"crop/{seed}")  # random() keeps its sequence between versions of Python; randrange() need not
    room = (placed.resized[0] - placed.bucket[0] + 1, placed.resized[1] - placed.bucket[1] + 1)
    corners = [(int(rng.random() * room[0]), int(rng.random() * room[1])) for _ in range(RANDOM_CROPS)]
    return [placed.cut_at(left, top) for left, top in corners]


def _distance(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[float, int]:
    """Difference in log aspect ratio, the same for a picture and its transpose; the larger area wins a tie."""
    difference = abs(math.log(size[0] * bucket[1]) - math.log(size[1] * bucket[0]))
    return round(difference, 9), -bucket[0] * bucket[1]  # rounded: equal ratios may differ in the last bit


def _floor(value: int, step: int) -> int:
    return value // step * step


def _divide(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)  # to the nearest integer, halves up
