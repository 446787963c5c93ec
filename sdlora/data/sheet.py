"""A contact sheet: every picture under its bucket, with what the crop leaves out dimmed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdlora.data import images
from sdlora.data.buckets import Placed, enlargement
from sdlora.data.dataset import Example

CELL = 176  # px, the longest side of a picture
GAP = 18
NOTES = 36  # px below a picture: two lines
HEADING = 38
COLUMNS = 6
SHOWN = 60  # pictures of a bucket
PAPER, INK, FAINT, FRAME, ALARM = "#ffffff", "#1a1a1a", "#6b6b6b", "#e0218a", "#b00020"


@dataclass(frozen=True)
class Entry:
    """A picture at one size, with all the crops that are made of it."""

    example: Example
    crops: tuple[Placed, ...]

    @property
    def size(self) -> tuple[int, int]:
        """On the sheet: the whole picture, its longer side a cell's."""
        width, height = self.crops[0].resized
        return max(1, round(width * CELL / max(width, height))), max(1, round(height * CELL / max(width, height)))


def draw_sheet(places: Iterable[tuple[Example, Placed]], background: tuple[int, int, int] = images.WHITE) -> Image.Image:
    """Buckets one below the other, from tall to wide. Raises DataError for a picture that cannot be read."""
    buckets = _by_bucket(places)
    columns = max(3, min(COLUMNS, max(len(entries) for entries in buckets.values())))
    rows = {bucket: [of[at : at + columns] for at in range(0, min(len(of), SHOWN), columns)] for bucket, of in buckets.items()}
    tallest = {bucket: max(entry.size[1] for entry in of[:SHOWN]) for bucket, of in buckets.items()}
    height = GAP + sum(HEADING + len(rows[bucket]) * (tallest[bucket] + NOTES + GAP) for bucket in buckets)
    sheet = Image.new("RGB", (GAP + columns * (CELL + GAP), height), PAPER)
    y = GAP
    for bucket, entries in buckets.items():
        _head(sheet, y, bucket, len(entries))
        y += HEADING
        for row in rows[bucket]:
            for number, entry in enumerate(row):
                _draw(sheet, GAP + number * (CELL + GAP), y + tallest[bucket], entry, background)
            y += tallest[bucket] + NOTES + GAP
    return sheet


def _by_bucket(places: Iterable[tuple[Example, Placed]]) -> dict[tuple[int, int], list[Entry]]:
    grouped: dict[tuple[int, int], dict[tuple[Path, tuple[int, int]], Entry]] = {}
    for example, placed in dict.fromkeys(places):
        of, key = grouped.setdefault(placed.bucket, {}), (example.path, placed.resized)
        of[key] = Entry(example, (*of[key].crops, placed) if key in of else (placed,))
    return {bucket: list(grouped[bucket].values()) for bucket in sorted(grouped, key=lambda b: (b[0] / b[1], b))}


def _head(sheet: Image.Image, y: int, bucket: tuple[int, int], count: int) -> None:
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    title = f"{bucket[0]} x {bucket[1]}"
    shown = f", {SHOWN} of them shown" if count > SHOWN else ""
    pen.text((GAP, y), title, INK, font)
    pen.text(
        (GAP + pen.textlength(title, font) + 12, y + 6), f"{count} picture{'s'[: count > 1]}{shown}", FAINT, ImageFont.load_default(13)
    )


def _draw(sheet: Image.Image, x: int, base: int, entry: Entry, background: tuple[int, int, int]) -> None:
    """The picture upon the line `base`, its name and size below it."""
    picture = images.decode(entry.example.path, background, at_least=entry.size).resize(entry.size, Image.Resampling.LANCZOS)
    scale = entry.size[0] / entry.crops[0].resized[0]
    boxes = [tuple(round(edge * scale) for edge in placed.crop) for placed in entry.crops]
    whole = Image.blend(picture, Image.new("RGB", picture.size, PAPER), 0.7)
    for left, top, right, bottom in boxes:
        whole.paste(picture.crop((left, top, right, bottom)), (left, top))
    pen = ImageDraw.Draw(whole)
    for left, top, right, bottom in boxes:  # of a very long picture what is drawn may be less than a pixel thin
        pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=FRAME, width=2 if len(boxes) == 1 else 1)
    sheet.paste(whole, (x, base - whole.height))
    pen, font, example = ImageDraw.Draw(sheet), ImageFont.load_default(12), entry.example
    times = enlargement(example.size, entry.crops[0])
    pen.text((x, base + 4), _fitted(example.path.name, pen, font), INK, font)
    enlarged = f", enlarged {times:.2f} times" if times > 1 else ""
    pen.text((x, base + 19), f"{example.size[0]} x {example.size[1]}{enlarged}", ALARM if enlarged else FAINT, font)


def _fitted(name: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The name, its middle left out where it is wider than a cell."""
    fitted = name
    for keep in range(len(name) - 1, 3, -1):
        if pen.textlength(fitted, font) <= CELL:
            break
        fitted = f"{name[: keep - keep // 2]}...{name[len(name) - keep // 2 :]}"
    return fitted
