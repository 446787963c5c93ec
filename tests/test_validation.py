"""Held-out pictures: which they are, that nothing trains them, and that the best step is kept, through kills, too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import build_model

from sdlora import config as configs
from sdlora import events, run
from sdlora.errors import ConfigError
from sdlora.items import find_items
from sdlora.train import train
from sdlora.validation import hold_out


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    build_model(folder / "tiny")
    for name in ("subject", "others"):
        (folder / name).mkdir()
        for number in range(6):
            pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(folder / name / f"{number}.png")
            (folder / name / f"{number}.txt").write_text("a cat, {red|blue}, big")
    return folder


@pytest.fixture
def make(place: Path, tmp_path: Path) -> Any:
    def make(**changes: Any) -> run.Run:
        flags = {
            "model.base": place / "tiny",
            "data.folder": place / "subject",
            "resolution": 32,
            "bucket_step": 8,
            "steps": 8,
            "batch_size": 2,
            "precision": "fp32",
            "output.runs": tmp_path,
            "rank": 2,
            "rate": 0.03,
            "holdout": 2,
            "validate_every": 2,
            "checkpoint_every": 3,
            "threads": 1,
        }
        return run.create(configs.load([], [(name.replace("__", "."), str(value)) for name, value in (flags | changes).items()]))

    return make


def validated(stream: Any) -> list[events.Validated]:
    return [event for event in stream if isinstance(event, events.Validated)]


def test_a_picture_is_held_out_however_it_is_shown(make: Any, place: Path) -> None:
    config = make(flip="true", colour_variants=1, regularisation_folder=place / "others", caption_dropout=0.5, shuffle_tags="true").config
    items, _ = find_items(config)
    training, held_out = hold_out(items, config)
    paths = {item.example.path for item in held_out}
    assert len(held_out) == len(paths) == 2 and all(path.parent.name == "subject" for path in paths)
    assert not paths & {item.example.path for item in training} and len(training) == len(items) - 2 * 4
    assert not any(item.mirrored or item.colours or item.rules.dropout or item.rules.shuffle for item in held_out)
    assert [item.example.path for item in hold_out(items, config)[1]] == [item.example.path for item in held_out]
    others = hold_out(items, make(flip="true", seed=3).config)[1]
    assert {item.example.path for item in others} != paths
    assert hold_out(items, make(holdout=0).config) == (items, [])


def test_all_cannot_be_held_out(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.holdout = 6 would leave nothing to train: there are 6"):
        list(train(make(holdout=6)))


def test_the_lowest_step_is_kept(make: Any) -> None:
    of, told, states = make(steps=10), [], {}
    for event in train(of):
        if isinstance(event, events.Validated):
            told.append(event)
            if event.path:
                assert event.path == str(of.best)
                states[event.loss] = load_file(of.best)
    assert [event.step for event in told] == [0, 2, 4, 6, 8, 10] and not told[0].path
    assert len({event.loss for event in told}) == len(told)  # it moves with the LoRA
    losses = [event.loss for event in told[1:]]
    assert [bool(event.path) for event in told[1:]] == [loss == min(losses[: n + 1]) for n, loss in enumerate(losses)]
    kept = load_file(of.best)
    assert all(torch.equal(kept[key], tensor) for key, tensor in states[min(losses)].items())


def test_looking_changes_nothing_that_is_trained(make: Any) -> None:
    runs = [make(validate_every=every, dropout=0.2, learned_alpha="true") for every in (1, 1000)]
    first, second = ([e.loss for e in train(of) if isinstance(e, events.Stepped)] for of in runs)
    assert first == second
    ours, theirs = (load_file(of.export) for of in runs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("step", [3, 6])
def test_a_killed_run_finds_the_same_best(make: Any, step: int) -> None:
    straight, broken = make(), make()
    whole = validated(train(straight))
    stream = train(broken)
    first = []
    for event in stream:
        first.append(event)
        if isinstance(event, events.Saved) and event.step == step:
            break
    stream.close()
    again = validated(train(broken))
    told = {event.step: (event.loss, bool(event.path)) for event in [*validated(first), *again]}
    assert told == {event.step: (event.loss, bool(event.path)) for event in whole}
    assert min(event.step for event in again) > step
    ours, theirs = (load_file(of.best) for of in (straight, broken))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
