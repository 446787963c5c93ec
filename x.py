"""Install, try and check sdlora from a checkout, on Linux, macOS and Windows, with nothing but Python 3.11 or newer.

    python x.py install         make .venv and install everything at the versions in constraints.txt
    python x.py demo            sdlora train configs/mini.toml
    python x.py check           style and types
    python x.py test [args]     style, types, then pytest with these arguments

Each installs first what is missing, and shows every command it runs, so that you can run them yourself.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# Relative to ROOT, where every command runs: short to read, and the same on every machine.
VENV = Path(".venv")
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = str(BIN / "python")
INSTALLED = VENV / "installed.txt"  # fingerprint of what is installed, or UNFINISHED
UNFINISHED = "unfinished"
CPU_TORCH_HOST = "download.pytorch.org"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")  # which the tests of the page look for
INTERRUPTED = 130  # a shell's code for a command ended by Ctrl-C


def main(arguments: list[str]) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036  an older Python gets this far and should hear why it goes no further
        found = ".".join(map(str, sys.version_info[:2]))
        print(f"sdlora needs Python 3.11 or newer, and this is {found}: run x.py with a newer one.", file=sys.stderr)
        return 2
    name, *rest = arguments or [""]
    if name not in COMMANDS or (rest and name != "test"):
        print(__doc__.strip(), file=sys.stderr)
        return 0 if name in ("-h", "--help", "help") else 2
    os.chdir(ROOT)
    if name == "test" and not any(map(shutil.which, BROWSERS)):
        print("There is no chromium here: the page is not tested in a browser (on Debian: apt install chromium).")
    return install() or run_all(*COMMANDS[name], rest=rest)


# What each command runs once everything is installed; further arguments go to the last.
CHECK = [[PYTHON, "-m", "ruff", "check", "."], [PYTHON, "-m", "mypy"]]
COMMANDS: dict[str, list[list[str]]] = {
    "install": [],
    "demo": [[str(BIN / "sdlora"), "train", "configs/mini.toml"]],
    "check": CHECK,
    "test": [*CHECK, [PYTHON, "-m", "pytest"]],
}


def run_all(*commands: list[str], rest: list[str]) -> int:
    """Exit code of the first command that fails, or 0."""
    for index, command in enumerate(commands):
        code = run([*command, *rest] if index == len(commands) - 1 else command)
        if code:
            return code
    return 0


def run(command: list[str]) -> int:
    """Show and run a command; its exit code, as a shell would give it."""
    print("$", subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command), flush=True)
    # Two threads make the tests' figures and times alike everywhere; a demo may use what the machine has.
    environment = {"OMP_NUM_THREADS": "2", **os.environ} if "pytest" in command else None
    process = subprocess.Popen(command, env=environment)
    interrupted = False
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # the command got it too: let it finish its own way, a training run saves itself first
            interrupted = True
    if interrupted and code:
        return INTERRUPTED
    return 128 - code if code < 0 else code  # negative: ended by that signal


def install() -> int:
    """Bring .venv up to date with pyproject.toml and constraints.txt; does nothing when neither changed."""
    state = INSTALLED.read_text() if INSTALLED.exists() else ""
    works = venv_works()
    if works and state == fingerprint():
        return 0
    # pip takes a package for installed that a killed pip left half unpacked, so what is unfinished starts afresh.
    if (not works or state == UNFINISHED) and (code := run([sys.executable, "-m", "venv", "--clear", str(VENV)])):
        return code
    INSTALLED.write_text(UNFINISHED)
    code = run([PYTHON, "-m", "pip", "install", "-c", "constraints.txt", *cpu_torch_index(), "-e", ".[dev]"])
    if code == 0:
        INSTALLED.write_text(fingerprint())
    elif code < 128:  # pip failed by itself and has put back what it found
        INSTALLED.unlink()
    return code


def fingerprint() -> str:
    """Of what decides the installation: the requirements, and where the checkout lies, which an editable install records."""
    digest = hashlib.sha256(str(Path.cwd()).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update(Path(name).read_bytes())
    return digest.hexdigest()


def venv_works() -> bool:
    test = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    try:
        return subprocess.run([PYTHON, "-c", test], stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def cpu_torch_index() -> list[str]:
    """pip arguments for a small torch (0.2 GB): PyPI's for Linux is a CUDA build of 2.7 GB, of no use without an NVIDIA GPU."""
    if sys.platform != "linux" or shutil.which("nvidia-smi"):
        return []
    try:
        socket.create_connection((CPU_TORCH_HOST, 443), timeout=3).close()
    except OSError:  # pip would retry it for minutes; whatever pip is set up with has to do
        return []
    return ["--extra-index-url", f"https://{CPU_TORCH_HOST}/whl/cpu"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
