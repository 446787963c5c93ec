"""Safetensors files a tensor at a time: as the library writes and reads them, byte for byte, and never a whole file in memory."""

import hashlib
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlora.errors import WeightsError
from sdlora.tensors import NAMES, body_of, read_header, read_tensor, rewrite


def some() -> dict[str, Tensor]:
    plain = {"é.weight": torch.randn(3, 4), "scalar": torch.tensor(7), "none": torch.zeros(0, 2), "mask": torch.tensor([True, False])}
    return plain | {f"in {dtype}": torch.arange(5).to(dtype) for dtype in NAMES}


def test_what_is_added_is_what_the_library_reads(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", some()
    with body_of(path) as body:
        for name, tensor in tensors.items():
            body.add(name, tensor)
        body.metadata = {"note": 'é "quoted"', "hash": body.digest.hexdigest()}
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors) and file.metadata()["note"] == 'é "quoted"'
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype and torch.equal(found.float(), tensor.float())
        data = path.read_bytes()
        assert file.metadata()["hash"] == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert os.listdir(tmp_path) == ["a.safetensors"]
    header = read_header(path)
    with path.open("rb") as file:
        assert all(torch.equal(read_tensor(file, header, name).float(), tensor.float()) for name, tensor in tensors.items())
    assert header.length % 8 == 0 and header.metadata["note"] == 'é "quoted"'


def test_a_rewritten_file_differs_in_what_was_changed_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(some(), source, {"format": "pt"})
    rewrite(source, target, {"é.weight"}, lambda name, tensor: tensor + 1, {"format": "pt", "note": "x"})
    before, after = read_header(source), read_header(target)
    assert list(after.entries.items()) == list(before.entries.items()) and after.metadata == {"format": "pt", "note": "x"}
    old, new = source.read_bytes()[before.length :], bytearray(target.read_bytes()[after.length :])
    entry = before.entries["é.weight"]
    assert torch.equal(load_file(target)["é.weight"], load_file(source)["é.weight"] + 1)
    new[entry.start : entry.stop] = old[entry.start : entry.stop]
    assert new == old


def test_a_change_of_shape_or_a_failure_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2)}, source)
    with pytest.raises(ValueError, match="became F32"):
        rewrite(source, tmp_path / "b.safetensors", {"a"}, lambda name, tensor: torch.zeros(3), {})
    with pytest.raises(KeyError), body_of(tmp_path / "c.safetensors") as body:
        body.add("a", torch.zeros(2))
        raise KeyError
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_no_more_than_one_tensor_is_in_memory(tmp_path: Path) -> None:
    """What is read and copied is in Python's own memory, which tracemalloc counts."""
    source, target, names = tmp_path / "a.safetensors", tmp_path / "b.safetensors", [f"t{n}" for n in range(40)]
    megabyte = 2**20
    tracemalloc.start()
    with body_of(source) as body:
        for name in names:
            body.add(name, torch.zeros(megabyte // 4))
    rewrite(source, target, names[::2], lambda name, tensor: tensor.add_(1), {})
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert source.stat().st_size > 40 * megabyte
    assert most < 3 * megabyte  # one to read, one piece to copy
    assert [int(tensor[0]) for tensor in load_file(target).values()].count(1) == 20


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(WeightsError, match="There is no file"):
        read_header(path)
    save_file({"a": torch.zeros(20)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightsError, match=r"a\.safetensors is not a readable"):
        read_header(path)
