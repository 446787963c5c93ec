"""Pictures from the command line, through a LoRA file."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from sdlora.commands.pictures import as_trained, split_strength
from sdlora.lora import formats
from sdlora.lora.change import Change, Factors

Told = subprocess.CompletedProcess[str]


def test_strength_behind_a_path() -> None:
    assert split_strength("a.safetensors:0.5") == (Path("a.safetensors"), 0.5)
    assert split_strength("C:\\a.safetensors") == (Path("C:\\a.safetensors"), 1.0)


def test_a_lora_says_how_it_was_trained() -> None:
    assert as_trained({}) == as_trained({"ss_clip_skip": "None", "ss_max_token_length": "None"}) == (1, 75)
    assert as_trained({"ss_clip_skip": "2", "ss_max_token_length": "225"}) == (2, 225)
    assert as_trained({"ss_clip_skip": "2", "ss_base_model_version": "sdxl_base_v1-0"}) == (1, 75)


def test_generate(place: Path, tmp_path: Path, sdlora: Callable[..., Told]) -> None:
    lora = tmp_path / "whole.safetensors"
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    formats.save(lora, {layer: Change(Factors(torch.ones(1, 16), torch.ones(16, 1), 1.0))}, 1.0, {"ss_clip_skip": "2"})
    out = tmp_path / "out"
    told = sdlora("generate", "a cat --s 2", "--base", place / "tiny", "--lora", f"{lora}:0.5", "--out", out)
    assert told.returncode == 0, told.stderr
    with Image.open(out / "00000.png") as picture:
        assert "<lora:whole:0.5>" in picture.text["parameters"]  # type: ignore
        said = picture.tobytes()
    assert told.stdout.startswith("Clip skip 2, prompts of 75 tokens\n")
    asked = sdlora("generate", "a cat --s 2", "--base", place / "tiny", "--lora", f"{lora}:0.5", "--out", out, "--clip-skip", 1)
    assert asked.returncode == 0, asked.stderr
    with Image.open(out / "00001.png") as picture:
        assert picture.tobytes() != said
    longer = sdlora("generate", "a " * 40 + "--s 2", "--base", place / "tiny", "--max-tokens", 150, "--out", out, "--lora", lora)
    assert longer.returncode == 0 and longer.stdout.startswith("Clip skip 2, prompts of 150 tokens\n")
    assert sdlora("generate", "--base", place / "tiny").returncode == 2
    assert sdlora("generate", "a", "--base", place / "tiny", "--lora", "nowhere.safetensors").returncode == 2
