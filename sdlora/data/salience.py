"""Where in a picture the detail is: a crop that keeps it, without a detector of faces or anything else."""

from __future__ import annotations

import numpy as np
from PIL import Image


def most_detail(picture: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """Left and top of the window of `size` (width, height) with the most edges, of several the one nearest to the middle.

    An edge is a difference of brightness between neighbours; differences are whole numbers, so that a tie is one on every machine.
    """
    grey = np.asarray(picture.convert("L")).astype(np.int64)  # (H, W)
    edges = np.zeros_like(grey)
    edges[:, 1:] += np.abs(np.diff(grey, axis=1))
    edges[1:] += np.abs(np.diff(grey, axis=0))
    sums = np.pad(edges, ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)  # of all above and to the left (Crow 1984)
    width, height = size
    inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]  # of each window, by corner
    tops, lefts = np.nonzero(inside == inside.max())
    # In doubled coordinates, so that the middle is whole.
    distance = (2 * lefts - inside.shape[1] + 1) ** 2 + (2 * tops - inside.shape[0] + 1) ** 2
    nearest = int(distance.argmin())
    return int(lefts[nearest]), int(tops[nearest])
