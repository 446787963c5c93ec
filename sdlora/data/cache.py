"""Tensors that are costly to compute once more (latents, prompt embeddings), kept in one safetensors file.

A key is a digest of everything that the tensors depend on, so an entry can be missing but never stale.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sdlora.errors import TrainingError

FORMAT_VERSION = "1"  # of the file: how keys and names are laid out in it
METADATA = {"format": "pt", "sdlora_cache": FORMAT_VERSION}

logger = logging.getLogger(__name__)


def fingerprint(*parts: object) -> str:
    """sha256, hex, of the parts (None, bool, int, float, str, and lists, tuples, dicts of these) as canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class TensorCache:
    """Entries of the file at `path` as it is needed, and new ones in memory until save()."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new: dict[str, dict[str, torch.Tensor]] = {}
        self._stored: dict[str, list[str]] | None = None  # key -> names in the file; None: not looked at yet
        self._file: Any = None  # a safe_open, whose methods carry no types

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        if key in self._new:
            return self._new[key]
        return self._read(key) if key in self._index() else None

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Tensors are copied to the CPU: a slice of a batch must not keep the batch alive."""
        self._new[key] = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }

    def save(self) -> None:
        """Write old and new entries together; all of them are in memory meanwhile. Raises TrainingError when the disk refuses."""
        if not self._new:
            return
        self._close()  # what another run has added since is kept, too
        entries = {key: self._read(key) for key in self._index()} | self._new
        self._close()  # Windows does not replace a file that is mapped
        tensors = {f"{key}/{name}": tensor for key, entry in entries.items() for name, tensor in entry.items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _write(self._path, tensors)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"The cache {self._path} cannot be written ({error}); make room or choose another folder.") from error
        self._new = {}

    def _index(self) -> dict[str, list[str]]:
        if self._stored is None:
            self._stored = {}
            if self._path.exists():
                self._open()
        return self._stored

    def _open(self) -> None:
        try:
            file: Any = safe_open(self._path, framework="pt", device="cpu")
            version = (file.metadata() or {}).get("sdlora_cache")
        except (SafetensorError, OSError) as error:
            logger.warning("The cache %s is damaged and will be made anew (%s)", self._path, error)
            return
        if version != FORMAT_VERSION:
            logger.warning("The cache %s is of another version and will be made anew", self._path)
            return
        self._file = file
        self._stored = {}
        for full_name in file.keys():  # noqa: SIM118 - it is no mapping
            key, _, name = full_name.rpartition("/")
            self._stored.setdefault(key, []).append(name)

    def _read(self, key: str) -> dict[str, torch.Tensor]:
        assert self._file is not None and self._stored is not None
        # Copied, for a view would keep the file mapped.
        return {name: self._file.get_tensor(f"{key}/{name}").clone() for name in self._stored[key]}

    def _close(self) -> None:
        self._file = None
        self._stored = None


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """At every moment, power cuts included, the path holds the whole old file or the whole new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.touch()
        mode = draft.stat().st_mode  # what the umask makes of it; save_file leaves 0600, which shuts out other users
        save_file(tensors, draft, METADATA)
        draft.chmod(mode)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    if os.name == "posix":  # the new name, too, is only in memory until the folder is synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
