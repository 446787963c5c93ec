"""Grids of options: their rows, their folders, and how rows compare."""

from pathlib import Path

import pytest

from sdlora import events
from sdlora.errors import ConfigError
from sdlora.grid import figures, pareto, rows_of, split, table
from sdlora.run import Run, create


def test_values_are_parted_at_commas_of_their_own() -> None:
    assert split("lora.rank=4,16, 64") == ("lora.rank", ["4", "16", "64"])
    assert split('lora.unet=["attention", "time"],[]') == ("lora.unet", ['["attention", "time"]', "[]"])
    assert split("layer_rates={ mid = 0, up = 1 },{}") == ("layer_rates", ["{ mid = 0, up = 1 }", "{}"])
    assert split("author='a, b',c") == ("author", ["'a, b'", "c"])
    for wrong in ("lora.rank", "lora.rank=", "lora.rank=4,,8", "lora.rank=4,4"):
        with pytest.raises(ConfigError, match="write an option and its values, each once"):
            split(wrong)


def test_every_combination_is_a_row(tmp_path: Path) -> None:
    flags = [("output.runs", str(tmp_path)), ("output.name", "cat"), ("data.folder", str(tmp_path))]
    rows = rows_of([], flags, [("lora.rank", ["4", "16"]), ("loss.embedding_norm", ["0", "0.1"])])
    assert [(row.config.lora.rank, row.config.loss.embedding_norm) for row in rows] == [(4, 0), (4, 0.1), (16, 0), (16, 0.1)]
    assert [row.label for row in rows][1] == "rank 4, embedding_norm 0.1"
    assert [row.folder.name for row in rows][3] == "03-rank-16_embedding_norm-0.1"
    assert {row.folder.parent for row in rows} == {tmp_path / "cat-sweep"}
    assert {row.config.data.cache for row in rows} == {tmp_path / "_cache"}  # what other runs share, too
    first = rows[0].run()
    assert rows[0].run() == first and first.folder.name == "00-rank-4_embedding_norm-0"
    (other, *_) = rows_of([], [*flags, ("steps", "7")], [("lora.rank", ["4", "16"]), ("loss.embedding_norm", ["0", "0.1"])])
    with pytest.raises(ConfigError, match="is a run with other options"):
        other.run()
    with pytest.raises(ConfigError, match="twice"):
        rows_of([], flags, [("lora.rank", ["4"]), ("lora.rank", ["8"])])
    with pytest.raises(ConfigError, match=r"lora\.rank = 0"):  # before anything is trained
        rows_of([], flags, [("lora.rank", ["4", "0"])])


def told(run: Run, *stream: events.Event) -> None:
    list(events.record(stream, run.events))


def test_figures_and_their_table(tmp_path: Path) -> None:
    flags = [("output.runs", str(tmp_path)), ("data.folder", str(tmp_path))]
    rows = rows_of([], flags, [("lora.rank", ["4", "16"])])
    steps = [events.Stepped(n, 2, loss, 1e-4, 0.25, 0.5, 1.0) for n, loss in ((1, 1.0), (2, 2.0))]
    told(rows[0].run(), *steps, events.Validated(0, 0.1, ""), events.Validated(1, 0.5, "a"), events.Validated(2, 0.7, ""))
    found = {rows[0].label: figures(rows[0].run()), "rank 16": {"concept": 0.5}}
    assert found["rank 4"] == pytest.approx({"loss": 1.05, "norm drift": 0.25, "held out": 0.5})  # 0.95 * 1 + 0.05 * 2
    assert table(rows, found) == (
        "| lora.rank | loss | norm drift | held out | concept |\n|---|---|---|---|---|\n"
        "| 4 | 1.05 | 0.25 | 0.5 |  |\n| 16 |  |  |  | 0.5 |\n"
    )
    assert figures(create(rows[1].config)) == {}


def test_the_front_is_what_no_other_beats() -> None:
    points = {"a": (0.9, 0.5), "b": (0.8, 0.9), "c": (0.7, 0.8), "d": (0.9, 0.4), "e": (0.1, 0.95), "f": (0.8, 0.9)}
    assert pareto(points) == ["e", "b", "f", "a"]
