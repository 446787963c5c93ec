"""One schema: files and flags merge, what is wrong gets one clear sentence, and a config survives being written."""

from pathlib import Path

import pytest

from sdlora.config import Config, dump, load, options
from sdlora.errors import ConfigError


def file(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_later_files_and_flags_win(tmp_path: Path) -> None:
    first = file(tmp_path, "a.toml", "[train]\nsteps = 1\nbatch_size = 2\n[lora]\nrank = 4")
    second = file(tmp_path, "b.toml", "[train]\nsteps = 3")
    config = load([first, second], [("rank", "8")])
    assert (config.train.steps, config.train.batch_size, config.lora.rank) == (3, 2, 8)


def test_written_config_reads_back_equal(tmp_path: Path) -> None:
    config = load(
        [],
        [
            ("layer_rates", '{"unet.*.attn2.*" = 2e-4, "text_encoder.*" = 0}'),
            ("prompts", '["a \\"b\\" --d 1", "c"]'),
            ("trigger", "ohwx"),
            ("data.folder", "C:\\pictures"),
            ("betas", "[0.9, 0.95]"),
            ("text_encoder_rate", "1e-5"),
            ("lora.unet", "[]"),
        ],
    )
    assert load([file(tmp_path, "c.toml", dump(config))]) == config
    assert load([file(tmp_path, "d.toml", dump(Config()))]) == Config()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([("ratee", "1")], "--ratee is not an option. Did you mean --rate?"),
        ([("train.rank", "4")], "Did you mean --lora.rank?"),
        ([("rank", "0")], "lora.rank = 0: input should be greater than or equal to 1"),
        ([("rank", "many")], "lora.rank = 'many'"),
        ([("init", "xavier")], "lora.init = 'xavier'"),
        ([("rate", "nan")], "optimizer.rate = nan"),
        ([("output.name", "../evil")], "output.name"),
        ([("missing_caption", "trigger")], "data.missing_caption = 'trigger' needs a trigger word: set data.trigger."),
    ],
)
def test_wrong_flags_get_one_sentence(flags: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load([], flags)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[lora]\nrnak = 4", "lora.rnak is not an option. Did you mean lora.rank?"),
        ("[lorra]\nrank = 4", "[lorra] is not a section of options. Did you mean lora?"),
        ("[train]\nrank = 4", "train.rank is not an option. Did you mean lora.rank?"),
        ("lora = 3", "must be a section"),
        ("[lora\n", "a.toml as TOML"),
    ],
)
def test_wrong_files_get_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load([file(tmp_path, "a.toml", text)])
    assert message in str(error.value)


SETS = """
[data]
trigger = "ohwx"
repeats = 2
caption_prefix = "a {trigger}, "
masks = "alpha"
[[data.sets]]
folder = "one"
[[data.sets]]
folder = "two"
repeats = 5
trigger = "sks"
[[data.sets]]
folder = "three"
regularises = true
weight = 0.5
class_noun = "a \\"cat\\""
"""


def test_a_set_takes_from_data_what_it_leaves_out(tmp_path: Path) -> None:
    config = load([file(tmp_path, "a.toml", SETS)], [("data.flip", "true")])
    one, two, three = config.data.every_set()
    assert config.data.sets == (one, two, three)
    assert (one.repeats, one.trigger, one.caption_prefix, one.masks, one.weight) == (2, "ohwx", "a {trigger}, ", "alpha", 1.0)
    assert (two.repeats, two.trigger) == (5, "sks")
    assert (three.repeats, three.trigger, three.caption_prefix, three.masks, three.class_noun) == (2, "", "", "off", 'a "cat"')
    assert [of.flip for of in (one, two, three)] == [True] * 3
    assert load([file(tmp_path, "b.toml", dump(config))]) == config
    later = file(tmp_path, "c.toml", '[[data.sets]]\nfolder = "four"')
    assert [of.folder for of in load([file(tmp_path, "a.toml", SETS), later]).data.sets] == [Path("four")]


