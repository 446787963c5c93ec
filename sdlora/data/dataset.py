"""A folder of pictures with captions -> the examples to train on, and what was left out and why.

Captions come from metadata.jsonl or metadata.csv, or from a text file beside the picture. Where both have one, the table is right, as it is
for Hugging Face's and kohya's programs; a text file that says something else is named among what was left out. A folder without pictures
of its own may hold kohya's subfolders instead, `<repeats>_<token> <class>`; or a folder is a dataset that Hugging Face's library saved.
"""

import difflib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from sdlora.data import metadata, saved
from sdlora.data.captions import PLACEHOLDER, SEPARATORS, apply_trigger, read_caption
from sdlora.data.images import IMAGE_SUFFIXES, MAX_PIXELS, examine, open_file
from sdlora.data.metadata import leads_out
from sdlora.errors import DataError

CAPTION_SUFFIXES = (".txt", ".caption")  # in this order under "auto"
MASK_SUFFIX = "-masklabel"  # of the stem, as OneTrainer names masks
DATASET_SUFFIXES = frozenset({".parquet", ".arrow"})
TABLE_SUFFIXES = frozenset({".json", ".jsonl", ".csv"})
# Files that belong in a folder of pictures without being one: left out without a word, as is everything that begins with a dot.
STRAY_STEMS = frozenset({"thumbs", "desktop", "license", "licence", "readme", "copying", "notice", "credits"})
KOHYA_NAME = re.compile(r"([1-9]\d{0,3})_(.*\S.*)")  # repeats, and what the pictures show; more digits would be a date
LEADS_OUT = "it is a link that leads out of the folder"
NAMED_IN_MESSAGES = 3


Refuse = Callable[[str], None]
"""Hears, in a sentence, what training refuses; returns where it is enough to know that, as for a check of the folder."""


def refuse(sentence: str) -> None:
    raise DataError(sentence)


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
    caption: str  # alternatives each on a line of its own
    size: tuple[int, int]  # upright width and height in pixels
    digest: str  # sha256 of the file's bytes, hex
    mask: Mask | None = None


@dataclass(frozen=True)
class Found:
    examples: tuple[Example, ...]
    skipped: tuple[tuple[Path, str], ...]  # each with the reason


@dataclass(frozen=True)
class Subset:
    """A folder that holds pictures."""

    folder: Path
    repeats: int = 1
    caption: str = ""  # of pictures that have none


def find_subsets(folder: Path) -> tuple[list[Subset], list[tuple[Path, str]]]:
    """The folder itself, or kohya's subfolders in it where it has no pictures; and what was left out, with the reason."""
    files, subfolders = _list(folder)
    kohya = {path: match for path in subfolders if (match := KOHYA_NAME.fullmatch(path.name))}
    if not kohya or any(path.suffix.lower() in IMAGE_SUFFIXES or path.name in metadata.NAMES for path in files):
        return [Subset(folder)], []
    skipped = [
        (path, "its name is not of the form <repeats>_<token> <class>, as those beside it") for path in subfolders if path not in kohya
    ]
    skipped += [(path, "not in one of the <repeats>_ folders") for path in files if path.stem.lower() not in STRAY_STEMS]
    return [Subset(path, int(match[1]), match[2].strip()) for path, match in kohya.items()], skipped


