"""Pictures from a base model and up to three LoRA files, drawn by a process of their own."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from sdlora.errors import ConfigError, SdloraError
from sdlora.run import folders

from . import launch, live, markup
from .markup import file_url, text
from .paths import BUILT_IN, Places, shown
from .train import QUIET

LORAS = 3
FOLDER = "_generated"
SHOWN = 60  # pictures, the newest
FLAG = re.compile(r"(^|\s)--[a-z]+(\s|$)")  # would be read as a setting of its own
SMALL_SIDE = live.SMALL_SIDE


def build(places: Places) -> None:
    out = places.runs / FOLDER
    drawing: list[subprocess.Popen[bytes]] = []  # one at a time, whichever page asked for it

    with gr.Row(elem_classes="sd-train"):
        with gr.Column(scale=2, min_width=320, elem_classes="sd-card"):
            prompt = gr.Textbox(label="Prompt", lines=3, placeholder="a red heart on a pink background", elem_id="prompt")
            negative = gr.Textbox(label="Negative prompt", elem_id="negative")
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
            error = gr.HTML(elem_id="generate-error")
            draw = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Column(scale=3, min_width=320):
            pictures = gr.HTML(elem_id="pictures", apply_default_css=False)
            with gr.Accordion("Log", open=False):
                log = gr.HTML(elem_id="generate-log", apply_default_css=False)
    sent = gr.State({})

    def start(*values: Any) -> str:
        *told, base = values[: -2 * LORAS]
        paths, strengths = values[-2 * LORAS :: 2], values[1 - 2 * LORAS :: 2]
        try:
            if drawing and drawing[-1].poll() is None:
                raise ConfigError("A picture is being drawn: wait for it.")
            line = prompt_line(*told)
            if base != BUILT_IN:
                place = places.resolve(base, "Base model")
                base = str(place) if place.exists() else base.strip()  # or a hub's owner/name
            arguments = ["generate", f"--base={base}", "--out", str(out), "--prompts", str(out / "prompts.txt")]
            for number, (path, strength) in enumerate(zip(paths, strengths, strict=True), 1):
                if path:
                    file = places.resolve(path, f"LoRA {number}")
                    if not file.is_file():
                        raise ConfigError(f"LoRA {number}: there is no file {path}.")
                    arguments += ["--lora", f"{file}:{strength:g}"]
        except SdloraError as problem:
            return markup.error(str(problem))
        out.mkdir(parents=True, exist_ok=True)
        (out / "prompts.txt").write_text(line + "\n", encoding="utf-8")
        (out / "log.txt").unlink(missing_ok=True)
        drawing[:] = [launch.spawn(arguments, out / "log.txt")]
        return ""

    def tick(sent: dict[str, str]) -> tuple[Any, ...]:
        busy = bool(drawing) and drawing[-1].poll() is None
        failed = bool(drawing) and drawing[-1].poll() not in (None, 0)
        parts = {"pictures": gallery(out, busy), "log": live.log(out / "log.txt")}
        parts["error"] = markup.error(last_line(out / "log.txt")) if failed else ""
        told = [parts[key] if sent.get(key) != parts[key] else gr.skip() for key in ("pictures", "log")]
        problem = parts["error"] if sent.get("error", "") != parts["error"] else gr.skip()
        return *told, problem, parts

    def files() -> list[Any]:
        found = [shown(path) for folder in folders(places.runs) for path in sorted(folder.glob("*.safetensors"))]
        return [gr.update(choices=["", *found])] * LORAS

    gr.Timer(1.0).tick(tick, sent, [pictures, log, error, sent], concurrency_limit=None, **QUIET)
    draw.click(start, [prompt, negative, seed, steps, guidance, width, height, base, *loras], error, **QUIET)
    gr.on([path.focus for path in loras[::2]], files, None, loras[::2], **QUIET)


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


def gallery(out: Path, busy: bool) -> str:
    """The newest first, each with what it was drawn from."""
    found = sorted((path for path in out.glob("*.png") if path.stem.isdigit()), reverse=True)[:SHOWN]
    waiting = '<figure class="waiting"><div></div><figcaption>Being drawn ...</figcaption></figure>' if busy else ""
    if not found and not busy:
        return '<p class="sd-empty">Pictures appear here; they are kept beside the runs.</p>'
    return f'<div class="sd-pictures">{waiting}{"".join(map(figure, found))}</div>'


def figure(path: Path) -> str:
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            parameters, is_small = picture.info.get("parameters", ""), max(picture.size) <= SMALL_SIDE
    except (OSError, SyntaxError):  # it is being written
        return ""
    url = text(file_url(path))
    lines = parameters.split("\n")
    about = "".join(f"<span>{text(line)}</span>" for line in lines[1:])
    return (
        f"<figure{' class=small' if is_small else ''}>"
        f'<a href="{url}" target="_blank"><img loading="lazy" src="{url}" alt="{text(lines[0])}"></a>'
        f"<figcaption><b>{text(lines[0])}</b>{about}</figcaption></figure>"
    )


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "It ended without a word.").removeprefix("sdlora: ")
