"""A folder of pictures with captions beside them -> the examples to train on, and what was left out and why."""

import difflib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sdlora.data.captions import PLACEHOLDER, apply_trigger, read_caption
from sdlora.data.images import IMAGE_SUFFIXES, MAX_PIXELS, barred, examine
from sdlora.errors import DataError

CAPTION_SUFFIXES = (".txt", ".caption")  # in this order under "auto"
# Files that belong in a folder of pictures without being one: left out without a word, as is everything that begins with a dot.
MASK_SUFFIX = "-masklabel"  # of the stem, as OneTrainer names masks
STRAY_STEMS = frozenset({"thumbs", "desktop", "license", "licence", "readme", "copying", "notice", "credits"})
NAMED_IN_MESSAGES = 3


@dataclass(frozen=True)
class Mask:
    """What of a picture is trained: see `images.decode_mask`."""

    path: Path
    digest: str
    alpha: bool


@dataclass(frozen=True)
class Example:
    """One picture and its caption, the trigger word already in it."""

    path: Path
    caption: str
    size: tuple[int, int]  # upright width and height in pixels
    digest: str  # sha256 of the file's bytes, hex
    mask: Mask | None = None


@dataclass(frozen=True)
class Found:
    examples: tuple[Example, ...]
    skipped: tuple[tuple[Path, str], ...]  # each with the reason


def find_examples(
    folder: Path,
    *,
    caption_extension: str = "auto",
    missing_caption: Literal["error", "empty", "trigger"],
    trigger: str,
    on_bad_image: Literal["error", "skip"],
    masks: Literal["off", "file", "alpha"] = "off",
    max_pixels: int = MAX_PIXELS,
) -> Found:
    """The examples directly in `folder` in natural order of their names, each picture decoded once; raises DataError.

    A caption belongs to the picture of exactly the same stem, and so does a mask, `cat-masklabel.png` beside `cat.jpg`, whose size must
    be the picture's. `missing_caption` also covers captions of white space only.
    """
    files, subfolders = _list(folder)
    unopened = [(path, reason) for path in files if path.suffix.lower() not in IMAGE_SUFFIXES and (reason := barred(path, folder))]
    files = [path for path in files if path not in dict(unopened)]
    mask_files = [path for path in files if _is_mask(path)]
    files = [path for path in files if not _is_mask(path)]
    pictures = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not pictures:
        raise DataError(f"{folder} has no pictures ({_extensions(IMAGE_SUFFIXES)}): {_contents(files, subfolders)}.")
    suffixes = CAPTION_SUFFIXES if caption_extension == "auto" else ("." + caption_extension.lower().lstrip("."),)
    sidecars = {(path.stem, path.suffix.lower()): path for path in files if path.suffix.lower() in suffixes}
    _refuse_shared_captions(pictures, list(sidecars.values()))

    examples: list[Example] = []
    skipped = [(path, "a subfolder; only the pictures directly in the folder are used") for path in subfolders] + unopened
    without_caption: list[Path] = []
    used: dict[str, Path] = {}  # stem -> the caption file that was read for it
    for path, (size, digest) in zip(pictures, _examine_all(pictures, folder, max_pixels), strict=True):
        if isinstance(size, str):
            if on_bad_image == "error":
                raise DataError(f"{path} cannot be read: {size}; repair or remove it, or set on_bad_image to 'skip'.")
            skipped.append((path, size))
            continue
        caption = ""
        for sidecar in (sidecars[path.stem, suffix] for suffix in suffixes if (path.stem, suffix) in sidecars):
            used[path.stem] = sidecar
            caption = read_caption(sidecar)
            if caption:
                break
        if caption:
            if PLACEHOLDER in caption and not trigger:
                raise DataError(f"The caption {used[path.stem]} has {PLACEHOLDER} in it but no trigger is set; set one or take it out.")
            caption = apply_trigger(caption, trigger)
        else:
            without_caption.append(path)
            caption = trigger if missing_caption == "trigger" else ""
        examples.append(Example(path, caption, size, digest, Mask(path, digest, True) if masks == "alpha" else None))

    if not examples:
        first, reason = next(left_out for left_out in skipped if left_out[0] in pictures)
        raise DataError(f"None of the {len(pictures)} pictures in {folder} can be read; the first, {first.name}: {reason}.")
    if without_caption and missing_caption == "error":
        named = ", ".join(path.name for path in without_caption[:NAMED_IN_MESSAGES])
        raise DataError(
            f"{len(without_caption)} of {len(examples)} pictures in {folder} have no caption"
            f" ({named}{', ...' if len(without_caption) > NAMED_IN_MESSAGES else ''}); write each into a file of the same name that ends in"
            f" {' or '.join(suffixes)}, or set missing_caption to 'trigger' or 'empty'."
        )
    if masks == "file":
        examples = _with_masks(examples, mask_files, max_pixels)
    else:
        skipped += [(path, "a mask; set data.masks = 'file' to use it") for path in mask_files]
    return Found(tuple(examples), tuple(skipped + _left_over(files, suffixes, used)))


