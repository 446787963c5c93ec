"""The tensor cache: what goes in comes out, a key moves with whatever it depends on, and no damage stops a run."""

import logging
import os
import stat
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sdlora.data import cache as cache_module
from sdlora.data.buckets import place
from sdlora.data.cache import TensorCache, fingerprint
from sdlora.errors import TrainingError


def entry(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"mean": torch.randn(4, 8, 8, generator=generator), "std": torch.rand(4, 8, 8, generator=generator)}


def same(found: dict[str, torch.Tensor] | None, expected: dict[str, torch.Tensor]) -> bool:
    return found is not None and found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def filled(path: Path, *keys: str) -> TensorCache:
    cache = TensorCache(path)
    for number, key in enumerate(keys):
        cache.put(key, entry(number))
    cache.save()
    return cache


def test_round_trip_before_and_after_saving(tmp_path: Path) -> None:
    path = tmp_path / "new" / "latents.safetensors"
    cache = TensorCache(path)
    assert cache.get("a") is None
    cache.put("a", entry(0))
    assert same(cache.get("a"), entry(0))
    assert not path.exists()
    cache.save()
    for reader in (cache, TensorCache(path)):
        assert same(reader.get("a"), entry(0))
        assert reader.get("b") is None
    assert os.listdir(path.parent) == ["latents.safetensors"]  # no draft is left


def test_saving_adds_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    first = filled(path, "a", "b")
    assert same(first.get("a"), entry(0))
    second = TensorCache(path)
    assert same(second.get("b"), entry(1))
    second.put("a", entry(7))
    second.put("c", entry(8))
    second.save()
    first.put("d", entry(9))  # it read the file before the second wrote
    first.save()
    reader = TensorCache(path)
    assert [same(reader.get(key), entry(seed)) for key, seed in (("a", 7), ("b", 1), ("c", 8), ("d", 9))] == [True] * 4


def test_half_precision_slices_and_scalars_keep_type_and_value(tmp_path: Path) -> None:
    batch = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {"row": batch[1], "turned": batch[0].T, "half": batch[0].to(torch.bfloat16), "scalar": torch.tensor(3)}
    cache = TensorCache(tmp_path / "c.safetensors")
    cache.put("a", tensors)
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    batch.zero_()  # put() took a copy
    cache.save()
    found = TensorCache(tmp_path / "c.safetensors").get("a")
    assert same(found, expected)
    assert found is not None and found["half"].dtype == torch.bfloat16 and found["scalar"].shape == ()


def test_the_file_is_readable_by_others_and_names_its_version(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    before = os.umask(0o022)
    try:
        filled(path, "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "sdlora_cache": "1"}
        assert sorted(file.keys()) == ["a/mean", "a/std"]


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"not a cache at all", "half", "old version", "foreign"])
def test_a_damaged_file_is_told_and_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | str) -> None:
    path = tmp_path / "c.safetensors"
    filled(path, "a")
    if content == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif content == "old version":
        save_file({"a/mean": torch.zeros(1)}, path, {"format": "pt", "sdlora_cache": "0"})
    elif content == "foreign":
        save_file({"weight": torch.zeros(1)}, path)
    else:
        assert isinstance(content, bytes)
        path.write_bytes(content)
    cache = TensorCache(path)
    with caplog.at_level(logging.WARNING):
        assert cache.get("a") is None
        assert cache.get("b") is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once, not at every get
    assert "c.safetensors" in caplog.text
    cache.put("a", entry(5))
    cache.save()
    assert same(TensorCache(path).get("a"), entry(5))


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    cache = filled(path, "a")
    content = path.read_bytes()

    def full_disk(*arguments: object) -> None:
        Path(str(arguments[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    cache.put("b", entry(1))
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "save_file", full_disk)
        with pytest.raises(TrainingError, match="No space left"):
            cache.save()
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["c.safetensors"]
    cache.save()  # nothing was forgotten
    assert same(TensorCache(path).get("b"), entry(1)) and same(TensorCache(path).get("a"), entry(0))


def test_whoever_reads_the_old_file_keeps_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    cache = filled(path, "a")
    content = path.read_bytes()
    with path.open("rb") as reader:
        cache.put("b", entry(1))
        cache.save()
        assert reader.read() == content


def test_nothing_new_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    cache = filled(path, "a")
    before = path.stat()
    cache.get("a")
    cache.save()
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_key_moves_with_each_thing_the_latents_depend_on() -> None:
    placed = place((640, 512), resolution=512)
    left, top, right, bottom = placed.crop
    keys = [
        fingerprint("picture", astuple(placed), False, "vae"),
        fingerprint("picture changed", astuple(placed), False, "vae"),
        fingerprint("picture", astuple(place((640, 512), resolution=448)), False, "vae"),
        fingerprint("picture", astuple(replace(placed, crop=(left + 1, top, right + 1, bottom))), False, "vae"),
        fingerprint("picture", astuple(placed), True, "vae"),
        fingerprint("picture", astuple(placed), False, "another vae"),
    ]
    assert len(set(keys)) == len(keys)


def test_fingerprints_tell_parts_apart_and_forget_the_order_of_a_dict() -> None:
    parts: list[tuple[object, ...]] = [("ab",), ("a", "b"), (["a", "b"],), (1,), ("1",), (1.0,), (True,), (None,), ()]
    assert len({fingerprint(*part) for part in parts}) == len(parts)
    assert fingerprint({"a": 1, "b": [2, 3]}) == fingerprint({"b": (2, 3), "a": 1})
    # printf '["a",1.5]' | sha256sum
    assert fingerprint("a", 1.5) == "f3bb2af6dd5cf908f196d80b7bd15840493c85be0707a55124b7aa9600c3cb15"
    with pytest.raises(TypeError):
        fingerprint(Path("a"))  # what has no canonical form is refused, not guessed
