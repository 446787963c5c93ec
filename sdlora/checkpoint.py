"""Training state on disk: a folder a checkpoint, written so that a kill at any moment leaves a whole one behind.

Every file is flushed to disk, the manifest with their hashes last; then the folder gets its name, and only then old ones go, as long as
two whole ones stay.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from torch import Tensor

from sdlora.errors import TrainingError
from sdlora.files import check_room, durable_folder, remove_folder, write_synced
from sdlora.tensors import opened

MANIFEST, STATE, TENSORS = "manifest.json", "state.json", ".safetensors"
FILE = re.compile(r"[a-z_]+\.safetensors|state\.json")  # what a manifest names: nothing outside its folder
NAME = re.compile(r"step-(\d{8})$")
LEAST = 2  # whole checkpoints that pruning leaves


@dataclass(frozen=True)
class Checkpoint:
    step: int  # steps taken
    tensors: dict[str, dict[str, Tensor]]  # file -> name -> tensor
    state: dict[str, Any]  # what JSON can hold
    damaged: tuple[str, ...] = ()  # newer ones that were passed over, each with what is wrong


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder`/step-00000123, then delete all but the newest `keep`. Raises OSError, as of a full disk before anything is written
    where it would not fit; what was there is whole then, and nothing half-written stays."""
    final = folder / _name(checkpoint.step)
    files = {
        name + TENSORS: serialise({k: t.detach().cpu().contiguous() for k, t in ts.items()}) for name, ts in checkpoint.tensors.items()
    }
    files[STATE] = json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=2).encode()
    manifest = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[MANIFEST] = json.dumps(manifest, indent=2).encode()
    folder.mkdir(parents=True, exist_ok=True)
    check_room(folder, sum(map(len, files.values())))
    with durable_folder(final) as draft:
        for name, data in files.items():
            write_synced(draft / name, data)
        if final.exists():  # of a step that is taken again after a fall-back
            remove_folder(final)
    prune(folder, keep)
    return final


def prune(folder: Path, keep: int) -> None:
    """Delete what is older than the newest `keep`, once LEAST whole ones stay."""
    whole = 0
    for number, path in enumerate(_named(folder)):
        if number >= keep and whole >= LEAST:
            remove_folder(path)
        elif whole < LEAST:
            whole += _is_whole(path)


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose hashes match; None where there is none at all. Raises TrainingError where all are damaged."""
    damaged: list[str] = []
    for path in _named(folder):
        try:
            return _load(path, tuple(damaged))
        except (OSError, ValueError) as error:
            damaged.append(f"{path.name} ({error})")
    if damaged:
        raise TrainingError(f"All checkpoints in {folder} are damaged: {', '.join(damaged)}; delete that folder to begin anew.")
    return None


def newest_whole(folder: Path) -> Path | None:
    return next(filter(_is_whole, _named(folder)), None)


def _load(path: Path, damaged: tuple[str, ...]) -> Checkpoint:
    """Raises OSError or ValueError for one that is not whole, or that no run has written: hashes say who copied it, not who made it."""
    files = _read(path)
    state = _json(files.pop(STATE, b"null"))
    step = state.pop("step", None) if isinstance(state, dict) else None
    if not isinstance(step, int) or path.name != _name(step):
        raise ValueError(f"{STATE} is not of this step")
    return Checkpoint(step, {name.removesuffix(TENSORS): _tensors(path / name, data) for name, data in files.items()}, state, damaged)


def _read(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint but for its manifest. Raises OSError or ValueError where they are not what that says."""
    manifest = _json((path / MANIFEST).read_bytes())
    if not isinstance(manifest, dict) or not all(map(FILE.fullmatch, manifest)):
        raise ValueError(f"{MANIFEST} names other files than a checkpoint has")
    files = {name: (path / name).read_bytes() for name in manifest}
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != manifest[name]:
            raise ValueError(f"{name} does not match its hash")
    return files


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None


def _tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    opened(path)  # so that the header is sound
    tensors = deserialise(data)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path.name} has numbers in {name} that are not finite")
    return tensors


def _is_whole(path: Path) -> bool:
    try:
        _read(path)
    except (OSError, ValueError):
        return False
    return True


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _named(folder: Path) -> list[Path]:
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
