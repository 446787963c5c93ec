"""What an exported file says of its training, in the words that WebUIs look for (kohya's `ss_*` and Stability's modelspec 1.0.1)."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

MOST_TAGS = 1000  # of a folder, the most frequent: headers of many MB are refused by readers
# What a file says of its base model, by family and by whether that predicts v.
_DIFFUSERS, _SGM = "https://github.com/huggingface/diffusers", "https://github.com/Stability-AI/generative-models"  # whose names it has
_BASES: dict[tuple[str, bool], tuple[str, str, str]] = {  # ss_base_model_version, modelspec.architecture, modelspec.implementation
    ("sd1", False): ("sd_v1", "stable-diffusion-v1/lora", _DIFFUSERS),
    ("sd1", True): ("sd_v1", "stable-diffusion-v1/lora", _DIFFUSERS),
    ("sd2", False): ("sd_v2", "stable-diffusion-v2-512/lora", _DIFFUSERS),
    ("sd2", True): ("sd_v2_v", "stable-diffusion-v2-768-v/lora", _DIFFUSERS),
    ("sdxl", False): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", _SGM),
    ("sdxl", True): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", _SGM),
}


def of_base(family: str, prediction_type: str | None) -> dict[str, str]:
    """Which base model a file is for. prediction_type: "epsilon" or "v_prediction", as diffusers has it, or None where it is not known:
    then nothing is said that depends on it."""
    predicts_v = prediction_type == "v_prediction"
    version, architecture, implementation = _BASES[family, predicts_v]
    found = {"ss_v2": str(family == "sd2"), "ss_base_model_version": version, "modelspec.implementation": implementation}
    if prediction_type is None:
        return found
    return found | {"modelspec.architecture": architecture, "modelspec.prediction_type": "v" if predicts_v else "epsilon"}


def kohya_metadata(
    *,
    name: str,
    rank: int,
    alpha: float,
    network_args: dict[str, Any],
    training: dict[str, Any],
    captions: Mapping[str, Sequence[str]],
    repeats: Mapping[str, int],
    buckets: Sequence[tuple[int, int]],
    trigger: str,
    resolution: int,
    author: str = "",
    licence: str = "",
    thumbnail: str = "",
) -> dict[str, str]:
    """All values strings. `training`: the `ss_` names of options that users look for, without the prefix. Captions, one a picture, and
    repeats by the folder's name. What is empty is left out of modelspec."""
    tags = {
        folder: dict(Counter(tag.strip() for caption in of for tag in re.split(r"[,\n]", caption) if tag.strip()).most_common(MOST_TAGS))
        for folder, of in captions.items()
    }
    counted = Counter(buckets)
    bucket_info = {"buckets": {str(i): {"resolution": list(size), "count": n} for i, (size, n) in enumerate(sorted(counted.items()))}}
    values: dict[str, Any] = {
        **of_file(name, rank, alpha),
        "ss_network_args": json.dumps(network_args),
        "ss_tag_frequency": json.dumps(tags, ensure_ascii=False),
        "ss_bucket_info": json.dumps(bucket_info),
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": repeats[folder], "img_count": len(of)} for folder, of in captions.items()}),
        "ss_resolution": f"({resolution}, {resolution})",
        **{f"ss_{key}": value for key, value in training.items()},  # kohya writes "None" for what is off
    }
    modelspec = {
        "resolution": f"{resolution}x{resolution}",
        "trigger_phrase": trigger,
        "author": author,
        "license": licence,
        "thumbnail": thumbnail,
    }
    values |= {f"modelspec.{key}": value for key, value in modelspec.items() if value}
    return {key: str(value) for key, value in values.items()}


def of_file(name: str, rank: int, alpha: float) -> dict[str, str]:
    """What can be said of any LoRA file, however it was made. `rank`: the largest in it."""
    return {
        "ss_output_name": name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": name,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


# ---------------------------------------------------------------- how much of it

_TO_LOAD = frozenset({"ss_v2", "ss_base_model_version"})  # by which A1111 tells families apart
_TO_SHOW = _TO_LOAD | {"ss_output_name", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_resolution", "ss_clip_skip"}
_MODELSPEC = ("sai_model_spec", "architecture", "implementation", "prediction_type", "resolution", "title")
_MODELSPEC_OPTIONAL = ("trigger_phrase", "author", "license", "thumbnail")

# Level -> the keys that stay; None: all.
LEVELS: dict[str, Collection[str] | None] = {
    "full": None,
    "minimal": _TO_SHOW | {f"modelspec.{key}" for key in (*_MODELSPEC, *_MODELSPEC_OPTIONAL)},
    "none": _TO_LOAD,
}


def at_level(metadata: Mapping[str, str], level: str) -> dict[str, str]:
    kept = LEVELS[level]
    return {key: value for key, value in metadata.items() if kept is None or key in kept}


# ---------------------------------------------------------------- of files


def thumbnail(picture: Path, side: int = 256) -> str:
    """A small JPEG of a picture as a data URI, no side longer than so many px."""
    with Image.open(picture) as opened:
        small = opened.convert("RGB")
    small.thumbnail((side, side))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def model_hashes(checkpoint: Path) -> dict[str, str]:
    """By which WebUIs know a checkpoint file: A1111's, sha256 of all, and its first one, of 64 KiB a megabyte in, cut to 8 digits."""
    with checkpoint.open("rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0x100000)
        part = hashlib.sha256(file.read(0x10000)).hexdigest()
    return {"new_sd_model_hash": whole, "sd_model_hash": part[:8]}
