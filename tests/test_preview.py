"""Prompt lines as users know them, PNG parameters as WebUIs read them, grids that show every picture."""

from pathlib import Path

import pytest
from PIL import Image

from sdlora.errors import ConfigError
from sdlora.models.family import PicturePrompt
from sdlora.preview import check_size, grid, parse_prompt, save_picture


def parse(line: str) -> PicturePrompt:
    return parse_prompt(line, steps=20, guidance=7.0)


def test_prompt_lines() -> None:
    assert parse("a cat, sitting") == PicturePrompt("a cat, sitting")
    line = "a cat --n dog, blurry --w 512 --h 768 --d 7 --s 30 --l 4.5"
    assert parse(line) == PicturePrompt("a cat", "dog, blurry", 512, 768, 7, 30, 4.5)
    assert parse("--n nothing but a negative").text == ""


@pytest.mark.parametrize("line", ["a --w wide", "a --q 3", "a --s 0", "a --d -1", "a --l x"])
def test_wrong_prompt_lines(line: str) -> None:
    with pytest.raises(ConfigError):
        parse(line)


def test_sizes_must_fit_the_model() -> None:
    check_size(parse("a --w 64 --h 128"), 64)
    with pytest.raises(ConfigError, match="--h 100"):
        check_size(parse("a --w 64 --h 100"), 64)


def test_png_carries_its_parameters(tmp_path: Path) -> None:
    save_picture(Image.new("RGB", (8, 4)), tmp_path / "a.png", parse("a cat --n dog --d 5"), model="mini", lora=" <lora:x:0.5>")
    with Image.open(tmp_path / "a.png") as picture:
        text = picture.text["parameters"]  # type: ignore
    assert text == "a cat <lora:x:0.5>\nNegative prompt: dog\nSteps: 20, Sampler: DPM++ 2M, CFG scale: 7, Seed: 5, Size: 8x4, Model: mini"


def test_grid_holds_every_picture_at_a_size_one_can_see() -> None:
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    sheet = grid([("before", [red, red]), ("after", [blue, red])], ["a long caption that must be wrapped " * 3, "b"])
    counts = {colour: n for n, colour in sheet.getcolors(1 << 20) or []}
    assert counts[(255, 0, 0)] == 3 * 192**2 and counts[(0, 0, 255)] == 192**2
