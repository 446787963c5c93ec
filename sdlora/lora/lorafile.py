"""LoRA files for the tools that make one file of others: whatever they call a layer, and written a layer at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.errors import WeightsError
from sdlora.lora import formats
from sdlora.lora.change import Change
from sdlora.lora.names import readable
from sdlora.tensorfile import body_of

BASE = "ss_base_model_version"


@dataclass(frozen=True)
class LoraFile:
    path: Path
    changes: Mapping[str, Change]  # by readable name
    stems: Mapping[str, str]  # what the file calls these layers
    metadata: Mapping[str, str]

    def rank(self) -> int:
        """The largest; 0 where nothing is of low rank."""
        return max((change.factors.down.shape[0] for change in self.changes.values() if change.factors is not None), default=0)


def read(path: Path, *, folded: bool) -> LoraFile:
    """`folded`: every delta must be known without the base model, as DoRA's is not. Raises WeightsError."""
    changes, metadata = formats.load(path)
    names = {stem: readable(stem) for stem in changes}
    unknown = [stem for stem, name in names.items() if name is None]
    if unknown:
        raise WeightsError(f"{path} is not a LoRA of Stable Diffusion: it adapts {unknown[0]}.")
    if folded and any(change.dora_scale is not None for change in changes.values()):
        raise WeightsError(
            f"{path} is a DoRA, whose change depends on the base model: merge it into a checkpoint, and extract a LoRA from that."
        )
    stems = {name: stem for stem, name in names.items() if name is not None}
    return LoraFile(path, {name: changes[stem] for name, stem in stems.items()}, stems, metadata)


def check_alike(files: Sequence[LoraFile]) -> None:
    """Raises WeightsError where two are for different models, as far as they say so or as shapes show."""
    first, *others = files
    for other in others:
        versions = [file.metadata.get(BASE, "") for file in (first, other)]
        if all(versions) and len({version[:5] for version in versions}) == 2:  # sd_v1, sd_v2, sdxl_
            raise WeightsError(f"{first.path} is for {versions[0]} and {other.path} for {versions[1]}: they cannot become one file.")
        for name in first.changes.keys() & other.changes.keys():
            if not alike(first.changes[name], other.changes[name]):
                raise WeightsError(f"{first.path} and {other.path} are for different models: {name} has another shape.")


def alike(one: Change, other: Change) -> bool:
    return one.shape is None or other.shape is None or one.shape == other.shape


def shared_metadata(files: Sequence[LoraFile]) -> dict[str, str]:
    """What all files say alike, but for the hashes of their bytes."""
    common = set.intersection(*(set(file.metadata.items()) for file in files))
    return {key: value for key, value in sorted(common) if not key.startswith("sshs_")}


def write(path: Path | None, layers: Iterable[tuple[str, Change]], alpha: float, metadata: Callable[[int], Mapping[str, Any]]) -> None:
    """Write layers by their stems as they come; `metadata` of their largest rank is asked for in the end, and what is no text becomes
    JSON. Without a path the layers are only computed. Raises WeightsError, OSError."""
    if path is None:
        for _ in layers:
            pass
        return
    largest = 0
    with body_of(path) as body:
        for stem, change in layers:
            for key, tensor in formats.layer_tensors(stem, change, alpha).items():
                if not tensor.isfinite().all():
                    raise WeightsError(f"{path.name} is not written: {key} holds numbers that are not finite.")
                body.add(key, tensor)
            largest = max(largest, change.factors.down.shape[0] if change.factors is not None else 0)
        said = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata(largest).items()}
        body.metadata = {**said, "sshs_model_hash": body.digest.hexdigest()}
