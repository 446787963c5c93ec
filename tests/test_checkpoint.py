"""Checkpoints: whole or not there, verified, the newest good one wins, old ones go last."""

import logging
from pathlib import Path

import pytest
import torch

from sdlora.checkpoint import Checkpoint, flatten, load_newest, save, unflatten


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
def test_damage_falls_back_to_the_one_before(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
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
    with caplog.at_level(logging.WARNING):
        newest = load_newest(tmp_path)
    assert newest is not None and newest.step == 1
    assert "step-00000002 is damaged" in caplog.text


def test_nothing_and_leftovers(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "none") is None
    (tmp_path / ".tmp-step-00000001").mkdir()
    assert load_newest(tmp_path) is None
    save(tmp_path, state(1), keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_flatten_round_trip() -> None:
    layers = {"unet.a.b": {"down": torch.ones(1), "up": torch.zeros(2)}}
    assert unflatten(flatten(layers)).keys() == layers.keys()
    assert unflatten(flatten(layers))["unet.a.b"].keys() == {"down", "up"}
