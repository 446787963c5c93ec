"""The command line as a user meets it first: help at once, and one clear line with exit code 2 for what is wrong."""

import resource
import subprocess
import sys

import pytest

from sdlora.cli import main, pairs
from sdlora.errors import ConfigError


def test_help_needs_no_torch_and_half_a_second() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = subprocess.run([sys.executable, "-m", "sdlora", "--help"], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert told.returncode == 0 and "train" in told.stdout
    # a bound on work, not a race: importing torch alone takes over a second of CPU
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.9
    code = "import sys; from sdlora.cli import main; main(['options']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("words", [["--help"], ["train", "--rnk", "3"]])
def test_help_and_a_mistyped_option_load_and_build_only_what_they_need(words: list[str]) -> None:
    """pydantic.plugin._loader comes with the first validator that pydantic builds: that takes as long as all else."""
    late = ["PIL", "psutil", "pydantic.plugin._loader", "tomlkit", "torch"]
    code = f"""if True:
        import contextlib, sys
        from sdlora.cli import main
        with contextlib.suppress(SystemExit):
            main({words})
        print([name for name in {late} if name in sys.modules])"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines()[-1] == "[]"


def test_flags() -> None:
    assert pairs(["--a.b", "1", "--c=x=y"]) == [("a.b", "1"), ("c", "x=y")]
    with pytest.raises(ConfigError, match="needs a value"):
        pairs(["--steps"])


def test_a_command_that_takes_no_options_names_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options", "--steps", "3"]) == 2
    assert capsys.readouterr().err == "sdlora: --steps is not an option of this command; see `sdlora --help`.\n"
