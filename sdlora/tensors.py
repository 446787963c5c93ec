"""Safetensors files, read and written a tensor at a time: a file of any size takes as much memory as its largest tensor.

The format: eight bytes that say how long the header is, the header (JSON: name -> dtype, shape and where the tensor lies behind
the header; `__metadata__` -> strings), then the tensors without a gap.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdlora.errors import WeightsError
from sdlora.files import durable

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 2**20  # bytes that are copied at once


class Entry(NamedTuple):
    """Where a tensor lies, in bytes behind the header."""

    dtype: str  # as the format calls it
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    entries: dict[str, Entry]  # in the order of their bytes
    metadata: dict[str, str]
    length: int  # bytes before the first tensor


def read_header(path: Path) -> Header:
    """Raises WeightsError for what is not a whole safetensors file."""
    try:
        with safe_open(path, framework="pt"):  # checks that the tensors fill the file
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            found = json.loads(file.read(size))
    except FileNotFoundError:
        raise WeightsError(f"There is no file {path}.") from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable .safetensors file: {error}.") from None
    metadata = found.pop("__metadata__", None) or {}
    entries = {name: Entry(held["dtype"], tuple(held["shape"]), *held["data_offsets"]) for name, held in found.items()}
    return Header(dict(sorted(entries.items(), key=lambda item: item[1].start)), metadata, 8 + size)


def read_tensor(file: BufferedReader, header: Header, name: str) -> Tensor:
    """From a file that is open; memory of its own."""
    entry = header.entries[name]
    file.seek(header.length + entry.start)
    data = bytearray(entry.stop - entry.start)
    file.readinto(data)
    dtype = DTYPES[entry.dtype]
    return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).view(entry.shape)


def rewrite(
    source: Path, target: Path, names: Collection[str], change: Callable[[str, Tensor], Tensor], metadata: Mapping[str, str]
) -> None:
    """Copy `source` to `target` with this metadata and with what `change` makes of the tensors `names`, of the same shape and dtype; all
    other tensors are copied byte for byte, and all keep their order. Raises OSError, and leaves nothing behind then."""
    header = read_header(source)
    with source.open("rb") as file, durable(target) as out:
        out.write(header_bytes(header.entries, metadata))
        for name, entry in header.entries.items():
            if name not in names:
                file.seek(header.length + entry.start)
                copy_piecewise(file, out, entry.stop - entry.start)
                continue
            changed = change(name, read_tensor(file, header, name))
            became = (NAMES[changed.dtype], tuple(changed.shape))
            if became != (entry.dtype, entry.shape):
                raise ValueError(f"{name} was {entry.dtype} {entry.shape} and became {became[0]} {became[1]}")
            out.write(tensor_bytes(changed))


class Body:
    """Tensors of a file that has no header yet: how many there are, and how large, shows only in the end."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}  # to be filled in while the file is open
        self.length = 0  # bytes so far
        self.digest = hashlib.sha256()  # of them

    def add(self, name: str, tensor: Tensor) -> None:
        data = tensor_bytes(tensor)
        self.entries[name] = Entry(NAMES[tensor.dtype], tuple(tensor.shape), self.length, self.length + len(data))
        self.length += len(data)
        self.digest.update(data)
        self.file.write(data)


@contextmanager
def body_of(path: Path) -> Iterator[Body]:
    """Tensors to add, one at a time, to a file that is put at `path` when the block ends; nothing is left behind if it fails. Until then
    they lie in a file without a name beside it."""
    with tempfile.TemporaryFile(dir=path.parent) as file:
        body = Body(file)
        yield body
        file.seek(0)
        with durable(path) as out:
            out.write(header_bytes(body.entries, body.metadata))
            shutil.copyfileobj(file, out, PIECE)


def header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """With its length, padded so that the first tensor is aligned."""
    found: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, entry in entries.items():
        found[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (entry.start, entry.stop)}
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A view of the tensor's own memory where it is contiguous."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def copy_piecewise(file: BinaryIO, out: BinaryIO, size: int) -> None:
    while size:
        piece = file.read(min(size, PIECE))
        if not piece:
            raise OSError(f"{file.name} became shorter while it was read")
        out.write(piece)
        size -= len(piece)
