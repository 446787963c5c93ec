"""Sweeps: runs over values of options, each in a folder below that of its sweep, compared, stopped and gone on with."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora import grid
from sdlora.errors import ConfigError, SdloraError
from sdlora.run import Run

from . import form, history, launch, live, markup, runs
from .markup import file_url, text
from .paths import Places
from .train import QUIET

PICTURES = {"plot.png": "Concept against known things", "pictures.png": "The last samples of each row"}  # that its command draws
OWN = ("output.name", "data.cache")  # options that are a row's own, or all rows' alike, without having been chosen
EMPTY = '<p class="sd-empty">No sweep yet. On the first page, under Sweep, give an option several values.</p>'


def build(places: Places, begun: gr.Textbox, tabs: gr.Tabs, tab: gr.Tab, timer: gr.Timer) -> None:
    """`begun`: name of a sweep that another page has started."""
    with gr.Column(elem_classes="sd-page"):
        with gr.Row(elem_classes="sd-tools"):
            chosen = gr.Dropdown([], label="Sweep", elem_id="sweeps-chosen", scale=2)
            resume = gr.Button("Go on", size="sm", elem_id="sweeps-resume")
            stop = gr.Button("Stop and save", size="sm", elem_id="sweeps-stop")
            delete = gr.Button("Delete ...", size="sm", variant="stop", elem_id="sweeps-delete")
        confirming, question, yes = runs.confirmation("sweeps")
        message = gr.HTML(elem_id="sweeps-message")
        shown = gr.HTML(EMPTY, elem_id="sweeps-shown", apply_default_css=False)

    def refresh(name: str | None) -> tuple[Any, str]:
        names = [folder.name for folder in grid.folders(places.runs)]
        name = name if name in names else next(iter(names), None)
        return gr.update(choices=names, value=name), view(places, name)

    def go_on(name: str | None) -> str:
        try:
            launch.sweep(places.sweep(name or ""))
        except SdloraError as problem:
            return markup.error(str(problem))
        return markup.note(f"{name} goes on.")

    def end(name: str | None) -> str:
        try:
            training = [row for row in launch.rows_of(places.sweep(name or "")) if row.trained_by() is not None]
        except SdloraError as problem:
            return markup.error(str(problem))
        for row in training:
            row.ask_to_stop()
        return markup.note("It stops after this step." if training else "None of its rows is in training.")

    def ask(name: str | None) -> tuple[Any, str, str]:
        try:
            return gr.update(visible=True), runs.question_about(idle(places, name)), ""
        except SdloraError as problem:
            return gr.update(visible=False), "", markup.error(str(problem))

    def delete_sweep(name: str | None) -> tuple[Any, str]:
        try:
            shutil.rmtree(idle(places, name))
        except SdloraError as problem:
            return gr.update(visible=False), markup.error(str(problem))
        return gr.update(visible=False), markup.note(f"{name} is deleted.")

    tab.select(refresh, chosen, [chosen, shown], **QUIET)
    timer.tick(lambda name: view(places, name), chosen, shown, **QUIET)
    chosen.input(lambda name: view(places, name), chosen, shown, **QUIET)
    begun.change(refresh, begun, [chosen, shown], **QUIET).then(lambda: gr.update(selected="runs"), None, tabs, **QUIET)
    resume.click(go_on, chosen, message, **QUIET)
    stop.click(end, chosen, message, **QUIET)
    delete.click(ask, chosen, [confirming, question, message], **QUIET)
    yes.click(delete_sweep, chosen, [confirming, message], **QUIET).then(refresh, chosen, [chosen, shown], **QUIET)


def idle(places: Places, name: str | None) -> Path:
    """Its folder. Raises ConfigError where there is none, or something trains in it."""
    folder = places.sweep(name or "")
    if launch.in_training(folder):
        raise ConfigError(f"{name} is in training: stop it first.")
    return folder


@lru_cache(maxsize=256)
def told_of(row: Run) -> form.Texts:
    """What its config says, which never changes."""
    return form.texts(row.config)


@lru_cache(maxsize=256)
def figures_of(row: Run, so_far: int) -> dict[str, float]:
    """Read once for a number of bytes that its events have."""
    return grid.figures(row)


# ---------------------------------------------------------------- HTML


def view(places: Places, name: str | None) -> str:
    if not name:
        return EMPTY
    try:
        folder = places.sweep(name)
        rows = launch.rows_of(folder)
        drawn = [(folder / file, about) for file, about in PICTURES.items() if (folder / file).is_file()]
        pictures = "".join(
            f'<figure class="sd-plot"><figcaption><b>{about}</b></figcaption><a href="{text(file_url(path))}" target="_blank">'
            f'<img class="sd-effect" src="{text(file_url(path))}" alt="{about}"></a></figure>'
            for path, about in drawn
        )
        parts = f"{standing(folder)}{table(rows)}{runs.losses_of(rows[: runs.COMPARED])}{pictures}"
        return f'<div class="sd-parts">{parts}</div>'
    except SdloraError as problem:
        return markup.error(str(problem))


def standing(folder: Path) -> str:
    """What its process does, or said last."""
    said = live.last_said(folder / launch.SWEEP_LOG)
    if Run(folder).trained_by() is not None:
        return f'<div class="sd-job" role="status"><i></i><b>{text(folder.name)}</b><code>{text(said)}</code></div>'
    return markup.note(said)


def table(rows: list[Run]) -> str:
    """Options that differ, and figures; what a row lacks is left empty."""
    if not rows:
        return ""
    told = [told_of(row) for row in rows]
    options = [name for name in told[0] if name not in OWN and len({of[name] for of in told}) > 1]
    seen = [history.of(row.events).look() for row in rows]
    found = [figures_of(row, of.offset) | grid.measured(row.export) for row, of in zip(rows, seen, strict=True)]
    names = list(dict.fromkeys(name for of in found for name in of))
    head = "".join(f"<th>{text(column)}</th>" for column in ("Run", "Status", *options, *names))
    body = ""
    for row, of, texts, figures in zip(rows, seen, told, found, strict=True):
        word = history.status(row, of)
        link = f'<a href="?run={text(row.folder.parent.name)}/{text(row.folder.name)}">{text(row.folder.name)}</a>'
        cells = (
            link,
            f'<span class="sd-badge {word}">{word}</span>',
            *(text(texts[option]) for option in options),
            *(grid.cell(figures[name]) if name in figures else "" for name in names),
        )
        body += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return f'<div class="sd-table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