def find_examples(
    folder: Path,
    *,
    caption_extension: str = "auto",
    caption_column: str = "",
    caption_lines: Literal["join", "pick"] = "join",
    missing_caption: Literal["error", "empty", "trigger"],
    trigger: str,
    around: str = "",
    fallback: str = "",
    on_bad_image: Literal["error", "skip"],
    masks: Literal["off", "file", "alpha"] = "off",
    max_pixels: int = MAX_PIXELS,
    refuse: Refuse = refuse,
) -> Found:
    """The examples in `folder` in natural order of their names, each picture decoded once; raises DataError where there are none.

    These are the pictures directly in it, and those in subfolders that its table names, or the rows of a dataset. A text file belongs to
    the picture of exactly the same stem beside it, and so does a mask, `cat-masklabel.png` beside `cat.jpg`, whose size must be the
    picture's. `fallback` is the caption of pictures that have none or only white space, and where that is empty, too, `missing_caption`
    says what becomes of them.
    around: what a prefix and a suffix will put round each caption, where the trigger may stand as well.
    """
    separator = SEPARATORS[caption_lines]
    is_saved = saved.is_saved(folder)
    table = (saved if is_saved else metadata).read_table(folder, separator, caption_column)
    named = table.captions if table else {}
    files, subfolders = (list(named), []) if is_saved else _list(folder)
    files += _below(folder, named)
    listed = set(files)
    skipped = [*table.skipped, *((path, "a hidden file") for path in named if path not in listed)] if table else []
    within = {parent for path in named for parent in path.parents}
    skipped += [(path, "a subfolder; only the pictures directly in the folder are used") for path in subfolders if path not in within]
    outside = {path for path in files if leads_out(path, folder)}
    skipped += [(path, LEADS_OUT) for path in files if path in outside and not _is_picture(path)]
    pipes = {path for path in files if not _is_picture(path) and path.exists() and not path.is_file()}  # to open one would wait for ever
    skipped += [(path, "it is not a regular file") for path in files if path in pipes]
    files = [path for path in files if _is_picture(path) or path not in outside | pipes]
    mask_files = [path for path in files if _is_mask(path)]
    pictures = [path for path in files if _is_picture(path)]
    files = [path for path in files if not (_is_mask(path) or (table and path == table.path))]
    if not pictures:
        raise DataError(f"{folder} has no pictures ({_extensions(IMAGE_SUFFIXES)}): {_contents(files, subfolders)}.")
    suffixes = CAPTION_SUFFIXES if caption_extension == "auto" else ("." + caption_extension.lower().lstrip("."),)
    sidecars = {(_place(path), path.suffix.lower()): path for path in files if path.suffix.lower() in suffixes}
    _refuse_shared_captions(pictures, list(sidecars.values()), refuse)

    examples: list[Example] = []
    unreadable: list[tuple[Path, str]] = []
    without_caption: list[Path] = []
    passed_over: dict[Path, Path] = {}  # caption file -> the file that was right instead
    examined = dict.fromkeys(outside, (LEADS_OUT, "")) | _examine_all([path for path in pictures if path not in outside], max_pixels)
    for path in pictures:
        size, digest = examined[path]
        if isinstance(size, str):
            unreadable.append((path, size))
            continue
        beside = [sidecars[_place(path), suffix] for suffix in suffixes if (_place(path), suffix) in sidecars]
        written = {sidecar: _read(sidecar, separator, refuse) for sidecar in beside}
        sources = ({table.path: named.get(path, "")} if table else {}) | written
        source, caption = next(((source, text) for source, text in sources.items() if text), (None, ""))
        if source is not None:
            passed_over |= {sidecar: source for sidecar, text in written.items() if text != caption}
            if PLACEHOLDER in caption and not trigger:
                refuse(f"The caption {source} has {PLACEHOLDER} in it but no trigger is set; set one or take it out.")
            caption = apply_trigger(caption, trigger, around)
        elif fallback:
            caption = apply_trigger(fallback, trigger, around)
        else:
            without_caption.append(path)
            caption = trigger if missing_caption == "trigger" else ""
        examples.append(Example(path, caption, size, digest, Mask(path, digest, True) if masks == "alpha" else None))

    skipped += unreadable
    if unreadable and on_bad_image == "error":
        first, reason = unreadable[0]
        others = f" and {len(unreadable) - 1} more that cannot" if unreadable[1:] else ""
        refuse(f"{first} cannot be read: {reason}; repair or remove it{others}, or set on_bad_image to 'skip'.")
    if not examples:
        first, reason = unreadable[0]
        raise DataError(f"None of the {len(pictures)} pictures in {folder} can be read; the first, {first.name}: {reason}.")
    if without_caption and missing_caption == "error":
        names = ", ".join(path.name for path in without_caption[:NAMED_IN_MESSAGES])
        refuse(
            f"{len(without_caption)} of {len(examples)} pictures in {folder} have no caption"
            f" ({names}{', ...' if len(without_caption) > NAMED_IN_MESSAGES else ''}); "
            + ("" if is_saved else f"write each into a file of the same name that ends in {' or '.join(suffixes)}, or ")
            + "set missing_caption to 'trigger' or 'empty'."
        )
    if masks == "file":
        examples = _with_masks(examples, mask_files, max_pixels, {_place(path) for path in pictures}, refuse)
    else:
        skipped += [(path, "a mask; set data.masks = 'file' to use it") for path in mask_files]
    return Found(tuple(examples), tuple(skipped + _left_over(files, suffixes, passed_over)))


def _read(sidecar: Path, separator: str, refuse: Refuse) -> str:
    try:
        return read_caption(sidecar, separator)
    except DataError as error:
        refuse(str(error))
        return "?"  # a check goes on, and does not say of this picture that it has no caption


def _place(path: Path) -> Path:
    """What a picture and its caption share."""
    return path.parent / path.stem


def _below(folder: Path, named: Mapping[Path, str]) -> list[Path]:
    """Of the subfolders that a table names pictures in: these, and their captions and masks."""
    places = {_place(path) for path in named if path.parent != folder}
    parents = sorted({place.parent for place in places})
    files = [path for parent in parents for path in _list(parent)[0]]
    return [
        path
        for path in files
        if path in named
        or (_place(path) in places and path.suffix.lower() not in IMAGE_SUFFIXES)
        or (_is_mask(path) and _masked(path) in places)
    ]


