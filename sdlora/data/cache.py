"""Tensors that are costly to compute once more (latents, prompt embeddings), on disk and shared between runs.

A key is a digest of everything that the tensors depend on, so an entry can be missing but never stale. A folder holds shards:
safetensors files that are written whole and never again, so that any number of processes may read and write at once. An entry is
`<key>/<name>` for each of its tensors and `<key>/crc32` over their bytes. Only the keys are held in memory; tensors are read from
mapped files when they are asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save as serialise
from torch import Tensor

from sdlora.errors import TrainingError
from sdlora.files import DRAFT_PREFIX, write_durably
from sdlora.tensors import opened

FORMAT_VERSION = "2"  # of a shard: how keys and names are laid out in it
CHECK = "crc32"  # catches what a failing disk turned round; int64, for torch has no arithmetic for unsigned ones
OPEN_SHARDS = 32  # mapped at once: what was read of a mapped file counts as the process's memory until the system takes it back
DAY = 24 * 3600  # s
DRAFT_AGE = DAY  # no shard takes a day to write: such a draft was left by a process that was killed

Entry = dict[str, Tensor]
log = logging.getLogger(__name__)


def fingerprint(*parts: object) -> str:
    """sha256, hex, of the parts (None, bool, int, float, str, and lists, tuples, dicts of these) as canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Place(NamedTuple):
    """Where an entry lies."""

    shard: Path
    names: tuple[str, ...]


class TensorCache:
    """Entries of the shards in `folder` as they are needed, and new ones in memory until flush()."""

    def __init__(self, folder: Path, model: str) -> None:
        """`model` names for people what the entries are of; it is no part of their keys."""
        self._folder, self._model = folder, model
        self._new: dict[str, Entry] = {}
        self._places: dict[str, Place] | None = None  # None: not looked at yet
        self._opened: dict[Path, Any] = {}  # at most OPEN_SHARDS of tensors.opened(), whose methods carry no types

    def __contains__(self, key: str) -> bool:
        """Whether get() will most likely find it: the tensors themselves are not looked at."""
        return key in self._new or key in self._index()

    def get(self, key: str) -> Entry | None:
        """The entry, copied from the disk; None where there is none, or where it is damaged, which the log tells."""
        if key in self._new:
            return self._new[key]
        place = self._index().get(key)
        if place is None:
            return None
        try:
            return self._read(key, place)
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("%s: entry %s is damaged or gone (%s) and will be computed anew", place.shard, key, error)
            del self._index()[key]
            return None

    def put(self, key: str, tensors: Entry) -> None:
        """Tensors are copied to the CPU: a slice of a batch must not keep the batch alive."""
        self._new[key] = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }

    def flush(self) -> None:
        """Write what is new as one more shard. Raises TrainingError when the disk refuses; nothing is forgotten then."""
        if not self._new:
            return
        # In the order of their writing, so that an entry that replaces a damaged one is found in its place.
        shard = self._folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.safetensors"
        tensors = {f"{key}/{name}": tensor for key, entry in self._new.items() for name, tensor in (entry | _check(entry)).items()}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_durably(shard, serialise(tensors, {"format": "pt", "sdlora_cache": FORMAT_VERSION, "model": self._model}))
        except OSError as error:
            raise TrainingError(
                f"The cache {self._folder} cannot be written ({error.strerror}); make room with `sdlora cache prune`, or set data.cache."
            ) from error
        self._index().update({key: Place(shard, tuple(entry)) for key, entry in self._new.items()})
        self._new = {}

    def _index(self) -> dict[str, Place]:
        if self._places is None:
            self._places = {}
            for shard in _shards(self._folder):
                try:
                    self._places |= _places(shard)
                except (SafetensorError, OSError, ValueError) as error:
                    log.warning("The cache's file %s is damaged (%s): what it held will be computed anew", shard, error)
        return self._places

    def _read(self, key: str, place: Place) -> Entry:
        file = self._opened.get(place.shard)
        if file is None:
            file = self._opened[place.shard] = opened(place.shard)
            if len(self._opened) > OPEN_SHARDS:
                del self._opened[next(iter(self._opened))]
            with contextlib.suppress(OSError):  # a cache of another user's may be read but not marked
                os.utime(place.shard)  # in use: prune() goes by this
        # Copied before it is checked: a view would read the disk again when it is used.
        entry = {name: file.get_tensor(f"{key}/{name}").clone() for name in place.names}
        if file.get_tensor(f"{key}/{CHECK}").tolist() != _check(entry)[CHECK].item():
            raise ValueError("its checksum is wrong")
        return entry


