"""The first screen: what to train, Start, and the run as it goes."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from sdlora import config as configs
from sdlora import run as runs
from sdlora.config import Config
from sdlora.errors import ConfigError, SdloraError
from sdlora.files import write_durably
from sdlora.run import Run

from . import form, launch, live, markup
from .files import PICTURES
from .paths import BUILT_IN, FISH, Places, shown

FIRST_PRESET = "mini"
DROPPED = PICTURES | {".txt", ".caption"}
QUIET = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
SCRIPT, LIVE_SCRIPT = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("form.js", "live.js"))
# A reload, or a link that is sent on, shows the same run.
REMEMBER = "(name) => { const at = new URL(location); at.searchParams.set('run', name); history.replaceState(null, '', at); }"
BUTTONS = ("stop", "resume", "sample", "save")
KEPT = ("preset", "over", "base", "folder", "trigger", "name", "told", "toml", "path", "sweep")  # by the browser, over a reload
OVER_INFO = "Laid over the preset; All options shows what each sets."

Told = dict[str, Any]  # the value of the form: {"preset": Texts, "told": Texts}


@dataclass(frozen=True)
class Fields:
    """What the first screen says, beside the form."""

    base: str
    folder: str
    trigger: str
    name: str

    @classmethod
    def of(cls, texts: form.Texts) -> Fields:
        return cls(*(texts[name] for name in form.OWN_FIELDS))

    def texts(self) -> form.Texts:
        return dict(zip(form.OWN_FIELDS, (self.base, self.folder, self.trigger, self.name), strict=True))

    def all(self) -> tuple[str, str, str, str]:
        return self.base, self.folder, self.trigger, self.name


@dataclass(frozen=True)
class Screen:
    """What other pages need of the first. A config's text is put into it by setting `toml` and calling `use`."""

    toml: gr.Textbox
    use: Callable[..., Any]
    use_inputs: list[Any]
    use_outputs: list[Any]
    config_of: Callable[..., Config]  # of another folder of pictures, and `inputs`
    inputs: list[Any]


