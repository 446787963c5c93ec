"""Pictures and their captions: seen, edited one by one or all together, and checked as training would."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora import config as configs
from sdlora.errors import ConfigError, SdloraError

from . import captions, launch, markup
from .captions import Captions, Change
from .markup import file_url, text
from .paths import FISH, Places, shown
from .train import QUIET, Screen

FOLDER = "_dataset"  # of what a check writes, in the folder of runs
SCRIPT = (Path(__file__).parent / "dataset.js").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Cut:
    """What a bucket shows of a picture, in px of what the picture is resized to; width before height."""

    bucket: tuple[int, int]
    resized: tuple[int, int]
    box: tuple[int, int, int, int]  # left, top, right, bottom


Cuts = dict[str, list[Cut]]  # path of a picture -> all that is shown of it


def build(places: Places, screen: Screen) -> None:
    kept = places.runs / FOLDER

    def write_one(told: dict[str, str]) -> str:
        """What is wrong, "" for nothing; called by dataset.js."""
        try:
            now = captions.read(places, told["folder"], only=told["name"])
            captions.write(places, told["folder"], {told["name"]: told["caption"]}, now)
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
    cuts = gr.State({})  # of the folder that was checked

    def show(folder: str, wanted: str, cuts: Cuts) -> tuple[str, str]:
        try:
            return cards(places, folder, captions.read(places, folder), wanted, cuts), ""
        except SdloraError as problem:
            return "", markup.error(str(problem))

    def change(folder: str, wanted: str, cuts: Cuts, needed: str, field: str, how: Change) -> tuple[Any, ...]:
        """Of every caption that is shown."""
        try:
            if not needed:
                raise ConfigError(f"{field} is empty.")
            now = captions.read(places, folder)
            told = {name: how(caption) for name, caption in now.items() if matches(caption, wanted)}
            grid = cards(places, folder, captions.write(places, folder, told, now), wanted, cuts)
        except SdloraError as problem:
            return gr.skip(), markup.error(str(problem)), gr.skip(), gr.skip()
        return grid, markup.note(f"{len(captions.differing(told, now))} captions changed."), now, gr.update(interactive=True)

    def tagged(folder: str, wanted: str, cuts: Cuts, tag: str, how: Callable[[str], Change]) -> tuple[Any, ...]:
        return change(folder, wanted, cuts, tag.strip(), "Tag", how(tag.strip()))

    def take_back(folder: str, wanted: str, cuts: Cuts, before: Captions) -> tuple[Any, ...]:
        try:
            now = captions.read(places, folder)
            grid = cards(places, folder, captions.write(places, folder, before, now), wanted, cuts)
        except SdloraError as problem:
            return gr.skip(), markup.error(str(problem)), gr.skip()
        return grid, markup.note(f"{len(captions.differing(before, now))} captions are as before."), gr.update(interactive=False)

    def check_as_trained(folder: str, wanted: str, *told: Any) -> tuple[Any, ...]:
        """The report of `sdlora data check` with the options of the first screen, and how each picture is cut."""
        try:
            config = screen.config_of(str(places.folder(folder, "Folder")), *told)
            kept.mkdir(parents=True, exist_ok=True)
            (kept / "config.toml").write_text(configs.dump(config), encoding="utf-8")
            (kept / "places.json").unlink(missing_ok=True)
            said = launch.ask(["data", "check", str(kept / "config.toml"), "--places", str(kept / "places.json")])
            cuts = cuts_in(kept / "places.json")
            grid = cards(places, folder, captions.read(places, folder), wanted, cuts)
        except SdloraError as problem:
            return "", markup.error(str(problem)), gr.skip(), gr.skip()
        return f'<pre class="sd-log">{text(said)}</pre>', "", grid, cuts

    seen, changed = [folder, wanted, cuts], [grid, message, before, undo]
    gr.on([load.click, folder.submit, wanted.submit], show, seen, [grid, message], **QUIET)
    first.click(partial(tagged, how=captions.add_first), [*seen, tag], changed, **QUIET)
    last.click(partial(tagged, how=captions.add_last), [*seen, tag], changed, **QUIET)
    remove.click(partial(tagged, how=captions.remove), [*seen, tag], changed, **QUIET)
    replace.click(lambda f, w, c, o, n: change(f, w, c, o, "Find", captions.replace(o, n)), [*seen, old, new], changed, **QUIET)
    undo.click(take_back, [*seen, before], [grid, message, undo], **QUIET)
    check.click(check_as_trained, [folder, wanted, *screen.inputs], [report, message, grid, cuts], api_visibility="private")


def matches(caption: str, wanted: str) -> bool:
    return wanted.strip().lower() in caption.lower()


def cuts_in(path: Path) -> Cuts:
    """What `sdlora data check --places` wrote; nothing where training would refuse the folder."""
    cuts: Cuts = {}
    for row in json.loads(path.read_text(encoding="utf-8")) if path.exists() else []:
        if not row["mirrored"]:
            cut = Cut(tuple(row["bucket"]), tuple(row["resized"]), tuple(row["crop"]))
            if cut not in cuts.setdefault(row["file"], []):
                cuts[row["file"]].append(cut)
    return cuts


def cards(places: Places, folder: str, found: Captions, wanted: str, cuts: Cuts) -> str:
    inside = places.folder(folder, "Folder")
    shown = [(inside / name, caption) for name, caption in found.items() if matches(caption, wanted)]
    listed = "".join(card(path, caption, cuts.get(str(path), [])) for path, caption in shown)
    return f'<div class="sd-cards" data-folder="{text(folder)}">{listed or "<p class=sd-empty>No picture is like that.</p>"}</div>'


def card(picture: Path, caption: str, cuts: list[Cut]) -> str:
    name, url = text(picture.name), text(file_url(picture, thumbnail=True))
    buckets = " and ".join(dict.fromkeys(f"{width} x {height}" for width, height in (cut.bucket for cut in cuts)))
    return (
        f'<figure><div class="cut"><img loading="lazy" src="{url}" alt="">{frames(cuts)}</div>'
        f"<figcaption>{name}{f', cut to {buckets}' if buckets else ''}</figcaption>"
        f'<textarea rows="3" aria-label="Caption of {name}" data-name="{name}" data-caption="{text(caption)}"></textarea>'
        "<output></output></figure>"
    )


def frames(cuts: list[Cut]) -> str:
    """Drawn over the picture, which the style sheet gives the same place: what is cut off is dimmed where there is one way to cut."""
    if not cuts:
        return ""
    width, height = cuts[0].resized
    boxes = "".join(rectangle(cut, width / cut.resized[0]) for cut in cuts)
    dimmed = f'<path d="M0 0H{width}V{height}H0Z{boxes}"/>' if len(cuts) == 1 else ""
    return f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{dimmed}<path class="frame" d="{boxes}"/></svg>'


def rectangle(cut: Cut, scale: float) -> str:
    left, top, right, bottom = (round(edge * scale, 1) for edge in cut.box)
    return f"M{left:g} {top:g}H{right:g}V{bottom:g}H{left:g}Z"
