"""Grids of options: their rows, their folders, and how rows compare."""

from pathlib import Path

import pytest

from sdlora import config as configs
from sdlora import events
from sdlora.config import Config
from sdlora.errors import ConfigError
from sdlora.grid import better_half, came_to, figures, halvings, held_out, pareto, require_judge, rows_of, split, step_at, table
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
    found = {rows[0].label: figures(rows[0].run()), "rank 16": {"concept": 0.5, "dropped at step": 12_000}}
    assert found["rank 4"] == pytest.approx({"loss": 1.05, "norm drift": 0.25, "held out": 0.5})  # 0.95 * 1 + 0.05 * 2
    assert table(rows, found) == (
        "| lora.rank | loss | norm drift | held out | concept | dropped at step |\n|---|---|---|---|---|---|\n"
        "| 4 | 1.05 | 0.25 | 0.5 |  |  |\n| 16 |  |  |  | 0.5 | 12000 |\n"
    )
    assert figures(create(rows[1].config)) == {}


def test_the_front_is_what_no_other_beats() -> None:
    points = {"a": (0.9, 0.5), "b": (0.8, 0.9), "c": (0.7, 0.8), "d": (0.9, 0.4), "e": (0.1, 0.95), "f": (0.8, 0.9)}
    assert pareto(points) == ["e", "b", "f", "a"]


def test_half_of_the_rows_go_at_each_doubling() -> None:
    assert halvings("0.25") == [0.25, 0.5] and halvings("0.5") == [0.5] and halvings("0.3") == [0.3, 0.6]
    assert better_half({"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.0}) == ["b", "c"]
    assert better_half({"a": 0.1, "b": 0.1, "c": 0.2}) == ["c", "a"]


def test_how_far_a_row_has_come_and_what_it_had_reached_by_then(tmp_path: Path) -> None:
    of = create(configs.load([], [("output.runs", str(tmp_path)), ("data.folder", str(tmp_path)), ("steps", "8")]))
    seen = [events.Validated(step, loss, "") for step, loss in ((0, 0.1), (1, 0.9), (2, 0.8), (3, 0.85), (4, 0.5))]
    told(of, *seen[:3], events.Stopped(2), events.Resumed(2), *seen[3:], events.Stopped(5))
    assert [came_to(of, step) for step in (1, 2, 3, 6)] == [2, 2, 5, None]
    assert [held_out(events.read(of.events), until) for until in (0, 1, 3, 4)] == [None, 0.9, 0.8, 0.5]
    assert step_at(of.config, 0.25) == 2 and step_at(of.config, 0.01) == 1


def test_rows_are_halved_only_by_what_compares_them() -> None:
    def load(*flags: tuple[str, str]) -> Config:
        return configs.load([], [("model.base", "m"), ("steps", "100"), ("holdout", "2"), *flags])

    alike = [load(), load(("rate", "1e-3")), load(("lora.rank", "4")), load(("loss.prior", "1"))]
    require_judge(alike, 0.5)
    with pytest.raises(ConfigError, match=r"set train\.validate_every to 25 or less"):
        require_judge(alike, 0.25)
    for other in (("loss.weighting", "none"), ("train.seed", "1"), ("holdout", "3"), ("flip", "true")):
        with pytest.raises(ConfigError, match="rows differ in what these depend on"):
            require_judge([load(), load(other)], 0.5)
    with pytest.raises(ConfigError, match="hold some out"):
        require_judge([load(("holdout", "0"))], 0.5)
    require_judge([load(("holdout", "0"), ("model.base", "mini"))], 0.5)  # the oracle can
