"""A sweep as a user starts it, stops it and goes on with it."""

from pathlib import Path

import pytest
from PIL import Image

from sdlora import events
from sdlora.cli import main


def test_a_sweep_goes_on_and_compares(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", str(place / "tiny.toml"), "--output.name", "grid", "--steps", "2", "--preview.prompts", "a cat --s 2"]
    grid = ["--set", "lora.rank=1,2", "--set", "optimizer.rate=1e-4"]
    assert main([*command, *grid]) == 0
    told = capsys.readouterr().out
    folder = place / "runs" / "grid-sweep"
    assert "Row 1 of 2: rank 1, rate 1e-4\n" in told and "Row 2 of 2: rank 2, rate 1e-4\n" in told
    assert "| lora.rank | optimizer.rate | loss | norm drift |\n" in told and (folder / "table.md").read_text() in told
    with Image.open(folder / "pictures.png") as picture:
        assert picture.height > 2 * 192  # a row each
    second = folder / "01-rank-2_rate-1e-4"
    before = events.read(second / "events.jsonl")

    (second / "01-rank-2_rate-1e-4.safetensors").unlink()  # as if it had been killed before its export
    assert main([*command, *grid]) == 0
    told = capsys.readouterr().out
    assert "Row 1 of 2" not in told and "Row 2 of 2" in told and events.Resumed(2) in events.read(second / "events.jsonl")[len(before) :]

    assert main([*command, "--warmup-steps", "1", *grid]) == 2 and "is a run with other options" in capsys.readouterr().err
    assert main(command) == 2 and "say which options vary" in capsys.readouterr().err
