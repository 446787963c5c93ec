"""How the page's child processes run."""

import os
from pathlib import Path

import psutil
import pytest
from sdlora_ui import launch


@pytest.mark.skipif(os.name != "posix", reason="other systems have classes, and no numbers")
def test_a_child_gives_way_to_the_page(tmp_path: Path) -> None:
    process = launch.spawn(["queue", str(tmp_path)], tmp_path / "log.txt")
    assert psutil.Process(process.pid).nice() == min(psutil.Process().nice() + launch.NICE, 19)
    assert process.wait(60) == 0
