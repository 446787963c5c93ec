"""What an exported file says of its training, in the words that WebUIs look for (kohya's `ss_*` and Stability's modelspec 1.0.1)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any


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
        folder: dict(Counter(tag.strip() for caption in of for tag in re.split(r"[,\n]", caption) if tag.strip()).most_common())
        for folder, of in captions.items()
    }
    counted = Counter(buckets)
    bucket_info = {"buckets": {str(i): {"resolution": list(size), "count": n} for i, (size, n) in enumerate(sorted(counted.items()))}}
    values: dict[str, Any] = {
        "ss_output_name": name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(network_args),
        "ss_tag_frequency": json.dumps(tags, ensure_ascii=False),
        "ss_bucket_info": json.dumps(bucket_info),
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": repeats[folder], "img_count": len(of)} for folder, of in captions.items()}),
        "ss_resolution": f"({resolution}, {resolution})",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        **{f"ss_{key}": value for key, value in training.items()},  # kohya writes "None" for what is off
    }
    if trigger:
        values["modelspec.trigger_phrase"] = trigger
    return {key: str(value) for key, value in values.items()}
