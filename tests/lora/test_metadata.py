"""What exported files say of themselves: kohya's and Stability's words, how much of them, thumbnails and hashes."""

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdlora.lora.metadata import LEVELS, at_level, kohya_metadata, model_hashes, of_base, thumbnail


def metadata(**options: Any) -> dict[str, str]:
    return kohya_metadata(
        name="n",
        rank=4,
        alpha=2.0,
        network_args={"init": "pissa"},
        training={"seed": 7, "min_snr_gamma": None, "sd_model_name": "secret.safetensors"},
        captions={"f": ["a, b", "a"], "g": ["c\na"]},
        repeats={"f": 3, "g": 1},
        buckets=[(64, 64), (64, 64)],
        resolution=64,
        **({"trigger": "t"} | options),
    )


def test_metadata_is_what_webuis_read() -> None:
    said = metadata(author="me", licence="CC0-1.0", thumbnail="data:x")
    assert all(isinstance(value, str) for value in said.values())
    assert json.loads(said["ss_tag_frequency"]) == {"f": {"a": 2, "b": 1}, "g": {"c": 1, "a": 1}}
    assert json.loads(said["ss_bucket_info"])["buckets"]["0"] == {"resolution": [64, 64], "count": 2}
    assert json.loads(said["ss_dataset_dirs"]) == {"f": {"n_repeats": 3, "img_count": 2}, "g": {"n_repeats": 1, "img_count": 1}}
    assert said["ss_seed"] == "7" and said["ss_min_snr_gamma"] == "None" and said["modelspec.trigger_phrase"] == "t"
    assert (said["modelspec.author"], said["modelspec.license"], said["modelspec.thumbnail"]) == ("me", "CC0-1.0", "data:x")
    assert not {"modelspec.author", "modelspec.license", "modelspec.thumbnail", "modelspec.trigger_phrase"} & metadata(trigger="").keys()


@pytest.mark.parametrize(
    ("family", "prediction", "v2", "version", "architecture"),
    [
        ("sd1", "epsilon", "False", "sd_v1", "stable-diffusion-v1/lora"),
        ("sd2", "epsilon", "True", "sd_v2", "stable-diffusion-v2-512/lora"),
        ("sd2", "v_prediction", "True", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", "epsilon", "False", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
        ("sdxl", "v_prediction", "False", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_which_base(family: str, prediction: str, v2: str, version: str, architecture: str) -> None:
    said = of_base(family, prediction)
    assert (said["ss_v2"], said["ss_base_model_version"], said["modelspec.architecture"]) == (v2, version, architecture)
    assert said["modelspec.prediction_type"] == {"epsilon": "epsilon", "v_prediction": "v"}[prediction]


def test_how_much_is_said() -> None:
    said = of_base("sdxl", "epsilon") | metadata() | {"sdlora_learned_alphas": "{}"}
    assert at_level(said, "full") == said
    assert at_level(said, "none") == {"ss_v2": "False", "ss_base_model_version": "sdxl_base_v1-0"}
    minimal = at_level(said, "minimal")
    assert minimal["ss_network_dim"] == "4" and minimal["modelspec.trigger_phrase"] == "t" and minimal["modelspec.title"] == "n"
    for secret in ("secret", "pissa", said["modelspec.date"], '"f"'):
        assert any(secret in value for value in said.values())
        assert not any(secret in value for value in minimal.values())
    assert set(LEVELS) == {"full", "minimal", "none"}


def test_a_thumbnail_is_a_small_jpeg(tmp_path: Path) -> None:
    Image.new("RGBA", (600, 300), (250, 0, 0, 255)).save(tmp_path / "x.png")
    kind, _, data = thumbnail(tmp_path / "x.png").partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (256, 128))
        colour = picture.getpixel((5, 5))
        assert isinstance(colour, tuple) and colour[0] > 240 and max(colour[1:]) < 15


def test_hashes_of_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\0" * 0x100000 + b"a" * 0x10000 + b"rest")
    assert model_hashes(path) == {
        "new_sd_model_hash": hashlib.sha256(path.read_bytes()).hexdigest(),
        "sd_model_hash": hashlib.sha256(b"a" * 0x10000).hexdigest()[:8],
    }