def _is_picture(path: Path) -> bool:
    return (path.suffix.lower() in IMAGE_SUFFIXES and not path.stem.endswith(MASK_SUFFIX)) or saved.is_row(path)


def _is_mask(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.stem.endswith(MASK_SUFFIX)


def _masked(mask: Path) -> Path:
    """The place of the picture that a mask is for."""
    return mask.parent / mask.stem.removesuffix(MASK_SUFFIX)


def _with_masks(examples: Sequence[Example], files: Sequence[Path], max_pixels: int, pictures: Set[Path], refuse: Refuse) -> list[Example]:
    """Each example with the mask of its name, if there is one; `pictures` are the places of all, unreadable ones too."""
    by_place = {_masked(path): path for path in files}
    strays = by_place.keys() - pictures
    if strays or not files:
        named = f"{by_place[min(strays)].name} belongs to no picture" if strays else f"there is no NAME{MASK_SUFFIX}.png in the folder"
        refuse(f"data.masks = 'file', but {named}; name each mask after its picture.")
    found = []
    for example in examples:
        path = by_place.get(_place(example.path))
        if path is None:
            found.append(example)
            continue
        size = examine(path, max_pixels)
        if size != example.size:
            wrong = size if isinstance(size, str) else "it has {}x{} pixels, and the picture {}x{}".format(*size, *example.size)
            refuse(f"The mask {path} does not fit {example.path.name}: {wrong}.")
            found.append(example)
            continue
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


def _examine_all(pictures: Sequence[Path], max_pixels: int) -> dict[Path, tuple[tuple[int, int] | str, str]]:
    """Size (or the reason why the picture cannot be read) and digest of each; Pillow and hashlib let threads run at once."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # each holds a whole picture in memory
        sizes = dict(zip(pictures, pool.map(partial(examine, max_pixels=max_pixels), pictures), strict=True))
        readable = [path for path, size in sizes.items() if not isinstance(size, str)]
        digests = dict(zip(readable, pool.map(_digest, readable), strict=True))
    return {path: (size, digests.get(path, "")) for path, size in sizes.items()}


def _digest(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _left_over(files: Sequence[Path], suffixes: Sequence[str], passed_over: Mapping[Path, Path]) -> list[tuple[Path, str]]:
    """The files that are neither picture nor caption of one, each with the reason; strays are not worth a line."""
    pictures = {path for path in files if _is_picture(path)}
    places = {_place(path) for path in pictures}
    left_over = []
    for path in files:
        is_caption = path.suffix.lower() in suffixes
        if path in passed_over:
            left_over.append((path, f"the caption is taken from {passed_over[path].name}"))
        elif _is_picture(path) or (is_caption and _place(path) in places):
            continue  # used, or its picture is listed, as unreadable
        elif is_caption and path.with_suffix("") in pictures:
            right = path.with_suffix("").with_suffix(path.suffix).name
            left_over.append((path, f"a caption's name leaves the extension of its picture out: call it {right}"))
        elif path.suffix.lower() in TABLE_SUFFIXES:
            left_over.append((path, f"a table of captions is read where it is called {' or '.join(metadata.NAMES)}"))
        elif path.stem.lower() not in STRAY_STEMS:
            left_over.append((path, "a caption without a picture of the same name" if is_caption else "not a picture"))
    return left_over


def _refuse_shared_captions(pictures: Sequence[Path], sidecars: Sequence[Path], refuse: Refuse) -> None:
    by_place: dict[Path, list[Path]] = {}
    for path in pictures:
        by_place.setdefault(_place(path), []).append(path)
    for sidecar in sidecars:
        sharing = by_place.get(_place(sidecar), [])
        if len(sharing) > 1:
            names = " and ".join(path.name for path in sharing)
            refuse(f"{names} in {sidecar.parent} share the caption {sidecar.name}; remove one of them or give it a name of its own.")


def _contents(files: Sequence[Path], subfolders: Sequence[Path]) -> str:
    """What a folder without pictures has instead: "it holds 3 .txt, 1 .psd; subfolders: a, b"."""
    counts = Counter(path.suffix.lower() or "without extension" for path in files)
    parts = []
    if counts:
        parts.append("it holds " + ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common()))
    if subfolders:
        more = ", ..." if len(subfolders) > NAMED_IN_MESSAGES else ""
        parts.append(
            f"subfolders: {', '.join(path.name for path in subfolders[:NAMED_IN_MESSAGES])}{more} (they are not searched: give one of them,"
            " or several as [[data.sets]])"
        )
    if counts.keys() & DATASET_SUFFIXES:
        parts.append("a dataset is read as Hugging Face's library saves it: open it there, and give the folder of its save_to_disk")
    return "; ".join(parts) or "it is empty"


def _extensions(suffixes: frozenset[str]) -> str:
    return ", ".join(sorted(suffix.removeprefix(".") for suffix in suffixes))
