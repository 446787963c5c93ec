"""Checkpoints: whole or not there, verified, the newest good one wins, old ones go last."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as serialise

from sdlora.checkpoint import Checkpoint, flatten, load_newest, newest_whole, save, unflatten
from sdlora.errors import TrainingError


def state(step: int) -> Checkpoint:
    return Checkpoint(step, {"adapter": {"a/down": torch.full((2, 3), float(step)), "a/alpha": torch.tensor(1.5)}}, {"threads": 2})


def test_round_trip_and_pruning(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, state(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    newest = load_newest(tmp_path)
    assert newest is not None and newest.step == 10 and newest.state == {"threads": 2}
    assert torch.equal(newest.tensors["adapter"]["a/down"], torch.full((2, 3), 10.0))
    assert newest.tensors["adapter"]["a/alpha"].shape == ()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_damage_falls_back_to_the_one_before_and_is_told(tmp_path: Path, damage: str) -> None:
    save(tmp_path, state(1), keep=2)
    victim = save(tmp_path, state(2), keep=2) / "adapter.safetensors"
    data = victim.read_bytes()
    if damage == "flip":
        victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        victim.write_bytes(data[:-3])
    elif damage == "remove":
        victim.unlink()
    else:
        victim.with_name("manifest.json").write_text("{")
    newest = load_newest(tmp_path)
    assert newest is not None and newest.step == 1
    (told,) = newest.damaged
    assert told.startswith("step-00000002 (")
    assert newest_whole(tmp_path) == tmp_path / "step-00000001"
    save(tmp_path, state(2), keep=2)  # in the damaged one's place
    again = load_newest(tmp_path)
    assert again is not None and again.step == 2 and not again.damaged


def test_where_all_are_damaged_nothing_is_begun_anew_in_silence(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, state(step), keep=2) / "state.json").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"All checkpoints .* step-00000002 .*, step-00000001 .* to begin anew"):
        load_newest(tmp_path)
    assert newest_whole(tmp_path) is None


def test_two_whole_ones_stay_however_many_are_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        victim = save(tmp_path, state(step), keep=3)
    shutil.rmtree(victim)  # the third; then a damaged one in its place
    victim.mkdir()
    save(tmp_path, state(4), keep=2)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["2", "3", "4"]
    save(tmp_path, state(5), keep=2)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["4", "5"]


def test_where_the_disk_has_no_room_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, state(1), keep=2)
    written = sum(p.stat().st_size for p in (tmp_path / "step-00000001").iterdir())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=written - 1))
    monkeypatch.setattr("sdlora.checkpoint.write_synced", None)  # which must not be reached
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, state(2), keep=2)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=written))
    save(tmp_path, state(2), keep=2)


def test_nothing_and_leftovers(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "none") is None
    (tmp_path / ".tmp-1-step-00000001").mkdir()
    assert load_newest(tmp_path) is None and newest_whole(tmp_path) is None


def test_flatten_round_trip() -> None:
    layers = {"unet.a.b": {"down": torch.ones(1), "up": torch.zeros(2)}}
    assert unflatten(flatten(layers)).keys() == layers.keys()
    assert unflatten(flatten(layers))["unet.a.b"].keys() == {"down", "up"}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks the system which file a descriptor is of")
def test_all_is_on_the_disk_before_the_name_and_the_name_before_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, state(step), keep=2)
    told: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        told.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (told.append(f"rename {Path(b).name}"), replace(a, b))[1])
    save(tmp_path, state(3), keep=2)
    draft = f".tmp-{os.getpid()}-step-00000003"
    assert told[:5] == ["adapter.safetensors", "state.json", "manifest.json", draft, "rename step-00000003"]
    assert told[5:] == [tmp_path.name, f"rename .tmp-{os.getpid()}-old-step-00000001"]


def forged(folder: Path, name: str, data: bytes, listed_as: str | None = None) -> None:
    """Put `data` in the place of a checkpoint's file, with its right hash in the manifest."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[listed_as or name] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def header(text: str, body: bytes = bytes(8)) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + body


F32 = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
FORGERIES: dict[str, tuple[str, bytes]] = {
    "a pickle": ("adapter.safetensors", pickle.dumps(print)),
    "a name twice": ("adapter.safetensors", header(f'{{"a/up":{F32},"a/up":{F32}}}')),
    "a large header": ("optimizer.safetensors", header("{" + " " * 5_000_000 + "}", b"")),
    "not finite": ("adapter.safetensors", serialise({"a/up": torch.tensor([1.0, float("inf")])})),
    "another step": ("state.json", b'{"step": 1}'),
    "no step": ("state.json", b"[]"),
    "a deep state": ("state.json", b"[" * 100_000),
}


@pytest.mark.parametrize("name, data", FORGERIES.values(), ids=FORGERIES.keys())
def test_right_hashes_do_not_make_a_checkpoint_sound(tmp_path: Path, name: str, data: bytes) -> None:
    save(tmp_path, state(1), keep=2)
    forged(save(tmp_path, state(2), keep=2), name, data)
    newest = load_newest(tmp_path)
    assert newest is not None and newest.step == 1 and len(newest.damaged) == 1


@pytest.mark.parametrize("path", ["../secret.safetensors", "sub/../../secret.safetensors", "{absolute}"])
def test_a_manifest_reaches_nothing_outside_its_folder(tmp_path: Path, path: str) -> None:
    save(tmp_path / "steps", state(1), keep=2)
    of = save(tmp_path / "steps", state(2), keep=2)
    secret = serialise({"a": torch.ones(1)})
    (tmp_path / "steps" / "secret.safetensors").write_bytes(secret)
    forged(of, "extra.safetensors", secret, listed_as=path.replace("{absolute}", str(tmp_path / "steps" / "secret.safetensors")))
    newest = load_newest(tmp_path / "steps")
    assert newest is not None and newest.step == 1 and "names other files" in newest.damaged[0]
