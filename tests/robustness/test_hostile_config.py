"""Config files that nobody would write: each is a config that can be written down and read again, or one clear sentence."""

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import tomlkit

from sdlora.cli import main
from sdlora.config import LARGEST_FILE, Config, dump, load, options
from sdlora.errors import ConfigError

FILES = 2000
NAMES = [option.name for option in options()]
RIGHT = [
    f"{s}.{key} = {tomlkit.item(value).as_string()}\n"
    for s, of in tomlkit.parse(dump(Config())).unwrap().items()
    for key, value in of.items()
]
NUMBERS = [
    "0",
    "1",
    "-1",
    "16",
    "0.5",
    "-0.0",
    "1e-3",
    "1e308",
    "1e999",
    "nan",
    "inf",
    "-inf",
    "1_000",
    "0xff",
    "9" * 40,
    "9" * 5000,
    "2147483648",
]
TEXTS = [
    '""',
    '"auto"',
    '"a cat"',
    "'C:\\x'",
    '"\\u0000"',
    '"\\u001b[31m"',
    '"../../x"',
    '"\\u202e"',
    '"ünïcödé 猫 🐈"',
    '"a\\nb"',
    '"rgb(999,0,0)"',
]
WORDS = ['"adamw"', '"none"', '"lora"', '"file"', '"attention"', '"squared"', '"trigger"', '"exact"', '"orthogonal"', '"white"', '"fp32"']
ODD = [
    "true",
    "false",
    "2024-02-30",
    "2024-01-01T00:00:00Z",
    "10:00:00",
    "[]",
    "{}",
    "[[]]",
    "[{}]",
    "[1, 'a', true]",
    "{a = 1}",
    "{'' = nan}",
]
BROKEN = ["", "=", "[", "{", '"', "'''", "1 2", "\\", "nul\0", "é", "0o9", "1..2"]


