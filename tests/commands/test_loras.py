"""What can be done with one LoRA file from the command line."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sdlora.cli import main
from sdlora.lora import formats, lorafile
from sdlora.lora.change import Change, Factors

NAMES = [f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_{of}" for of in "kqv"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Singular values 8, 4, 2, 1 at k, 8, 0, 0, 0 at q, none at v; alpha 2, rank 4."""
    tall, wide = torch.eye(6)[:, :4], torch.eye(4, 5)
    values = [torch.tensor([8.0, 4.0, 2.0, 1.0]), torch.tensor([8.0, 0.0, 0.0, 0.0]), torch.zeros(4)]
    layers = [(name, Change(Factors(wide, tall * value, 4.0))) for name, value in zip(NAMES, values, strict=True)]
    lorafile.write(tmp_path / "a.safetensors", layers, "sd1", 2.0, lambda rank: {"ss_network_dim": str(rank), "ss_seed": "7"})
    return tmp_path / "a.safetensors"


def test_resize_by_rank(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = path.with_name("b.safetensors")
    assert main(["resize", str(path), "--rank", "2", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    # 4 + 1 of 85, and 5 of 85 + 64 in all
    assert f"     2     4  {(5 / 85) ** 0.5:.3%}   unet.mid_block" in told and f"Left out: {(5 / 149) ** 0.5:.3%} of" in told
    changes, metadata = formats.load(out)
    assert list(changes) == NAMES and metadata["ss_network_dim"] == "2" and metadata["ss_seed"] == "7"
    deltas = [change.factors.delta() for change in changes.values() if change.factors is not None]
    expected = torch.zeros(6, 5)
    expected[0, 0], expected[1, 1] = 8, 4
    torch.testing.assert_close(deltas[0], expected)
    assert not deltas[2].any()


def test_resize_by_energy_and_error(path: Path) -> None:
    # of 85: two ranks keep 94 %, three keep 98.8 %, at an error of 10.8 %
    for number, (option, value, ranks) in enumerate((("--kept-energy", "0.94", [2, 1, 1]), ("--max-error", "0.11", [3, 1, 1]))):
        out = path.with_name(f"{number}.safetensors")
        assert main(["resize", str(path), option, value, "--out", str(out)]) == 0
        factors = [change.factors for change in formats.load(out)[0].values() if change.factors is not None]
        assert [of.down.shape[0] for of in factors] == ranks and {of.alpha for of in factors} == {4.0}


def test_resize_to_all_it_has_changes_nothing(path: Path) -> None:
    out = path.with_name("b.safetensors")
    assert main(["resize", str(path), "--rank", "64", "--out", str(out)]) == 0
    before, after = formats.load(path)[0], formats.load(out)[0]
    for name, change in before.items():
        assert change.factors is not None and after[name].factors is not None
        torch.testing.assert_close(after[name].factors.delta(), change.factors.delta(), rtol=1e-6, atol=1e-6)  # type: ignore


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


def test_inspect_tells_what_is_in_a_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(path), "--layers", "--metadata"]) == 0
    told = capsys.readouterr().out
    assert f"{path}: 0.0 MiB, fp32, " in told and "3 layers: 3 lora\n  ranks: 4 (3)\n  alphas: 2 (3)\n" in told
    assert f"     4        2 {85**0.5:10.4g}   {NAMES[0]}\n" in told and "  ss_seed = 7\n" in told
    full = path.with_name("full.safetensors")
    formats.save(full, {NAMES[0]: Change(weight=torch.ones(2, 2))}, 1.0, {})
    assert main(["inspect", str(full)]) == 0
    told = capsys.readouterr().out
    assert "1 layers: 1 diff\n" in told and "\nNote: full deltas are right in ComfyUI" in told and "ss_seed" not in told
    assert main(["inspect", str(path.with_name("nowhere.safetensors"))]) == 2


def test_inspect_tells_programs_all_of_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learned = path.with_name("learned.safetensors")
    metadata = {"ss_seed": "7", "sdlora_learned_alphas": json.dumps({NAMES[0]: 3.5, "elsewhere": 1.0})}
    formats.save(learned, formats.load(path)[0], 1.0, metadata)
    assert main(["inspect", str(learned), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told["metadata"]["ss_seed"] == "7" and [layer["name"] for layer in told["layers"]] == sorted(NAMES)
    assert told["learned_alphas"] == {NAMES[0]: 3.5} and told["layers"][0]["norm"] > 0


def test_convert(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = path.with_name("b.safetensors")
    command = ["convert", str(path), "--to", "diffusers", "--precision", "bf16", "--family", "sd1", "--out", str(out)]
    said = f"{len(NAMES)} layers of sd1 as diffusers names them, bf16, the scale in the matrices\n"
    assert main([*command, "--dry-run"]) == 0 and not out.exists()
    assert capsys.readouterr().out == said + f"Nothing written: {out} was a dry run\n"
    assert main(command) == 0
    assert capsys.readouterr().out == said + f"Written: {out}, 0.0 MiB\n"
    with safe_open(out, "pt") as file:
        assert set(file.keys()) == {f"{name}.lora_{side}.weight" for name in NAMES for side in "AB"}
        assert file.get_tensor(f"{NAMES[0]}.lora_A.weight").dtype == torch.bfloat16
    assert main(["convert", str(path), "--out", str(out)]) == 2 and "exists" in capsys.readouterr().err
