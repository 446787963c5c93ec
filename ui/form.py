"""Every option of the schema as a form: its HTML, the texts that stand in its fields, and the config that they mean."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tomlkit

from sdlora import config as configs
from sdlora.config import Config, Option, Tables
from sdlora.errors import ConfigError

from .markup import text
from .paths import PRESETS

# Fields of the first screen, and what the page itself decides: not asked for once more.
OWN_FIELDS = ("model.base", "data.folder", "data.trigger", "output.name")
DECIDED = ("output.runs",)
OPTIONS: dict[str, Option] = {option.name: option for option in configs.options() if option.name not in DECIDED}
SIGNS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}

Texts = dict[str, str]  # option -> what its field says


@cache
def presets() -> dict[str, str]:
    """Name of each whole config in configs/ -> what it is for, which its first line says."""
    return {name: about for name, about in _described().items() if "steps" in configs.parse(preset(name), name).get("train", {})}


def additions() -> dict[str, str]:
    """The same of those that are laid over a whole one: how long training takes is not theirs to say."""
    return {name: about for name, about in _described().items() if name not in presets()}


def preset(name: str) -> str:
    """A preset's TOML."""
    if name not in _described():
        raise ConfigError(f"preset: there is none called {name}.")
    return (PRESETS / f"{name}.toml").read_text(encoding="utf-8")


def layers(name: str, over: Sequence[str]) -> dict[str, str]:
    """TOML by name: a preset, and what is laid over it."""
    return {of: preset(of) for of in (name, *over)}


@cache
def _described() -> dict[str, str]:
    found = {}
    for path in sorted(PRESETS.glob("*.toml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found[path.stem] = first.lstrip("# ").rstrip(":. ") + "."
    return found


# ---------------------------------------------------------------- texts and configs


def texts(config: Config) -> Texts:
    """What the fields say of a config. A folder that data.sets stand in for is told by no field."""
    values = config.model_dump(mode="json")
    found = {name: written(option, value(values, name)) for name, option in OPTIONS.items()}
    return found | ({"data.folder": ""} if config.data.sets else {})


def value(values: Mapping[str, Any], name: str) -> Any:
    section, key = name.split(".")
    return values[section][key]


def written(option: Option, of: Any) -> str:
    """An option's value as its field shows it: lists of text a line each, other lists with commas, tables as in TOML."""
    if of is None or of == [] or of == {}:
        return ""
    if option.type == "list of text":
        return "\n".join(of)
    if isinstance(of, list) and not isinstance(of[0], dict):
        return ", ".join(map(str, of))
    if isinstance(of, list):
        return f"[{', '.join(as_toml(table) for table in of)}]"
    if isinstance(of, dict):
        return as_toml(of)
    return str(of).lower() if isinstance(of, bool) else str(of)


def as_toml(table: dict[str, Any]) -> str:
    """In one line."""
    inline = tomlkit.inline_table()
    inline.update(table)
    return inline.as_string()


def config_of(tomls: Mapping[str, str], told: Mapping[str, str], runs: Path) -> Config:
    """The config that TOML texts mean, by their names, later ones over earlier ones, with what fields say over them; an empty field takes
    an option out. Raises ConfigError."""
    tables = [configs.parse(toml, name) for name, toml in tomls.items()]
    flags = [("output.runs", str(runs))]
    for name, of in told.items():
        if name not in OPTIONS:
            raise ConfigError(f"{name} is not an option.")
        option, of = OPTIONS[name], of.strip()
        take_out(tables, name)
        if option.type == "list of tables":
            if of:
                take_out(tables, "data.folder")  # which they stand in for
                tables.append(configs.parse(f"{name} = {of}", name))
        elif of or option.type == "text" or (option.type.startswith("list") and not option.type.endswith("unset")):
            flags.append((name, as_flag(option, of)))
    return configs.merge(tables, flags)


def take_out(tables: Sequence[Tables], name: str) -> None:
    section, key = name.split(".")
    for table in tables:
        table.get(section, {}).pop(key, None)


def as_flag(option: Option, of: str) -> str:
    """What a field says, as a flag would."""
    if option.type == "list of text":
        return tomlkit.item([line.strip() for line in of.splitlines() if line.strip()]).as_string()
    if option.type.startswith("list of ") and " | " in option.type:
        return tomlkit.item([word.strip() for word in of.split(",") if word.strip()]).as_string()
    return f"[{of}]" if option.type.startswith("list") else of


def changes(told: Mapping[str, str], before: Mapping[str, str]) -> Texts:
    """Texts that differ from a preset's."""
    return {name: of for name, of in told.items() if of != before.get(name)}


# ---------------------------------------------------------------- HTML


def html() -> str:
    """A search field, and the sections, folded. form.js fills the fields, finds them and marks what differs from the preset."""
    sections: dict[str, list[str]] = {}
    for name, option in OPTIONS.items():
        if name not in OWN_FIELDS:
            sections.setdefault(name.split(".")[0], []).append(field(option))
    folded = "".join(
        f'<details data-section="{section}"><summary>{section}<span class="count"></span></summary><div>{"".join(fields)}</div></details>'
        for section, fields in sections.items()
    )
    return (
        '<div class="sd-form"><div class="sd-search"><input type="search" placeholder="Search all options" aria-label="Search all options">'
        '<label><input type="checkbox" class="only-changed"> changed only</label></div>'
        f'<p class="sd-none" hidden>No option is like that.</p>{folded}</div>'
    )


def field(option: Option) -> str:
    name, key = option.name, option.name.split(".")[1]
    about = " · ".join([*bounds(option), f"default {written_default(option)}"])
    return (
        f'<div class="sd-option" data-name="{name}"><label for="option-{name}">{text(key.replace("_", " "))}</label>{control(option)}'
        f'<p id="about-{name}">{text(option.field.description)} <span>{text(about)}</span> '
        '<button type="button" class="reset" title="Back to the preset">reset</button></p></div>'
    )


def control(option: Option) -> str:
    attributes = f'id="option-{option.name}" data-option="{option.name}" aria-describedby="about-{option.name}"'
    if option.type == "true | false":
        return f'<input type="checkbox" {attributes}>'
    if " | " in option.type and not option.type.startswith("list"):
        choices = "".join(f"<option>{text(of)}</option>" for of in option.type.split(" | "))
        return f"<select {attributes}>{choices}</select>"
    if option.type in ("list of text", "list of tables"):
        return f'<textarea rows="3" spellcheck="false" {attributes}></textarea>'
    decimal = 'inputmode="decimal" ' if option.type.split(" or ")[0] in ("integer", "number") else ""
    unset = 'placeholder="unset" ' if option.type.endswith("unset") else ""
    return f'<input type="text" spellcheck="false" autocomplete="off" {decimal}{unset}{attributes}>'


def bounds(option: Option) -> list[str]:
    """ "at least 1" and the like."""
    limits = [*option.field.metadata]
    for of in typing.get_args(option.field.annotation):  # X | None keeps the bounds of X to itself
        limits += getattr(of, "__metadata__", ())
    flat = [one for limit in limits for one in (limit.metadata if hasattr(limit, "metadata") else [limit])]
    return [said.format(getattr(one, key)) for one in flat for key, said in SIGNS.items() if getattr(one, key, None) is not None]


def written_default(option: Option) -> str:
    default = option.default
    plain = list(default) if isinstance(default, tuple) else str(default) if isinstance(default, Path) else default
    return written(option, plain) or ("unset" if default is None else "empty")
