"""A sweep that the page begins, and what it shows of one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sdlora_ui import launch, sweeps
from sdlora_ui.paths import FISH, Places

from sdlora import config, events, grid
from sdlora.config import Config
from sdlora.errors import ConfigError
from sdlora.run import Run


@pytest.fixture
def places(tmp_path: Path) -> Places:
    (tmp_path / "root").mkdir()
    return Places.at(tmp_path / "root" / "runs", [tmp_path / "root"])


@pytest.fixture
def common(places: Places) -> Config:
    return config.load([], [("data.folder", str(FISH)), ("output.runs", str(places.runs)), ("output.name", "cat")])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """What would have been started, in whose place a process sleeps."""
    asked: list[list[str]] = []
    sleepers: list[subprocess.Popen[bytes]] = []

    def spawn(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
        asked.append(arguments)
        sleepers.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return sleepers[-1]

    monkeypatch.setattr(launch, "spawn", spawn)
    yield asked
    for one in sleepers:
        one.kill()
        one.wait()


def test_a_sweep_is_checked_as_a_whole_and_begun_in_a_new_folder(places: Places, common: Config, asked: list[list[str]]) -> None:
    assert launch.begin_sweep(places, common, "lora.rank = 4, 16\n\n  loss.prior=0,1 ") == "cat-sweep"
    (words,) = asked
    folder = places.runs / "cat-sweep"
    assert words == ["sweep", str(folder / "sweep.toml"), "--set=lora.rank = 4, 16", "--set=loss.prior=0,1"]
    assert config.load([folder / "sweep.toml"]).output.name == "cat" and grid.folders(places.runs) == [folder]
    with pytest.raises(ConfigError, match="in training already"):
        launch.sweep(folder)
    assert launch.begin_sweep(places, common, "lora.rank=4") == "cat-2-sweep"
    holding = common.model_copy(update={"data": common.data.model_copy(update={"holdout": 3})})
    assert launch.begin_sweep(places, holding, "lora.rank=4,8\nhalve = 0.5") == "cat-3-sweep"
    assert asked[2][2:] == ["--set=lora.rank=4,8", "--halve=0.5"]
    for wrong, told in (
        ("", "Sweep is empty"),
        ("lora.rank", "write an option and its values"),
        ("lora.rank=4,0", "lora.rank = 0"),
        ("lora.ranks=4", "lora.ranks"),
        ("data.folder=/etc,/", "lies outside"),
        ("model.base=mini,../x", "model.base"),
        ("halve=0.5", "Sweep is empty"),
        ("lora.rank=4,8\nhalve=2", "between 0 and 1"),
    ):
        with pytest.raises(ConfigError, match=told):
            launch.begin_sweep(places, common, wrong)
    with pytest.raises(ConfigError, match=r"set train\.validate_every"):
        launch.begin_sweep(places, holding, "lora.rank=4,8\nhalve=0.001")
    assert len(asked) == 3 and len(grid.folders(places.runs)) == 3
    (folder / "sweep.txt").unlink()
    with pytest.raises(ConfigError, match="the same command goes on"):
        launch.sweep(folder)


def test_its_rows_are_shown_with_what_differs_and_what_came_of_it(places: Places, common: Config) -> None:
    rows = [row.run() for row in grid.rows_of([], flags(common), [("lora.rank", ["4", "16"])])]
    told = [events.Stepped(step, 2, loss, 1e-4, 0.25, 0.5, 1.0) for step, loss in ((1, 1.0), (2, 2.0))]
    list(events.record([*told, events.Finished(2, "x")], rows[0].events))
    grid.measured_in(rows[0].export).write_text(json.dumps({"concept": {"kind": 0.75}, "base prompts": {"kind": 0.5}}))
    shown = sweeps.view(places, "cat-sweep")
    heads = ("Run", "Status", "lora.rank", "loss", "norm drift", "concept", "kept")
    assert f"<tr>{''.join(f'<th>{of}</th>' for of in heads)}</tr>" in shown
    assert '<span class="sd-badge finished">finished</span></td><td>4</td><td>1.05</td><td>0.25</td><td>0.75</td><td>0.5</td>' in shown
    assert '<span class="sd-badge waiting">waiting</span></td><td>16</td><td></td><td></td><td></td><td></td>' in shown
    assert '<a href="?run=cat-sweep/00-rank-4">' in shown and "<img" not in shown
    (places.runs / "cat-sweep" / "pictures.png").write_bytes(b"")
    Run(places.runs / "cat-sweep").claim(os.getpid())
    assert sweeps.view(places, "cat-sweep").count("<img") == 1 and "sd-job" in sweeps.view(places, "cat-sweep")


def flags(common: Config) -> list[tuple[str, str]]:
    return [("data.folder", str(FISH)), ("output.runs", str(common.output.runs)), ("output.name", "cat")]


def test_one_in_training_is_not_deleted(places: Places, common: Config, asked: list[list[str]]) -> None:
    name = launch.begin_sweep(places, common, "lora.rank=4,16")
    with pytest.raises(ConfigError, match="stop it first"):
        sweeps.idle(places, name)
    Run(places.runs / name).pid_file.unlink()
    row = grid.rows_of([places.runs / name / "sweep.toml"], [], [("lora.rank", ["4"])])[0].run()
    assert sweeps.idle(places, name) == places.runs / name
    row.claim(os.getpid())
    with pytest.raises(ConfigError, match="stop it first"):
        sweeps.idle(places, name)
    for wrong in (None, "..", "cat"):
        with pytest.raises(ConfigError, match="not the name of a sweep"):
            sweeps.idle(places, wrong)


def test_nothing_but_a_sweep_is_one(places: Places, common: Config) -> None:
    assert sweeps.view(places, None) == sweeps.EMPTY
    (places.runs / "a-sweep").mkdir(parents=True)
    (places.runs / "a-sweep" / "config.toml").touch()  # a run of that name
    for name in ("a-sweep", "b-sweep", "..", "/etc", "<b>-sweep"):
        assert "is not the name of a sweep" in sweeps.view(places, name) and "<b>" not in sweeps.view(places, name)
