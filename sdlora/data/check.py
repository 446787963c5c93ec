"""What training would see of a folder, and what its owner may not know of it: copies, look-alikes, enlarged pictures, captions."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sdlora.data import images, saved
from sdlora.data.buckets import Placed, enlargement
from sdlora.data.dataset import Example

ALIKE = 4  # of 64 bits in which the hashes of two pictures may differ
HASH_SIZE = (9, 8)  # width, height
# Levels of 255 by which their shades may differ in the mean: drawings on plain paper have few edges, and so hashes that are alike.
SAME_SHADES = 12
NAMED = 20  # lines of one kind


@dataclass(frozen=True)
class Report:
    sizes: dict[Path, tuple[int, int]]  # of every picture
    captions: int  # different ones
    buckets: dict[tuple[int, int], int]  # -> pictures; one is counted in each that it is placed in
    copies: list[list[Path]]  # the same bytes
    alike: list[list[Path]]  # other bytes, but hardly to be told apart
    enlarged: dict[Path, float]  # -> how many times, for their bucket
    uncaptioned: list[Path]
    overlong: dict[Path, int]  # -> tokens
    max_tokens: int  # of a caption that are used, beside the marks of start and end
    unreadable: list[tuple[Path, str]]
    unused: list[tuple[Path, str]]
    refusals: list[str]  # why training would not start


def check(
    places: Iterable[tuple[Example, Placed]],
    skipped: Iterable[tuple[Path, str]],
    *,
    tokens: Callable[[str], int],
    max_tokens: int = 75,
    seen: Mapping[Path, Look] | None = None,
    refusals: Iterable[str] = (),
) -> Report:
    """`places` and `skipped` are what was found; a picture may come in several places. Look-alikes are sought among `seen`."""
    places = list(dict.fromkeys(places))
    examples = {example.path: example for example, _ in places}
    scales: dict[Path, float] = {}
    for example, placed in places:
        scales[example.path] = max(scales.get(example.path, 0.0), enlargement(example.size, placed))
    lengths = {path: max(tokens(line) for line in example.caption.split("\n")) for path, example in examples.items()}
    by_digest: dict[str, list[Path]] = {}
    for path, example in examples.items():
        by_digest.setdefault(example.digest, []).append(path)
    distinct = {same[0] for same in by_digest.values()}
    left_out = [(path, path.suffix.lower() in images.IMAGE_SUFFIXES or saved.is_row(path), reason) for path, reason in skipped]
    return Report(
        sizes={path: example.size for path, example in examples.items()},
        captions=len({example.caption for example in examples.values()}),
        buckets=dict(Counter(bucket for bucket, _ in {(placed.bucket, example.path) for example, placed in places})),
        copies=[same for same in by_digest.values() if len(same) > 1],
        alike=look_alikes({path: look for path, look in (seen or {}).items() if path in distinct}),
        enlarged={path: scale for path, scale in scales.items() if scale > 1},
        uncaptioned=[path for path, example in examples.items() if not example.caption],
        overlong={path: length for path, length in lengths.items() if length > max_tokens},
        max_tokens=max_tokens,
        unreadable=[(path, reason) for path, is_picture, reason in left_out if is_picture],
        unused=[(path, reason) for path, is_picture, reason in left_out if not is_picture],
        refusals=list(refusals),
    )


# ---------------------------------------------------------------- look-alikes


@dataclass(frozen=True)
class Look:
    """What a picture looks like from afar."""

    code: int  # 64 bits: whether each of 9 x 8 mean levels of grey is lighter than its right neighbour
    shades: tuple[int, ...]  # these means in red, green and blue


def looks(paths: Sequence[Path]) -> dict[Path, Look]:
    """Of each picture its difference hash (Krawetz, 'Kind of Like That', 2013), which size and format leave as it is, and its shades."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(_look, paths), strict=True))


def _look(path: Path) -> Look:
    small = images.decode(path, at_least=HASH_SIZE).resize(HASH_SIZE, Image.Resampling.BOX)
    grey = np.asarray(small.convert("L"))
    bits = np.packbits(grey[:, :-1] > grey[:, 1:])
    return Look(int.from_bytes(bits.tobytes(), "big"), tuple(small.tobytes()))


def look_alikes(of: Mapping[Path, Look]) -> list[list[Path]]:
    """Groups in which each picture has another that is all but the same, in the order of the pictures."""
    paths = list(of)
    codes = np.array([look.code for look in of.values()], dtype=np.uint64)
    shades = np.array([look.shades for look in of.values()], dtype=np.int16)
    group = np.arange(len(paths))  # each picture's group, named after its first member
    for index in range(len(paths)):
        close = index + 1 + np.flatnonzero(np.bitwise_count(codes[index + 1 :] ^ codes[index]) <= ALIKE)
        for other in close[np.abs(shades[close] - shades[index]).mean(axis=1) <= SAME_SHADES] if len(close) else ():
            group[group == max(group[index], group[other])] = min(group[index], group[other])
    members: dict[int, list[Path]] = {}
    for path, number in zip(paths, group.tolist(), strict=True):
        members.setdefault(number, []).append(path)
    return [alike for alike in members.values() if len(alike) > 1]


# ---------------------------------------------------------------- as text


def lines(report: Report) -> Iterator[str]:
    """The report as a page, an empty line before each finding."""
    widths, heights = zip(*report.sizes.values(), strict=True)
    yield f"Pictures     {len(report.sizes)}, {min(widths)} to {max(widths)} px wide and {min(heights)} to {max(heights)} px high"
    yield f"Captions     {report.captions} different"
    yield f"Buckets      {', '.join(f'{width}x{height} ({n})' for (width, height), n in sorted(report.buckets.items()))}"
    for title, entries in (_findings(report) | {"Training would refuse": report.refusals}).items():
        if entries:
            yield ""
            yield f"{title} ({len(entries)}):"
            yield from (f"  {entry}" for entry in entries[:NAMED])
            if len(entries) > NAMED:
                yield f"  and {len(entries) - NAMED} more"
    if not report.refusals:
        yield ""
        yield "Training would start."


def short(report: Report) -> Iterator[str]:
    """The report in a sentence for each finding; what was skipped is not among them."""
    titles = list(_findings(report).items())[:-2]
    yield from (f"{title}: {len(entries)}, as {entries[0]}." for title, entries in titles if entries)


def _findings(report: Report) -> dict[str, list[str]]:
    folders = {path.parent for path in report.sizes}

    def name(path: Path) -> str:
        """Alone where all pictures lie together, as names may be the same in several folders."""
        return path.name if len(folders) == 1 else str(path)

    return {
        "Exact copies": [" = ".join(name(path) for path in same) for same in report.copies],
        "Pictures that look alike": [", ".join(name(path) for path in alike) for alike in report.alike],
        "Pictures smaller than their bucket, so enlarged": [
            f"{name(path)}, {_size(report.sizes[path])}, {scale:.2f} times"
            for path, scale in sorted(report.enlarged.items(), key=lambda entry: -entry[1])
        ],
        "Empty captions": [name(path) for path in report.uncaptioned],
        f"Captions longer than {report.max_tokens} tokens": [f"{name(path)}, {length}" for path, length in report.overlong.items()],
        "Pictures that are not used": [f"{name(path)}: {reason}" for path, reason in report.unreadable],
        "Other files that are not used": [f"{name(path)}: {reason}" for path, reason in report.unused],
    }


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
