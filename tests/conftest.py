"""For every test: two threads, so that figures and times do not depend on the machine; and no network, in child processes neither."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read when torch is first imported
os.environ["HF_HUB_OFFLINE"] = "1"

OFFLINE = Path(__file__).parent / "offline"
LOOK_UPS = Path(tempfile.mkstemp(prefix="look-ups-")[1])
os.environ["SDLORA_LOOK_UPS"] = str(LOOK_UPS)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))
_found = spec_from_file_location("offline", OFFLINE / "sitecustomize.py")
assert _found is not None and _found.loader is not None
_found.loader.exec_module(module_from_spec(_found))


@pytest.fixture(scope="session", autouse=True)
def torch_threads() -> None:
    """For tests whose modules imported torch; the others should not pay for it."""
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session", autouse=True)
def no_look_ups() -> Iterator[None]:
    """Of other machines, by any process of the whole suite: some libraries hide that one failed."""
    yield
    told = LOOK_UPS.read_text(encoding="utf-8")
    LOOK_UPS.unlink()
    assert told == ""
