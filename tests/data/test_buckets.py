"""Buckets: hand-made cases, and the properties that hold for a picture of any shape."""

import math
import random

import pytest

from sdlora.data.buckets import RANDOM_CROPS, Placed, bucket_sizes, enlargement, place, place_all, random_crops
from sdlora.errors import ConfigError, DataError


def test_the_buckets_of_512_are_novelai_s() -> None:
    # Side 256 to 1024 in steps of 64: for each width the greatest height with width * height <= 512 * 512, and the reverse.
    portrait = [(256, 1024), (320, 768), (384, 640), (448, 576)]
    sizes = bucket_sizes(512)
    assert (512, 512) in sizes
    assert set(portrait) <= set(sizes)
    assert {(height, width) for width, height in sizes} == set(sizes)
    assert all(width % 64 == 0 and 256 <= width <= 1024 and width * height <= 512 * 512 for width, height in sizes)


@pytest.mark.parametrize(
    ("size", "placed"),
    [
        ((512, 512), Placed((512, 512), (512, 512), (0, 0, 512, 512))),
        ((512, 520), Placed((512, 512), (512, 520), (0, 4, 512, 516))),  # cut, not resampled
        ((1024, 1024), Placed((512, 512), (512, 512), (0, 0, 512, 512))),
        ((100, 100), Placed((512, 512), (512, 512), (0, 0, 512, 512))),
        ((3000, 2000), Placed((640, 384), (640, 427), (0, 21, 640, 405))),  # 3:2; 2000 * 640 / 3000 = 426.67
        ((2000, 3000), Placed((384, 640), (427, 640), (21, 0, 405, 640))),
        ((10000, 100), Placed((1024, 256), (25600, 256), (12288, 0, 13312, 256))),
    ],
)
def test_placed_by_hand_at_512(size: tuple[int, int], placed: Placed) -> None:
    assert place(size, resolution=512) == placed


def test_the_miniature_size_works() -> None:
    assert place((64, 64), resolution=64, step=8) == Placed((64, 64), (64, 64), (0, 0, 64, 64))
    assert place((300, 200), resolution=64, step=8).bucket == (80, 48)  # of (72, 56) and (80, 48), 5/3 is nearer to 3/2
    assert bucket_sizes(64, 64) == ((64, 64),)


def test_a_resolution_between_steps_still_has_its_square() -> None:
    assert place((700, 700), resolution=500).bucket == (448, 448)


def test_limits_on_the_sides_hold() -> None:
    placed = place((4000, 1000), resolution=512, min_side=384, max_side=640)
    assert placed == Placed((640, 384), (1536, 384), (448, 0, 1088, 384))


def test_without_upscaling_small_pictures_keep_their_pixels() -> None:
    assert place((300, 200), resolution=512, upscale=False) == Placed((256, 192), (300, 200), (22, 4, 278, 196))
    assert place((3000, 2000), resolution=512, upscale=False) == place((3000, 2000), resolution=512)
    with pytest.raises(DataError, match="300x40"):
        place((300, 40), resolution=512, upscale=False)


def test_limits_that_leave_no_bucket_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiples of 64"):
        place((512, 512), resolution=512, min_side=600)
    with pytest.raises(ConfigError, match="multiples of 64"):
        place((32, 32), resolution=32)


@pytest.mark.parametrize("upscale", [True, False])
@pytest.mark.parametrize(("resolution", "step"), [(64, 8), (512, 64), (768, 64), (1000, 32)])
def test_every_picture_is_covered_and_none_distorted(resolution: int, step: int, upscale: bool) -> None:
    rng = random.Random(resolution)
    for _ in range(1000):
        size = width, height = int(2 ** rng.uniform(6, 13)), int(2 ** rng.uniform(6, 13))
        placed = place(size, resolution=resolution, step=step, upscale=upscale)
        bucket, resized = placed.bucket, placed.resized
        left, top, right, bottom = placed.crop
        assert bucket[0] % step == 0 and bucket[1] % step == 0 and bucket[0] * bucket[1] <= resolution**2
        assert max(bucket) <= 2 * resolution
        assert (right - left, bottom - top) == bucket  # filled exactly
        assert left >= 0 and top >= 0 and right <= resized[0] and bottom <= resized[1]  # without bars
        assert abs(left - (resized[0] - right)) <= 1 and abs(top - (resized[1] - bottom)) <= 1  # from the centre
        # One scale for both sides, to within the rounding of the longer one to whole pixels.
        exact = (resized[1] * width / height, resized[0] * height / width)
        assert abs(resized[0] - exact[0]) <= 0.5 or abs(resized[1] - exact[1]) <= 0.5
        if upscale:
            assert bucket[0] == resized[0] or bucket[1] == resized[1]  # no smaller size would cover
            ratio = math.log(width / height)
            assert all(
                abs(ratio - math.log(bucket[0] / bucket[1])) <= abs(ratio - math.log(w / h)) + 1e-8
                for w, h in bucket_sizes(resolution, step)
            )
            turned = place((height, width), resolution=resolution, step=step)
            assert turned.bucket == bucket[::-1] and turned.resized == resized[::-1]
        else:
            assert resized[0] <= width and resized[1] <= height


def test_several_resolutions_by_hand() -> None:
    sizes = {(1024, 1024): [512, 768, 1024], (1000, 1000): [512, 768], (500, 1300): [512, 768], (300, 300): [512]}
    for size, expected in sizes.items():
        found = place_all(size, [1024, 512, 768, 512])
        assert [placed.bucket for placed in found] == [place(size, resolution=resolution).bucket for resolution in expected]
    assert place_all((300, 200), [512, 768], upscale=False) == [place((300, 200), resolution=512, upscale=False)]
    assert enlargement((300, 200), place((300, 200), resolution=512)) == 427 / 200  # in the height, which is rounded up
    assert enlargement((1280, 768), place((1280, 768), resolution=512)) == 0.5


def test_random_crops_lie_anywhere_inside_and_are_the_same_every_time() -> None:
    wide = place((3000, 2000), resolution=512)  # room: 640x427 for 640x384
    corners = set()
    for number in range(200):
        crops = random_crops(wide, str(number))
        assert crops == random_crops(wide, str(number)) and len(crops) == RANDOM_CROPS
        for placed in crops:
            left, top, right, bottom = placed.crop
            assert (placed.bucket, placed.resized) == (wide.bucket, wide.resized)
            assert left == 0 and right == 640 and top >= 0 and bottom == top + 384 <= 427
            corners.add(top)
    assert corners == set(range(44))  # both edges are reached
    square = place((512, 512), resolution=512)
    assert random_crops(square, "a") == [square] * RANDOM_CROPS  # no room: alike, and as many
    # Another draw here would make every cache stale: int(44 * random()) for random.Random("crop/a").
    assert [placed.crop[1] for placed in random_crops(wide, "a")] == [26, 24, 5, 7]
