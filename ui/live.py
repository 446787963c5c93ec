"""The live part of a run: status, plots, pictures, log and result, each a piece of HTML made from the run folder alone."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

from sdlora.errors import SdloraError
from sdlora.run import Run

from . import history, plots
from .history import History
from .markup import duration, file_url, text
from .paths import shown

LOG_BYTES = 16_384
LOG_LINES = 60
KEPT = 16  # runs whose plots and pictures are kept as they were last made
SMALL_SIDE = 128  # px of a picture's shorter side up to which it is enlarged by whole pixels
PREVIEW = re.compile(r"(\d{8})-(\d\d)\.png")
PARTS = ("result", "plots", "gallery", "log")
WORDS = {
    "waiting": "Not begun",
    "running": "Training",
    "stopping": "Stopping after this step",
    "stopped": "Stopped",
    "finished": "Finished",
    "failed": "Failed",
}
NO_RUN = '<p class="sd-empty">No run yet. Choose pictures and press Start: progress, plots and sample pictures appear here.</p>'


def html() -> str:
    """The places of PARTS, which live.js fills."""
    return (
        '<div class="sd-parts"><div id="result"></div><div id="plots"></div><h3>Samples</h3><div id="gallery"></div>'
        '<details class="sd-fold"><summary>Log</summary><div id="log"></div></details></div>'
    )


def parts(run: Run) -> dict[str, str]:
    """Status and PARTS; and the word, of WORDS, for how the run stands."""
    seen = history.of(run.events).look()
    word = history.status(run, seen)
    return {
        "word": word,
        "status": status(run, seen, word),
        "result": result(run, seen),
        "plots": plotted(run, seen.offset),
        "gallery": gallery(run, changed_at(run.previews), seen.drawn),
        "log": log(run.log),
    }


@lru_cache(maxsize=KEPT)
def plotted(run: Run, offset: int) -> str:
    """Made once for what its events say up to `offset`."""
    return plots.of_run(history.of(run.events))


def status(run: Run, seen: History, word: str) -> str:
    share = seen.step / seen.steps if seen.steps else 0.0
    notes = (
        [*seen.warnings, f"{seen.unknown} events are of another version of sdlora, and left out here."] if seen.unknown else seen.warnings
    )
    warnings = "".join(f"<li>{text(message)}</li>" for message in notes)
    return (
        f'<section class="sd-status {word}">'
        f'<header><b>{text(run.folder.name)}</b><span class="sd-badge {word}">{WORDS[word]}</span></header>'
        f'<div class="sd-bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{100 * share:.0f}">'
        f'<i style="width:{100 * share:.1f}%"></i></div>'
        f'<p class="sd-figures">{" ".join(f"<span>{text(of)}</span>" for of in figures(seen, word))}</p>'
        + (f'<p class="sd-error" role="alert">{text(history.reason(seen))}</p>' if word == "failed" else "")
        + (f'<details class="sd-warnings"><summary>{len(notes)} notes</summary><ul>{warnings}</ul></details>' if warnings else "")
        + "</section>"
    )


def figures(seen: History, word: str) -> list[str]:
    """What is going on, in a few words each."""
    told = []
    if word == "running" and not seen.count:
        told.append("Loading the model ...")
    if seen.step:
        told.append(f"Step {seen.step:,} of {seen.steps:,}")
    elif seen.cached is not None:
        told.append(f"Encoding {seen.cached.of}: {seen.cached.done} of {seen.cached.total}")
    left = seen.seconds_left()
    if word == "running" and left is not None:
        told += [f"{duration(left)} left", f"{seen.series['seconds'].values[-1]:.2f} s a step"]
    plan = seen.plan
    if plan is None:
        return told
    memory = f"about {plan.memory_bytes / 2**30:.1f} GiB on {plan.device}"
    return [*told, f"{plan.images} pictures", f"{sum(plan.layers.values())} layers", memory]


def result(run: Run, seen: History) -> str:
    """The exported file, once there is one."""
    if seen.exported is None:
        return ""
    file = run.folder / Path(seen.exported.path).name  # the folder may have been moved
    if not file.is_file():
        return ""
    size = file.stat().st_size / 2**20
    lost = f" It leaves out {seen.exported.lost:.2%} of the change, most of {seen.exported.worst}." if seen.exported.lost else ""
    return (
        f'<section class="sd-result"><a class="sd-download" href="{text(file_url(file))}" download>'
        f"Download {text(file.name)}</a><span>{size:.1f} MiB, after step {seen.exported.step:,}.{text(lost)}</span>"
        f"<code>{text(shown(file))}</code></section>"
    )


@lru_cache(maxsize=KEPT)
def gallery(run: Run, changed: int, drawn_so_far: int) -> str:
    """A strip for each prompt, the newest step first. Made once for a time of the folder's last change and a number of pictures told of:
    two changes may share a time, and a picture is there before it is told of."""
    found = previews(run)
    if not found:
        return '<p class="sd-empty">Sample pictures appear here as the run draws them.</p>'
    prompts, is_small = drawn(run)
    strips = []
    for number, pictures in sorted(found.items()):
        prompt = prompts[number] if number < len(prompts) else ""
        strip = "".join(picture(path, step, prompt) for step, path in sorted(pictures.items(), reverse=True))
        strips.append(f"<section><h4>{text(prompt)}</h4><div>{strip}</div></section>")
    return f'<div class="sd-gallery{" small" if is_small else ""}">{"".join(strips)}</div>'


def changed_at(folder: Path) -> int:
    """In ns; 0 where there is none."""
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def previews(run: Run) -> dict[int, dict[int, Path]]:
    """Number of a prompt -> step -> its picture."""
    found: dict[int, dict[int, Path]] = {}
    for entry in os.scandir(run.previews) if run.previews.is_dir() else ():
        if match := PREVIEW.fullmatch(entry.name):
            found.setdefault(int(match[2]), {})[int(match[1])] = Path(entry.path)
    return found


def newest_previews(run: Run) -> list[tuple[int, Path, str]]:
    """Of each prompt the last step that was drawn, the picture, and the prompt."""
    prompts, _ = drawn(run)
    newest = [(number, *max(pictures.items())) for number, pictures in sorted(previews(run).items())]
    return [(step, path, prompts[number] if number < len(prompts) else "") for number, step, path in newest]


def drawn(run: Run) -> tuple[tuple[str, ...], bool]:
    """A run's prompts, and whether its pictures are small."""
    try:
        return run.config.preview.prompts, run.config.data.resolution <= SMALL_SIDE
    except SdloraError:  # a config of another version: the pictures can be shown all the same
        return (), False


