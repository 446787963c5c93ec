"""Digests of the weights of a model's parts, kept from one run to the next: what was computed of pictures and prompts is found by them, so
that a part that is known need not be read as long as all that it would compute is on disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from sdlora.data.cache import TensorCache, fingerprint
from sdlora.errors import TrainingError
from sdlora.models.family import digest
from sdlora.models.sources import Part

VERSION = 1  # part of the key: raise it when the weights of a file come to be read otherwise
SETTLED = 2.0  # s since a file was written: within a tick of its clock, which is as long on some disks, it may be written again unseen
log = logging.getLogger(__name__)


def networks(parts: Mapping[str, Part], cache: TensorCache | None, resting: Collection[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The networks, and their digests: those that an earlier run found of the same files, and the others found now. Of those that are
    known the `resting` ones are shells. Without a cache all are read, and none has a digest. Raises WeightsError."""
    if cache is None:
        return {name: part.load() for name, part in parts.items()}, {}
    made, digests = {}, {}
    for name, part in parts.items():
        of_files = key(name, part)  # as they are before they are read
        entry = cache.get(of_files)
        made[name] = part.load() if entry is None or name not in resting else part.shell()
        if entry is None:
            digests[name] = digest(made[name])
            keep(cache, of_files, part, digests[name])
        else:
            digests[name] = bytes(entry["sha256"].tolist()).hex()
    return made, digests


def keep(cache: TensorCache, of_files: str, part: Part, digest: str) -> None:
    """A disk that takes nothing keeps nothing: the next run reads the part once more."""
    if time.time() - max(path.stat().st_mtime for path in part.files) < SETTLED:
        return
    cache.put(of_files, {"sha256": torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)})
    try:
        cache.flush()
    except TrainingError as error:
        log.warning("what the model's weights are known by is not kept: %s", error)


def key(name: str, part: Part) -> str:
    """All that a digest depends on, as far as the system tells it of files without reading them."""
    readers = (torch.__version__, diffusers.__version__, transformers.__version__)
    return fingerprint(VERSION, readers, name, str(part.dtype), [identity(path) for path in part.files])


def identity(path: Path) -> tuple[str, int, int, int]:
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ino
