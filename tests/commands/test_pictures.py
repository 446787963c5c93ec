"""Pictures from the command line, through a LoRA file."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdlora.cli import main
from sdlora.commands.pictures import as_trained
from sdlora.lora import formats
from sdlora.lora.change import Change, Factors

Told = subprocess.CompletedProcess[str]


def test_a_lora_says_how_it_was_trained() -> None:
    assert as_trained({}) == as_trained({"ss_clip_skip": "None", "ss_max_token_length": "None"}) == (1, 75)
    assert as_trained({"ss_clip_skip": "2", "ss_max_token_length": "225"}) == (2, 225)
    assert as_trained({"ss_clip_skip": "2", "ss_base_model_version": "sdxl_base_v1-0"}) == (1, 75)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    layer = "text_encoder.text_model.encoder.layers.0.mlp.fc2"
    factors = Factors(torch.randn(1, 32, generator=generator), torch.randn(16, 1, generator=generator), 1.0)
    formats.save(tmp_path / "whole.safetensors", {layer: Change(factors)}, 1.0, {"ss_clip_skip": "2"})
    return tmp_path / "whole.safetensors"


def test_generate_as_a_process(place: Path, tmp_path: Path, lora: Path, sdlora: Callable[..., Told]) -> None:
    told = sdlora("generate", "a cat --s 2", "--base", place / "tiny", "--lora", f"{lora}:0.5", "--out", tmp_path / "out")
    assert told.returncode == 0, told.stderr
    with Image.open(tmp_path / "out" / "00000.png") as picture:
        assert "<lora:whole:0.5>" in picture.text["parameters"]  # type: ignore


def test_generate(place: Path, tmp_path: Path, lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = 0

    def draw(*arguments: object, prompt: str = "a cat") -> tuple[bytes, str]:
        nonlocal drawn
        base, out = ["--base", str(place / "tiny")], ["--out", str(tmp_path / "out")]
        assert main(["generate", f"{prompt} --s 2", *base, *out, *map(str, arguments)]) == 0
        with Image.open(tmp_path / "out" / f"{drawn:05d}.png") as picture:
            drawn += 1
            return picture.tobytes(), capsys.readouterr().out

    half, told = draw("--lora", f"{lora}:0.5")
    assert told.startswith("Clip skip 2, prompts of 75 tokens\n")
    assert draw("--lora", f"{lora}:0.5", "--clip-skip", 1)[0] != half
    assert draw("--lora", f"{lora}:9,te.0=0.5")[0] == half
    without, _ = draw("--clip-skip", 2)
    assert draw("--lora", f"{lora}:0.5,te=0")[0] == without != half
    words = "a b c d e f g h i j k l m n o p q r s t u v w x y z"
    long, told = draw("--max-tokens", 150, prompt=words)
    assert told.startswith("Clip skip 1, prompts of 150 tokens\n") and draw(prompt=words)[0] != long
    assert main(["generate", "--base", str(place / "tiny")]) == 2
    assert main(["generate", "a", "--base", str(place / "tiny"), "--lora", "nowhere.safetensors"]) == 2


def test_a_grid_of_strengths_files_and_prompts(place: Path, tmp_path: Path, lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each cell is the picture that its LoRAs give alone, whatever was drawn before it."""
    other = tmp_path / "other.safetensors"
    layer = "text_encoder.text_model.encoder.layers.1.mlp.fc1"
    formats.save(other, {layer: Change(Factors(torch.linspace(-1, 1, 16)[None], torch.ones(32, 1), 1.0))}, 1.0, {})

    def draw(out: str, *arguments: object) -> list[bytes]:
        words = ["generate", "--base", place / "tiny", "--clip-skip", 1, "--out", tmp_path / out, *arguments]
        assert main(list(map(str, words))) == 0
        found = []
        for path in sorted((tmp_path / out).glob("?????.png")):
            with Image.open(path) as picture:
                found.append(picture.tobytes())
        return found

    a, b = f"{lora}:0.5", f"{other}:2"
    grid = draw("grid", "a cat --s 2", "--lora", a, "--lora", b, "--each", "--strengths", 0, 2)
    (base,), (first,), (second,) = (
        draw(str(n), "a cat --s 2", *w) for n, w in enumerate([(), ("--lora", f"{lora}:1"), ("--lora", f"{other}:4")])
    )
    assert grid == [base, first, base, second] and len({base, first, second}) == 3
    with Image.open(tmp_path / "grid" / "00003-grid.png") as picture:
        assert picture.width > 2 * 192 and picture.height > 2 * 192
    sweep = draw("sweep", "a cat --s 2", "a dog --s 2", "--lora", a, "--strengths", 1, 0)
    assert len(sweep) == 4 and sweep[2] == base and (tmp_path / "sweep" / "00003-grid.png").is_file()
    assert draw("sweep", "a cat --s 2")[-1] == base, "numbers go on behind those of a grid"
    capsys.readouterr()
    assert main(["generate", "a", "b", "--lora", a, "--lora", b, "--each", "--strengths", "0", "1"]) == 2
    assert "two sides" in capsys.readouterr().err
