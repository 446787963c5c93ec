"""LoRAs folded into a checkpoint, as a WebUI would apply them: W + strength * alpha / R * up @ down, in fp32, rounded once."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sdlora.errors import WeightsError
from sdlora.files import copy_durably, durable_folder
from sdlora.lora.change import Change
from sdlora.lora.checkpoints import Checkpoint
from sdlora.tensors import rewrite

MERGED = "sdlora_merged"  # metadata of a checkpoint: JSON, a list of what was folded into it
# Of weights in any format: of a part that is changed, a copied folder must not keep the old ones beside the new.
WEIGHTS = ("*.safetensors", "*.bin", "*.ckpt", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data")


@dataclass(frozen=True)
class Source:
    """A LoRA to fold."""

    name: str
    changes: Mapping[str, Change]  # by readable name of the module
    strengths: Mapping[str, float]  # of each of these; 0 leaves it out


@dataclass
class Size:
    """Squared norms of weights and of what was added to them."""

    weights: float = 0.0
    added: float = 0.0

    def count(self, before: Tensor, after: Tensor) -> None:
        self.weights += float(before.square().sum())
        self.added += float((after - before).square().sum())

    def share(self) -> float:
        """Norm of what was added over that of the weights."""
        return math.sqrt(self.added / self.weights) if self.weights else 0.0


def changed_parameters(checkpoint: Checkpoint, sources: Sequence[Source]) -> list[str]:
    """Readable names, each once. Raises WeightsError where a LoRA changes what the checkpoint lacks, or has in another shape."""
    found: dict[str, None] = {}
    for source in sources:
        for module, change in source.changes.items():
            weight, bias = require_fit(checkpoint, source.name, module, change)
            if source.strengths[module]:
                found |= dict.fromkeys([weight] if change.shape is not None else [])
                found |= dict.fromkeys([bias] if change.bias is not None else [])
    return list(found)


def require_fit(checkpoint: Checkpoint, source: str, module: str, change: Change) -> tuple[str, str]:
    """Names of the module's weight and bias. Raises WeightsError where the checkpoint has no module that can be changed so."""
    weight, bias = f"{module}.weight", f"{module}.bias"
    if weight not in checkpoint.places:
        raise WeightsError(f"{source} does not fit {checkpoint.path}: it changes {module}, which the model lacks.")
    if not change.fits(checkpoint.shape(weight), checkpoint.shape(bias) if bias in checkpoint.places else None):
        raise WeightsError(f"{source} does not fit {checkpoint.path}: {module} has another shape.")
    return weight, bias


def merge(checkpoint: Checkpoint, sources: Sequence[Source], target: Path, notes: Sequence[Mapping[str, Any]]) -> dict[str, Size]:
    """Write the checkpoint with the LoRAs in it to `target`, a file or a folder as the checkpoint is; all else is byte for byte the
    same. `notes` say in its metadata what was folded. Returns how much was added, by part. Raises WeightsError, OSError."""
    parameters: dict[Path, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for parameter in changed_parameters(checkpoint, sources):
        file, key, *_ = checkpoint.places[parameter]
        parameters[file][key].append(parameter)
    sizes: dict[str, Size] = defaultdict(Size)

    def write(file: Path, to: Path) -> None:
        def change(key: str, stored: Tensor) -> Tensor:
            work = stored.float()
            for parameter in parameters[file][key]:
                view = checkpoint.places[parameter].of(work)
                before = view.clone()
                add(view, parameter, sources)
                sizes[parameter.partition(".")[0]].count(before, view)
            result = work.to(stored.dtype)
            if not result.float().isfinite().all():
                raise WeightsError(f"{key} would hold numbers that are not finite in {stored.dtype}: merge with smaller strengths.")
            return result

        metadata = checkpoint.headers[file].metadata
        merged = json.dumps([*json.loads(metadata.get(MERGED, "[]")), *notes])
        rewrite(file, to, parameters[file], change, metadata | {MERGED: merged})

    if checkpoint.path.is_dir():
        copy_folder(checkpoint, {file.parent for file in parameters}, target, write)
    else:
        write(checkpoint.path, target)
    return sizes


def add(view: Tensor, parameter: str, sources: Sequence[Source]) -> None:
    """What the sources change of a parameter, one after the other, in place and in fp32."""
    module, _, kind = parameter.rpartition(".")
    for source in sources:
        if module in source.changes and source.strengths[module]:
            change, strength = source.changes[module], source.strengths[module]
            if kind == "weight":
                view += strength * change.delta(view)
            elif change.bias is not None:
                view += strength * change.bias.float()


def copy_folder(checkpoint: Checkpoint, parts: Collection[Path], target: Path, write: Callable[[Path, Path], None]) -> None:
    """Copy a folder in diffusers' layout, with `write` for the weights of some of its parts; other formats of these, which would hold
    the old weights, stay behind."""
    weights = shutil.ignore_patterns(*WEIGHTS)
    with durable_folder(target) as draft:
        shutil.copytree(
            checkpoint.path,
            draft,
            ignore=lambda folder, names: weights(folder, names) if Path(folder) in parts else set(),
            copy_function=copy_durably,
            dirs_exist_ok=True,
        )
        for file in checkpoint.headers:
            if file.parent in parts:
                write(file, draft / file.relative_to(checkpoint.path))
