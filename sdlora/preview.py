"""Pictures of what the model draws: prompt lines, PNG files that WebUIs can read back, and labelled grids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from sdlora.errors import ConfigError
from sdlora.files import durable
from sdlora.models.device import on_device
from sdlora.models.family import Family, Model, PicturePrompt
from sdlora.models.sampling import generate
from sdlora.run import Run

FLAG = re.compile(r"\s--([a-z]+)\s+(.*?)(?=\s--[a-z]+\s|$)")
SHOWN_SIDE = 192  # px; smaller pictures are enlarged in grids by a whole factor


def parse_prompt(line: str, *, steps: int, guidance: float) -> PicturePrompt:
    """`text --n negative --w 512 --h 768 --d seed --s steps --l guidance`, as in kohya's sample files. Raises ConfigError."""
    text = FLAG.split(" " + line, maxsplit=1)[0].strip()
    values: dict[str, str] = {name: value.strip() for name, value in FLAG.findall(" " + line)}
    unknown = values.keys() - {"n", "w", "h", "d", "s", "l"}
    if unknown:
        raise ConfigError(f"Prompt {line!r}: --{min(unknown)} is unknown; --n --w --h --d --s --l are known.")
    try:
        prompt = PicturePrompt(
            text=text,
            negative=values.get("n", ""),
            width=int(values["w"]) if "w" in values else None,
            height=int(values["h"]) if "h" in values else None,
            seed=int(values.get("d", 0)),
            steps=int(values.get("s", steps)),
            guidance=float(values.get("l", guidance)),
        )
    except ValueError:
        raise ConfigError(f"Prompt {line!r}: --w, --h, --d and --s take whole numbers, --l a number.") from None
    if not 1 <= prompt.steps <= 1000 or prompt.guidance < 0 or prompt.seed < 0:
        raise ConfigError(f"Prompt {line!r}: --s goes from 1 to 1000, --l and --d from 0.")
    return prompt


def check_size(prompt: PicturePrompt, size_multiple: int) -> None:
    for flag, side in (("w", prompt.width), ("h", prompt.height)):
        if side is not None and (side <= 0 or side % size_multiple):
            raise ConfigError(f"Prompt {prompt.text!r}: --{flag} {side} is not a multiple of {size_multiple} px, as this model needs.")


def save_picture(
    picture: Image.Image, path: Path, prompt: PicturePrompt, *, model: str, lora: str = "", size: tuple[int, int] | None = None
) -> None:
    """PNG with its parameters in the text chunk that A1111 writes and reads. `size`: of one of its pictures, where it is a grid."""
    width, height = size or picture.size
    info = PngInfo()
    fields = [
        f"Steps: {prompt.steps}",
        "Sampler: DPM++ 2M",
        f"CFG scale: {prompt.guidance:g}",
        f"Seed: {prompt.seed}",
        f"Size: {width}x{height}",
        f"Model: {model}",
    ]
    lines = [prompt.text + lora, *([f"Negative prompt: {prompt.negative}"] if prompt.negative else []), ", ".join(fields)]
    info.add_text("parameters", "\n".join(lines))
    with durable(path) as file:
        picture.save(file, "PNG", pnginfo=info)


def draw(run: Run, family: Family, model: Model, prompts: Sequence[PicturePrompt], step: int) -> None:
    with on_device(model, "vae", *model.text_encoders):
        for number, prompt in enumerate(prompts):
            (picture,) = generate(family, model, [prompt])
            save_picture(picture, picture_path(run, step, number), prompt, model=run.config.model.base)


def picture_path(run: Run, step: int, number: int) -> Path:
    return run.previews / f"{step:08d}-{number:02d}.png"


def save_grid(run: Run, prompts: Sequence[PicturePrompt], rows: Sequence[tuple[str, int]], name: str) -> Path:
    """Labelled grid of previews that are on disk: a row for each (label, step)."""
    pictures = []
    for label, step in rows:
        row = []
        for number in range(len(prompts)):
            with Image.open(picture_path(run, step, number)) as picture:
                row.append(picture.convert("RGB"))
        pictures.append((label, row))
    path = run.previews / name
    with durable(path) as file:
        grid(pictures, [prompt.text for prompt in prompts]).save(file, "PNG")
    return path


def grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[str]) -> Image.Image:
    """Labelled rows of pictures under one caption a column."""
    side = max(max(p.size) for _, pictures in rows for p in pictures)
    factor = max(1, -(-SHOWN_SIDE // side))
    cell, gap = side * factor, 8
    font = ImageFont.load_default(13)
    wrapped = [_wrap(caption, font, cell) for caption in captions]
    line_height, label_width = 17, 16 + int(max(font.getlength(label) for label, _ in rows))
    top = gap + line_height * max(text.count("\n") + 1 for text in wrapped)
    sheet = Image.new("RGB", (label_width + (cell + gap) * len(captions), top + (cell + gap) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(wrapped):
        draw.multiline_text((label_width + column * (cell + gap), gap // 2), text, fill="black", font=font, spacing=2)
    for row, (label, pictures) in enumerate(rows):
        y = top + row * (cell + gap)
        draw.text((8, y + cell // 2 - 8), label, fill="black", font=font)
        for column, picture in enumerate(pictures):
            shown = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
            sheet.paste(shown, (label_width + column * (cell + gap), y))
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
