"""The file of a run: names and precision, and what it says, much or little."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from tiny import build_model

from sdlora import config as configs
from sdlora import run
from sdlora.lora import formats
from sdlora.lora.report import inspect
from sdlora.train import train


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "tiny", family="sdxl")


def trained(base: Path, folder: Path, **options: object) -> run.Run:
    pictures = folder / "cats"
    pictures.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a cat, big")
    flags = {"model.base": base, "data.folder": pictures, "resolution": 32, "bucket_step": 8, "steps": 2, "batch_size": 2, "rank": 2}
    flags |= {"train.precision": "fp32", "rate": 1e-2, "threads": 1, "runs": folder, "trigger": "ohwx", "init": "pissa"}
    of = run.create(configs.load([], [(name.replace("__", "."), str(value)) for name, value in (flags | options).items()]))
    list(train(of))
    return of


def test_an_sdxl_file_says_all_at_half_precision(sdxl: Path, tmp_path: Path) -> None:
    drawn = {"preview__prompts": '["a cat --s 1"]', "preview__every": 1}
    of = trained(sdxl, tmp_path, save_precision="fp16", author="me", licence="CC0-1.0", **drawn)
    report = inspect(of.export)
    assert (report.family, report.naming, report.precision, report.readers) == ("sdxl", "webui", "fp16", ())
    parts = {name.partition(".")[0] for name in (layer.name for layer in report.layers)}
    assert parts == {"unet", "text_encoder", "text_encoder_2"}
    with safe_open(of.export, "pt") as file:
        assert any(key.startswith("lora_unet_middle_block_1_") for key in file.keys())  # noqa: SIM118 - not a dict
    said = report.metadata
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora" and said["ss_v2"] == "False"
    assert (said["modelspec.author"], said["modelspec.license"], said["modelspec.trigger_phrase"]) == ("me", "CC0-1.0", "ohwx")
    assert said["modelspec.thumbnail"].startswith("data:image/jpeg;base64,") and said["modelspec.hash_sha256"].startswith("0x")
    assert said["ss_num_epochs"] == "2"  # four pictures of three an epoch
    assert float(said["ss_training_started_at"]) == pytest.approx((of.folder / "config.toml").stat().st_mtime)
    assert json.loads(said["ss_tag_frequency"]) == {"cats": {"ohwx": 3, "a cat": 3, "big": 3}}
    assert formats.read_alphas(of.export).keys() == {layer.name for layer in report.layers}


def test_a_file_that_says_little(sdxl: Path, tmp_path: Path) -> None:
    of = trained(sdxl, tmp_path, output__metadata="none", preview__prompts="[]")
    _, said = formats.load(of.export)
    assert said.keys() == {"ss_v2", "ss_base_model_version", "sshs_model_hash"}