def value(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.04:
        return '"' + "x" * rng.choice([300, 5000, 200_000]) + '"'
    if kind < 0.08:
        depth = rng.choice([5, 50, 400, 20_000])
        return rng.choice(["[" * depth + "]" * depth, "{a = " * depth + "1" + "}" * depth, "[" * depth])
    return rng.choice(rng.choices([NUMBERS, TEXTS, WORDS, ODD, BROKEN], [8, 6, 8, 4, 1])[0])


def key(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.9:
        return rng.choice(NAMES)
    if kind < 0.93:
        name = list(rng.choice(NAMES))
        name[rng.randrange(len(name))] = rng.choice("abz_")
        return "".join(name)
    return rng.choice(
        [
            "lora",
            "data.trigger.x",
            "train",
            '"\\u001b[2J".x',
            '"a\\nb"',
            "x" * 3000,
            ".".join("a" * 40),
            "data.sets",
            "optimizer.arguments.k",
        ]
    )


def table(rng: Random) -> str:
    sets = "".join(
        f"[[data.sets]]\nfolder = {value(rng)}\n{rng.choice(NAMES).split('.')[1]} = {value(rng)}\n" for _ in range(rng.randint(1, 3))
    )
    return rng.choice(
        [sets, f"[[{rng.choice(NAMES)}]]\na = {value(rng)}\n", f"[{rng.choice(NAMES)}]\na = {value(rng)}\n", "[lora]\n[lora]\n"]
    )


def hostile_file(rng: Random) -> bytes:
    text = "".join(f"{key(rng)} = {value(rng)}\n" for _ in range(rng.choice([0, 1, 1, 1, 2, 3])))
    text += "".join(rng.sample(RIGHT, rng.randint(0, 3)))
    if rng.random() < 0.15:
        text += table(rng)
    data = text.encode(rng.choices(["utf-8", "utf-8-sig", "utf-16", "latin-1"], [90, 3, 2, 2])[0], "replace")
    if rng.random() < 0.05:
        place = rng.randint(0, len(data))
        data = data[:place] + rng.randbytes(rng.randint(1, 20)) + data[place:]
    return data


def is_one_line(message: str) -> bool:
    return "\n" not in message and len(message) < 1000


def test_two_thousand_files_are_configs_or_one_sentence(tmp_path: Path) -> None:
    rng, path, read, worst = Random(0), tmp_path / "hostile.toml", 0, 0.0
    for number in range(FILES):
        path.write_bytes(hostile_file(rng))
        began = time.process_time()
        try:
            config = load([path])
        except ConfigError as error:
            assert is_one_line(str(error)), (number, str(error)[:500])
            named = any(name in str(error) for name in (str(path), *NAMES, *Config.model_fields, *(n.split(".")[1] for n in NAMES)))
            assert named, (number, str(error))
        else:
            read += 1
            if read % 4 == 0:  # to write one down takes longer than to read ten
                path.write_text(dump(config), encoding="utf-8")
                assert load([path]) == config, number
        worst = max(worst, time.process_time() - began)
    assert FILES / 20 < read < FILES / 2, "neither side is tested where one is rare"
    assert worst < 2, "seconds"


LARGE: dict[str, Callable[[], str]] = {
    "10 MB of text": lambda: '[data]\ntrigger = "' + "a" * 10_000_000 + '"',
    "10 MB of a name": lambda: "a" * 10_000_000 + " = 1",
    "a long name": lambda: f'"{"ab" * 500_000}" = 1',
    "a deep name": lambda: ".".join("a" * 400_000) + " = 1",  # 60 GB in tomllib
    "deep names": lambda: "\n".join("a." * 500 + f"b{n} = 1" for n in range(900)),
    "deep lists": lambda: "lora = " + "[" * 500_000,
    "many names": lambda: "[optimizer.layer_rates]\n" + "\n".join(f"k{n}=1" for n in range(90_000)),
    "many sets": lambda: "\n".join(f"[[data.sets]]\nfolder='{n}'" for n in range(30_000)),
    "many tables": lambda: "\n".join(f"[a{n}]" for n in range(100_000)),
    "many dots": lambda: '[data]\ntrigger = "' + "." * 1_000_000 + '"',
    "many quotes": lambda: "a" + "'\"" * 500_000,
}


@pytest.mark.parametrize("name", LARGE)
def test_large_files_take_little_time_and_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "large.toml"
    path.write_text(LARGE[name]())
    if "deep" in name:  # elsewhere memory is bounded by the file's size, and tracing it makes all slow
        tracemalloc.start()
    began = time.process_time()
    try:
        load([path])
    except ConfigError as error:
        assert is_one_line(str(error))
    taken = time.process_time() - began
    if tracemalloc.is_tracing():
        assert tracemalloc.get_traced_memory()[1] < 200e6
        tracemalloc.stop()
    assert taken < 4


def test_the_largest_config_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.toml"
    path.write_text("[lora]\nrank = 8\n" + "#" * (LARGEST_FILE - 16))
    assert load([path]).lora.rank == 8
    path.write_text("[lora]\nrank = 8\n" + "#" * (LARGEST_FILE - 15))
    with pytest.raises(ConfigError, match="1,048,576 bytes"):
        load([path])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nsteps = 2147483648", "train.steps = 2147483648: input should be less than or equal to 2147483647"),
        ("[optimizer]\nrate = " + "9" * 400, "optimizer.rate: the number has more than 64 bits"),
        ('[data]\nfolder = "a\\u0000b"', "data.folder: its text has the control character '\\x00' in it"),
        (f'[data]\ncache = "{"x" * 300}"', "no file or folder can have so long a name"),
        (f'[model]\nbase = "{"x" * 300}"', "no file or folder can have so long a name"),
        (f'[data]\ntrigger = "{"x" * 5000}"', "data.trigger = 'xxx"),
        ("[optimizer.arguments]\na = nan", "optimizer.arguments.a must be a finite number"),
        ("[optimizer.arguments]\na = 2024-01-01", "optimizer.arguments.a must be a finite number"),
        ("[optimizer.arguments]\na = [[[[[[1]]]]]]", "optimizer.arguments.a: no option is nested so deep"),
        ('[data]\nbackground = "rgb(1000%,1%,1%)"', "is no colour"),
        ("[optimizer.layer_rates]\n'a\u2028\\u' = [1]", "optimizer.layer_rates"),
    ],
)
def test_the_field_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load([path])
    assert message in str(error.value) and is_one_line(str(error.value))


@pytest.mark.parametrize(
    "flag", ["[" * 100_000, "9" * 5000, "nan", "2024-01-01", "a\x1b[2J", "\udcff", "{a = {b = {c = {d = {e = {f = {g = 1}}}}}}}"]
)
@pytest.mark.parametrize("name", ["rank", "rate", "trigger", "layer_rates", "optimizer.arguments", "lora.unet"])
def test_flags_are_no_way_round(name: str, flag: str) -> None:
    try:
        config = load([], [(name, flag)])
    except ConfigError as error:
        assert is_one_line(str(error)) and name in str(error)
    else:
        assert name == "trigger" and config.data.trigger == flag and flag.isprintable()


def test_the_program_exits_with_two_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.toml"
    for text in (
        '"\\u001b[2J" = 1',
        "lora = " + "[" * 100_000,
        "[train]\nsteps = nan",
        '[lora]\ninit = "\\u202e"',
        "[lora]\nrank = 4\nrank = 5",
    ):
        path.write_text(text, encoding="utf-8")
        assert main(["train", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("sdlora: ") and error.endswith("\n") and error[:-1].isprintable(), error
    assert main(["train", str(tmp_path)]) == 2  # a folder
    assert main(["train", "/dev/zero"]) == 2
    assert main(["train", str(tmp_path / "\x1b[2J")]) == 2
    assert all(line.isprintable() for line in capsys.readouterr().err.splitlines())
