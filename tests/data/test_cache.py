"""The tensor cache: what goes in comes out, a key moves with whatever it depends on, and no damage stops a run."""

import itertools
import logging
import os
import subprocess
import sys
import time
import zlib
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sdlora.data import cache as cache_module
from sdlora.data.buckets import place
from sdlora.data.cache import TensorCache, fingerprint, prune, survey
from sdlora.errors import TrainingError


def entry(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"mean": torch.randn(4, 8, 8, generator=generator), "std": torch.rand(4, 8, 8, generator=generator)}


def same(found: dict[str, torch.Tensor] | None, expected: dict[str, torch.Tensor]) -> bool:
    return found is not None and found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def filled(folder: Path, *keys: str, model: str = "m") -> TensorCache:
    cache = TensorCache(folder, model)
    for number, key in enumerate(keys):
        cache.put(key, entry(number))
    cache.flush()
    return cache


def shards(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_round_trip_before_and_after_flushing(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "latents"
    cache = TensorCache(folder, "m")
    assert cache.get("a") is None and "a" not in cache
    cache.put("a", entry(0))
    assert same(cache.get("a"), entry(0)) and "a" in cache
    assert not folder.exists()
    cache.flush()
    for reader in (cache, TensorCache(folder, "m")):
        assert same(reader.get("a"), entry(0)) and "a" in reader
        assert reader.get("b") is None
    assert len(shards(folder)) == 1  # and no draft


def test_a_flush_adds_a_shard_and_touches_no_other(tmp_path: Path) -> None:
    filled(tmp_path, "a", "b")
    (first,) = shards(tmp_path)
    content, before = first.read_bytes(), first.stat()
    cache = filled(tmp_path, "c")
    cache.flush()  # nothing new writes nothing
    assert len(shards(tmp_path)) == 2
    after = first.stat()
    assert (first.read_bytes(), after.st_ino, after.st_mtime_ns) == (content, before.st_ino, before.st_mtime_ns)
    assert [same(cache.get(key), entry(seed)) for key, seed in (("a", 0), ("b", 1), ("c", 0))] == [True] * 3


def test_of_two_entries_of_one_key_the_later_counts(tmp_path: Path) -> None:
    filled(tmp_path, "a")
    cache = TensorCache(tmp_path, "m")
    cache.put("a", entry(7))
    cache.flush()
    assert same(cache.get("a"), entry(7)) and same(TensorCache(tmp_path, "m").get("a"), entry(7))


def test_processes_may_write_and_read_at_once(tmp_path: Path) -> None:
    code = """
import sys, torch
from pathlib import Path
from sdlora.data.cache import TensorCache
writer = int(sys.argv[2])
cache = TensorCache(Path(sys.argv[1]), "m")
for number in range(50):
    cache.put(f"{writer}-{number}", {"mean": torch.full((64,), 100.0 * writer + number)})
    cache.put("shared", {"mean": torch.ones(64)})
    cache.flush()
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(writer)]) for writer in range(2)]
    while any(process.poll() is None for process in writers):
        reader = TensorCache(tmp_path, "m")
        for key in list(reader._index()):  # whatever a reader sees is whole
            assert reader.get(key) is not None
    assert [process.returncode for process in writers] == [0, 0]
    reader = TensorCache(tmp_path, "m")
    for writer, number in itertools.product(range(2), range(50)):
        assert same(reader.get(f"{writer}-{number}"), {"mean": torch.full((64,), 100.0 * writer + number)})
    assert same(reader.get("shared"), {"mean": torch.ones(64)})


def test_half_precision_slices_and_scalars_keep_type_and_value(tmp_path: Path) -> None:
    batch = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {"row": batch[1], "turned": batch[0].T, "half": batch[0].to(torch.bfloat16), "scalar": torch.tensor(3)}
    cache = TensorCache(tmp_path, "m")
    cache.put("a", tensors)
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    batch.zero_()  # put() took a copy
    cache.flush()
    found = TensorCache(tmp_path, "m").get("a")
    assert same(found, expected)
    assert found is not None and found["half"].dtype == torch.bfloat16 and found["scalar"].shape == ()


def test_a_shard_names_its_version_and_model_and_can_be_read_without_us(tmp_path: Path) -> None:
    filled(tmp_path, "a", model="mini")
    (path,) = shards(tmp_path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "sdlora_cache": "2", "model": "mini"}
        assert sorted(file.keys()) == ["a/crc32", "a/mean", "a/std"]
        data = b"".join(entry(0)[name].numpy().tobytes() for name in ("mean", "std"))
        assert int(file.get_tensor("a/crc32")) == zlib.crc32(data)


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"not a cache at all", "half", "old version", "foreign"])
def test_a_damaged_shard_is_told_and_the_others_serve_on(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | str) -> None:
    filled(tmp_path, "a")
    (path,) = shards(tmp_path)
    filled(tmp_path, "b")
    if content == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif content == "old version":
        save_file({"a/mean": torch.zeros(1)}, path, {"format": "pt", "sdlora_cache": "0"})
    elif content == "foreign":
        save_file({"weight": torch.zeros(1)}, path)
    else:
        assert isinstance(content, bytes)
        path.write_bytes(content)
    cache = TensorCache(tmp_path, "m")
    with caplog.at_level(logging.WARNING):
        assert cache.get("a") is None and "a" not in cache
        assert same(cache.get("b"), entry(0))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert path.name in caplog.text
    cache.put("a", entry(5))
    cache.flush()
    assert same(TensorCache(tmp_path, "m").get("a"), entry(5))


@pytest.mark.parametrize(("name", "offset"), [("mean", 0), ("mean", 1023), ("std", 500)])
def test_one_bit_that_turned_costs_one_entry(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, offset: int) -> None:
    filled(tmp_path, "a", "b")
    (path,) = shards(tmp_path)
    content = bytearray(path.read_bytes())
    content[content.index(entry(1)[name].numpy().tobytes()) + offset] ^= 0x10
    path.write_bytes(content)
    cache = TensorCache(tmp_path, "m")
    assert "b" in cache
    with caplog.at_level(logging.WARNING):
        assert cache.get("b") is None and "b" not in cache
    assert path.name in caplog.text and "entry b" in caplog.text
    assert same(cache.get("a"), entry(0))
    cache.put("b", entry(1))
    cache.flush()
    assert same(TensorCache(tmp_path, "m").get("b"), entry(1))  # the new shard counts, though the damaged one is still there


def test_a_shard_that_is_deleted_under_a_reader_is_computed_anew(tmp_path: Path) -> None:
    filled(tmp_path, "a")
    early, late = TensorCache(tmp_path, "m"), TensorCache(tmp_path, "m")
    assert same(early.get("a"), entry(0)) and "a" in late
    shards(tmp_path)[0].unlink()
    assert late.get("a") is None
    if os.name == "posix":
        assert same(early.get("a"), entry(0))  # it has the file open


def test_a_write_that_fails_says_so_and_forgets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(tmp_path, "a")

    def full_disk(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    cache.put("b", entry(1))
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "write_durably", full_disk)
        with pytest.raises(TrainingError, match=r"No space left.*prune"):
            cache.flush()
    cache.flush()
    assert same(TensorCache(tmp_path, "m").get("b"), entry(1)) and same(TensorCache(tmp_path, "m").get("a"), entry(0))


def test_only_some_shards_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "OPEN_SHARDS", 2)
    for key in "abcde":
        filled(tmp_path, key)
    cache = TensorCache(tmp_path, "m")
    for key in "abcdeabcde":
        assert same(cache.get(key), entry(0))
        assert len(cache._opened) <= 2


def test_survey_counts_each_key_once(tmp_path: Path) -> None:
    filled(tmp_path / "latents-1", "a", "b", model="mini")
    filled(tmp_path / "latents-1", "b", "c", model="other")
    filled(tmp_path / "prompts-1", "a")
    (tmp_path / "prompts-1" / "9.safetensors").write_bytes(b"x")
    (tmp_path / "not ours").mkdir()
    latents, prompts = survey(tmp_path)
    assert (latents.folder.name, latents.models, latents.entries, latents.damaged) == ("latents-1", ("mini", "other"), 3, ())
    assert latents.bytes == sum(path.stat().st_size for path in shards(tmp_path / "latents-1"))
    assert (prompts.entries, prompts.damaged) == (1, (tmp_path / "prompts-1" / "9.safetensors",))
    assert survey(tmp_path / "nowhere") == []


def test_prune_takes_what_was_not_used_and_leaves_what_is_being_written(tmp_path: Path) -> None:
    folder = tmp_path / "latents-1"
    for key in ("old", "used", "new"):
        filled(folder, key)
    old, used, new = shards(folder)
    draft, left, damaged = folder / ".tmp-1-x.safetensors", folder / ".tmp-2-y.safetensors", folder / "9.safetensors"
    for path in (draft, left, damaged):
        path.write_bytes(b"xy")
    for path, days in ((old, 31), (used, 31), (new, 29), (left, 2)):
        then = time.time() - days * 24 * 3600
        os.utime(path, (then, then))
    assert same(TensorCache(folder, "m").get("used"), entry(0))  # which marks it
    gone = old.stat().st_size + left.stat().st_size + 2
    assert prune(tmp_path, 30) == (3, gone)
    assert set(shards(folder)) == {used, new, draft}
    assert prune(tmp_path, 0)[0] == 2 and shards(folder) == [draft]
    assert prune(tmp_path / "nowhere", 0) == (0, 0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="where Linux says what a process holds")
def test_reading_all_of_a_cache_takes_no_memory_in_proportion(tmp_path: Path) -> None:
    """64 MB of entries in 256 shards; the benchmark does it with 100,000 entries."""
    code = """
import sys, torch
from pathlib import Path
from sdlora.data.cache import TensorCache
def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) // 1024
folder = Path(sys.argv[1])
writer = TensorCache(folder, "m")
for number in range(1024):
    writer.put(str(number), {"mean": torch.full((2, 64, 64), float(number)), "std": torch.ones(2, 64, 64)})
    if number % 4 == 3:
        writer.flush()
cache = TensorCache(folder, "m")
assert "0" in cache
before = held()
for number in range(1024):
    assert cache.get(str(number * 37 % 1024))["mean"][0, 0, 0] == number * 37 % 1024
print(held() - before)
"""
    told = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(told.stdout) < 16  # MB


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
