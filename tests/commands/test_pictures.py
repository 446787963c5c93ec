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
