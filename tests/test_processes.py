"""Two processes over gloo train as one does with batches twice as large; where one dies, the other ends."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import build_model

from sdlora import config as configs
from sdlora import events, run
from sdlora.checkpoint import load_newest
from sdlora.errors import TrainingError
from sdlora.processes import ALONE, Processes, joined
from sdlora.train import train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so as not to import the libraries once more in each process")
OPTIONS = {
    "steps": 20,
    "precision": "fp32",
    "rank": 4,
    "alpha": 4,
    "rate": 1e-4,
    "alpha_rate": 1e-4,
    "threads": 1,
    "resolution": 32,
    "bucket_step": 8,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and seven pictures in two buckets, so that batches end short, some with one picture for two processes."""
    folder = tmp_path_factory.mktemp("processes")
    build_model(folder / "tiny")
    (folder / "pictures").mkdir()
    for number in range(7):
        size = (32, 32) if number < 5 else (48, 24)
        Image.effect_noise(size, 90).convert("RGB").save(folder / "pictures" / f"{number}.png")
        (folder / "pictures" / f"{number}.txt").write_text(f"a cat, {'abcdefg'[number]}")
    return folder


@pytest.fixture
def make(place: Path) -> Callable[..., run.Run]:
    def make(**changes: Any) -> run.Run:
        flags = {**OPTIONS, "model.base": place / "tiny", "data.folder": place / "pictures", "runs": place, **changes}
        return run.create(configs.load([], [(name.replace("__", "."), str(value)) for name, value in flags.items()]))

    return make


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def forked(work: Callable[[Processes], None], count: int = 2) -> list[int]:
    """Exit codes, or the negative number of the signal, of processes that do this together; 1 for an error, 2 for one of ours."""
    place, children = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}, []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
                torch.set_num_threads(1)  # the parent's other threads are not here
                with joined() as processes:
                    work(processes)
                code = 0
            except TrainingError:
                code = 2
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def together(of: run.Run) -> list[events.Event]:
    """What the first of two processes tells."""

    def work(processes: Processes) -> None:
        stream = train(of, processes)
        for _ in events.record(stream, of.events) if processes.is_first else stream:
            pass

    assert forked(work) == [0, 0]
    return events.read(of.events)


def losses(told: list[events.Event]) -> list[float]:
    return [event.loss for event in told if isinstance(event, events.Stepped)]


def assert_alike(one: run.Run, other: run.Run) -> None:
    """Of the trained matrices, to 1e-6 and a hundred-thousandth of themselves, a hundredth of a step: Adam turns what rounding leaves of a
    gradient of zero into steps."""
    ours, theirs = load_newest(one.checkpoints), load_newest(other.checkpoints)
    assert ours is not None and theirs is not None and ours.step == theirs.step
    assert ours.tensors["adapter"].keys() == theirs.tensors["adapter"].keys()
    for name, tensor in ours.tensors["adapter"].items():
        assert torch.allclose(tensor, theirs.tensors["adapter"][name], rtol=1e-5, atol=1e-6), name
    assert load_file(one.export).keys() == load_file(other.export).keys()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulation": 2, "steps": 6, "prior": 1, "pinned_embedding": 0.5, "shuffle_tags": "true", "caption_dropout": 0.3},
        {"text_encoder_steps": 4, "steps": 7, "ema": 0.9},
    ],
)
def test_two_processes_are_one_with_twice_the_batch(make: Callable[..., run.Run], options: dict[str, Any]) -> None:
    two, one = make(batch_size=1, **options), make(batch_size=2, **options)
    told = together(two)
    alone = list(train(one))
    assert len(losses(told)) == options.get("steps", 20)
    assert losses(told) == pytest.approx(losses(alone), abs=1e-6)
    assert_alike(two, one)
    plans = [event for of in (told, alone) for event in of if isinstance(event, events.Planned)]
    assert replace(plans[0], memory_bytes=0) == replace(plans[1], memory_bytes=0), "but for the memory, which is one process's"


def test_a_run_goes_on_with_another_number_of_processes(make: Callable[..., run.Run]) -> None:
    of, whole = make(batch_size=2, steps=8, checkpoint_every=4), make(batch_size=2, steps=8)
    for event in (stream := train(of)):
        if isinstance(event, events.Saved) and event.step == 4:
            break
    stream.close()
    text = (of.folder / "config.toml").read_text().replace("batch_size = 2", "batch_size = 1")
    (of.folder / "config.toml").write_text(text)
    assert events.Resumed(4) in together(run.open_run(of.folder))
    list(train(whole))
    assert_alike(of, whole)


def test_all_stop_at_one_step(make: Callable[..., run.Run]) -> None:
    of = make(steps=100_000)

    def work(processes: Processes) -> None:
        steps = 0
        for event in train(of, processes):
            if isinstance(event, events.Stepped):
                steps = event.step
                if not processes.is_first and steps == 3:
                    of.ask_to_stop()
        assert steps == min(processes.mean([steps])), "all have gone as far"

    assert forked(work) == [0, 0]
    newest = load_newest(of.checkpoints)
    assert newest is not None and newest.step in (3, 4)


@pytest.mark.parametrize("dying", [0, 1])
def test_where_one_dies_the_other_ends(make: Callable[..., run.Run], dying: int) -> None:
    of = make(steps=100_000, checkpoint_every=2)

    def work(processes: Processes) -> None:
        for event in train(of, processes):
            if isinstance(event, events.Stepped) and event.step == 5 and processes.rank == dying:
                os.kill(os.getpid(), signal.SIGKILL)

    began = time.monotonic()
    assert forked(work)[dying] == -signal.SIGKILL
    assert time.monotonic() - began < 60
    newest = load_newest(of.checkpoints)
    assert newest is not None and newest.step == 4


def test_shares_are_all_of_a_batch_once() -> None:
    for count in (1, 2, 3, 8):
        for of in range(20):
            shares = [list(Processes(rank, count).share(of)) for rank in range(count)]
            assert [place for share in shares for place in share] == list(range(of))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_processes_speak() -> None:
    def work(processes: Processes) -> None:
        rank = processes.rank
        assert processes.tell("/a/ü 猫" if processes.is_first else "") == "/a/ü 猫"
        assert processes.mean([rank, 4.0]) == [1.0, 4.0] and processes.most(rank) == 2.0
        assert processes.any(rank == 1) and not processes.any(False)
        one, two, none = (torch.zeros(2, requires_grad=True) for _ in range(3))
        one.grad = torch.full((2,), float(rank))
        if rank == 2:
            two.grad = torch.full((2,), 3.0)
        processes.average([one, two, none])
        assert one.grad.tolist() == [1.0, 1.0] and two.grad is not None and two.grad.tolist() == [1.0, 1.0] and none.grad is None

    assert forked(work, 3) == [0, 0, 0]


def test_alone_nothing_is_sent() -> None:
    with joined() as processes:
        assert processes is ALONE
    parameter = torch.zeros(2, requires_grad=True)
    ALONE.average([parameter])
    assert parameter.grad is None and ALONE.mean([2.0]) == [2.0] and ALONE.tell("a") == "a" and not ALONE.any(False)