def build(places: Places, current: gr.Textbox, swept: gr.Textbox) -> Screen:
    """`current`: name of the run that is shown; `swept`: of the sweep that was begun."""
    start_texts = preset_texts(FIRST_PRESET, [], places)
    own = Fields.of(start_texts)
    with gr.Row(elem_classes="sd-train"):
        with gr.Column(scale=2, min_width=320, elem_classes="sd-card"):
            preset = gr.Dropdown([*form.presets()], value=FIRST_PRESET, label="Preset", info=form.presets()[FIRST_PRESET], elem_id="preset")
            over = gr.CheckboxGroup(
                [(name.replace("_", " "), name) for name in form.additions()], label="For", info=OVER_INFO, elem_id="over"
            )
            base = gr.Textbox(own.base, label="Base model", info="mini, the one built in, or a checkpoint or folder", elem_id="base")
            folder = gr.Textbox(own.folder, label="Folder of pictures", elem_id="folder")
            dropped = gr.File(
                label="or drop pictures and captions here",
                file_count="multiple",
                file_types=[*sorted(DROPPED)],
                height=130,
                elem_id="dropped",
            )
            with gr.Row():
                trigger = gr.Textbox(own.trigger, label="Trigger word", placeholder="ohwx", min_width=120, elem_id="trigger")
                name = gr.Textbox(own.name, label="Name", min_width=120, elem_id="name")
            error = gr.HTML(elem_id="error")
            with gr.Row(elem_classes="sd-start"):
                start = gr.Button("Start", variant="primary", elem_id="start", scale=2)
                wait = gr.Button("Add to queue", elem_id="enqueue", scale=1)
            with gr.Accordion("All options", open=False, elem_id="options"):
                told = gr.HTML(
                    {"preset": start_texts, "told": {}},
                    html_template=form.html(),
                    js_on_load=SCRIPT,
                    apply_default_css=False,
                    elem_id="form",
                )
            with gr.Accordion("Config file", open=False, elem_id="config"):
                toml = gr.Textbox("", label="The config as TOML", lines=14, max_lines=30, elem_classes="sd-code", elem_id="toml")
                with gr.Row():
                    show = gr.Button("Show", size="sm", elem_id="toml-show")
                    apply = gr.Button("Use this text", size="sm", elem_id="toml-use")
                path = gr.Textbox("", label="File", placeholder="configs/mine.toml", elem_id="toml-path")
                with gr.Row():
                    load = gr.Button("Load", size="sm", elem_id="toml-load")
                    save = gr.Button("Save", size="sm", elem_id="toml-save")
                config_note = gr.HTML(elem_id="config-note")
            with gr.Accordion("Sweep", open=False, elem_id="sweep"):
                values = gr.Textbox(
                    "",
                    label="Options and their values, a line each",
                    info="A run for each combination, with what is chosen above for the rest. With a line halve=0.25 the worse half "
                    "is dropped after a quarter of the steps, and again after a half.",
                    placeholder="lora.rank=4,16,64\nloss.embedding_norm=0,0.1",
                    lines=3,
                    elem_id="sweep-values",
                )
                sweep = gr.Button("Start the sweep", size="sm", elem_id="sweep-start")
                sweep_error = gr.HTML(elem_id="sweep-error")
        with gr.Column(scale=3, min_width=320, elem_classes="sd-live"):
            status = gr.HTML(live.NO_RUN, elem_id="status", apply_default_css=False)
            with gr.Row(elem_classes="sd-actions"):
                stop = gr.Button("Stop and save", size="sm", interactive=False, elem_id="stop")
                resume = gr.Button("Resume", size="sm", interactive=False, elem_id="resume")
                sample = gr.Button("Sample now", size="sm", interactive=False, elem_id="sample")
                save_now = gr.Button("Save now", size="sm", interactive=False, elem_id="save")
            run_error = gr.HTML(elem_id="run-error")
            parts = gr.HTML({}, html_template=live.html(), js_on_load=LIVE_SCRIPT, elem_id="parts", apply_default_css=False)
    sent = gr.Textbox(visible="hidden")  # what of the run this page shows, so that it is told of the rest alone
    of_use = gr.Textbox(visible="hidden")  # which of BUTTONS
    draft = gr.BrowserState({}, storage_key="sdlora-draft", secret="sdlora")  # kept by the browser, and read by nobody else
    fields = [base, folder, trigger, name]
    everything = [preset, over, *fields, told]
    other_texts = [toml, path, values]
    shown_live = [status, parts, of_use, sent]

    def chosen(preset: str, over: list[str], *values: Any) -> Config:
        *own, told = values
        texts = told["told"] | Fields(*own).texts()
        if texts.get("data.sets"):
            texts.pop("data.folder")
        else:
            places.folder(texts["data.folder"], "data.folder")
        config = form.config_of(form.layers(preset, over), texts, places.runs)
        places.check(config)
        return config

    def of_folder(pictures: str, preset: str, over: list[str], base: str, folder: str, *values: Any) -> Config:
        *own, told = values
        told = told | {"told": told["told"] | {"data.sets": ""}}
        return chosen(preset, over, base.strip() or BUILT_IN, pictures, *own, told)

    def begin(how: Callable[[Run], None], dropped: list[str] | None, *values: Any) -> tuple[Any, ...]:
        """Make the run, and have it trained now or in its turn."""
        preset, over, base, folder, *others = values
        try:
            if dropped:
                folder = str(keep(dropped, places))
            run = runs.create(chosen(preset, over, base, folder, *others))
            how(run)
        except SdloraError as problem:
            return gr.skip(), gr.skip(), gr.skip(), markup.error(str(problem))
        return run.folder.name, folder, None, ""

    def begin_sweep(values: str, dropped: list[str] | None, preset: str, over: list[str], base: str, folder: str, *others: Any) -> Any:
        try:
            if dropped:
                folder = str(keep(dropped, places))
            return launch.begin_sweep(places, chosen(preset, over, base, folder, *others), values), folder, None, ""
        except SdloraError as problem:
            return gr.skip(), gr.skip(), gr.skip(), markup.error(str(problem))

    def pick(preset: str, over: list[str], *values: Any) -> tuple[Any, ...]:
        """What was typed stays, and what still says what the preset before said follows the new one."""
        *own, told = values
        texts = preset_texts(preset, over, places)
        typed = form.changes(Fields(*own).texts(), told["preset"])
        told = {"preset": texts, "told": form.changes(told["told"], texts)}
        return gr.update(info=form.presets()[preset]), over, *Fields.of(texts | typed).all(), told

    def show_toml(*values: Any) -> tuple[Any, str]:
        try:
            return configs.dump(chosen(*values)), ""
        except SdloraError as problem:
            return gr.skip(), markup.error(str(problem))

    def use_toml(toml: str, preset: str, over: list[str]) -> tuple[Any, ...]:
        try:
            texts = form.texts(form.config_of({"The text": toml}, {}, places.runs))
        except SdloraError as problem:
            return *[gr.skip()] * 5, markup.error(str(problem))
        before = preset_texts(preset, over, places)
        return *Fields.of(texts).all(), {"preset": before, "told": form.changes(texts, before)}, markup.note("In use.")

    def load_toml(path: str) -> tuple[Any, str]:
        try:
            found = places.resolve(path, "File")
            if found.suffix != ".toml":
                raise ConfigError(f"File: {path} does not end in .toml.")
            return found.read_text(encoding="utf-8-sig"), markup.note("Loaded; press 'Use this text'.")
        except (OSError, UnicodeDecodeError):
            return gr.skip(), markup.error(f"File: {path} cannot be read.")
        except SdloraError as problem:
            return gr.skip(), markup.error(str(problem))

    def save_toml(path: str, toml: str) -> str:
        try:
            target = places.resolve(path, "File")
            if target.suffix != ".toml":
                raise ConfigError(f"File: {path} does not end in .toml.")
            form.config_of({"The text": toml}, {}, places.runs)
            write_durably(target, toml.encode())
        except OSError as problem:
            return markup.error(f"File: cannot write {path}: {problem.strerror}.")
        except SdloraError as problem:
            return markup.error(str(problem))
        return markup.note(f"Saved {shown(target)}.")

    def tick(name: str, sent: str) -> tuple[Any, ...]:
        """Only what this page does not show yet. Values alone, of few components: Gradio makes each anew that is to be left as it is."""
        if not name:
            return live.NO_RUN, {}, "", ""
        try:
            run = places.run(name)
        except SdloraError:  # deleted, by another page or by hand
            return live.NO_RUN, dict.fromkeys(live.PARTS, ""), "", ""
        parts = live.parts(run)
        marks = {part: mark(name, part, parts[part]) for part in live.PARTS}
        before = sent.split()
        new = {part: parts[part] for part in live.PARTS if marks[part] not in before}
        return parts["status"], new, " ".join(usable(run, parts["word"])), " ".join(marks.values())

    def stop_run(name: str) -> str:
        try:
            run = places.run(name)
            if run.trained_by() is not None:
                run.ask_to_stop()
        except SdloraError as problem:
            return markup.error(str(problem))
        return ""

    def ask_run(name: str, what: runs.Request) -> str:
        try:
            run = places.run(name)
            if what == "sample" and not run.config.preview.prompts:
                raise ConfigError("preview.prompts is empty: this run has nothing to draw.")
            if run.trained_by() is not None:
                run.ask_for(what)
        except SdloraError as problem:
            return markup.error(str(problem))
        return ""

    def resume_run(name: str) -> str:
        try:
            launch.train(places.run(name))
        except SdloraError as problem:
            return markup.error(str(problem))
        return ""

    def remember(*values: Any) -> Told:
        *others, told, toml, path, sweep = values
        return dict(zip(KEPT, (*others, told["told"], toml, path, sweep), strict=True))

    def recall(draft: Told) -> tuple[Any, ...]:
        try:
            preset, over, *own, told, toml, path, sweep = (draft[key] for key in KEPT)
            before = preset_texts(preset, over, places)
        except (KeyError, SdloraError):  # a first visit, another version's draft, or a preset that is gone
            return (gr.skip(),) * len(KEPT)
        return gr.update(value=preset, info=form.presets()[preset]), over, *own, {"preset": before, "told": told}, toml, path, sweep

    def opened(request: gr.Request) -> str:
        return request.query_params.get("run") or live.newest(places.every_run())

    timer = gr.Timer(1.0)
    timer.tick(tick, [current, sent], shown_live, concurrency_limit=None, **QUIET)
    current.change(None, current, None, js=REMEMBER)
    current.change(tick, [current, sent], shown_live, **QUIET)
    buttons = [stop, resume, sample, save_now]
    of_use.change(lambda names: [gr.update(interactive=name in names.split()) for name in BUTTONS], of_use, buttons, **QUIET)
    begun = [current, folder, dropped, error]
    start.click(partial(begin, launch.train), [dropped, *everything], begun, api_visibility="private")
    wait.click(partial(begin, launch.queue_up), [dropped, *everything], begun, api_visibility="private")
    sweep.click(begin_sweep, [values, dropped, *everything], [swept, folder, dropped, sweep_error], api_visibility="private")
    stop.click(stop_run, current, run_error, **QUIET)
    resume.click(resume_run, current, run_error, **QUIET)
    sample.click(lambda name: ask_run(name, "sample"), current, run_error, **QUIET)
    save_now.click(lambda name: ask_run(name, "save"), current, run_error, **QUIET)
    gr.on([preset.input, over.input], pick, everything, everything, **QUIET)
    show.click(show_toml, everything, [toml, config_note], **QUIET)
    screen = Screen(toml, use_toml, [toml, preset, over], [*fields, told, config_note], of_folder, everything)
    apply.click(screen.use, screen.use_inputs, screen.use_outputs, **QUIET)
    load.click(load_toml, path, [toml, config_note], **QUIET)
    save.click(save_toml, [path, toml], config_note, **QUIET)
    kept = [*everything, *other_texts]
    gr.on([field.change for field in kept], remember, kept, draft, trigger_mode="always_last", **QUIET)
    here = gr.context.Context.root_block
    here.load(recall, draft, kept, **QUIET)
    here.load(opened, None, current, **QUIET)
    return screen


