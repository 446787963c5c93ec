"""What an exported file says of its training, in the words that WebUIs look for (kohya's `ss_*` and Stability's modelspec 1.0.1)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

MOST_TAGS = 1000  # of a folder, the most frequent: headers of many MB are refused by readers


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
) -> dict[str, str]:
    """All values strings. `training`: the `ss_` names of options that users look for, without the prefix. Captions, one a picture, and
    repeats by the folder's name."""
    tags = {
        folder: dict(Counter(tag.strip() for caption in of for tag in re.split(r"[,\n]", caption) if tag.strip()).most_common(MOST_TAGS))
        for folder, of in captions.items()
    }
    counted = Counter(buckets)
    bucket_info = {"buckets": {str(i): {"resolution": list(size), "count": n} for i, (size, n) in enumerate(sorted(counted.items()))}}
    values: dict[str, Any] = {
        **file_metadata(name, rank, alpha),
        "ss_network_args": json.dumps(network_args),
        "ss_tag_frequency": json.dumps(tags, ensure_ascii=False),
        "ss_bucket_info": json.dumps(bucket_info),
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": repeats[folder], "img_count": len(of)} for folder, of in captions.items()}),
        "ss_resolution": f"({resolution}, {resolution})",
        "modelspec.resolution": f"{resolution}x{resolution}",
        **{f"ss_{key}": value for key, value in training.items()},  # kohya writes "None" for what is off
    }
    if trigger:
        values["modelspec.trigger_phrase"] = trigger
    return {key: str(value) for key, value in values.items()}


def file_metadata(name: str, rank: int, alpha: float) -> dict[str, str]:
    """What can be said of any LoRA file, however it was made."""
    return {
        "ss_output_name": name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": name,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def base_metadata(family: str, prediction_type: str | None) -> dict[str, str]:
    """Which base model a LoRA file is for. Of SD 2.x a prediction type that is not known is left open."""
    version, architecture = {
        ("sd1", True): ("sd_v1", "stable-diffusion-v1/lora"),
        ("sd2", False): ("sd_v2", "stable-diffusion-v2-512/lora"),
        ("sd2", True): ("sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", True): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    }[family, family != "sd2" or prediction_type == "v_prediction"]
    found = {"ss_v2": str(family == "sd2"), "ss_base_model_version": version}
    if prediction_type is None:
        return found
    return found | {"modelspec.architecture": architecture, "modelspec.prediction_type": "v" if "v_" in prediction_type else "epsilon"}
