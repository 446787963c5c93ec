"""Pictures from a base model and up to three LoRA files, drawn by a process of their own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from sdlora.errors import ConfigError, SdloraError

from . import jobs, live, markup
from .loras import lora_files
from .markup import file_url, text
from .paths import BUILT_IN, Places
from .train import QUIET

LORAS = 3
FOLDER = "_generated"
SHOWN = 60  # pictures, the newest
NAME = re.compile(r"\d{5}(-grid)?\.png")
LORA = re.compile(r" <lora:[^>]*>")
FLAG = re.compile(r"(^|\s)--[a-z]+(\s|$)")  # would be read as a setting of its own
SMALL_SIDE = live.SMALL_SIDE
SCRIPT = (Path(__file__).parent / "compare.js").read_text(encoding="utf-8")


def build(places: Places, wishes: gr.BrowserState) -> None:
    out = places.runs / FOLDER
    drawing = jobs.Job(out / "log.txt", "Drawing")

    with gr.Row(elem_classes="sd-train"):
        with gr.Column(scale=2, min_width=320, elem_classes="sd-card"):
            prompt = gr.Textbox(label="Prompt", lines=3, placeholder="a red heart on a pink background", elem_id="prompt")
            negative = gr.Textbox("", label="Negative prompt", elem_id="negative")
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90)
                steps = gr.Number(20, label="Steps", precision=0, minimum=1, maximum=1000, min_width=90)
                guidance = gr.Number(7.0, label="Guidance", minimum=0, maximum=100, min_width=90)
            with gr.Row():
                width = gr.Textbox(label="Width, px", min_width=90, placeholder="the model's own", elem_id="width")
                height = gr.Textbox(label="Height, px", min_width=90, placeholder="the model's own", elem_id="height")
            base = gr.Textbox(BUILT_IN, label="Base model", elem_id="generate-base")
            loras: list[Any] = []
            for number in range(1, LORAS + 1):
                with gr.Row():
                    path = gr.Dropdown([], value=None, label=f"LoRA {number}", allow_custom_value=True, scale=3, elem_id=f"lora-{number}")
                    strength = gr.Number(1.0, label="Strength", step=0.05, min_width=90, scale=1, elem_id=f"strength-{number}")
                loras += [path, strength]
            without = gr.Checkbox(label="Draw without the LoRAs, too, to compare", elem_id="without")
            with gr.Accordion("Sweep and grid", open=False, elem_id="grid"):
                sweep = gr.Textbox("", label="Strengths", info="times those above: 0, 0.5, 1, 1.5", elem_id="sweep")
                rows = gr.Dropdown(
                    [],
                    label="LoRA files, a row each",
                    info="in the place of those above",
                    multiselect=True,
                    allow_custom_value=True,
                    elem_id="rows",
                )
                more = gr.Textbox("", label="More prompts, one a line", lines=2, elem_id="more")
            error = gr.HTML(elem_id="generate-error")
            with gr.Row(elem_classes="sd-start"):
                draw = gr.Button("Draw", variant="primary", elem_id="draw", scale=2)
                cancel = gr.Button("Cancel", interactive=False, elem_id="draw-cancel", scale=1)
        with gr.Column(scale=3, min_width=320):
            status = gr.HTML(elem_id="generate-status")
            pictures = gr.HTML(js_on_load=SCRIPT, elem_id="pictures", apply_default_css=False)
            with gr.Accordion("Log", open=False):
                log = gr.HTML(elem_id="generate-log", apply_default_css=False)
    sent = gr.State({})
    asked = [prompt, negative, seed, steps, guidance, width, height, base, without, sweep, rows, more, *loras]

    def start(*values: Any) -> str:
        prompt, *numbers, base, without, sweep, rows, more = values[: -2 * LORAS]
        try:
            lines = [prompt_line(of, *numbers) for of in (prompt, *filter(str.strip, more.splitlines()))]
            if base != BUILT_IN:
                place = places.resolve(base, "Base model")
                base = str(place) if place.exists() else base.strip()  # or a hub's owner/name
            told = zip(values[-2 * LORAS :: 2], values[1 - 2 * LORAS :: 2], strict=True)
            wanted = [(path, 1.0) for path in rows] or [(path, strength) for path, strength in told if path]
            arguments = [
                "generate",
                f"--base={base}",
                "--out",
                str(out),
                "--prompts",
                str(out / "prompts.txt"),
                *(["--each"] if rows else []),
            ]
            for path, strength in wanted:
                file = places.resolve(path, "LoRA")
                if not file.is_file():
                    raise ConfigError(f"LoRA: there is no file {path}.")
                arguments += ["--lora", f"{file}:{strength:g}"]
            factors = numbers_of(sweep) or ([0.0, 1.0] if without and wanted else [])
            if factors:
                arguments += ["--strengths", *(f"{factor:g}" for factor in factors)]
            if drawing.is_busy:
                raise ConfigError("A picture is being drawn: wait for it, or cancel it.")
            out.mkdir(parents=True, exist_ok=True)
            (out / "prompts.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            drawing.start(arguments)
        except SdloraError as problem:
            return markup.error(str(problem))
        return ""

    def tick(sent: dict[str, str]) -> tuple[Any, ...]:
        parts = {"status": drawing.status(), "pictures": gallery(out), "log": live.log(drawing.log), "busy": str(drawing.is_busy)}
        told = [parts[key] if sent.get(key) != parts[key] else gr.skip() for key in ("status", "pictures", "log")]
        usable = gr.update(interactive=drawing.is_busy) if sent.get("busy") != parts["busy"] else gr.skip()
        return *told, usable, parts

    def files() -> list[Any]:
        found = lora_files(places)
        return [*[gr.update(choices=["", *found])] * LORAS, gr.update(choices=found)]

    choosers = [*loras[::2], rows]
    gr.Timer(1.0).tick(tick, sent, [status, pictures, log, cancel, sent], concurrency_limit=None, **QUIET)
    draw.click(start, asked, error, **QUIET)
    cancel.click(drawing.cancel, None, None, **QUIET)
    gr.on([path.focus for path in choosers], files, None, choosers, **QUIET)
    gr.on([field.change for field in asked], lambda *values: list(values), asked, wishes, trigger_mode="always_last", **QUIET)
    gr.context.Context.root_block.load(lambda kept: kept if len(kept) == len(asked) else [gr.skip()] * len(asked), wishes, asked, **QUIET)


def numbers_of(text: str) -> list[float]:
    """ "0, 0.5, 1" -> numbers. Raises ConfigError."""
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"Strengths: {text} is no list of numbers; write 0, 0.5, 1.") from None


def prompt_line(prompt: str, negative: str, seed: Any, steps: Any, guidance: Any, width: str, height: str) -> str:
    """As a file of prompts has it. Raises ConfigError for text that would be taken for a setting."""
    for field, of in (("Prompt", prompt), ("Negative prompt", negative)):
        if FLAG.search(of):
            raise ConfigError(f"{field}: a word that begins with -- would be read as a setting; use the fields.")
    words = " ".join(prompt.split())
    if not words or words.startswith("#"):
        raise ConfigError("Prompt is empty: write what to draw.")
    if None in (seed, steps, guidance):
        raise ConfigError("Seed, Steps and Guidance each need a number.")
    for field, side in (("Width", width), ("Height", height)):
        if side.strip() and not side.strip().isdecimal():
            raise ConfigError(f"{field}: {side} is not a whole number of px; leave it empty for the model's own size.")
    flags = {"n": " ".join(negative.split()), "w": width.strip(), "h": height.strip(), "d": seed, "s": steps, "l": guidance}
    return words + "".join(f" --{flag} {of}" for flag, of in flags.items() if of not in (None, ""))


def gallery(out: Path) -> str:
    """The newest first, each with what it was drawn from; before them the newest beside what the base model drew of the same."""
    found = sorted((path for path in out.glob("*.png") if NAME.fullmatch(path.name)), key=lambda path: path.stem, reverse=True)[:SHOWN]
    pictures = [of for path in found if (of := drawn(path, path.stat().st_mtime_ns)) is not None]
    if not pictures:
        return '<p class="sd-empty">Pictures appear here; they are kept beside the runs.</p>'
    return f'{slider(pictures)}<div class="sd-pictures">{"".join(map(figure, pictures))}</div>'


@dataclass(frozen=True)
class Drawn:
    path: Path
    lines: tuple[str, ...]  # its parameters
    is_small: bool

    @property
    def is_grid(self) -> bool:
        return self.path.stem.endswith("-grid")

    @property
    def same(self) -> tuple[str, ...]:
        """What a picture of the same, with another LoRA, shares with it."""
        return LORA.sub("", self.lines[0]), *self.lines[1:]

    @property
    def has_lora(self) -> bool:
        return LORA.search(self.lines[0]) is not None


@lru_cache(maxsize=4 * SHOWN)
def drawn(path: Path, changed: int) -> Drawn | None:
    """A picture and its parameters; `changed`, when it last did, tells a new file of an old name."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            lines = tuple(picture.info.get("parameters", "").split("\n"))
            return Drawn(path, lines, max(picture.size) <= SMALL_SIDE)
    except (OSError, SyntaxError):  # deleted meanwhile, or of others
        return None