@dataclass(frozen=True)
class Held:
    """What one folder of shards holds."""

    folder: Path
    models: tuple[str, ...]
    entries: int
    bytes: int
    used: float  # when last, seconds since 1970; 0 where nothing is readable
    damaged: tuple[Path, ...]


def survey(root: Path) -> list[Held]:
    """What the caches below `root` hold, a line a folder."""
    return [_held(folder) for folder in sorted(path for path in root.glob("*") if path.is_dir() and _shards(path))]


def prune(root: Path, older_than: float) -> tuple[int, int]:
    """Delete shards that were not used for `older_than` days, damaged ones, and what killed processes left; returns how many files,
    and their bytes. Whoever has a shard open keeps it, and computes anew what is gone."""
    now, files, size = time.time(), 0, 0
    for folder in (path for path in root.glob("*") if path.is_dir()):
        damaged = _held(folder).damaged
        ages = dict.fromkeys(_shards(folder), older_than * DAY) | dict.fromkeys(folder.glob(f"{DRAFT_PREFIX}*"), DRAFT_AGE)
        for path, least in ages.items():
            try:
                found = path.stat()
                if path in damaged or now - found.st_mtime >= least:
                    path.unlink()
                    files, size = files + 1, size + found.st_size
            except FileNotFoundError:  # a draft has got its name meanwhile, or another prune was faster
                continue
            except PermissionError as error:  # Windows keeps what is mapped
                log.warning("%s is in use and stays (%s)", path, error)
    return files, size


def _held(folder: Path) -> Held:
    models: set[str] = set()
    keys: set[str] = set()
    size, used, damaged = 0, 0.0, []
    for shard in _shards(folder):
        try:
            keys |= _places(shard).keys()
            with opened(shard) as file:
                models.add(file.metadata().get("model", "another program's"))
        except (SafetensorError, OSError, ValueError):
            damaged.append(shard)
            continue
        stat = shard.stat()
        size, used = size + stat.st_size, max(used, stat.st_mtime)
    return Held(folder, tuple(sorted(models)), len(keys), size, used, tuple(damaged))


def _shards(folder: Path) -> list[Path]:
    """In the order of their writing; drafts, whose names begin with a dot, are not among them."""
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))


def _places(shard: Path) -> dict[str, Place]:
    """Where the entries of a shard lie. Raises SafetensorError, OSError or ValueError for what is no whole shard."""
    with opened(shard) as file:
        if (file.metadata() or {}).get("sdlora_cache") != FORMAT_VERSION:
            raise ValueError("it is of another program or version")
        names: dict[str, list[str]] = {}
        for full_name in file.keys():  # noqa: SIM118 - it is no mapping
            key, _, name = full_name.rpartition("/")
            names.setdefault(key, []).append(name)
    shared: dict[tuple[str, ...], Place] = {}  # entries of a shard have the same names: one tuple serves all
    return {key: shared.setdefault(own, Place(shard, own)) for key, found in names.items() for own in [_without_check(found)]}


def _without_check(names: list[str]) -> tuple[str, ...]:
    return tuple(sorted(name for name in names if name != CHECK))


def _check(entry: Entry) -> Entry:
    crc = 0
    for name in sorted(entry):
        crc = zlib.crc32(entry[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return {CHECK: torch.tensor(crc)}
