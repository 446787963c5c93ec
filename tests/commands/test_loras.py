"""What can be done with one LoRA file from the command line."""

import os
from pathlib import Path

import pytest
import torch

from sdlora.cli import main
from sdlora.lora import lorafile
from sdlora.lora.change import Change, Factors

STEMS = [f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_{of}" for of in "kqv"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Singular values 8, 4, 2, 1 at k, 8, 0, 0, 0 at q, none at v; alpha 2, rank 4."""
    tall, wide = torch.eye(6)[:, :4], torch.eye(4, 5)
    values = [torch.tensor([8.0, 4.0, 2.0, 1.0]), torch.tensor([8.0, 0.0, 0.0, 0.0]), torch.zeros(4)]
    layers = [(stem, Change(Factors(wide, tall * value, 4.0))) for stem, value in zip(STEMS, values, strict=True)]
    lorafile.write(tmp_path / "a.safetensors", layers, 2.0, lambda rank: {"ss_network_dim": str(rank), "ss_seed": "7"})
    return tmp_path / "a.safetensors"


def test_resize_by_rank(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = path.with_name("b.safetensors")
    assert main(["resize", str(path), "--rank", "2", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    # 4 + 1 of 85, and 5 of 85 + 64 in all
    assert f"     2     4  {(5 / 85) ** 0.5:.3%}   unet.mid_block" in told and f"Left out: {(5 / 149) ** 0.5:.3%} of" in told
    file = lorafile.read(out, folded=True)
    assert list(file.stems.values()) == STEMS and file.metadata["ss_network_dim"] == "2" and file.metadata["ss_seed"] == "7"
    deltas = [change.factors.delta() for change in file.changes.values() if change.factors is not None]
    expected = torch.zeros(6, 5)
    expected[0, 0], expected[1, 1] = 8, 4
    torch.testing.assert_close(deltas[0], expected)
    assert not deltas[2].any()


def test_resize_by_energy_and_error(path: Path) -> None:
    # of 85: two ranks keep 94 %, three keep 98.8 %, at an error of 10.8 %
    for number, (option, value, ranks) in enumerate((("--kept-energy", "0.94", [2, 1, 1]), ("--max-error", "0.11", [3, 1, 1]))):
        out = path.with_name(f"{number}.safetensors")
        assert main(["resize", str(path), option, value, "--out", str(out)]) == 0
        file = lorafile.read(out, folded=True)
        assert [change.factors.down.shape[0] for change in file.changes.values() if change.factors is not None] == ranks
        assert {change.factors.alpha for change in file.changes.values() if change.factors is not None} == {4.0}


def test_resize_to_all_it_has_changes_nothing(path: Path) -> None:
    out = path.with_name("b.safetensors")
    assert main(["resize", str(path), "--rank", "64", "--out", str(out)]) == 0
    before, after = lorafile.read(path, folded=True), lorafile.read(out, folded=True)
    for name, change in before.changes.items():
        assert change.factors is not None and after.changes[name].factors is not None
        torch.testing.assert_close(after.changes[name].factors.delta(), change.factors.delta(), rtol=1e-6, atol=1e-6)  # type: ignore


def test_a_full_disk_is_one_line_and_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    out = path.with_name("b.safetensors")
    assert main(["resize", str(path), "--rank", "2", "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"sdlora: --out: cannot write {out}: No space left on device.\n"
    assert os.listdir(path.parent) == [path.name]