def picture(path: Path, step: int, prompt: str, name: str = "") -> str:
    """`name`: of its run, where several are shown."""
    url = text(file_url(path))
    label = f"step {step:,}" if step else "base model"
    label = f"{name}, {label}" if name else label
    return (
        f'<figure><a href="{url}" target="_blank"><img loading="lazy" src="{url}" alt="{text(prompt)}, {text(label)}"></a>'
        f"<figcaption>{text(label)}</figcaption></figure>"
    )


def log(path: Path) -> str:
    return f'<pre class="sd-log" tabindex="0">{text(chr(10).join(tail(path)))}</pre>'


def tail(path: Path) -> list[str]:
    """The last lines of a log; none where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            # A progress bar draws itself over and over behind carriage returns, which splitlines takes for line ends.
            return file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    except FileNotFoundError:
        return []


def last_said(log: Path) -> str:
    """The last line of a command's log that says something, without the program's name; "" where none does."""
    return next((line for line in reversed(tail(log)) if line.strip()), "").removeprefix("sdlora: ")


def newest(runs: dict[str, Run]) -> str:
    """Name of the run in training, or of the last that was, "" where there is none."""
    training = {name: run for name, run in runs.items() if run.trained_by() is not None}
    return max(training or runs, key=lambda name: changed(runs[name]), default="")


def changed(run: Run) -> float:
    """When it last told something, in seconds since 1970."""
    told = run.events if run.events.exists() else run.folder / "config.toml"
    return told.stat().st_mtime
