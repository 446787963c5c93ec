"""A run is not lost: the figures of kill.py, with few kills, each of which must be whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks and kills")


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """In a process of its own: forks of one that has trained on several threads would hang."""
    path = tmp_path_factory.mktemp("robustness") / "figures.json"
    command = [sys.executable, str(Path(__file__).with_name("kill.py")), "--kills", "20", "--signals", "6", "--json", str(path)]
    subprocess.run(command, check=True)
    found: dict[str, dict[str, float]] = json.loads(path.read_text())
    return found


def test_killed_runs_end_in_the_same_bits_with_no_stray_files(figures: dict[str, dict[str, float]]) -> None:
    of = figures["SIGKILL"]
    assert of["kills"] >= 20 and of["inside a save"] >= of["kills"] / 3
    assert of["bit-identical"] == of["runs"] > 0 and of["stray files"] == of["exports that did not load"] == 0


def test_signals_end_a_run_saved(figures: dict[str, dict[str, float]]) -> None:
    of = figures["signals"]
    assert of["ended with code 0"] == of["signals"] >= 6
    assert of["bit-identical"] == of["runs"] > 0 and of["stray files"] == 0


def test_whichever_call_fails_a_valid_checkpoint_and_export_stay(figures: dict[str, dict[str, float]]) -> None:
    of = figures["failing calls"]
    assert of["a valid checkpoint stays"] == of["calls of a save"] > 20
    assert of["a valid export stays"] == of["calls of an export"] > 4 and of["stray files"] == 0


def test_a_full_disk_is_told_of_waited_for_and_changes_nothing(figures: dict[str, dict[str, float]]) -> None:
    of = figures["full disks"]
    if not of:
        pytest.skip("mounting a small disk is not permitted here")
    assert of["told"] == of["bit-identical"] == of["stages"] == 10 and of["stray files"] == 0


def test_a_damaged_checkpoint_is_passed_over(figures: dict[str, dict[str, float]]) -> None:
    of = figures["corruptions"]
    assert of["the previous one is loaded and the damage told"] == of["corruptions"] >= 200


def test_every_step_is_one_to_go_on_from(figures: dict[str, dict[str, float]]) -> None:
    of = figures["resumed at every step"]
    assert of["bit-identical"] == of["resumes"] == 5
