"""The form says what a config says, and means what it says."""

from pathlib import Path

import pytest
from sdlora_ui import form

from sdlora import config
from sdlora.errors import ConfigError

RUNS = Path("runs")
TOML = """
[data]
folder = "datasets/fish"
trigger = "<cat> ${x} {{y}}"
min_side = 64
flip = true
[lora]
rank = 4
layer_ranks = { "down.0" = 8 }
unet = ["attention", "resnet"]
text_encoder = []
[optimizer]
rate = 1e-5
betas = [0.9, 0.95]
arguments = { d_coef = 0.5, name = "x" }
[loss]
pinned_prompts = ["a cat, sitting", "a dog"]
"""


@pytest.mark.parametrize("toml", [TOML, "", *(form.preset(name) for name in form.presets())])
def test_texts_mean_what_they_were_made_from(toml: str) -> None:
    meant = form.config_of({"toml": toml}, {}, RUNS)
    assert form.config_of({"toml": toml}, form.texts(meant), RUNS) == meant
    assert form.config_of({}, form.texts(meant), RUNS) == meant, "and need no file beside them"


def test_sets_are_a_text_too_and_stand_in_for_the_folder() -> None:
    toml = '[data]\ntrigger = "cat"\n[[data.sets]]\nfolder = "a"\nrepeats = 3\n[[data.sets]]\nfolder = "b"\nregularises = true\n'
    meant = form.config_of({"toml": toml}, {}, RUNS)
    told = form.texts(meant)
    assert told["data.folder"] == ""
    assert form.config_of(form.layers("mini", []), told, RUNS).data.sets == meant.data.sets
    with pytest.raises(ConfigError, match=r"Cannot read data\.sets as TOML"):
        form.config_of({}, {"data.sets": "[{"}, RUNS)


def test_an_empty_field_takes_an_option_back() -> None:
    assert form.config_of({"toml": TOML}, {"data.min_side": ""}, RUNS).data.min_side is None
    assert form.config_of({"toml": TOML}, {"data.trigger": ""}, RUNS).data.trigger == ""
    assert form.config_of({"toml": TOML}, {"loss.pinned_prompts": "\n"}, RUNS).loss.pinned_prompts == ()
    assert form.config_of({"toml": TOML}, {"lora.unet": ""}, RUNS).lora.unet == ()
    assert form.config_of({"toml": TOML}, {"lora.layer_ranks": ""}, RUNS).lora.layer_ranks == {}


def test_runs_are_made_where_the_page_makes_them() -> None:
    assert form.config_of({"toml": '[output]\nruns = "elsewhere"'}, {}, RUNS).output.runs == RUNS
    with pytest.raises(ConfigError, match="not an option"):
        form.config_of({}, {"output.runs": "elsewhere"}, RUNS)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("train.steps", "0", "train.steps"),
        ("train.steps", "many", "train.steps"),
        ("lora.unet", "attention, nonsense", "lora.unet"),
        ("optimizer.betas", "2, 3", "optimizer.betas"),
        ("model.base", "", "model.base"),
        ("output.name", "../x", "output.name"),
    ],
)
def test_an_error_names_the_field(name: str, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        form.config_of({}, {name: text}, RUNS)


def test_every_option_has_a_field_with_its_description_bounds_and_default() -> None:
    html = form.html()
    for option in config.options():
        asked = option.name not in (*form.OWN_FIELDS, *form.DECIDED)
        assert (f'data-option="{option.name}"' in html) == asked
    assert "Rank of each layer&#x27;s update" in html and "at least 1 · at most 2048 · default 16" in html
    assert form.bounds(form.OPTIONS["data.min_side"])[0] == "at least 1", "also of what may be unset"
    assert form.bounds(form.OPTIONS["lora.max_norm"]) == ["above 0"]
    assert not set("`${}\\") & set(html), "nothing that a template would take for code"


def test_a_preset_is_one_of_those_there_are() -> None:
    assert form.presets()["mini"].startswith("The demo: teach the embedded miniature")
    with pytest.raises(ConfigError, match="none called"):
        form.preset("../pyproject")


def test_a_text_that_is_no_config_is_named() -> None:
    for text, told in (("[lora", "Cannot read mine as TOML"), ("lora = 3", "mine: lora must be a section"), ("[a]", "mine: .a. is not")):
        with pytest.raises(ConfigError, match=told):
            form.config_of({"mine": text}, {}, RUNS)


def test_what_is_laid_over_a_preset_changes_that_alone() -> None:
    assert {"mini", "sd15", "sdxl"} <= form.presets().keys() and {"character", "style", "concept"} <= form.additions().keys()
    assert not form.presets().keys() & form.additions().keys()
    for preset in form.presets():
        before = form.config_of(form.layers(preset, []), {}, RUNS)
        for name in form.additions():
            after = form.config_of(form.layers(preset, [name]), {}, RUNS)
            changed = form.changes(form.texts(after), form.texts(before))
            said = [f"{section}.{key}" for section, values in config.parse(form.preset(name), name).items() for key in values]
            assert changed.keys() <= set(said), (preset, name)
    style = form.config_of(form.layers("sd15", ["character", "style"]), {"data.flip": "false"}, RUNS)
    assert (style.data.crop, style.optimizer.text_encoder_rate, style.data.flip) == ("salient", 0, False), "all of them, and the field last"


def test_changes_are_what_differs() -> None:
    assert form.changes({"a": "1", "b": "2"}, {"a": "1", "b": "3"}) == {"b": "2"}