def test_the_short_forms_are_sets() -> None:
    data = load([], [("data.folder", "a"), ("regularisation_folder", "b"), ("trigger", "sks"), ("shuffle_tags", "true")]).data
    own, other = data.every_set()
    assert (own.folder, own.trigger, own.regularises) == (Path("a"), "sks", False)
    assert (other.folder, other.trigger, other.regularises) == (Path("b"), "", True)
    assert own.shuffle_tags and other.shuffle_tags


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[data.sets]]\nfolder = "a"\nrepeat = 3', "repeat is not an option of [[data.sets]]. Did you mean repeats?"),
        ('[[data.sets]]\nfolder = "a"\nresolution = 3', "resolution is not an option of [[data.sets]]."),
        ("[[data.sets]]\nrepeats = 3", "data.sets.0.folder is missing."),
        ('[[data.sets]]\nfolder = "a"\n[[data.sets]]\nfolder = "b"\nrepeats = 0', "data.sets.1.repeats = 0: input should be"),
        ('[data.sets]\nfolder = "a"', "data.sets must be tables, each written [[data.sets]]."),
        ("[data]\nsets = [3]", "data.sets must be tables"),
        ('[data]\nfolder = "b"\n[[data.sets]]\nfolder = "a"', "data.folder = 'b' and data.sets both say"),
        ('[[data.sets]]\nfolder = "a"\nmissing_caption = "trigger"', "needs a trigger word"),
        ('[[data.sets]]\nfolder = "a"\nregularises = true\ntrigger = "sks"', "does without your subject"),
        ('[[data.sets]]\nfolder = "a"\ncaption_suffix = "{trigger}"', "has {trigger} in it: set data.trigger"),
        ('[data]\ncaption_prefix = "{trigger}, "', "has {trigger} in it: set data.trigger"),
    ],
)
def test_wrong_sets_get_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load([file(tmp_path, "a.toml", text)])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["data.sets", "sets", "data.sets.0.repeats"])
def test_no_flag_sets_sets(flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"--{flag}: sets are written as \[\[data.sets\]\] tables in a TOML file"):
        load([], [(flag, "[]")])


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    file(tmp_path, "mini.toml", "")
    with pytest.raises(ConfigError, match=r"Did you mean .*mini\.toml"):
        load([tmp_path / "mimi.toml"])


def test_text_flags_stay_text() -> None:
    config = load([], [("trigger", "2024-01-01"), ("output.name", "123"), ("prompts", "a cat --s 3"), ("learned_alpha", "False")])
    assert (config.data.trigger, config.output.name, config.preview.prompts) == ("2024-01-01", "123", ("a cat --s 3",))
    assert config.lora.learned_alpha is False


def test_every_option_says_what_it_does() -> None:
    for option in options():
        assert option.field.description and option.field.description.endswith((".", "'.")), option.name
        assert option.type


def test_presets_load() -> None:
    presets = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))
    assert presets
    for preset in presets:
        load([preset])


@pytest.mark.parametrize("partial", ["low_vram", "very_low_vram"])
@pytest.mark.parametrize("full", ["mini", "sd15", "sd21", "sdxl"])
def test_partial_presets_change_what_they_are_for_and_no_more(partial: str, full: str) -> None:
    configs = Path(__file__).parent.parent / "configs"
    alone, merged = load([configs / f"{full}.toml"]), load([configs / f"{full}.toml", configs / f"{partial}.toml"])
    values, changed = alone.model_dump(), merged.model_dump()
    differs = {f"{section}.{key}" for section in values for key in values[section] if values[section][key] != changed[section][key]}
    assert differs <= {
        "model.base_precision",
        "model.offload",
        "model.vae_tile",
        "data.caption_dropout",
        "lora.text_encoder",
        "train.batch_size",
        "train.accumulation",
        "train.gradient_checkpointing",
    }
    assert merged.train.gradient_checkpointing and merged.lora.text_encoder == () and merged.train.batch_size == 1


def test_a_background_is_a_colour() -> None:
    assert load([], [("background", "#102030")]).data.background == "#102030"
    with pytest.raises(ConfigError, match=r"data\.background = 'no colour'.*#rrggbb"):
        load([], [("background", "no colour")])


@pytest.mark.parametrize("flag", [("dropout", "0.1"), ("rank_dropout", "0.1"), ("module_dropout", "0.1"), ("model.offload", "true")])
def test_what_changes_with_each_step_is_not_compiled(flag: tuple[str, str]) -> None:
    assert load([], [("compile", "true")]).train.compile
    with pytest.raises(ConfigError, match=rf"train\.compile and \w+\.{flag[0].removeprefix('model.')} do not go together"):
        load([], [("compile", "true"), flag])
