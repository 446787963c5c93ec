"""LoRAs folded into checkpoints of every family: the formula for each module, and not a byte more."""

import json
import math
from pathlib import Path

import pytest
import torch
from originals import build_original
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import build_model
from torch import Tensor

from sdlora.errors import WeightsError
from sdlora.lora.change import Change, Factors
from sdlora.lora.checkpoints import Checkpoint, open_checkpoint
from sdlora.lora.merge import MERGED, Source, changed_parameters, merge
from sdlora.lora.targets import selects
from sdlora.tensors import read_header

FAMILIES = ["sd1", "sd2", "sdxl"]


def random_lora(checkpoint: Checkpoint, seed: int, rank: int = 2, alpha: float = 3.0) -> dict[str, Change]:
    """Of every matrix but token and position embeddings."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for module in checkpoint.modules():
        shape = checkpoint.shape(f"{module}.weight")
        if len(shape) > 1 and "embeddings." not in module:
            down, up = torch.randn(rank, *shape[1:], generator=generator), torch.randn(shape[0], rank, generator=generator)
            found[module] = Change(Factors(down, up.view(*up.shape, *[1] * (len(shape) - 2)), alpha))
    return found


def strengths(changes: dict[str, Change], value: float) -> dict[str, float]:
    return dict.fromkeys(changes, value)


def merged_parameters(path: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.places}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_module_gets_its_delta_and_nothing_else_moves(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    original = build_original(tmp_path / "a.safetensors", family, dtype)
    checkpoint = open_checkpoint(original.path)
    lora = random_lora(checkpoint, 1)
    target = tmp_path / "b.safetensors"
    sizes = merge(checkpoint, [Source("x", lora, strengths(lora, 0.7))], target, [{"lora": "x"}])
    after = merged_parameters(target)
    for name, before in original.parameters.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in lora:
            factors = lora[module].factors
            assert factors is not None
            product = torch.einsum("or,ri->oi", factors.up.flatten(1).double(), factors.down.flatten(1).double()).view(before.shape)
            expected = before.double() + 0.7 * 3.0 / 2 * product
            # rounded once: as near as its dtype can be, with a little room for fp32's own sums
            torch.testing.assert_close(after[name].double(), expected, rtol=torch.finfo(dtype).eps * 0.51 + 1e-6, atol=1e-6)
        else:
            assert torch.equal(after[name], before), name
    rest = set(original.tensors) - {checkpoint.places[f"{module}.weight"].key for module in lora}
    read, whole = load_file(target), read_header(target)
    assert all(torch.equal(read[key], original.tensors[key]) for key in rest) and len(rest) > 20
    assert list(whole.entries.items()) == list(read_header(original.path).entries.items())
    assert whole.metadata["note"] == "of the base" and json.loads(whole.metadata[MERGED]) == [{"lora": "x"}]
    assert {module.partition(".")[0] for module in lora} == set(sizes)
    names = [f"{module}.weight" for module in lora if module.startswith("unet.")]
    added = math.fsum(float((after[name].float() - original.parameters[name].float()).square().sum()) for name in names)
    assert sizes["unet"].added == pytest.approx(added, rel=1e-2)


def test_every_layer_that_a_lora_can_adapt_is_there(tmp_path: Path) -> None:
    """Counted by hand: per transformer block 10 matrices, and so on."""
    modules = random_lora(open_checkpoint(build_original(tmp_path / "a.safetensors", "sdxl").path), 0)
    groups = {"attention": 8, "feed_forward": 2}  # of a transformer block
    blocks = 2 * (2 + 3) + 2  # of two blocks down, three up, one in the middle, two deep each
    for group, number in groups.items():
        assert sum(selects(f"unet.{group}", name) for name in modules) == number * blocks
        assert sum(selects(f"text_encoder.{group}", name) for name in modules) == 2 * (4 if group == "attention" else 2)
        assert sum(selects(f"text_encoder_2.{group}", name) for name in modules) == 2 * (4 if group == "attention" else 2)
    assert "text_encoder_2.text_projection" in modules and "unet.up_blocks.0.upsamplers.0.conv" in modules


def test_loras_follow_each_other_and_strengths_are_their_own(tmp_path: Path) -> None:
    original = build_original(tmp_path / "a.safetensors", "sd2")
    checkpoint = open_checkpoint(original.path)
    one, two = random_lora(checkpoint, 1), random_lora(checkpoint, 2, rank=3)
    by_block = {module: 0.0 if selects("mid", module) else 0.5 for module in one}
    merge(checkpoint, [Source("one", one, by_block), Source("two", two, strengths(two, -1.0))], tmp_path / "b.safetensors", [])
    for name, tensor in merged_parameters(tmp_path / "b.safetensors").items():
        module, before = name.removesuffix(".weight"), original.parameters[name]
        if module in one:
            expected = before + by_block[module] * one[module].delta(before) - two[module].delta(before)
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)
    nothing = Source("one", one, strengths(one, 0.0))
    assert changed_parameters(checkpoint, [nothing]) == []


def test_dora_biases_and_norms_of_a_third_of_a_matrix(tmp_path: Path) -> None:
    original = build_original(tmp_path / "a.safetensors", "sd2")
    checkpoint = open_checkpoint(original.path)
    attention, norm = "text_encoder.text_model.encoder.layers.0.self_attn.", "text_encoder.text_model.encoder.layers.1.layer_norm2"
    factors = random_lora(checkpoint, 3)[f"{attention}k_proj"].factors
    changes = {
        f"{attention}k_proj": Change(factors, dora_scale=torch.full((1, 8), 0.3), bias=torch.arange(8.0)),
        f"{attention}v_proj": Change(bias=torch.ones(8)),
        norm: Change(weight=torch.full((8,), 2.0), bias=torch.full((8,), -1.0)),
    }
    merge(checkpoint, [Source("x", changes, strengths(changes, 0.5))], tmp_path / "b.safetensors", [])
    before, after = original.parameters, merged_parameters(tmp_path / "b.safetensors")
    columns = (after[f"{attention}k_proj.weight"] * 2 - before[f"{attention}k_proj.weight"]).norm(dim=0)
    torch.testing.assert_close(columns, torch.full((8,), 0.3))  # of the weight at full strength
    moved = {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}
    assert moved.keys() == {f"{attention}k_proj.weight", *(f"{attention}{of}_proj.bias" for of in "kv"), f"{norm}.weight", f"{norm}.bias"}
    torch.testing.assert_close(moved[f"{attention}k_proj.bias"], 0.5 * torch.arange(8.0))
    torch.testing.assert_close(moved[f"{norm}.weight"], torch.ones(8))


def test_a_folder_is_copied_with_its_changed_weights(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "tiny")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"the old weights")
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"of a part that stays")
    checkpoint = open_checkpoint(folder)
    lora = {module: change for module, change in random_lora(checkpoint, 1).items() if module.startswith("unet.")}
    merge(checkpoint, [Source("x", lora, strengths(lora, 2.0))], tmp_path / "merged", [{"lora": "x"}])
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    copied = {path.relative_to(tmp_path / "merged") for path in (tmp_path / "merged").rglob("*") if path.is_file()}
    assert files - copied == {Path("unet/diffusion_pytorch_model.fp16.safetensors")} and not copied - files
    weights = Path("unet/diffusion_pytorch_model.safetensors")
    assert all((folder / path).read_bytes() == (tmp_path / "merged" / path).read_bytes() for path in copied - {weights})
    after = merged_parameters(tmp_path / "merged")
    for module, change in lora.items():
        base = checkpoint.read(f"{module}.weight")
        torch.testing.assert_close(after[f"{module}.weight"], base + 2 * change.delta(base), rtol=1e-6, atol=1e-6)
    with safe_open(tmp_path / "merged" / weights, "pt") as file:
        assert json.loads(file.metadata()[MERGED]) == [{"lora": "x"}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "tiny"]


def test_a_second_merge_is_noted_behind_the_first(tmp_path: Path) -> None:
    path = build_original(tmp_path / "0.safetensors", "sd1").path
    for number in range(2):
        checkpoint = open_checkpoint(path)
        lora = random_lora(checkpoint, 1)
        path = tmp_path / f"{number + 1}.safetensors"
        merge(checkpoint, [Source("x", lora, strengths(lora, 0.01))], path, [{"lora": number}])
    assert json.loads(read_header(path).metadata[MERGED]) == [{"lora": 0}, {"lora": 1}]


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build_original(tmp_path / "a.safetensors", "sd1", torch.float16).path)
    plain = Factors(torch.ones(1, 8), torch.ones(8, 1), 1.0)
    for module, said in (("unet.nowhere", "changes unet.nowhere, which"), ("unet.conv_in", "unet.conv_in has another shape")):
        with pytest.raises(WeightsError, match=said):
            merge(checkpoint, [Source("x", {module: Change(plain)}, {module: 1.0})], tmp_path / "b.safetensors", [])
    module = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    with pytest.raises(WeightsError, match=r"not finite in torch\.float16: merge with smaller strengths"):
        merge(checkpoint, [Source("x", {module: Change(plain)}, {module: 1e6})], tmp_path / "b.safetensors", [])
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