def mark(*of: str) -> str:
    """Of a run's name, a part's, and what it says: no other has it."""
    return blake2b("\n".join(of).encode(), digest_size=8).hexdigest()


def usable(run: Run, word: str) -> list[str]:
    """Those of BUTTONS that are of use, for a run that stands so."""
    if word == "running":
        return ["stop", *(what for what in get_args(runs.Request) if not run.asked_for(what))]
    return ["resume"] if word in ("waiting", "stopped", "failed") else []


def preset_texts(name: str, over: Sequence[str], places: Places) -> form.Texts:
    """The demo's pictures are where the program is, not where the user stands; other presets leave base and pictures to the user."""
    texts = form.texts(form.config_of(form.layers(name, over), {}, places.runs))
    if name == FIRST_PRESET:
        return texts | {"data.folder": shown(FISH)}
    return texts | {"model.base": "", "data.folder": ""}


def keep(dropped: list[str], places: Places) -> Path:
    """Copy pictures and captions that were dropped on the page into a folder of their own beside the runs."""
    folder = places.runs / "_pictures" / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}"
    files = [Path(path) for path in dropped if Path(path).suffix.lower() in DROPPED]
    if not any(path.suffix.lower() in PICTURES for path in files):
        raise ConfigError("data.folder: there is no picture among what was dropped.")
    folder.mkdir(parents=True)
    for path in files:
        shutil.copyfile(path, folder / path.name)
    return folder
