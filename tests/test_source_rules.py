"""What our own code must never do, read from its syntax: run what a file or a user says, or speak to the network."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "sdlora").rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}  # they run what they read
NETWORK = {"requests", "urllib", "urllib3", "http", "httpx", "aiohttp", "socket", "ftplib", "smtplib", "huggingface_hub"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "torch.hub.load",
}
SPEAKS = ("cli.py", "commands/", "mini/train.py", "mini/measure.py")  # programs: they alone print


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def wrongs(source: str, speaks: bool = False) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.split(".")[0] in MODULES | NETWORK:
                    yield f"{node.lineno}: imports {name}"
            if isinstance(node, ast.ImportFrom) and node.module in ("os", "torch", "builtins"):
                for alias in node.names:
                    if f"{node.module}.{alias.name}" in CALLS | {"torch.load"} or alias.name in CALLS:
                        yield f"{node.lineno}: imports {alias.name}"
        if isinstance(node, ast.Call):
            given = {word.arg: word.value for word in node.keywords}
            name = dotted(node.func)
            if name in CALLS:
                yield f"{node.lineno}: calls {name}"
            if name == "print" and not speaks:
                yield f"{node.lineno}: prints"
            if "shell" in given:
                yield f"{node.lineno}: says shell"
            weights_only = given.get("weights_only")
            is_safe = isinstance(weights_only, ast.Constant) and weights_only.value is True
            if not is_safe and (name == "torch.load" or "weights_only" in given):
                yield f"{node.lineno}: {name} without weights_only=True"
            if given.get("trust_remote_code") is not None:
                yield f"{node.lineno}: says trust_remote_code"
            if given.get("allow_pickle") is not None:
                yield f"{node.lineno}: says allow_pickle"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_our_code_keeps_the_rules(path: Path) -> None:
    speaks = path.relative_to(ROOT / "sdlora").as_posix().startswith(SPEAKS)
    assert not list(wrongs(path.read_text(encoding="utf-8"), speaks))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import yaml",
        "import urllib.request",
        "from os import system",
        "from torch import load",
        "eval('1')",
        "exec(text)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=wanted)",
        "load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "Model.from_pretrained(path, trust_remote_code=True)",
        "def f():\n    import socket",
        "print(1)",
    ],
)
def test_each_rule_sees_what_breaks_it(line: str) -> None:
    assert list(wrongs(line))


def test_what_is_allowed_is_not_called_wrong() -> None:
    assert not list(wrongs("torch.load(path, weights_only=True)\nre.compile('a')\nmodel.eval()\nsubprocess.run(['ls'])"))
    assert not list(wrongs("print(1)", speaks=True))
