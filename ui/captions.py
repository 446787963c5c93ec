"""Captions in text files beside their pictures: read as training reads them, changed one or all at a time, written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sdlora.errors import ConfigError, DataError
from sdlora.files import write_durably

from .files import PICTURES
from .paths import Places

SUFFIXES = (".txt", ".caption")  # the first that says something is right
TABLES = ("metadata.jsonl", "metadata.csv")

Captions = dict[str, str]  # name of a picture -> its caption, "" where it has none
Change = Callable[[str], str]


def read(places: Places, folder: str, only: str | None = None) -> Captions:
    """Of all pictures directly in a folder, by name, or of one alone. Raises ConfigError, or DataError where captions are in a table or
    no text."""
    inside = places.folder(folder, "Folder")
    for table in TABLES:
        if (inside / table).exists():
            raise DataError(f"The captions of {folder} are in {table}: edit them there.")
    names = sorted(path.name for path in inside.iterdir()) if only is None else [only]
    found = [inside / name for name in names if is_picture(name) and path_of(places, inside / name) is not None]
    return {path.name: read_one(places, path) for path in found if path.exists()}


def is_picture(name: str) -> bool:
    """A name alone, that no folder stands before."""
    return Path(name).suffix.lower() in PICTURES and not name.startswith(".") and Path(name).name == name


def read_one(places: Places, picture: Path) -> str:
    texts = [_text(path) for path in sidecars(picture) if path_of(places, path) is not None]
    return next((text for text in texts if text), "")


def write(places: Places, folder: str, captions: Captions, now: Captions) -> Captions:
    """Write those that differ from what stands there `now`, which was read; what stands there then. Raises as `read`."""
    inside = places.folder(folder, "Folder")
    changed = differing(captions, now)
    for name, caption in changed.items():
        # Into the file that is there, as a second one beside it would say something else.
        target = next((path for path in sidecars(inside / name) if path.exists()), (inside / name).with_suffix(SUFFIXES[0]))
        try:
            write_durably(target, (caption + "\n").encode())
        except OSError as error:
            raise DataError(f"Cannot write {target}: {error.strerror}.") from None
    return now | changed


def differing(captions: Captions, now: Captions) -> Captions:
    """Those of pictures that are there."""
    return {name: caption.strip() for name, caption in captions.items() if name in now and caption.strip() != now[name]}


def sidecars(picture: Path) -> list[Path]:
    return [picture.with_suffix(suffix) for suffix in SUFFIXES]


def path_of(places: Places, path: Path) -> Path | None:
    """None for a link that leads out of what the page may use."""
    try:
        return places.resolve(str(path), "Folder")
    except ConfigError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; save it again with the encoding UTF-8.") from None


# ---------------------------------------------------------------- changes of every caption


def add_first(tag: str) -> Change:
    return lambda caption: ", ".join([tag, *(of for of in tags(caption) if of != tag)])


def add_last(tag: str) -> Change:
    return lambda caption: caption if tag in tags(caption) else ", ".join([*tags(caption), tag])


def remove(tag: str) -> Change:
    return lambda caption: ", ".join(of for of in tags(caption) if of != tag) if tag in tags(caption) else caption


def replace(old: str, new: str) -> Change:
    return lambda caption: caption.replace(old, new)


def tags(caption: str) -> list[str]:
    return [tag.strip() for tag in caption.split(",") if tag.strip()]