def _is_mask(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.stem.endswith(MASK_SUFFIX)


def _with_masks(examples: Sequence[Example], files: Sequence[Path], max_pixels: int) -> list[Example]:
    """Each example with the mask of its stem, if there is one."""
    by_stem = {path.stem.removesuffix(MASK_SUFFIX): path for path in files}
    strays = by_stem.keys() - {example.path.stem for example in examples}
    if strays or not files:
        named = f"{by_stem[min(strays)].name} belongs to no picture" if strays else f"there is no NAME{MASK_SUFFIX}.png in the folder"
        raise DataError(f"data.masks = 'file', but {named}; name each mask after its picture.")
    found = []
    for example in examples:
        path = by_stem.get(example.path.stem)
        if path is None:
            found.append(example)
            continue
        size = barred(path, path.parent) or examine(path, max_pixels)
        if size != example.size:
            wrong = size if isinstance(size, str) else "it has {}x{} pixels, and the picture {}x{}".format(*size, *example.size)
            raise DataError(f"The mask {path} does not fit {example.path.name}: {wrong}.")
        found.append(replace(example, mask=Mask(path, _digest(path), False)))
    return found


def _list(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files and subfolders, hidden ones left out, in natural order: a2 before a10, upper and lower case alike."""
    if folder.is_file():
        raise DataError(f"{folder} is a file; give the folder that holds the pictures.")
    if not folder.exists():
        siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        close = difflib.get_close_matches(folder.name, siblings, n=1)
        way_out = f"did you mean {folder.parent / close[0]}?" if close else "check the path."
        raise DataError(f"The folder {folder} does not exist; {way_out}")
    try:
        entries = sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=_natural)
    except OSError as error:
        raise DataError(f"The folder {folder} cannot be opened ({error.strerror}); check its permissions.") from error
    return [path for path in entries if not path.is_dir()], [path for path in entries if path.is_dir()]


def _natural(path: Path) -> tuple[list[str | int], str]:
    # Every other part is a number, so that only like is compared with like; the name itself settles A against a, 01 against 1.
    parts: list[str | int] = [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", path.stem.casefold()))]
    return parts, path.name


def _examine_all(pictures: Sequence[Path], folder: Path, max_pixels: int) -> list[tuple[tuple[int, int] | str, str]]:
    """Size (or the reason why the picture cannot be read) and digest of each; Pillow and hashlib let threads run at once."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # each holds a whole picture in memory
        sizes = list(pool.map(lambda path: barred(path, folder) or examine(path, max_pixels), pictures))
        readable = [path for path, size in zip(pictures, sizes, strict=True) if not isinstance(size, str)]
        digests = dict(zip(readable, pool.map(_digest, readable), strict=True))
    return [(size, digests.get(path, "")) for path, size in zip(pictures, sizes, strict=True)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _left_over(files: Sequence[Path], suffixes: Sequence[str], used: dict[str, Path]) -> list[tuple[Path, str]]:
    """The files that are neither picture nor caption of one, each with the reason; strays are not worth a line."""
    stems = {path.stem for path in files if path.suffix.lower() in IMAGE_SUFFIXES}
    left_over = []
    for path in files:
        is_caption = path.suffix.lower() in suffixes
        if path.suffix.lower() in IMAGE_SUFFIXES or path == used.get(path.stem):
            continue
        if is_caption and path.stem in stems:
            if path.stem in used:  # else its picture is listed, as unreadable
                left_over.append((path, f"the caption is taken from {used[path.stem].name}"))
        elif path.stem.lower() not in STRAY_STEMS:
            left_over.append((path, "a caption without a picture of the same name" if is_caption else "not a picture"))
    return left_over


def _refuse_shared_captions(pictures: Sequence[Path], sidecars: Sequence[Path]) -> None:
    by_stem: dict[str, list[Path]] = {}
    for path in pictures:
        by_stem.setdefault(path.stem, []).append(path)
    for sidecar in sidecars:
        sharing = by_stem.get(sidecar.stem, [])
        if len(sharing) > 1:
            names = " and ".join(path.name for path in sharing)
            raise DataError(
                f"{names} in {sidecar.parent} share the caption {sidecar.name}; remove one of them or give it a name of its own."
            )


def _contents(files: Sequence[Path], subfolders: Sequence[Path]) -> str:
    """What a folder without pictures has instead: "it holds 3 .txt, 1 .psd; subfolders: a, b"."""
    counts = Counter(path.suffix.lower() or "without extension" for path in files).most_common()
    parts = []
    if counts:
        parts.append("it holds " + ", ".join(f"{count} {suffix}" for suffix, count in counts))
    if subfolders:
        more = ", ..." if len(subfolders) > NAMED_IN_MESSAGES else ""
        parts.append(
            f"subfolders: {', '.join(path.name for path in subfolders[:NAMED_IN_MESSAGES])}{more} (give one of them, they are not searched)"
        )
    return "; ".join(parts) or "it is empty"


def _extensions(suffixes: frozenset[str]) -> str:
    return ", ".join(sorted(suffix.removeprefix(".") for suffix in suffixes))
