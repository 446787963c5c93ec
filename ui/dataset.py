"""Pictures and their captions: seen, edited one by one or all together, and checked as training would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.errors import ConfigError, SdloraError

from . import captions, launch, markup
from .captions import Captions, Change
from .markup import file_url, text
from .paths import FISH, Places, shown
from .train import QUIET

SCRIPT = (Path(__file__).parent / "dataset.js").read_text(encoding="utf-8")


def build(places: Places) -> None:
    def write_one(told: dict[str, str]) -> str:
        """What is wrong, "" for nothing; called by dataset.js."""
        try:
            captions.write(places, told["folder"], {told["name"]: told["caption"]})
        except SdloraError as problem:
            return str(problem)
        return ""

    with gr.Column(elem_classes="sd-page"):
        with gr.Row(elem_classes="sd-tools"):
            folder = gr.Textbox(shown(FISH), label="Folder of pictures", scale=3, elem_id="dataset-folder")
            wanted = gr.Textbox(label="Only captions with", scale=2, elem_id="dataset-wanted")
            load = gr.Button("Show", size="sm", variant="primary", elem_id="dataset-load")
            check = gr.Button("Check", size="sm", elem_id="dataset-check")
        with gr.Row(elem_classes="sd-tools"):
            tag = gr.Textbox(label="Tag", scale=2, elem_id="dataset-tag")
            first = gr.Button("Add first", size="sm", elem_id="dataset-first")
            last = gr.Button("Add last", size="sm", elem_id="dataset-last")
            remove = gr.Button("Remove", size="sm", elem_id="dataset-remove")
        with gr.Row(elem_classes="sd-tools"):
            old = gr.Textbox(label="Find", scale=2, elem_id="dataset-old")
            new = gr.Textbox(label="Replace with", scale=2, elem_id="dataset-new")
            replace = gr.Button("Replace", size="sm", elem_id="dataset-replace")
            undo = gr.Button("Undo", size="sm", interactive=False, elem_id="dataset-undo")
        message = gr.HTML(elem_id="dataset-message")
        report = gr.HTML(elem_id="dataset-report", apply_default_css=False)
        grid = gr.HTML(js_on_load=SCRIPT, server_functions=[write_one], elem_id="dataset-grid", apply_default_css=False)
    before = gr.State({})  # captions as they were before the last change of all

    def show(folder: str, wanted: str) -> tuple[str, str]:
        try:
            return cards(places, folder, captions.read(places, folder), wanted), ""
        except SdloraError as problem:
            return "", markup.error(str(problem))

    def change(folder: str, wanted: str, needed: str, field: str, how: Change) -> tuple[Any, ...]:
        """Of every caption that is shown."""
        try:
            if not needed:
                raise ConfigError(f"{field} is empty.")
            now = captions.read(places, folder)
            count = captions.write(places, folder, {name: how(caption) for name, caption in now.items() if matches(caption, wanted)})
            grid = cards(places, folder, captions.read(places, folder), wanted)
        except SdloraError as problem:
            return gr.skip(), markup.error(str(problem)), gr.skip(), gr.skip()
        return grid, markup.note(f"{count} captions changed."), now, gr.update(interactive=True)

    def take_back(folder: str, wanted: str, before: Captions) -> tuple[Any, ...]:
        try:
            count = captions.write(places, folder, before)
            grid = cards(places, folder, captions.read(places, folder), wanted)
        except SdloraError as problem:
            return gr.skip(), markup.error(str(problem)), gr.skip()
        return grid, markup.note(f"{count} captions are as before."), gr.update(interactive=False)

    def report_on(folder: str) -> tuple[str, str]:
        try:
            told = launch.ask(["data", "check", str(places.folder(folder, "Folder"))])
        except SdloraError as problem:
            return "", markup.error(str(problem))
        return f'<pre class="sd-log">{text(told)}</pre>', ""

    seen, changed = [folder, wanted], [grid, message, before, undo]
    gr.on([load.click, folder.submit, wanted.submit], show, seen, [grid, message], **QUIET)
    first.click(lambda f, w, t: change(f, w, t.strip(), "Tag", captions.add_first(t.strip())), [*seen, tag], changed, **QUIET)
    last.click(lambda f, w, t: change(f, w, t.strip(), "Tag", captions.add_last(t.strip())), [*seen, tag], changed, **QUIET)
    remove.click(lambda f, w, t: change(f, w, t.strip(), "Tag", captions.remove(t.strip())), [*seen, tag], changed, **QUIET)
    replace.click(lambda f, w, o, n: change(f, w, o, "Find", captions.replace(o, n)), [*seen, old, new], changed, **QUIET)
    undo.click(take_back, [*seen, before], [grid, message, undo], **QUIET)
    check.click(report_on, folder, [report, message], api_visibility="private")


def matches(caption: str, wanted: str) -> bool:
    return wanted.strip().lower() in caption.lower()


def cards(places: Places, folder: str, found: Captions, wanted: str) -> str:
    inside = places.folder(folder, "Folder")
    listed = "".join(card(inside / name, caption) for name, caption in found.items() if matches(caption, wanted))
    return f'<div class="sd-cards" data-folder="{text(folder)}">{listed or "<p class=sd-empty>No picture is like that.</p>"}</div>'


def card(picture: Path, caption: str) -> str:
    name, url = text(picture.name), text(file_url(picture, thumbnail=True))
    return (
        f'<figure><img loading="lazy" src="{url}" alt=""><figcaption>{name}</figcaption>'
        f'<textarea rows="3" aria-label="Caption of {name}" data-name="{name}" data-caption="{text(caption)}"></textarea>'
        "<output></output></figure>"
    )
