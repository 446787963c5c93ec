"""The cache from the command line."""

from pathlib import Path

import pytest
import torch

from sdlora.cli import main
from sdlora.data.cache import TensorCache


def test_cache_is_shown_and_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = TensorCache(tmp_path / "latents-1", "mini")
    cache.put("a", {"mean": torch.zeros(512, 1024)})
    cache.flush()
    assert main(["cache", "info", str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{tmp_path}: 2.0 MiB" and told[1].startswith("  latents-1: 1 entries, 2.0 MiB, of mini, last used 20")
    assert main(["cache", "prune", str(tmp_path)]) == 0 and "0 files deleted, 0.0 MiB" in capsys.readouterr().out
    assert main(["cache", "prune", str(tmp_path), "--older-than", "0"]) == 0 and "1 file deleted, 2.0 MiB" in capsys.readouterr().out
    assert main(["cache", "info", str(tmp_path)]) == 0 and capsys.readouterr().out == f"{tmp_path}: 0.0 MiB\n"
    assert main(["cache", "info", str(tmp_path / "nowhere")]) == 2
