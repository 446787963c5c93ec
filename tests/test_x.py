"""x.py: installs only what changed, starts afresh after an interruption, and hands on exit codes."""

from __future__ import annotations

import importlib.util
import signal
import sys
import types
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PIP_INSTALL = "pip install"
MAKE_VENV = "venv --clear"


@pytest.fixture
def x(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """x.py in an empty checkout with a .venv that works, whose commands are recorded in `x.ran` and end with `x.codes`."""
    specification = importlib.util.spec_from_file_location("x", REPOSITORY / "x.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / ".venv").mkdir()
    monkeypatch.chdir(tmp_path)
    ran: list[str] = []
    codes: dict[str, int] = {}

    def run(command: list[str]) -> int:
        ran.append(" ".join(command))
        return next((code for part, code in codes.items() if part in ran[-1]), 0)

    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "venv_works", lambda: True)
    monkeypatch.setattr(module, "cpu_torch_index", list)
    vars(module).update(really_run=module.run, run=run, ran=ran, codes=codes)
    return module


def test_installs_once_and_again_only_when_a_requirement_changes(x: types.ModuleType) -> None:
    assert x.main(["install"]) == 0
    assert len(x.ran) == 1 and PIP_INSTALL in x.ran[0] and "-c constraints.txt" in x.ran[0]
    assert x.main(["install"]) == 0
    assert len(x.ran) == 1
    Path("constraints.txt").write_text("torch==2.13.0\n")
    assert x.main(["install"]) == 0
    assert len(x.ran) == 2 and PIP_INSTALL in x.ran[1]


def test_a_checkout_that_was_moved_is_installed_again(x: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = x.fingerprint()
    (tmp_path / "moved").mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        Path(name).rename(tmp_path / "moved" / name)
    monkeypatch.chdir(tmp_path / "moved")
    assert x.fingerprint() != before


@pytest.mark.parametrize("code", [130, 137])  # Ctrl-C, kill -9
def test_an_interrupted_install_starts_afresh(x: types.ModuleType, code: int) -> None:
    x.codes[PIP_INSTALL] = code
    assert x.main(["demo"]) == code
    assert not any("sdlora" in command for command in x.ran)
    x.codes.clear()
    x.ran.clear()
    assert x.main(["install"]) == 0
    assert [MAKE_VENV in x.ran[0], PIP_INSTALL in x.ran[1]] == [True, True]


def test_an_install_that_pip_gave_up_keeps_the_venv(x: types.ModuleType) -> None:
    x.codes[PIP_INSTALL] = 1
    assert x.main(["install"]) == 1
    x.codes.clear()
    x.ran.clear()
    assert x.main(["install"]) == 0
    assert len(x.ran) == 1 and PIP_INSTALL in x.ran[0]


def test_a_venv_without_a_working_python_is_made_anew(x: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x.main(["install"])
    x.ran.clear()
    monkeypatch.setattr(x, "venv_works", lambda: False)
    assert x.main(["install"]) == 0
    assert [MAKE_VENV in x.ran[0], PIP_INSTALL in x.ran[1]] == [True, True]


def test_demo_is_the_command_that_a_user_would_type(x: types.ModuleType) -> None:
    assert x.main(["demo"]) == 0
    assert x.ran[-1] == f"{x.BIN / 'sdlora'} train configs/mini.toml"


def test_tests_follow_style_and_types_and_get_the_arguments(x: types.ModuleType) -> None:
    assert x.main(["test", "-k", "mini"]) == 0
    assert [command.removeprefix(x.PYTHON) for command in x.ran[1:]] == [" -m ruff check .", " -m mypy", " -m pytest -k mini"]


def test_the_first_failure_ends_it_with_its_code(x: types.ModuleType) -> None:
    x.codes["mypy"] = 7
    assert x.main(["test"]) == 7
    assert not any("pytest" in command for command in x.ran)


@pytest.mark.parametrize("arguments", [[], ["tset"], ["demo", "--steps"]])
def test_a_wrong_command_runs_nothing_and_shows_the_right_ones(
    x: types.ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert x.main(arguments) == 2
    assert x.ran == []
    assert "python x.py demo" in capsys.readouterr().err


def test_an_old_python_is_told_so(x: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert x.main(["demo"]) == 2
    assert x.ran == []
    assert "needs Python 3.11 or newer, and this is 3.10" in capsys.readouterr().err


def test_run_shows_the_command_and_hands_on_its_code(x: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert x.really_run([sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert capsys.readouterr().out.startswith(f"$ {sys.executable} -c ")


@pytest.mark.skipif(sys.platform == "win32", reason="signals end no process there")
def test_run_gives_the_shells_code_for_a_signal(x: types.ModuleType) -> None:
    assert x.really_run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 128 + 9


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is no signal there")
@pytest.mark.parametrize(("ending", "code"), [(0, 0), (1, 130)])
def test_ctrl_c_lets_the_command_finish_its_own_way(x: types.ModuleType, tmp_path: Path, ending: int, code: int) -> None:
    """The command here sends the signal to its parent as a terminal would, and takes longer to end than Popen waits."""
    program = (
        "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(0.6); "
        f"open('finished', 'w').close(); raise SystemExit({ending})"
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert x.really_run([sys.executable, "-c", program]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "finished").exists()


def test_a_browser_that_is_missing_is_told_of_in_one_line(
    x: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(x.shutil, "which", lambda name: None)
    assert x.main(["check"]) == 0 and capsys.readouterr().out == ""
    assert x.main(["test"]) == 0 and capsys.readouterr().out.count("There is no chromium") == 1
    monkeypatch.setattr(x.shutil, "which", lambda name: "/usr/bin/chromium" if name == "chromium" else None)
    assert x.main(["test"]) == 0 and capsys.readouterr().out == ""
