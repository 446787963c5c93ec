"""All runs: which there are and how they stand, what tells two apart, their losses over one another, and the end of one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora import config as configs
from sdlora import queue
from sdlora.errors import ConfigError, SdloraError
from sdlora.run import Run, folders

from . import form, history, launch, live, markup, plots
from .markup import duration, text
from .paths import Places
from .train import QUIET, Screen

COLUMNS = ("Run", "Status", "Steps", "Loss", "Pictures", "Last word")
COMPARED = plots.COLOURS  # loss curves that can be told apart


def build(places: Places, current: gr.Textbox, tabs: gr.Tabs, tab: gr.Tab, screen: Screen) -> gr.Timer:
    """Returns its timer."""
    with gr.Column(elem_classes="sd-page"):
        table = gr.HTML(elem_id="runs-table", apply_default_css=False)
        with gr.Row(elem_classes="sd-tools"):
            chosen = gr.Dropdown([], label="Run", elem_id="runs-chosen", scale=2)
            open_ = gr.Button("Open", size="sm", elem_id="runs-open")
            resume = gr.Button("Resume", size="sm", elem_id="runs-resume")
            again = gr.Button("Duplicate", size="sm", elem_id="runs-again")
            delete = gr.Button("Delete ...", size="sm", variant="stop", elem_id="runs-delete")
        confirming, question, yes = confirmation("runs")
        with gr.Row(elem_classes="sd-tools"):
            waits = gr.HTML(elem_id="runs-queue", apply_default_css=False)
            add = gr.Button("Queue it", size="sm", elem_id="runs-add")
            up = gr.Button("Earlier", size="sm", elem_id="runs-up")
            out = gr.Button("Take out", size="sm", elem_id="runs-out")
        message = gr.HTML(elem_id="runs-message")
        several = gr.Dropdown([], label="Compare", multiselect=True, max_choices=COMPARED, elem_id="runs-several")
        losses = gr.HTML(elem_id="runs-losses", apply_default_css=False)
        previews = gr.HTML(elem_id="runs-previews", apply_default_css=False)
        differences = gr.HTML(elem_id="runs-differences", apply_default_css=False)

    def refresh(name: str, names: list[str]) -> tuple[Any, ...]:
        found, every = {run.folder.name: run for run in listed(places)}, places.every_run()
        kept = [one for one in names or () if one in every]
        return (
            table_of(list(found.values())),
            queue_of(places),
            gr.update(choices=list(found), value=name if name in found else next(iter(found), None)),
            gr.update(choices=[*found, *(one for one in every if one not in found)], value=kept),
        )

    def compare(names: list[str]) -> tuple[str, str, str]:
        try:
            found = [places.run(name) for name in names or ()]
            return losses_of(found), previews_of(found), differences_of(found) if len(found) >= 2 else ""
        except SdloraError as problem:
            return "", "", markup.error(str(problem))

    def open_run(name: str) -> tuple[Any, ...]:
        return (name, gr.update(selected="train")) if name else (gr.skip(), gr.skip())

    def resume_run(name: str) -> str:
        try:
            launch.train(places.run(name or ""))
        except SdloraError as problem:
            return markup.error(str(problem))
        return markup.note(f"{name} goes on.")

    def queued(name: str, how: Callable[[Run], None]) -> tuple[str, str]:
        try:
            how(places.run(name or ""))
        except SdloraError as problem:
            return gr.skip(), markup.error(str(problem))
        return queue_of(places), ""

    def copied(name: str) -> tuple[Any, str]:
        try:
            return configs.dump(places.run(name or "").config), ""
        except SdloraError as problem:
            return gr.skip(), markup.error(str(problem))

    def ask(name: str) -> tuple[Any, str, str]:
        try:
            run = idle(places, name)
        except SdloraError as problem:
            return gr.update(visible=False), "", markup.error(str(problem))
        return gr.update(visible=True), question_about(run.folder), ""

    def delete_run(name: str) -> tuple[Any, str]:
        try:
            run = idle(places, name)
            queue.remove(places.runs, name)
            shutil.rmtree(run.folder)
        except SdloraError as problem:
            return gr.update(visible=False), markup.error(str(problem))
        return gr.update(visible=False), markup.note(f"{name} is deleted.")

    listing = [table, waits, chosen, several]
    tab.select(refresh, [chosen, several], listing, **QUIET)
    timer = gr.Timer(5.0)
    timer.tick(lambda: (table_of(listed(places)), queue_of(places)), None, [table, waits], **QUIET)
    several.change(compare, several, [losses, previews, differences], **QUIET)
    open_.click(open_run, chosen, [current, tabs], **QUIET)
    resume.click(resume_run, chosen, message, **QUIET).then(refresh, [chosen, several], listing, **QUIET)
    again.click(copied, chosen, [screen.toml, message], **QUIET).then(screen.use, screen.use_inputs, screen.use_outputs, **QUIET).then(
        lambda: gr.update(selected="train"), None, tabs, **QUIET
    )
    for button, how in (
        (add, launch.queue_up),
        (up, lambda run: queue.move_up(places.runs, run.folder.name)),
        (out, lambda run: queue.remove(places.runs, run.folder.name)),
    ):
        button.click(partial(queued, how=how), chosen, [waits, message], **QUIET)
    delete.click(ask, chosen, [confirming, question, message], **QUIET)
    yes.click(delete_run, chosen, [confirming, message], **QUIET).then(refresh, [chosen, several], listing, **QUIET)
    return timer


def listed(places: Places) -> list[Run]:
    """The one that last told something first."""
    return sorted((Run(folder) for folder in folders(places.runs)), key=live.changed, reverse=True)


def idle(places: Places, name: str) -> Run:
    run = places.run(name or "")
    if run.trained_by() is not None:
        raise ConfigError(f"{name} is being trained: stop it first.")
    return run


def confirmation(page: str) -> tuple[gr.Row, gr.HTML, gr.Button]:
    """A hidden row that asks once more before something is deleted: itself, its question, and the button that means yes."""
    with gr.Row(visible=False, elem_classes="sd-tools", elem_id=f"{page}-confirm") as row:
        question = gr.HTML(elem_id=f"{page}-question")
        yes = gr.Button("Delete it for good", size="sm", variant="stop", elem_id=f"{page}-yes")
        no = gr.Button("Keep it", size="sm", elem_id=f"{page}-no")
    no.click(lambda: gr.update(visible=False), None, row, **QUIET)
    return row, question, yes


def question_about(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f'<p class="sd-note">Delete <b>{text(folder.name)}</b>, {size / 2**20:.1f} MiB with its checkpoints and its LoRAs?</p>'


# ---------------------------------------------------------------- HTML


def table_of(found: list[Run]) -> str:
    if not found:
        return '<p class="sd-empty">No runs yet.</p>'
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    return f'<div class="sd-table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(map(row, found))}</tbody></table></div>'


def row(run: Run) -> str:
    seen = history.of(run.events).look()
    word = history.status(run, seen)
    smooth = seen.series["smooth"].values
    cells = (
        f"<b>{text(run.folder.name)}</b>",
        f'<span class="sd-badge {word}">{word}</span>',
        f"{seen.step:,} of {seen.steps:,}" if seen.steps else "-",
        f"{smooth[-1]:.4g}" if smooth else "-",
        str(seen.plan.images) if seen.plan else "-",
        f"{duration(max(0.0, time.time() - live.changed(run)))} ago",
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def queue_of(places: Places) -> str:
    """What waits, the next first."""
    waiting = queue.read(places.runs)
    if not waiting:
        return '<p class="sd-note">Nothing waits in the queue.</p>'
    listed = "".join(f"<li>{text(entry.run)}{' <i>in training</i>' if entry.begun else ''}</li>" for entry in waiting)
    return f'<ol class="sd-queue" aria-label="Queue">{listed}</ol>'


def previews_of(found: list[Run]) -> str:
    """The newest picture of each prompt, runs that have drawn it side by side."""
    by_prompt: dict[str, list[str]] = {}
    for run in found:
        for step, path, prompt in live.newest_previews(run):
            by_prompt.setdefault(prompt, []).append(live.picture(path, step, prompt, run.folder.name))
    rows = "".join(f"<section><h4>{text(prompt)}</h4><div>{''.join(figures)}</div></section>" for prompt, figures in by_prompt.items())
    is_small = all(live.drawn(run)[1] for run in found)
    return f'<div class="sd-gallery{" small" if is_small else ""}">{rows}</div>' if rows else ""


def losses_of(found: list[Run]) -> str:
    seen = [history.of(run.events).look() for run in found]
    if not seen:
        return ""
    lines = [plots.Line(run.folder.name, of.series["smooth"], number) for number, (run, of) in enumerate(zip(found, seen, strict=True))]
    end = max(of.steps for of in seen)
    return f'<div class="sd-plots wide">{plots.plot("Loss, smoothed", lines, form="{:.3g}".format, last_step=end)}</div>'


def differences_of(found: list[Run]) -> str:
    """Options that are not the same in all."""
    told = [form.texts(run.config) for run in found]
    different = [name for name in told[0] if len({of[name] for of in told}) > 1]
    if not different:
        return '<p class="sd-note">Their configs are the same.</p>'
    head = "".join(f"<th>{text(run.folder.name)}</th>" for run in found)
    body = "".join(f"<tr><td><code>{name}</code></td>{''.join(f'<td>{text(of[name])}</td>' for of in told)}</tr>" for name in different)
    return f'<div class="sd-table"><table><thead><tr><th>Option</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
