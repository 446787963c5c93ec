"""Merging and extracting from the command line, on files of every family."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from originals import build_original
from safetensors.torch import load_file, save_file
from spellings import spellings
from torch import Tensor

from sdlora.cli import main
from sdlora.lora import formats
from sdlora.lora.change import Change, Factors
from sdlora.lora.checkpoints import open_checkpoint
from sdlora.tensors import read_header

FAMILIES = ["sd1", "sd2", "sdxl"]
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> list[str]:
        assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out.splitlines()

    return call


def save_lora(path: str, family: str, base: str, seed: int, rank: int = 2, stem: Callable[[str], str] | None = None) -> None:
    """Of every matrix; `stem`: how its layers are called."""
    checkpoint, generator = open_checkpoint(Path(base)), torch.Generator().manual_seed(seed)
    changes = {}
    for module in checkpoint.modules():
        shape = checkpoint.shape(f"{module}.weight")
        if len(shape) > 1 and "embeddings." not in module:
            down, up = torch.randn(rank, *shape[1:], generator=generator), torch.randn(shape[0], rank, generator=generator)
            changes[module] = Change(Factors(down, up.view(*up.shape, *[1] * (len(shape) - 2)), 3.0))
    metadata = {"ss_base_model_version": VERSIONS[family], "ss_clip_skip": "2", "own": str(seed)}
    if stem is None:
        formats.save(Path(path), changes, 3.0, metadata, family=family)
    else:
        tensors = {}
        for module, change in changes.items():
            factors = change.factors
            assert factors is not None
            tensors |= {f"{stem(module)}.lora_down.weight": factors.down, f"{stem(module)}.lora_up.weight": factors.up}
            tensors[f"{stem(module)}.alpha"] = torch.tensor(factors.alpha)
        save_file(tensors, path, metadata)


def other_stem(family: str, name: str) -> str:
    """As no WebUI spells it."""
    return spellings(name, family)[-1]


def weights(path: str) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(Path(path))
    return {name: checkpoint.read(name) for name in checkpoint.places}


def near(one: str, other: str, tolerance: float = 1e-5) -> bool:
    first, second = weights(one), weights(other)
    return all(torch.allclose(first[name], second[name], rtol=0, atol=tolerance) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_file_of_two_is_both(family: str, run: Callable[..., list[str]]) -> None:
    build_original(Path("base.safetensors"), family)
    save_lora("a.safetensors", family, "base.safetensors", 1)
    save_lora("b.safetensors", family, "base.safetensors", 2, rank=3, stem=partial(other_stem, family))
    loras = ["--lora", "a.safetensors:0.5,mid=0", "--lora", "b.safetensors:-1"]
    told = run("merge", "--base", "base.safetensors", *loras, "--out", "both.safetensors")
    assert any("LoRA: a.safetensors, " in line and " at 0.5, " in line and line.endswith(" at 0") for line in told)
    assert told[-1].startswith("Written: both.safetensors, ")
    noted = json.loads(read_header(Path("both.safetensors")).metadata["sdlora_merged"])
    assert noted[0]["strengths"] == {"mid": 0.0} and noted[1]["strength"] == -1 and len(noted[0]["hash"]) == 64

    run("merge", *loras, "--out", "joined.safetensors")
    run("merge", "--base", "base.safetensors", "--lora", "joined.safetensors", "--out", "through.safetensors")
    assert near("both.safetensors", "through.safetensors") and not near("both.safetensors", "base.safetensors", 0.1)
    tensors, metadata = load_file("joined.safetensors"), read_header(Path("joined.safetensors")).metadata
    assert len({float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}) == 1
    assert tensors.keys() == load_file("a.safetensors").keys()  # by the family's own names
    assert metadata["ss_network_dim"] == "5" and metadata["ss_clip_skip"] == "2" and "own" not in metadata
    assert [of["lora"] for of in json.loads(metadata["sdlora_joined"])["loras"]] == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_folded_in_can_be_taken_out(family: str, run: Callable[..., list[str]]) -> None:
    build_original(Path("base.safetensors"), family)
    save_lora("a.safetensors", family, "base.safetensors", 1)
    run("merge", "--base", "base.safetensors", "--lora", "a.safetensors", "--out", "tuned.safetensors")
    arguments = ["--base", "base.safetensors", "--tuned", "tuned.safetensors", "--layers", "everything", "--out", "out.safetensors"]
    told = run("extract", *arguments, "--rank", 2)
    assert any(line.startswith("Left out: 0.000%") for line in told), told[-5:]
    before, after = (formats.load(Path(name))[0] for name in ("a.safetensors", "out.safetensors"))
    assert after.keys() == before.keys()
    for stem, change in before.items():
        assert change.factors is not None and after[stem].factors is not None
        torch.testing.assert_close(after[stem].factors.delta(), change.factors.delta(), rtol=0, atol=1e-4)  # type: ignore
    metadata = read_header(Path("out.safetensors")).metadata
    assert metadata["ss_base_model_version"] == VERSIONS[family] and metadata["ss_network_dim"] == "2"
    assert ("modelspec.architecture" in metadata) == (family != "sd2")  # of which it is not known what it predicts
    part = run("extract", *arguments[:4], "--layers", "mid", "--max-error", 0.5, "--out", "mid.safetensors")
    assert "Not in these layers: 0 that hardly differ" in part[-2] and "of the whole difference" in part[-2]


def test_a_dry_run_tells_the_same_and_writes_nothing(tmp_path: Path, run: Callable[..., list[str]]) -> None:
    build_original(Path("base.safetensors"), "sd1")
    for seed, name in enumerate(("a", "b")):
        save_lora(f"{name}.safetensors", "sd1", "base.safetensors", seed)
    run("merge", "--base", "base.safetensors", "--lora", "a.safetensors", "--out", "tuned.safetensors")
    before = sorted(tmp_path.iterdir())
    loras = ["--lora", "a.safetensors", "--lora", "b.safetensors"]
    for command in (
        ["merge", "--base", "base.safetensors", *loras],
        ["merge", *loras, "--rank", "1", "--dare", "0.5", "--ties", "0.5", "--seed", "3"],
        ["extract", "--base", "base.safetensors", "--tuned", "tuned.safetensors", "--kept-energy", "0.9"],
        ["resize", "a.safetensors", "--rank", "1"],
    ):
        dry = run(*command, "--out", "out.safetensors", "--dry-run")
        assert sorted(tmp_path.iterdir()) == before and dry[-1] == "Nothing written: out.safetensors was a dry run"
        told = run(*command, "--out", "out.safetensors")
        assert [line for line in told[:-1] if "moved by" not in line] == dry[:-1]
        Path("out.safetensors").unlink()


def test_thinning_needs_a_limit_and_follows_its_seed(run: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    build_original(Path("base.safetensors"), "sd1")
    for seed, name in enumerate(("a", "b")):
        save_lora(f"{name}.safetensors", "sd1", "base.safetensors", seed)
    join = ["merge", "--lora", "a.safetensors", "--lora", "b.safetensors", "--dare", "0.5"]
    assert main([*join, "--out", "out.safetensors"]) == 2 and "say what to keep of it" in capsys.readouterr().err
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        run(*join, "--rank", 4, "--seed", seed, "--out", f"{name}.safetensors")
    one, same, other = (load_file(f"{name}.safetensors") for name in ("one", "same", "other"))
    assert all(torch.equal(one[key], same[key]) for key in one) and not all(torch.equal(one[key], other[key]) for key in one)


def test_what_cannot_be_is_one_line(run: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    build_original(Path("base.safetensors"), "sd1")
    build_original(Path("xl.safetensors"), "sdxl")
    save_lora("a.safetensors", "sd1", "base.safetensors", 1)
    save_lora("b.safetensors", "sdxl", "xl.safetensors", 1)
    down, up = torch.ones(1, 8), torch.ones(8, 1)
    stem = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    dora = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.dora_scale": torch.ones(1, 8)}
    save_file(dora, "dora.safetensors")
    save_file({"first.lora_down.weight": down, "first.lora_up.weight": up}, "foreign.safetensors")
    base, out = ["--base", "base.safetensors"], ["--out", "out.safetensors"]
    for arguments, said in (
        (["merge", *base, "--lora", "a.safetensors", "--out", "a.safetensors"], "--out: a.safetensors exists"),
        (["merge", *base, "--lora", "a.safetensors", "--out", "nowhere/a.safetensors"], "there is no folder nowhere"),
        (["merge", *base, "--lora", "a.safetensors", "--out", "a.ckpt"], "must end in .safetensors"),
        (["merge", *base, "--lora", "a.safetensors", "--rank", "3", *out], "--rank is for LoRAs that become one file"),
        (["merge", *base, "--lora", "a.safetensors:down.9=0", *out], "'down.9' matches no"),
        (["merge", *base, "--lora", "nowhere.safetensors", *out], "no file nowhere.safetensors"),
        (["merge", "--lora", "a.safetensors", "--lora", "b.safetensors", *out], "cannot become one file"),
        (["merge", "--lora", "dora.safetensors", *out], "is a DoRA"),
        (["merge", "--lora", "foreign.safetensors", *out], "is not a LoRA that is understood"),
        (["extract", *base, "--tuned", "base.safetensors", *out], "Say how much of the difference"),
        (["extract", *base, "--tuned", "base.safetensors", "--rank", "2", *out], "there is nothing to extract"),
        (["resize", "a.safetensors", *out], "Say how much to keep"),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
        assert not Path("out.safetensors").exists()
    run("merge", *base, "--lora", "dora.safetensors", *out)
