"""A LoRA file looked at and made anew: what it holds layer by layer, who reads it; and resize, convert and merge in child processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora import run as runs
from sdlora.errors import ConfigError, SdloraError

from . import jobs, live, markup
from .markup import file_url, text
from .paths import BUILT_IN, Places, shown
from .plots import nice_ticks
from .train import QUIET

# What is asked of `sdlora inspect --base`, behind the name of its button.
EFFECTS: dict[str, list[str]] = {"Intruder dimensions": [], "Drift": ["--drift"], "Leakage": ["--leakage"]}
FOLDER = "_loras"  # of what is made here, in the folder of runs
SIDE = 1000  # of a chart's own square
NARROW = 0.03  # share of a chart's width below which a block's name has no place
LIMITS = {"rank": "--rank", "kept energy": "--kept-energy", "error": "--max-error"}
MERGED = 3


def build(places: Places) -> None:
    made = places.runs / FOLDER
    looking = jobs.Job(made / "inspect.txt", "Reading the file")
    comparing = jobs.Job(made / "effect.txt", "Looking at what it does")
    making = jobs.Job(made / "log.txt", "Writing a file")
    plot = made / "effect.png"
    wanted: list[Path] = []  # what `making` is to write

    with gr.Column(elem_classes="sd-page"):
        with gr.Row(elem_classes="sd-tools"):
            file = gr.Dropdown([], value=None, label="LoRA file", allow_custom_value=True, scale=3, elem_id="inspect-file")
            look = gr.Button("Inspect", size="sm", variant="primary", elem_id="inspect-look")
        message = gr.HTML(elem_id="inspect-message")
        report = gr.HTML(EMPTY, elem_id="inspect-report", apply_default_css=False)
        with gr.Row(elem_classes="sd-tools"):
            model = gr.Textbox(BUILT_IN, label="What it does to the base model", scale=2, elem_id="inspect-base")
            effects = {name: gr.Button(name, size="sm", elem_id=f"inspect-{name.split()[0].lower()}") for name in EFFECTS}
        effect = gr.HTML(elem_id="inspect-effect", apply_default_css=False)
    with gr.Column(elem_classes="sd-page"):
        gr.HTML("<h3>Make another file of it</h3>", elem_classes="sd-heading")
        out = gr.Textbox("", label="New file", placeholder=shown(made / "name.safetensors"), elem_id="inspect-out")
        with gr.Tabs(selected="resize"):
            with gr.Tab("Resize", id="resize"), gr.Row(elem_classes="sd-tools"):
                how = gr.Dropdown([*LIMITS], value="error", label="Keep", info="by rank, kept energy or largest error", scale=1)
                limit = gr.Number(0.05, label="Of it", info="16, 0.99 or 0.05", scale=1, elem_id="resize-limit")
                resize = gr.Button("Resize", size="sm", variant="primary", elem_id="inspect-resize")
            with gr.Tab("Convert", id="convert"), gr.Row(elem_classes="sd-tools"):
                to = gr.Dropdown(["webui", "diffusers"], value="webui", label="Names", scale=1)
                precision = gr.Dropdown(["as it is", "fp32", "fp16", "bf16"], value="as it is", label="Precision", scale=1)
                convert = gr.Button("Convert", size="sm", variant="primary", elem_id="inspect-convert")
            with gr.Tab("Repair", id="repair"), gr.Row(elem_classes="sd-tools"):
                scale = gr.Number(
                    0.5, label="Scale intruder dimensions by", info="against the base model above", scale=1, elem_id="repair-scale"
                )
                repair = gr.Button("Repair", size="sm", variant="primary", elem_id="inspect-repair")
            with gr.Tab("Merge", id="merge"):
                with gr.Row(elem_classes="sd-tools"):
                    own = gr.Number(1.0, label="Strength of the file above", step=0.05)
                    base = gr.Textbox("", label="Into the checkpoint", info="empty: several LoRAs into one", scale=2, elem_id="merge-base")
                    keep = gr.Textbox("", label="Largest rank", info="empty: ranks add up", elem_id="merge-rank")
                others: list[Any] = []
                for number in range(2, MERGED + 1):
                    with gr.Row(elem_classes="sd-tools"):
                        path = gr.Dropdown([], value=None, label=f"LoRA {number}", allow_custom_value=True, scale=3)
                        others += [path, gr.Number(1.0, label="Strength", step=0.05, scale=1)]
                merge = gr.Button("Merge", size="sm", variant="primary", elem_id="inspect-merge")
        with gr.Row(elem_classes="sd-tools"):
            cancel = gr.Button("Cancel", size="sm", interactive=False, elem_id="inspect-cancel")
        status = gr.HTML(elem_id="inspect-status")
    sent = gr.State({})

    def source(path: str | None, field: str = "LoRA file") -> Path:
        found = places.resolve(path or "", field)
        if not found.is_file():
            raise ConfigError(f"{field}: there is no file {path}.")
        return found

    def target(path: str, suffix: str = ".safetensors") -> Path:
        found = places.resolve(path or "", "New file")
        if found.suffix != suffix:
            raise ConfigError(f"New file: {path} does not end in {suffix or 'a name without a suffix'}.")
        found.parent.mkdir(parents=True, exist_ok=True)
        return found

    def start(job: jobs.Job, arguments: Callable[[], list[str]]) -> str:
        try:
            job.start(arguments())
        except SdloraError as problem:
            return markup.error(str(problem))
        return ""

    def make(out: str, arguments: Callable[[Path], list[str]]) -> str:
        """`arguments` of the command, but for --out."""

        def whole() -> list[str]:
            path = target(out)
            words = [*arguments(path), "--out", str(path)]
            wanted[:] = [path]
            return words

        return start(making, whole)

    def compare(flags: list[str], path: str | None, base: str) -> str:
        return start(comparing, lambda: ["inspect", str(source(path)), *against(base), *flags, "--plot", str(plot)])

    def merging(path: str | None, strength: float, base: str, rank: str, *others: Any) -> list[str]:
        loras = [(path, strength), *zip(others[::2], others[1::2], strict=True)]
        words = ["merge"]
        for number, (of, factor) in enumerate(loras, 1):
            if of or number == 1:
                words += ["--lora", f"{source(of, f'LoRA {number}' if number > 1 else 'LoRA file')}:{factor:g}"]
        if base.strip():
            words += ["--base", str(places.resolve(base, "Into the checkpoint"))]
        if rank.strip():
            words += ["--rank", rank.strip()]
        return words

    def against(base: str) -> list[str]:
        """The options that name a base model."""
        found = base.strip() if base.strip() == BUILT_IN else str(places.resolve(base, "Base model"))
        return [f"--base={found}", "--cache", str(places.runs / runs.CACHE)]

    def tick(sent: dict[str, str]) -> tuple[Any, ...]:
        busy = str(any(job.is_busy for job in (looking, comparing, making)))
        parts = {"message": "", "report": gr.skip(), "effect": effect_of(comparing, plot), "status": making.status(), "busy": busy}
        if looking.is_done:
            parts["report"] = report_of(looking.log)
        elif looking.process is not None:
            parts["message"] = looking.status()
        if making.is_done and wanted and wanted[0].is_file():
            parts["status"] += download(wanted[0])
        told = [parts[key] if sent.get(key, "") != parts[key] else gr.skip() for key in ("message", "report", "effect", "status")]
        usable = gr.update(interactive=parts["busy"] == "True") if sent.get("busy") != parts["busy"] else gr.skip()
        return *told, usable, {key: of for key, of in parts.items() if isinstance(of, str)}

    def stop() -> None:
        for job in (looking, comparing, making):
            job.cancel()

    def choices() -> list[Any]:
        return [gr.update(choices=lora_files(places))] * (1 + len(others) // 2)

    files = [file, *others[::2]]
    gr.Timer(1.0).tick(tick, sent, [message, report, effect, status, cancel, sent], concurrency_limit=None, **QUIET)
    gr.on([of.focus for of in files], choices, None, files, **QUIET)
    look.click(lambda path: start(looking, lambda: ["inspect", str(source(path)), "--json"]), file, message, **QUIET)
    for name, button in effects.items():
        button.click(partial(compare, EFFECTS[name]), [file, model], message, **QUIET)
    repair.click(
        lambda path, out, base, of: make(out, lambda _: ["repair", str(source(path)), *against(base), "--scale", f"{of:g}"]),
        [file, out, model, scale],
        status,
        **QUIET,
    )
    resize.click(
        lambda path, out, how, limit: make(out, lambda _: ["resize", str(source(path)), LIMITS[how], f"{limit:g}"]),
        [file, out, how, limit],
        status,
        **QUIET,
    )
    convert.click(
        lambda path, out, to, of: make(
            out, lambda _: ["convert", str(source(path)), "--to", to, *(["--precision", of] if of != "as it is" else [])]
        ),
        [file, out, to, precision],
        status,
        **QUIET,
    )
    merge.click(lambda out, *told: make(out, lambda _: merging(*told)), [out, file, own, base, keep, *others], status, **QUIET)
    cancel.click(stop, None, None, **QUIET)


def lora_files(places: Places) -> list[str]:
    """What runs exported, and what was made here."""
    folders = [*runs.folders(places.runs), places.runs / FOLDER]
    return [shown(path) for folder in folders for path in sorted(folder.glob("*.safetensors"))]


# ---------------------------------------------------------------- HTML

EMPTY = '<p class="sd-empty">Choose a LoRA file, of any trainer, and press Inspect.</p>'


def download(path: Path) -> str:
    return f'<p class="sd-written"><a class="sd-download" href="{text(file_url(path))}" download>Download {text(path.name)}</a></p>'


def effect_of(job: jobs.Job, plot: Path) -> str:
    """What `sdlora inspect --base` said, and its picture."""
    if not job.is_done:
        return job.status()
    picture = f'<img class="sd-effect" src="{text(file_url(plot))}" alt="By block">' if plot.is_file() else ""
    return f"{live.log(job.log)}{picture}"


def report_of(log: Path) -> str:
    """What `sdlora inspect --json` said."""
    told = json.loads(log.read_text(encoding="utf-8").strip().splitlines()[-1])
    size = f"{told['size'] / 2**20:.1f} MiB, {told['precision']}, {told['family'] or 'family not shown'}, {told['naming']} names"
    facts = {"file": Path(told["path"]).name, "kind": size, "layers": counted(told), **told["about"]}
    if told["tags"]:
        facts["tags"] = ", ".join(f"{tag} ({count})" for tag, count in told["tags"][:20])
    listed = "".join(f"<dt>{text(what)}</dt><dd>{text(said)}</dd>" for what, said in facts.items())
    readers = [f"{line}." for line in told["readers"]] or ["Every program that was tried reads it rightly."]
    notes = "".join(f"<li>{text(line[0].upper() + line[1:])}</li>" for line in readers)
    norms = {of["name"]: of["norm"] for of in told["layers"]}
    learned = told["learned_alphas"]  # which our own files multiply into their matrices
    alphas = {of["name"]: learned.get(of["name"], of["alpha"]) for of in told["layers"] if of["alpha"] is not None}
    alphas_are = "Learned alpha of each layer" if learned else "Alpha of each layer"
    metadata = "".join(
        f"<tr><td><code>{text(key)}</code></td><td>{text(said[:2000])}</td></tr>" for key, said in sorted(told["metadata"].items())
    )
    return (
        f'<div class="sd-report"><dl>{listed}</dl><section><h4>Which programs read it</h4><ul>{notes}</ul></section></div>'
        f'<div class="sd-plots wide">{chart("Norm of what each layer adds", norms, told["blocks"], 0)}'
        f"{chart(alphas_are, alphas, told['blocks'], 3)}</div>"
        f'<details class="sd-warnings"><summary>All {len(told["metadata"])} metadata</summary>'
        f'<div class="sd-table"><table><tbody>{metadata}</tbody></table></div></details>'
    )


def counted(told: dict[str, Any]) -> str:
    ranks = sorted({of["rank"] for of in told["layers"] if of["rank"] is not None})
    among = f", rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else ""
    return f"{len(told['layers'])}{among}"


def chart(title: str, values: dict[str, float], blocks: dict[str, list[str]], colour: int) -> str:
    """A bar for each layer that has a value, by block: the UNet's one by one, and all of a text encoder's together."""
    bars: dict[str, list[str]] = {}
    for block, names in blocks.items():
        bars.setdefault(block.partition(".")[0] if block.startswith("te") else block, []).extend(name for name in names if name in values)
    bars = {block: names for block, names in bars.items() if names}
    if not bars:
        return ""
    ticks = nice_ticks(min(0.0, *values.values()), max(values.values()))
    low, high = ticks[0], ticks[-1]
    across = SIDE / (sum(map(len, bars.values())) + len(bars) - 1)  # a bar's width, and the gap between two blocks

    def y(value: float) -> float:
        return SIDE * (high - value) / (high - low)

    shapes, heads, at = [f'<line class="grid" x1="0" x2="{SIDE}" y1="{y(of):.0f}" y2="{y(of):.0f}"/>' for of in ticks], [], 0.0
    for block, names in bars.items():
        share = across * len(names) / SIDE
        both = f"<b>{text(block)}</b><i>{text(short(block))}</i>" if share > NARROW else ""
        heads.append(f'<span style="left:{at / SIDE:.2%};width:{share:.2%}">{both}</span>')
        for name in names:
            value = values[name]
            top, height = y(max(value, 0.0)), abs(y(value) - y(0.0))
            shapes.append(
                f'<rect class="c{colour}" x="{at:.2f}" y="{top:.1f}" width="{0.8 * across:.2f}" height="{max(height, 1):.1f}">'
                f"<title>{text(name)}: {value:.4g}</title></rect>"
            )
            at += across
        at += across
    labels = "".join(f'<span style="top:{100 * (high - of) / (high - low):.1f}%">{of:.3g}</span>' for of in ticks)
    return (
        f'<figure class="sd-plot" role="img" aria-label="{text(title)}"><figcaption><b>{text(title)}</b></figcaption>'
        f'<div class="area"><div class="ticks">{labels}</div>'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none">{"".join(shapes)}</svg></div>'
        f'<div class="blocks">{"".join(heads)}</div></figure>'
    )


def short(block: str) -> str:
    """For narrow windows: `d0` for `down.0`."""
    return block if block.startswith("te") else block[0] + block.partition(".")[2]
