"""What can be done with one LoRA file from the command line."""

import json
import os
from pathlib import Path

import pytest
import torch
from originals import build_original
from PIL import Image
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
    assert told["blocks"] == {"mid": sorted(NAMES)}


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


def test_what_a_lora_does_to_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = build_original(tmp_path / "base.safetensors", "sd1")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    u = torch.linalg.svd(base.parameters[f"{name}.weight"]).U
    even = u.sum(dim=1) / len(u) ** 0.5  # equally far from all of the base's
    layers = [(name, Change(Factors(even[None], 50 * even[:, None], 1.0)))]
    lorafile.write(tmp_path / "a.safetensors", layers, "sd1", 1.0, lambda rank: {})
    command = ["inspect", str(tmp_path / "a.safetensors"), "--base", str(base.path), "--cache", str(tmp_path / "cache")]
    assert main([*command, "--plot", str(tmp_path / "all.png")]) == 0
    told = capsys.readouterr().out
    assert "like any of the base's): 1 in 1 layers, 1.00 a layer\n  mid          1 in   1 layers  ####\n      1  " + name in told
    assert f"Picture: {tmp_path / 'all.png'}" in told
    assert main([*command, "--threshold", "0.01"]) == 0 and "): 0 in 1 layers" in capsys.readouterr().out
    assert main([*command, "--layer", name, "--plot", str(tmp_path / "one.png")]) == 0
    capsys.readouterr()
    with Image.open(tmp_path / "all.png") as every, Image.open(tmp_path / "one.png") as one:
        assert every.size != one.size
    for wrong, said in (
        (["--layer", "unet.x", "--plot", "x.png"], "the file has no unet.x"),
        (["--layer", name], "say where, with --plot"),
        (["--base", str(tmp_path / "none.safetensors")], "There is no file"),
    ):
        assert main([*command, *wrong]) == 2 and said in capsys.readouterr().err
    assert main([*command[:2], "--plot", "x.png"]) == 2 and "name one with --base" in capsys.readouterr().err


def test_repair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = build_original(tmp_path / "base.safetensors", "sd1")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = base.parameters[f"{name}.weight"]
    u = torch.linalg.svd(weight).U
    even = u.sum(dim=1) / len(u) ** 0.5
    layers = [(name, Change(Factors(even[None], 50 * even[:, None], 1.0)))]
    file, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    lorafile.write(file, layers, "sd1", 1.0, lambda rank: {"ss_seed": "7"})
    command = ["repair", str(file), "--base", str(base.path), "--cache", str(tmp_path / "cache"), "--scale", "0.1", "--out"]
    assert main([*command, str(out), "--dry-run"]) == 0 and not out.exists()
    said = "1 intruder dimensions in 1 of 1 layers, each scaled by 0.1\n"
    assert capsys.readouterr().out == said + f"Nothing written: {out} was a dry run\n"
    assert main([*command, str(out)]) == 0
    (change,), metadata = list(formats.load(out)[0].values()), formats.load(out)[1]
    assert change.factors is not None and change.factors.down.shape[0] == 2 and metadata["ss_network_dim"] == "2"
    assert json.loads(metadata["sdlora_repaired"])["scale"] == 0.1 and metadata["ss_seed"] == "7"
    values = [torch.linalg.svdvals(weight + of.delta(weight)) for of in (layers[0][1], change)]
    torch.testing.assert_close(values[1].sort().values, (values[0] * torch.tensor([0.1] + [1.0] * (len(u) - 1))).sort().values)

    assert main([*command, str(tmp_path / "c.safetensors"), "--rank", "1"]) == 0
    assert "Left out: " in capsys.readouterr().out
    for wrong, error in ((["--scale", "2"], "from 0, which"), (["--method", "threshold", "--rank", "2"], "finds each layer's rank itself")):
        assert main([*command, str(tmp_path / "d.safetensors"), *wrong]) == 2 and error in capsys.readouterr().err
    assert main(["repair", str(file), "--out", str(tmp_path / "d.safetensors")]) == 2 and "--base: name" in capsys.readouterr().err


def test_repair_by_threshold(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = path.with_name("b.safetensors")
    assert main(["repair", str(path), "--method", "threshold", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    # 8, 4, 2, 1: the median of four is the lower middle, 2, and omega(4 / 6) 2.4; 8, 0, 0, 0: all that is not zero stays
    assert f"     1     4  {(21 / 85) ** 0.5:.3%}   {NAMES[0]}" in told and f"     1     4   0.000%   {NAMES[1]}" in told
    assert f"Left out, as noise could make all of it: {NAMES[2]} (1)" in told
    assert len(formats.load(out)[0]) == 2


def test_drift_and_leakage(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, said = tmp_path / "a.safetensors", tmp_path / "said.txt"
    text = Change(Factors(torch.ones(1, 16), 0.1 * torch.ones(16, 1), 1.0))
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tags = json.dumps({"set": {"cat": 3, "a cat": 1}})
    lorafile.write(file, [(layer, text)], "sd1", 1.0, lambda rank: {"ss_tag_frequency": tags})
    said.write_text("# of ours\na dog\n")
    command = ["inspect", str(file), "--base", str(place / "tiny"), "--device", "cpu", "--prompts", str(said), "--class-noun", "cat"]
    assert main([*command, "--drift", "--plot", str(tmp_path / "drift.png")]) == 0
    told = capsys.readouterr().out
    groups = ["trained for", "class noun", "to be left alone"]
    assert [line.split("%")[-1].strip() for line in told.splitlines() if line.endswith(tuple(groups))] == groups
    assert main([*command, "--leakage", "--plot", str(tmp_path / "leakage.png")]) == 0
    told = capsys.readouterr().out
    for line in (
        "trained for: cat",
        "trained for: a cat",
        "class noun: cat",
        "to be left alone: a dog",
        "Of the class noun: ",
        "Leakage: ",
    ):
        assert line in told
    assert (tmp_path / "drift.png").exists() and (tmp_path / "leakage.png").exists()
    for wrong, error in (
        (["--layer", layer, "--plot", "x.png"], "is for intruder dimensions"),
        (["--leakage", "--plot", "x.png"], "one pic"),
    ):
        assert main([*command, "--drift", *wrong]) == 2 and error in capsys.readouterr().err
    lorafile.write(file, [(layer, text)], "sd1", 1.0, lambda rank: {})
    assert main([*command, "--leakage"]) == 2 and "--trigger: say a prompt" in capsys.readouterr().err
