"""Pictures from the command line, through a LoRA file."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from sdlora.commands.pictures import split_strength
from sdlora.lora import formats
from sdlora.lora.change import Change, Factors

Told = subprocess.CompletedProcess[str]


def test_strength_behind_a_path() -> None:
    assert split_strength("a.safetensors:0.5") == (Path("a.safetensors"), 0.5)
    assert split_strength("C:\\a.safetensors") == (Path("C:\\a.safetensors"), 1.0)


def test_generate(place: Path, tmp_path: Path, sdlora: Callable[..., Told]) -> None:
    lora = tmp_path / "whole.safetensors"
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    formats.save(lora, {layer: Change(Factors(torch.ones(1, 16), torch.ones(16, 1), 1.0))}, 1.0, {})
    out = tmp_path / "out"
    told = sdlora("generate", "a cat --s 2", "--base", place / "tiny", "--lora", f"{lora}:0.5", "--out", out)
    assert told.returncode == 0, told.stderr
    with Image.open(out / "00000.png") as picture:
        assert "<lora:whole:0.5>" in picture.text["parameters"]  # type: ignore
    assert sdlora("generate", "--base", place / "tiny").returncode == 2
    assert sdlora("generate", "a", "--base", place / "tiny", "--lora", "nowhere.safetensors").returncode == 2
