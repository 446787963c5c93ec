"""Imports point one way only, and what must start fast loads no torch."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sdlora"
PAGE = PACKAGE.parent / "ui"
# A module may import from its own layer's folder and from the layers before it.
LAYERS = [
    {"errors", "config", "events", "files", "tensors", "processes", "__init__"},
    {"run"},
    {"grid", "queue"},
    {"diffusion", "lora", "data"},
    {"models", "optim", "loss_scale"},
    {"checkpoint", "preview", "analysis", "adapt", "items"},
    {"latents", "prompts"},
    {"objective", "export", "plan", "saving"},
    {"validation", "footprint"},
    {"train"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
APART = {"diffusion", "lora", "data"}  # none imports another
# The embedded model stands beside the layers: it is made with the libraries alone and measured through the whole program.
BESIDE = "mini"


def imported(path: Path) -> set[str]:
    """First names below sdlora that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("sdlora.")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sdlora":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names if not a.name.startswith("__")}
    return found


def layer_of(name: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == BESIDE:
        return
    for name in imported(path) - {own}:
        if name == BESIDE:
            assert own == "models", "only models asks where the embedded weights lie"
            continue
        assert layer_of(name) <= layer_of(own), f"{own} must not import {name}"
        assert not (own in APART and name in APART), f"{own} and {name} stand apart"


def test_the_page_starts_and_reads_runs_and_no_more() -> None:
    for path in PAGE.glob("*.py"):
        assert imported(path) <= {"config", "errors", "events", "files", "grid", "queue", "run"}, path


def test_every_package_is_named_for_the_wheel() -> None:
    named = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in PACKAGE.rglob("__init__.py")}
    assert found == {name for name in named if not name.startswith("sdlora_ui")}


STARTED_FAST = ["sdlora_ui.app", "sdlora_ui.server", "sdlora.cli", "sdlora.config", "sdlora.events", "sdlora.run", "sdlora.errors"]


@pytest.mark.parametrize("module", STARTED_FAST)
def test_no_torch(module: str) -> None:
    heavy = {"torch", "diffusers", "transformers"} | ({"numpy"} if not module.startswith("sdlora_ui") else set())  # gradio needs it
    code = f"import sys, {module}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_file_says_what_it_is_for() -> None:
    for path in (*PACKAGE.rglob("*.py"), *PAGE.rglob("*.py")):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
