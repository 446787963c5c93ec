"""Safetensors files, read and written a tensor at a time: a file of any size takes as much memory as its largest tensor.

The format: eight bytes that say how long the header is, the header (JSON: name -> dtype, shape and where the tensor lies behind
the header; `__metadata__` -> strings), then the tensors without a gap.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
LARGEST_HEADER = 4 * 2**20  # bytes; a checkpoint of SDXL has 0.3 MB, and what trainers say of their captions rarely fills one
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # how torch.save's files begin, and bare pickles
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


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
    """Raises WeightsError for what is not a whole safetensors file, or not a sound one."""
    with reading(path):
        _, found, length = _sound(path)
    metadata = found.pop("__metadata__", None) or {}
    entries = {name: Entry(held["dtype"], tuple(held["shape"]), *held["data_offsets"]) for name, held in found.items()}
    return Header(dict(sorted(entries.items(), key=lambda item: item[1].start)), metadata, 8 + length)


def finite(path: Path, key: str, tensor: Tensor) -> Tensor:
    """The tensor that `path` has under `key`. Raises WeightsError for what cannot be a weight."""
    if tensor.dtype not in NAMES:
        raise WeightsError(f"{path}: {key} is of {tensor.dtype}, which is not a kind of number that weights have.")
    if not tensor.float().isfinite().all():
        raise WeightsError(f"{path}: {key} holds numbers that are not finite; the run that wrote it had failed.")
    return tensor


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises WeightsError for what is wrong with the file."""
    try:
        yield
    except FileNotFoundError:
        raise WeightsError(f"There is no file {path}.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is not a readable .safetensors file: {error}.") from None


def opened(path: Path) -> Any:
    """safetensors' `safe_open` of a file whose header is sound. Raises OSError, or ValueError with the reason."""
    return _sound(path)[0]


def _sound(path: Path) -> tuple[Any, dict[str, Any], int]:
    """The file as the library opens it, its header, and how many bytes that has.

    The library itself refuses offsets and shapes that do not fit the file. It does take a name that stands twice, of which two programs
    may then show two different tensors, names that steer a terminal, and headers of 100 MB, which fill a GB when they are parsed.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")  # a pipe would never end
    with path.open("rb") as file:
        start = file.read(8)
        length, size = int.from_bytes(start, "little"), path.stat().st_size
        if start.startswith(PICKLES) and length > min(size, LARGEST_HEADER):  # a header of 1152 bytes begins alike
            raise ValueError("it is a pickle, which runs what is in it when it is read; get it as .safetensors")
        if not 0 < length <= size - 8:
            raise ValueError("it does not begin with the length of a header")
        if length > LARGEST_HEADER:
            raise ValueError(f"its header of {length:,} bytes is larger than any model's")
        text = file.read(length)
    try:
        found = safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(str(error)[:300]) from None
    header = json.loads(text, object_pairs_hook=_once)  # which the library has found to be tensors and metadata, and nothing else
    for name in header:
        if CONTROL.search(name):
            raise ValueError(f"a name has control characters in it: {name[:200]!r}")
    return found, header, length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"{name[:200]!r} stands twice in its header")
        table[name] = value
    return table


def read_tensor(file: BufferedReader, header: Header, name: str) -> Tensor:
    """From a file that is open; memory of its own."""
    entry = header.entries[name]
    if entry.dtype not in DTYPES:
        raise WeightsError(f"{file.name}: {name} is of {entry.dtype}, which is not a kind of number that weights have.")
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
