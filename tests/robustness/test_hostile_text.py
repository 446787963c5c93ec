"""A run, and pictures from its file, with hostile captions and prompts, in a process that may not speak to the network."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from tiny import build_model

from sdlora import events
from sdlora.config import load
from sdlora.errors import ConfigError

# Python tells an audit hook of every look-up and connection, whoever asks for it; nothing can take the hook away.
HOOK = """
import os, sys
def hook(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto") or (
        event == "socket.connect" and not isinstance(arguments[1], (str, bytes))  # a path: of this machine
    ):
        with open(os.environ["NETWORK_LOG"], "a") as file:
            file.write(f"{event} {arguments[1:]!r}\\n")
        raise OSError("no network here")
sys.addaudithook(hook)
"""
CAPTIONS = {
    "markup": '<script>alert(1)</script> & <b>"cat"</b> \\" } {trigger} {a|b',
    "steering": "a \x1b[2J\x1b]0;title\x07cat\x08\x7f\x9b31m",
    "path": "../../../etc/passwd, ..\\..\\x, C:\\con, /dev/null",
    "turned": "\u202egnp.tac\u202c \u2066a\u2069 \u200fcat\u2028cat\u2029",
    "lines": "a\r\ncat\n\nNegative prompt: x\nSteps: 9, Seed: 1",
    "long": "cat, " * 20_000,
    "odd": "\ufeff\ud7ff\ue000\U0010ffff 猫 🐈‍⬛ ﷽",
}
PROMPTS = ['a "cat" <lora:x:1> \\ & \u202e {}', "../../x %s %n $(touch x) `touch x` ; touch x", "a" * 5000]


@dataclass(frozen=True)
class Ran:
    folder: Path
    told: list[str]  # lines on stdout
    network: str  # what was tried

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "hostile"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """`sdlora --help`, `train` and `generate`, in one process, for libraries take seconds to import."""
    folder = tmp_path_factory.mktemp("hostile")
    base = build_model(folder / "tiny")
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    (folder / "pictures").mkdir()
    for number, (name, caption) in enumerate(CAPTIONS.items()):
        Image.new("RGB", (32, 32), (30 * number, 90, 200)).save(folder / "pictures" / f"{name}.png")
        (folder / "pictures" / f"{name}.txt").write_bytes(caption.encode())
    train = ["train", "--base", base, "--data.folder", folder / "pictures", "--resolution", "32", "--bucket_step", "8"]
    train += ["--trigger", "../<b>\u202e", "--precision", "fp32", "--steps", "7", "--threads", "1", "--output.name", "hostile"]
    train += ["--output.runs", folder / "runs", "--preview.prompts", json.dumps([f"{p} --s 1 --n {p}" for p in PROMPTS[:2]])]
    lora = folder / "runs" / "hostile" / "hostile.safetensors"
    generate = ["generate", *(f"{p} --s 1" for p in PROMPTS), "--base", base, "--lora", lora, "--out", folder / "drawn"]
    commands = [list(map(str, words)) for words in (train, generate)]
    code = (
        "import json, sys\nfrom sdlora.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as done:\n    assert done.code == 0\n"
        "for words in json.loads(sys.argv[1]):\n    assert main(words) == 0, words[0]\n"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}  # which would forbid it by themselves
    place = {"PYTHONPATH": os.pathsep.join([str(folder / "hook"), *sys.path]), "NETWORK_LOG": str(folder / "network.txt")}
    command = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=kept | place, cwd=folder, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    log = folder / "network.txt"
    return Ran(folder, done.stdout.split("\n"), log.read_text() if log.exists() else "")


def test_nothing_speaks_to_the_network(ran: Ran) -> None:
    assert ran.network == ""


def test_the_hook_sees_look_ups_and_connections(ran: Ran, tmp_path: Path) -> None:
    code = (
        "import socket\nfor call in (lambda: socket.getaddrinfo('example.org', 80), lambda: socket.create_connection(('127.0.0.1', 9))):\n"
    )
    code += "    try:\n        call()\n    except OSError as error:\n        assert 'no network here' in str(error)"
    place = {"PYTHONPATH": str(ran.folder / "hook"), "NETWORK_LOG": str(tmp_path / "log")}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | place)
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_nothing_is_written_elsewhere(ran: Ran) -> None:
    assert {path.name for path in ran.folder.iterdir()} == {"tiny", "hook", "pictures", "runs", "drawn"}
    assert {path.name for path in ran.run.parent.iterdir()} == {"hostile", "_cache"}
    known = {"config.toml", "plan.json", "events.jsonl", "run.log", "previews", "checkpoints", "lock", "pid", "hostile.safetensors"}
    assert {path.name for path in ran.run.iterdir()} <= known
    pictures = {path.name for path in (ran.run / "previews").iterdir()}
    assert all(re.fullmatch(r"\d{8}-0[01]\.png|step-\d{8}\.png|before-after\.png", name) for name in pictures)
    assert {path.name for path in (ran.folder / "drawn").iterdir()} == {"00000.png", "00001.png", "00002.png"}


def test_what_is_said_steers_no_terminal(ran: Ran) -> None:
    assert all(line.isprintable() for line in ran.told)
    assert any("\\u202e" in line for line in ran.told)


def test_the_file_says_what_was_trained(ran: Ran) -> None:
    with safe_open(ran.run / "hostile.safetensors", "pt") as file:
        metadata = file.metadata()
    assert all(isinstance(json.loads(metadata[f"ss_{key}"]), dict) for key in ("tag_frequency", "bucket_info", "dataset_dirs"))
    tags = json.loads(metadata["ss_tag_frequency"])["pictures"]
    assert any("<script>" in tag for tag in tags) and any("\x1b" in tag for tag in tags)
    assert metadata["modelspec.trigger_phrase"] == "../<b>\u202e"
    assert load([ran.run / "config.toml"]).data.trigger == "../<b>\u202e"
    assert all(event is not None for event in events.read(ran.run / "events.jsonl"))
    json.loads((ran.run / "plan.json").read_text(encoding="utf-8"))


def test_pictures_say_their_prompts(ran: Ran) -> None:
    for number, prompt in enumerate(PROMPTS):
        with Image.open(ran.folder / "drawn" / f"{number:05d}.png") as picture:
            first, last = picture.text["parameters"].split("\n")  # type: ignore[attr-defined]
        assert first == f"{prompt} <lora:hostile:1>"
        assert re.fullmatch(r"Steps: 1, Sampler: DPM\+\+ 2M, CFG scale: 7, Seed: 0, Size: \d+x\d+, Model: tiny", last)


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "a\\b", ".", "..", ".hidden", "-x", "", "a\n", "a\0", "a b", "x" * 101, "\u202ea", "C:x", "a\x1b[2J", "é"]
)
def test_a_run_is_called_by_a_plain_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"output\.name"):
        load([], [("output.name", name)])
