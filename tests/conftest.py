"""For every test: two threads, so that figures and times do not depend on the machine; and no network."""

from __future__ import annotations

import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read when torch is first imported
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def torch_threads() -> None:
    """For tests whose modules imported torch; the others should not pay for it."""
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
