"""Training state on disk: a folder a checkpoint, written so that a kill at any moment leaves a whole one behind.

Every file is flushed to disk, the manifest with their hashes last; then the folder gets its name, and only then old ones go.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from torch import Tensor

from sdlora.files import sync_folder, write_durably

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8})$")


@dataclass(frozen=True)
class Checkpoint:
    step: int  # steps taken
    tensors: dict[str, dict[str, Tensor]]  # file -> name -> tensor
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder`/step-00000123, then delete all but the newest `keep`."""
    final = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f".tmp-{final.name}"
    for leftover in (temporary, final):  # of a killed save; or a step that is taken again after a fall-back
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    files = {
        f"{name}.safetensors": serialise({k: t.detach().cpu().contiguous() for k, t in ts.items()})
        for name, ts in checkpoint.tensors.items()
    }
    files["state.json"] = json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=2).encode()
    manifest = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    for name, data in {**files, MANIFEST: json.dumps(manifest, indent=2).encode()}.items():
        write_durably(temporary / name, data)
    os.replace(temporary, final)
    sync_folder(folder)
    for old in _complete(folder)[keep:]:
        shutil.rmtree(old)
    return final


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose hashes match; damaged ones are named in the log."""
    for path in _complete(folder):
        try:
            return _load(path)
        except (OSError, ValueError) as error:
            log.warning("checkpoint %s is damaged (%s); falling back to the one before", path.name, error)
    return None


def _load(path: Path) -> Checkpoint:
    manifest: dict[str, str] = json.loads((path / MANIFEST).read_bytes())
    files = {name: (path / name).read_bytes() for name in manifest}
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != manifest[name]:
            raise ValueError(f"{name} does not match its hash")
    state = json.loads(files.pop("state.json"))
    return Checkpoint(state.pop("step"), {name.removesuffix(".safetensors"): deserialise(data) for name, data in files.items()}, state)


def _complete(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((p for p in folder.glob("step-*") if NAME.match(p.name)), reverse=True)


def flatten(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Layer -> name -> tensor as "<layer>/<name>" -> tensor."""
    return {f"{layer}/{name}": tensor for layer, tensors in layers.items() for name, tensor in tensors.items()}


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, name = key.partition("/")
        layers.setdefault(layer, {})[name] = tensor
    return layers
