"""LoRA files: round trips, the readers' formula, metadata, refusal of what is broken."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sdlora.errors import TrainingError, WeightsError
from sdlora.lora.change import Change, Factors
from sdlora.lora.formats import load, merge, save, to_tensors, webui_name
from sdlora.lora.metadata import kohya_metadata

LAYER = "unet.mid_block.attentions.0.proj_in"


class Toy(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.mid_block = nn.Module()
        self.mid_block.attentions = nn.ModuleList([nn.Module()])
        self.mid_block.attentions[0].proj_in = base


def test_names() -> None:
    assert webui_name(LAYER) == "lora_unet_mid_block_attentions_0_proj_in"
    name = "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"
    assert webui_name(name) == "lora_te_text_model_encoder_layers_3_self_attn_q_proj"


def test_round_trip_keys_and_hash(tmp_path: Path) -> None:
    factors = Factors(torch.randn(2, 4, 3, 3), torch.randn(5, 2, 1, 1), 1.25)
    path = tmp_path / "x.safetensors"
    save(path, {LAYER: Change(factors)}, 1.25, {"ss_network_dim": "2"})
    read, metadata = load(path)
    assert list(read) == [webui_name(LAYER)]
    found = read[webui_name(LAYER)].factors
    assert found is not None and torch.equal(found.down, factors.down) and found.alpha == 1.25
    with safe_open(path, "pt") as file:
        assert file.get_tensor(f"{webui_name(LAYER)}.alpha").shape == ()
    data = path.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert os.name != "posix" or path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_one_alpha_for_all_layers_and_the_same_product() -> None:
    """diffusers applies one alpha to all layers of a kind, so files hold one: the rest of the scale goes into up."""
    learned = {"unet.a": Factors(torch.ones(2, 3), torch.ones(4, 2), 3.0), "unet.b": Factors(torch.ones(2, 3), torch.ones(4, 2), -1.0)}
    tensors = to_tensors({name: Change(factors) for name, factors in learned.items()}, 2.0)
    for name, (down, up, alpha) in learned.items():
        key = webui_name(name)
        assert float(tensors[f"{key}.alpha"]) == 2.0
        written = 2.0 / 2 * tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
        torch.testing.assert_close(written, alpha / 2 * up @ down)


def test_merge_applies_the_readers_formula() -> None:
    base = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(base.weight)
    changes = {webui_name(LAYER): Change(Factors(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), 0.5))}
    merge({"unet": Toy(base)}, changes, strength=2.0)
    assert base.weight.tolist() == [[3.0, 6.0], [4.0, 8.0]]


def test_missing_alpha_means_scale_one(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({f"{webui_name(LAYER)}.lora_down.weight": torch.ones(4, 2), f"{webui_name(LAYER)}.lora_up.weight": torch.ones(3, 4)}, path)
    assert load(path)[0][webui_name(LAYER)].factors.alpha == 4  # type: ignore[union-attr]


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(TrainingError, match="not finite"):
        save(path, {LAYER: Change(Factors(torch.full((1, 2), float("nan")), torch.ones(2, 1), 1.0))}, 1.0, {})
    assert not path.exists()
    with pytest.raises(WeightsError, match="no file"):
        load(path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(WeightsError, match="not a readable"):
        load(path)
    save_file({"model.weight": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match="not a LoRA"):
        load(path)
    with pytest.raises(WeightsError, match="lacks"):
        merge({"unet": Toy(nn.Linear(2, 2))}, {"lora_unet_nowhere": Change(Factors(torch.ones(1, 2), torch.ones(2, 1), 1.0))})
    with pytest.raises(WeightsError, match="shape"):
        merge({"unet": Toy(nn.Linear(2, 2))}, {webui_name(LAYER): Change(Factors(torch.ones(1, 3), torch.ones(2, 1), 1.0))})


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    parts, key = {"unet": Toy(nn.Linear(3, 2))}, webui_name(LAYER)
    matrices = Factors(torch.ones(1, 3), torch.ones(2, 1), 1.0)
    for change in (
        Change(matrices, dora_scale=torch.ones(2, 1)),  # on the output axis, as some trainers write it
        Change(Factors(torch.ones(2, 3), torch.ones(2, 1), 1.0)),
        Change(weight=torch.ones(3, 2)),
        Change(matrices, bias=torch.ones(3)),
    ):
        with pytest.raises(WeightsError, match="another shape"):
            merge(parts, {key: change})
    merge(parts, {key: Change(matrices, dora_scale=torch.ones(1, 3), bias=torch.ones(2))})
    save_file({f"{key}.dora_scale": torch.ones(1, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="not the matrices"):
        load(tmp_path / "x.safetensors")


def test_metadata_is_what_webuis_read() -> None:
    metadata = kohya_metadata(
        name="n",
        rank=4,
        alpha=2.0,
        network_args={"init": "pissa"},
        training={"seed": 7, "min_snr_gamma": None},
        captions={"f": ["a, b", "a"], "g": ["c\na"]},
        repeats={"f": 3, "g": 1},
        buckets=[(64, 64), (64, 64)],
        trigger="t",
        resolution=64,
    )
    assert all(isinstance(value, str) for value in metadata.values())
    assert json.loads(metadata["ss_tag_frequency"]) == {"f": {"a": 2, "b": 1}, "g": {"c": 1, "a": 1}}
    assert json.loads(metadata["ss_bucket_info"])["buckets"]["0"] == {"resolution": [64, 64], "count": 2}
    assert json.loads(metadata["ss_dataset_dirs"]) == {"f": {"n_repeats": 3, "img_count": 2}, "g": {"n_repeats": 1, "img_count": 1}}
    assert metadata["ss_seed"] == "7" and metadata["ss_min_snr_gamma"] == "None" and metadata["modelspec.trigger_phrase"] == "t"