def slider(pictures: list[Drawn]) -> str:
    """The newest picture with a LoRA over that of the base model: a bar between them is moved."""
    single = [of for of in pictures if not of.is_grid]
    after = next((of for of in single if of.has_lora), None)
    before = next((of for of in single if after and not of.has_lora and of.same == after.same), None)
    if after is None or before is None:
        return ""
    first, second = text(file_url(before.path)), text(file_url(after.path))
    return (
        f'<figure class="sd-compare{" small" if after.is_small else ""}"><div><img src="{second}" alt="With the LoRA">'
        f'<img class="before" src="{first}" alt="Base model"><i></i></div>'
        '<input type="range" min="0" max="100" value="50" aria-label="Base model at the left, with the LoRA at the right">'
        "<figcaption><span>base model</span><span>with LoRA</span></figcaption></figure>"
    )


def figure(of: Drawn) -> str:
    url, classes = text(file_url(of.path)), f"{'small ' if of.is_small else ''}{'grid' if of.is_grid else ''}".strip()
    about = "".join(f"<span>{text(line)}</span>" for line in of.lines[1:])
    return (
        f'<figure class="{classes}">'
        f'<a href="{url}" target="_blank"><img loading="lazy" src="{url}" alt="{text(of.lines[0])}"></a>'
        f"<figcaption><b>{text(of.lines[0])}</b>{about}</figcaption></figure>"
    )
