"""A sweep as a user starts it, stops it and goes on with it."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdlora import events, grid
from sdlora.cli import main
from sdlora.commands import sweeps
from sdlora.run import Run


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


def test_the_worse_half_is_dropped_and_the_rest_ends_as_without(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data.holdout", "1", "--validate-every", "1", "--lora.text-encoder", "[]"]
    command = ["sweep", str(place / "tiny.toml"), "--output.name", "halved", *options, "--set", "optimizer.rate=1e-4,1e-2,1"]
    assert main([*command, "--halve", "0.25"]) == 0  # of 8 steps
    told, folder = capsys.readouterr().out, place / "runs" / "halved-sweep"
    rows = {name: next(folder.glob(f"0?-rate-{name}")) for name in ("1e-4", "1e-2", "1")}

    def lowest(name: str, until: int) -> float:
        found = grid.held_out(events.read(rows[name] / "events.jsonl"), until)
        assert found is not None
        return found

    def last_step(name: str) -> int:
        return events.steps_of(events.read(rows[name] / "events.jsonl"))[-1].step

    *rest, third = sorted(rows, key=lambda name: lowest(name, 2))
    best, second = sorted(rest, key=lambda name: lowest(name, 4))
    assert [last_step(name) for name in (third, second, best)] == [2, 4, 8]
    assert f"Dropped after step 4: rate {second}\n" in told and "Row 1 of 3: rate 1e-4, to step 2\n" in told
    told_rows = [line.split("|") for line in (folder / "table.md").read_text().splitlines()[2:]]
    when = {cells[1].strip(): cells[-2].strip() for cells in told_rows}
    assert when == {third: "2", second: "4", best: ""}

    assert main([*command, "--halve", "0.25"]) == 0
    assert "Row" not in capsys.readouterr().out, "all is done, and stays so"
    whole = str(rows[best] / "config.toml")
    assert main(["train", whole, "--output.runs", str(place / "runs"), "--output.name", "whole"]) == 0
    one, other = (load_file(of / f"{of.name}.safetensors") for of in (rows[best], place / "runs" / "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_halved_sweep_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped by the user in its second row."""
    command = ["sweep", str(place / "tiny.toml"), "--output.name", "broken", "--data.holdout", "1", "--validate-every", "1"]
    command += ["--lora.text-encoder", "[]", "--set", "lora.rank=1,2", "--halve", "0.5"]
    follow, pauses = sweeps.follow_training, []

    def impatient(of: Run, pause: int | None) -> int:
        pauses.append(pause)
        return follow(of, pause=pause if len(pauses) == 1 else 1)

    monkeypatch.setattr(sweeps, "follow_training", impatient)
    assert main(command) == 0 and capsys.readouterr().out.endswith("Stopped. The same command goes on.\n") and pauses == [4, 4]
    monkeypatch.setattr(sweeps, "follow_training", follow)
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "Row 1 of 2: rank 1, to step 4\n" not in told and "Row 2 of 2: rank 2, to step 4\n" in told
    assert told.count("Dropped after step 4") == 1 and told.count("Row ") == 2


def test_what_halving_needs_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", str(place / "tiny.toml"), "--output.name", "never", "--set", "lora.rank=1,2"]
    for wrong, said in ((["--halve", "1"], "'1' is not a number between 0 and 1"), (["--halve", "0.5"], "hold some out")):
        assert main([*command, *wrong]) == 2 and said in capsys.readouterr().err
    assert not (place / "runs" / "never-sweep").exists()
