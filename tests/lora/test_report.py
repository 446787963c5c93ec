"""What is said of a LoRA file: figures by hand, its metadata, and who reads it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sdlora.errors import WeightsError
from sdlora.lora.change import Change, Factors
from sdlora.lora.formats import convert, save
from sdlora.lora.report import inspect

Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
NORM = "unet.mid_block.resnets.0.norm1"
FACTORS = Factors(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]), 0.5)  # 0.25 * 6 in one corner
SDXL = {"ss_base_model_version": "sdxl_base_v1-0"}


def test_figures_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    whole, norm = Change(weight=torch.full((1, 4), 2.0)), Change(weight=torch.ones(4), bias=torch.ones(4))
    changes = {Q: Change(FACTORS), "unet.conv_out": whole, NORM: norm}
    metadata = SDXL | {
        "modelspec.trigger_phrase": "ohwx cat",
        "ss_resolution": "(512, 512)",
        "ss_tag_frequency": json.dumps({"a": {"cat": 2, "dog": 3}, "b": {"cat": 4}}),
        "modelspec.license": "",
    }
    save(path, changes, 0.5, metadata, family="sdxl", precision="bf16")
    report = inspect(path)
    assert (report.family, report.naming, report.precision, report.size) == ("sdxl", "webui", "bf16", path.stat().st_size)
    layers = {layer.name: layer for layer in report.layers}
    assert (layers[Q].rank, layers[Q].alpha, layers[Q].scale, layers[Q].encoding) == (2, 0.5, 0.25, "lora")
    assert [layers[name].norm for name in (Q, "unet.conv_out", NORM)] == pytest.approx([1.5, 4.0, 2.0])
    assert (report.ranks, report.alphas, report.kinds) == ({2: 1}, {0.5: 1}, {"lora": 1, "diff": 1, "w_norm": 1})
    assert report.about["trigger"] == "ohwx cat" and report.about["resolution"] == "(512, 512)" and "licence" not in report.about
    assert report.tags == (("cat", 6), ("dog", 3)) and report.unread == ()
    assert report.metadata["ss_resolution"] == "(512, 512)"


def told_of(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> str:
    save_file(tensors, path, metadata=metadata or {})
    return "; ".join(inspect(path).readers)


def test_who_reads_what(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    down, up = torch.ones(1, 2), torch.ones(2, 1)
    save(path, {Q: Change(Factors(down, up, 1.0))}, 1.0, SDXL, family="sdxl")
    assert inspect(path).readers == ()
    plain = {"lora_unet_a.lora_down.weight": down, "lora_unet_a.lora_up.weight": up}
    assert told_of(plain, path) == ""
    assert "input" not in told_of(plain | {"lora_unet_a.dora_scale": torch.ones(1, 2)}, path)
    assert "output axis" in told_of(plain | {"lora_unet_a.dora_scale": torch.ones(2, 1)}, path)
    ours, theirs = ({f"lora_unet_{stem}_proj_in.diff": torch.ones(2, 2)} for stem in ("mid_block_attentions_0", "middle_block_1"))
    for tensors, version, told in ((ours, "sd_v1", False), (theirs, "sd_v1", True), (ours, "sdxl_", True), (theirs, "sdxl_", False)):
        assert ("not named as in" in told_of(tensors, path, {"ss_base_model_version": version})) == told
    loha = told_of({f"lora_unet_a.hada_w{n}_{side}": torch.ones(2, 2) for n in (1, 2) for side in "ab"}, path)
    assert "LoHa" in loha and "full deltas" not in loha
    assert "lora_mid" in told_of(plain | {"lora_unet_a.lora_mid.weight": torch.ones(1, 1, 1, 1)}, path)
    assert "time embedding" in told_of({"lora_unet_time_embedding_linear_1.diff": torch.ones(2, 2)}, path)
    convert(path, path, family="sd1")
    save(path, {Q: Change(Factors(down, up, 1.0))}, 1.0, {}, to="diffusers")
    assert "diffusers' own names" in inspect(path).readers[0]


OF_FAMILIES = [("sd1", "text_encoder", 0), ("sdxl", "text_encoder", 0), ("sdxl", "text_encoder_2", 1)]


@pytest.mark.parametrize(("family", "part", "told"), OF_FAMILIES)
def test_a1111_needs_whole_attentions_of_openclip(family: str, part: str, told: int, tmp_path: Path) -> None:
    names = [f"{part}.text_model.encoder.layers.{n}.self_attn.{of}_proj" for n in range(2) for of in ("q", "k", "v", "out")][:-1]
    metadata = SDXL if family == "sdxl" else {"ss_base_model_version": "sd_v1"}
    save(tmp_path / "x.safetensors", {name: Change(FACTORS) for name in names}, 0.5, metadata, family=family)
    lines = inspect(tmp_path / "x.safetensors").readers
    assert len(lines) == told and all("drops 1 attentions" in line for line in lines)


def test_what_is_not_understood_is_listed_beside_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"lora_unet_a.diff": torch.ones(2, 2), "lora_unet_b.lora_up.weight": torch.ones(1, 1), "bundle_emb.x": torch.ones(1)}, path)
    report = inspect(path)
    assert set(report.unread) == {"bundle_emb.x", "lora_unet_b.lora_up.weight"} and [layer.name for layer in report.layers] == ["unet.a"]
    save_file({"model.weight": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match=r"model\.weight"):
        inspect(path)


def test_tags_of_others_may_be_anything(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"a": 1}', '{"a": {"b": "many"}}'):
        save(tmp_path / "x.safetensors", {Q: Change(FACTORS)}, 0.5, {"ss_tag_frequency": text})
        assert inspect(tmp_path / "x.safetensors").tags == ()
