"""Files that are written one tensor at a time: what safetensors reads of them, hashes, refusals."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sdlora.errors import WeightsError
from sdlora.lora.tensor_file import PRECISIONS, write


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_written_is_read(tmp_path: Path, precision: str) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"b": torch.randn(3, 1, 2), "a": torch.tensor(1.5), "empty": torch.zeros(0, 4), "turned": torch.randn(2, 3).T}
    write(path, tensors.items(), {"said": 'ünï "quoted"', "modelspec.sai_model_spec": "1.0.1"}, precision)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read[key].dtype == PRECISIONS[precision] and torch.equal(read[key], tensor.to(PRECISIONS[precision]))
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    body = hashlib.sha256(data[start:]).hexdigest()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert start % 8 == 0
    assert metadata["said"] == 'ünï "quoted"' and metadata["sshs_model_hash"] == body and metadata["modelspec.hash_sha256"] == f"0x{body}"


def test_a_plain_file_names_one_hash(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", [("a", torch.ones(1))], {}, "fp32")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert list(file.metadata()) == ["sshs_model_hash"]


@pytest.mark.parametrize(
    ("number", "precision", "reason"), [(1e5, "fp16", "fp16 cannot hold: choose bf16"), (float("inf"), "fp32", "not finite")]
)
def test_numbers_that_cannot_be_held_leave_the_old_file(tmp_path: Path, number: float, precision: str, reason: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(WeightsError, match=f"second holds numbers that (are )?{reason}"):
        write(path, [("first", torch.ones(2)), ("second", torch.tensor([1.0, number]))], {}, precision)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.safetensors"]
    write(path, [("second", torch.tensor(1e5))], {}, "bf16")


def test_no_two_tensors_are_held_at_once(tmp_path: Path) -> None:
    alive: list[int] = []

    class Watched(torch.Tensor):
        pass

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        import weakref

        for number in range(3):
            tensor = torch.ones(4).as_subclass(Watched)
            alive.append(number)
            weakref.finalize(tensor, alive.remove, number)
            assert len(alive) <= 2  # this one, and the one before it until the name is bound anew
            yield str(number), tensor
            del tensor

    write(tmp_path / "x.safetensors", tensors(), {}, "fp32")
