"""What the page costs: CPU until it can be painted, and the answers of its timer while a run trains on the same cores.

    python tests/benchmarks/ui.py                  # both; three minutes on two cores
    python tests/benchmarks/ui.py --answers 100    # fewer

The run that is shown has 10,000 steps and 200 samples behind it; another one trains on the embedded model meanwhile.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
from PIL import Image
from sdlora_ui import launch

from sdlora import config, events
from sdlora import run as runs

ROOT = Path(__file__).parent.parent.parent
STEPS, SAMPLES, PROMPTS = 10_000, 200, 4
PAUSE = 0.2  # s between two questions
VISIT = 50  # questions of a page before it is opened anew, when it is told all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=300, help="how many are waited for (default: 300)")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(ROOT / "datasets" / "fish", place / "fish")
        run_of_the_past(place)
        with serving(place) as (process, address):
            fetch(address)
            timer = timer_of(json.loads(fetch(f"{address}config")))
            spent = process.cpu_times()
            print(f"first paint: {spent.user + spent.system:.2f} s of CPU from the start of the process to the page and its config")
            with training(place):
                before = process.cpu_times()
                seconds, shown = [], ""
                for number in range(parsed.answers):
                    shown = "" if number % VISIT == 0 else shown
                    waited, shown = answer(address, timer, f"visitor-{number // VISIT}", shown)
                    seconds.append(waited)
                after = process.cpu_times()
    in_ms = [1000 * of for of in seconds]
    p99 = quantiles(in_ms, n=100)[98]
    print(f"timer: {len(in_ms)} answers, median {median(in_ms):.0f} ms, p99 {p99:.0f} ms, longest {max(in_ms):.0f} ms")
    each = 1000 * (after.user + after.system - before.user - before.system) / len(in_ms)
    load = psutil.getloadavg()[0]
    print(f"       {each:.0f} ms of CPU each; load {load:.1f} on {psutil.cpu_count()} cores, of which training is 1 to 2")


def run_of_the_past(place: Path) -> None:
    prompts = ", ".join(f'"prompt {number}"' for number in range(PROMPTS))
    flags = [("data.folder", str(place / "fish")), ("output.runs", str(place / "runs")), ("output.name", "past")]
    past = runs.create(config.load([], [*flags, ("preview.prompts", f"[{prompts}]"), ("steps", str(STEPS))]))
    told: Iterator[Any] = (events.Stepped(step, STEPS, 1 / step, 1e-4, 0.01, 0.1, 0.1) for step in range(1, STEPS + 1))
    for _ in events.record([*told, events.Finished(STEPS, "x")], past.events):
        pass
    for number in range(SAMPLES):
        picture = past.previews / f"{50 * (number // PROMPTS):08d}-{number % PROMPTS:02d}.png"
        Image.new("RGB", (512, 512), (number, 90, 200)).save(picture)


@contextmanager
def serving(place: Path) -> Iterator[tuple[psutil.Process, str]]:
    log = place / "server.log"
    with log.open("wb") as told:
        process = psutil.Popen([sys.executable, "-m", "sdlora", "ui", "--port", "0", "--no-browser"], cwd=place, stdout=told, stderr=told)
    try:
        while not (found := re.search(r"http://\S+", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield process, found[0]
    finally:
        process.terminate()
        process.wait()


@contextmanager
def training(place: Path) -> Iterator[None]:
    """On the embedded model, from its first step on."""
    options = {"data.folder": "fish", "output.name": "now", "steps": "100000", "preview.every": "0", "preview.prompts": "[]"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "sdlora", "train", str(ROOT / "configs" / "mini.toml"), *words]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        launch.in_background(process)  # as the page starts it
        while "Stepped" not in (place / "runs/now/events.jsonl").read_text() if (place / "runs/now/events.jsonl").exists() else True:
            assert process.poll() is None
            time.sleep(0.5)
        yield
        process.kill()


def timer_of(page: dict[str, Any]) -> dict[str, Any]:
    """What the first screen's timer asks: of a run, by its name, and what the page shows of it."""
    (current,) = (one["id"] for one in page["components"] if one["props"].get("elem_id") == "current")
    (timer,) = (one for one in page["dependencies"] if current in one["inputs"] and one["targets"][0][1] == "tick")
    return timer


def answer(address: str, timer: dict[str, Any], visitor: str, shown: str) -> tuple[float, str]:
    """Seconds that the timer waits for what is new, and what the page shows then."""
    time.sleep(PAUSE)
    question = {"fn_index": timer["id"], "data": ["past", shown], "session_hash": visitor}
    began = time.perf_counter()
    told = json.loads(fetch(f"{address}gradio_api/run/predict", question))
    seconds = time.perf_counter() - began
    assert len(told["data"]) == len(timer["outputs"]) and bool(told["data"][1]) == (not shown)  # all at first, then nothing
    return seconds, told["data"][-1]


def fetch(address: str, question: object = None) -> bytes:
    data = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(address, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as told:
        return bytes(told.read())


if __name__ == "__main__":
    main()
