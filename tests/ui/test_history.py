"""What a run's events say, read as they come; and the drawings of it."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sdlora_ui import history, launch, live, plots
from sdlora_ui.history import History, Series
from sdlora_ui.markup import duration, text
from sdlora_ui.paths import Places

from sdlora import config, events, run
from sdlora.errors import TrainingError


def line(event: events.Event) -> str:
    return json.dumps({"event": type(event).__name__, "time": 0.0} | event.__dict__) + "\n"


def step(number: int, loss: float, steps: int = 100) -> events.Stepped:
    return events.Stepped(number, steps, loss, 1e-4, 0.01, 0.1, 0.5)


@pytest.fixture
def place(tmp_path: Path) -> run.Run:
    (tmp_path / "pictures").mkdir()
    return run.create(config.load([], [("data.folder", str(tmp_path / "pictures")), ("output.runs", str(tmp_path / "runs"))]))


def test_a_look_reads_what_is_new_and_leaves_an_unfinished_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    seen = History(path)
    assert seen.look().step == 0, "no file yet"
    half = line(step(2, 3.0))
    path.write_text(line(step(1, 1.0)) + half[:20])
    assert seen.look().step == 1
    with path.open("a") as file:
        file.write(half[20:])
    assert seen.look().series["loss"].values == [1.0, 3.0]
    assert seen.series["smooth"].values == [1.0, pytest.approx(1.1)]  # 0.95 x 1 + 0.05 x 3
    assert seen.seconds_left() == pytest.approx(98 * 0.5)
    path.write_text(line(step(1, 7.0)))
    assert seen.look().series["loss"].values == [7.0], "another run's file, which is shorter"


def test_steps_that_were_lost_are_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    told = [step(1, 1.0), step(2, 2.0), events.Measured(2, [1, 2, 3, 4, 5], 0.1), events.Resumed(1), step(2, 5.0)]
    path.write_text("".join(map(line, told)))
    seen = History(path).look()
    assert seen.series["loss"].steps == [1, 2] and seen.series["loss"].values == [1.0, 5.0]
    assert seen.series["alpha_50"].steps == []
    with path.open("a") as file:
        file.write(line(step(1, 9.0)))
    assert seen.look().series["loss"].values == [9.0], "killed before its first checkpoint"


def test_events_of_another_version_are_left_out_and_counted(place: run.Run) -> None:
    odd = ['{"event": "Unheard", "time": 0.0}', '{"event": "Planned", "time": 0.0, "images": 3}', "no JSON", "[]", '{"event": "Stopped"}']
    place.events.write_text("".join(f"{one}\n" for one in odd) + line(step(2, 1.0)))
    status = live.parts(place)["status"]
    assert "5 events are of another version" in status and "Step 2 of 100" in status


def test_thinned_keeps_both_ends_and_few_points() -> None:
    for count in (0, 1, 2, 299, 300, 301, 10_000):
        series = Series([*range(count)], [float(i) for i in range(count)])
        thin = series.thinned(300)
        assert len(thin.steps) <= 301 and thin.steps[:1] == series.steps[:1] and thin.steps[-1:] == series.steps[-1:]


def test_a_long_run_is_told_fast_and_in_few_bytes(place: run.Run) -> None:
    """A bound on work: what a page asks for each second, after 10,000 steps and with 200 samples."""
    with place.events.open("w") as file:
        file.writelines(line(step(number, 1 / number, 10_000)) for number in range(1, 10_001))
    for number in range(200):
        (place.previews / f"{number:08d}-00.png").write_bytes(b"")
    live.parts(place)
    began = time.process_time()
    for _ in range(5):
        parts = live.parts(place)
    assert (time.process_time() - began) / 5 < 0.1
    assert sum(map(len, parts.values())) < 150_000 and len(parts["plots"]) < 40_000


def test_status_is_what_the_process_and_its_last_word_say(place: run.Run) -> None:
    def status(*told: events.Event) -> str:
        place.events.write_text("".join(map(line, told)))
        return history.status(place, History(place.events).look())

    assert status() == "waiting", "nothing has begun"
    assert status(step(1, 1.0), events.Stopped(1)) == "stopped"
    assert status(step(1, 1.0), events.Finished(1, "x")) == "finished"
    assert status(events.Failed("DataError: no")) == "failed"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        place.claim(child.pid)
        assert status(events.Stopped(1)) == "running", "it goes on"
        place.ask_to_stop()
        assert status(step(1, 1.0)) == "stopping"
    finally:
        child.communicate(b"\n")
    assert status(step(1, 1.0)) == "failed"
    assert history.reason(History(place.events).look()) == history.KILLED


def test_the_time_left_and_reason_are_shown(place: run.Run) -> None:
    place.events.write_text(line(events.Failed("TrainingError: <b>no</b>")))
    assert "TrainingError: &lt;b&gt;no&lt;/b&gt;" in live.parts(place)["status"]
    assert [duration(of) for of in (0.4, 59.7, 65, 3600, 12_000)] == ["0 s", "1 min 00 s", "1 min 05 s", "1 h 00 min", "3 h 20 min"]


MARKUP = "<img src=x onerror=alert(1)>\"'`${alert(1)}{{x}}\x1b\u202e\\"


def test_markup_is_text_wherever_it_comes_from(place: run.Run) -> None:
    safe = text(MARKUP)
    assert not set("<>\"'`${}\\\x1b\u202e") & set(safe)
    toml = place.folder / "config.toml"
    place.log.write_text(MARKUP)
    place.events.write_text(line(events.Warned(MARKUP)) + line(events.Failed(MARKUP)))
    toml.write_text(config.dump(config.load([toml], [("preview.prompts", json.dumps([MARKUP.replace("\x1b", "")]))])))
    (place.previews / "00000001-00.png").write_bytes(b"")
    html = "".join(live.parts(run.Run(place.folder)).values())
    assert "<img src=x" not in html and "onerror=alert(1)&gt;" in html and "${" not in html and "{{" not in html


def test_plots_are_drawn_to_scale() -> None:
    """Two points, at a half and the end of the axis; the ticks are 0, 1 and 2."""
    html = plots.plot("Loss", [plots.Line("a", Series([50, 100], [0.0, 2.0]))], form="{:g}".format, last_step=100)
    (points,) = re.findall(r'<polyline class="c0" points="([^"]*)"', html)
    assert points == "500,1000 1000,0"
    assert "Nothing yet" in plots.plot("Loss", [plots.Line("a", Series())], form=str, last_step=0)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.0, 0.0), (-3, 5), (1e-9, 3e-9), (32.03, 32.03), (0.013, 0.31), (-5, -5)])
def test_ticks_are_few_and_hold_the_values(low: float, high: float) -> None:
    ticks = plots.nice_ticks(low, high)
    assert 2 <= len(ticks) <= 6 and ticks[0] <= low and high <= ticks[-1] and ticks[0] < ticks[-1]


def test_memory_is_drawn_where_it_was_told(place: run.Run) -> None:
    place.events.write_text(line(events.Measured(25, [], None)) + line(events.Measured(50, [], None, 3 << 30)))
    seen = History(place.events).look()
    assert (seen.series["memory"].steps, seen.series["memory"].values) == ([50], [3.0])
    assert "in use 3 GiB" in live.parts(place)["plots"]


def test_resuming_a_run_that_stops_leaves_its_stop_file(place: run.Run) -> None:
    place.claim(os.getpid())
    place.ask_to_stop()
    with pytest.raises(TrainingError, match="being trained already"):
        launch.train(place)
    assert place.asked_to_stop()


def test_the_newest_run_is_the_one_in_training(place: run.Run) -> None:
    folder = place.folder.parent
    places = Places(folder, (folder,))
    older = place.folder.name
    place.claim(os.getpid())
    other = run.create(place.config)
    os.utime(other.folder / "config.toml", (time.time() + 10, time.time() + 10))
    assert live.newest(places.every_run()) == older
    place.pid_file.unlink()
    assert live.newest(places.every_run()) == other.folder.name
    output = place.config.output.model_copy(update={"runs": folder / "cat-sweep", "name": "00-rank-4"})
    row = run.create(place.config.model_copy(update={"output": output}))
    os.utime(row.folder / "config.toml", (time.time() + 20, time.time() + 20))
    assert live.newest(places.every_run()) == "cat-sweep/00-rank-4" and places.run("cat-sweep/00-rank-4") == row
    assert live.newest({}) == ""
