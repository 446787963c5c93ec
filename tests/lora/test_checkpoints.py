"""Where checkpoints keep their parameters, against networks that were written down block by block."""

import json
from pathlib import Path

import pytest
import torch
from originals import build_original
from safetensors.torch import load_file, save_file
from tiny import build_model

from sdlora.errors import WeightsError
from sdlora.lora.checkpoints import open_checkpoint


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_parameter_of_a_single_file_is_found(tmp_path: Path, family: str) -> None:
    original = build_original(tmp_path / "a.safetensors", family)
    checkpoint = open_checkpoint(original.path)
    assert checkpoint.family == family and checkpoint.places.keys() == original.parameters.keys()
    for name, tensor in original.parameters.items():
        assert checkpoint.shape(name) == tuple(tensor.shape) and torch.equal(checkpoint.read(name), tensor)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_folders(tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(build_model(tmp_path / "tiny", family=family))
    assert checkpoint.family == family
    name = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.weight"
    assert checkpoint.shape(name) == checkpoint.read(name).shape and "unet.conv_in.bias" in checkpoint.places
    assert ("text_encoder_2.text_projection.weight" in checkpoint.places) == (family == "sdxl")


def test_pieces_and_variants_of_a_folder(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "tiny")
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert open_checkpoint(folder).places["unet.conv_in.bias"].file.name == "diffusion_pytorch_model.fp16.safetensors"
    pieces = {f"piece-{n}.safetensors": {k: t for i, (k, t) in enumerate(tensors.items()) if i % 2 == n} for n in range(2)}
    for name, piece in pieces.items():
        save_file(piece, whole.with_name(name))
    index = {"weight_map": {key: name for name, piece in pieces.items() for key in piece}}
    (whole.parent / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(folder)
    assert {place.file.name for name, place in checkpoint.places.items() if name.startswith("unet.")} == set(pieces)
    assert all(torch.equal(checkpoint.read(f"unet.{key}"), tensor) for key, tensor in tensors.items())


def test_the_prediction_type_is_read_or_left_open(tmp_path: Path) -> None:
    assert open_checkpoint(build_model(tmp_path / "v", "v_prediction")).prediction_type() == "v_prediction"
    found = {}
    for family in ("sd1", "sd2", "sdxl"):
        original = build_original(tmp_path / f"{family}.safetensors", family)
        found[family] = open_checkpoint(original.path).prediction_type()
    assert found == {"sd1": "epsilon", "sd2": None, "sdxl": "epsilon"}
    save_file(original.tensors | {"v_pred": torch.zeros(0)}, original.path)  # how SDXL's files say it
    assert open_checkpoint(original.path).prediction_type() == "v_prediction"
    save_file(original.tensors, original.path, {"modelspec.prediction_type": "v"})
    assert open_checkpoint(original.path).prediction_type() == "v_prediction"


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="There is no file"):
        open_checkpoint(tmp_path / "a.safetensors")
    (tmp_path / "a.ckpt").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"no \.safetensors file"):
        open_checkpoint(tmp_path / "a.ckpt")
    save_file({"model.diffusion_model.out.2.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="lacks a text encoder of SD 1"):
        open_checkpoint(tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="not a folder of SD 1"):
        open_checkpoint(tmp_path)
    folder = build_model(tmp_path / "tiny")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"no weights as \.safetensors"):
        open_checkpoint(folder)
