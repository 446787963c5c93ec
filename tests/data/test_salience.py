"""The crop that keeps the detail."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sdlora.data.salience import most_detail


def with_detail_at(box: tuple[int, int, int, int], size: tuple[int, int] = (96, 48)) -> Image.Image:
    """Grey but for noise in the box (left, top, right, bottom)."""
    pixels = np.full((size[1], size[0], 3), 128, dtype=np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = np.random.default_rng(0).integers(0, 256, (bottom - top, right - left, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("left", [0, 20, 48])
def test_detail_at_one_side_is_what_is_kept(left: int) -> None:
    picture = with_detail_at((left, 0, left + 48, 48))
    assert abs(most_detail(picture, (48, 48))[0] - left) <= 1  # the edge around the noise may weigh more than its last column
    turned = picture.transpose(Image.Transpose.TRANSPOSE)
    assert most_detail(turned, (48, 48)) == most_detail(picture, (48, 48))[::-1]


def test_a_window_smaller_both_ways_goes_to_the_detail() -> None:
    left, top = most_detail(with_detail_at((60, 10, 76, 26)), (20, 20))
    assert left <= 60 and left + 20 >= 76 and top <= 10 and top + 20 >= 26


def test_by_hand() -> None:
    row = np.array([[0, 0, 9, 9, 9, 5]], dtype=np.uint8)  # edges 0 0 9 0 0 4
    assert most_detail(Image.fromarray(row), (3, 1)) == (
        1,
        0,
    )  # windows 9 9 9 4: the first three alike, nearest to the middle 1.5 are 1 and 2
    assert most_detail(Image.fromarray(row), (4, 1)) == (2, 0)  # windows 9 9 13


def test_a_plain_picture_is_cut_in_the_middle_and_one_that_fits_is_whole() -> None:
    assert most_detail(Image.new("RGB", (97, 48)), (48, 48)) == (24, 0)
    assert most_detail(with_detail_at((0, 0, 10, 10)), (96, 48)) == (0, 0)
