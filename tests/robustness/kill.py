"""What it takes to lose a run: kills, signals, full disks, failing calls and damaged files, on a tiny model, with figures.

    python tests/robustness/kill.py                           # what the test suite runs: a minute on an idle core
    python tests/robustness/kill.py --kills 300 --all         # an hour: also every optimizer and kind, and 10,000 steps

Runs are forked from this process, which has imported everything, and which itself never trains: what a fork would inherit of a pool of
threads does not work in it. For Linux and macOS.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}

import psutil
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import build_model
from variants import EVERY_KIND, EVERY_OPTIMIZER

from sdlora import checkpoint, config, events, files, plan, preview, run, saving
from sdlora.checkpoint import Checkpoint
from sdlora.commands.training import stop_on_signals
from sdlora.lora import formats
from sdlora.lora.change import Change, Factors
from sdlora.objective import Objective
from sdlora.train import train

plan.estimate_memory = lambda *_: 0  # a quarter of the time that so short a run takes

Figures = dict[str, float]
STEPS = 8  # of a run
IN_SAVE = 0.6  # share of the kills that shall fall inside a save: while fewer have, the next waits for one


# ---------------------------------------------------------------- a place with runs


class Place:
    """A tiny model and three pictures, and runs of them that know how they would end undisturbed."""

    def __init__(self, folder: Path):
        self.folder = folder
        build_model(folder / "tiny")
        (folder / "pictures").mkdir()
        for number in range(3):
            Image.new("RGB", (32, 32), (80 * number, 90, 200)).save(folder / "pictures" / f"{number}.png")
            (folder / "pictures" / f"{number}.txt").write_text("a cat")

    def make(self, runs: Path | None = None, **changes: Any) -> Path:
        options = {
            "model.base": self.folder / "tiny",
            "data.folder": self.folder / "pictures",
            "data.cache": self.folder / "cache",
            "resolution": 32,
            "bucket_step": 8,
            "precision": "fp32",
            "threads": 1,
            "steps": STEPS,
            "checkpoint_every": 2,
            "rank": 2,
            "rate": 1e-2,
            "lora.unet": '["attention"]',
            "output.runs": runs or self.folder / "runs",
        }
        options |= {name.replace("__", "."): value for name, value in changes.items()}
        return run.create(config.load([], [(name, str(value)) for name, value in options.items()])).folder

    def finished(self, **changes: Any) -> Path:
        """A run that nothing disturbed."""
        folder = self.make(**changes)
        assert wait(fork(lambda: train_to_the_end(folder))) == 0
        return folder


def train_to_the_end(folder: Path) -> None:
    torch.set_num_threads(1)
    of = run.open_run(folder)
    with of.locked():
        of.stop_file.unlink(missing_ok=True)
        for _ in events.record(train(of), of.events):
            pass


def fork(work: Callable[[], None]) -> int:
    """Process id of a child that does `work` and ends with code 0, or 1."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    """Exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def series(folder: Path) -> list[tuple[int, float]]:
    return [(event.step, event.loss) for event in events.steps_of(events.read(folder / "events.jsonl"))]


def same_tensors(one: Path, other: Path) -> bool:
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def same_end(folder: Path, straight: Path) -> bool:
    """Whether weights, optimizer and losses are to the bit those of the undisturbed run."""
    newest, of_straight = (checkpoint.newest_whole(at / "checkpoints") for at in (folder, straight))
    if newest is None or of_straight is None or newest.name != of_straight.name:
        return False
    tensors = [(newest / file.name, file) for file in of_straight.glob("*.safetensors")]
    exports = (folder / "lora.safetensors", straight / "lora.safetensors")
    return series(folder) == series(straight) and all(same_tensors(*pair) for pair in [*tensors, exports])


def strays(folder: Path, straight: Path) -> int:
    """Files of a run that an undisturbed one does not have, but for what stopped ones export. The newest checkpoint and the one before
    stand for each other, whatever their steps are."""

    def names(at: Path) -> set[str]:
        found = {str(path.relative_to(at)) for path in at.rglob("*")}
        for number, path in enumerate(sorted((at / "checkpoints").glob("step-*"), reverse=True)):
            found = {name.replace(path.name, f"checkpoint {number}") for name in found}
        return {name for name in found if not name.startswith("lora-step")}

    return len(names(folder) - names(straight))


# ---------------------------------------------------------------- kills and signals


def kills(place: Place, count: int, a_run: int, seed: int = 0) -> Figures:
    """SIGKILL at random moments, `a_run` in each run, then the run is let end. A file of an earlier run lies where the export goes."""
    rng = random.Random(seed)
    began = time.monotonic()
    straight = place.finished()
    took, earlier = time.monotonic() - began, place.finished(steps=1) / "lora.safetensors"
    found = dict.fromkeys(("kills", "inside a save", "runs", "bit-identical", "stray files", "exports that did not load"), 0)
    while found["kills"] < count:
        folder = place.make()
        export = folder / "lora.safetensors"
        shutil.copy(earlier, export)
        for _ in range(a_run):
            died, inside, broken = killed(folder, export, rng, took, found["inside a save"] <= IN_SAVE * found["kills"])
            found["kills"] += died
            found["inside a save"] += inside
            found["exports that did not load"] += broken
            if not died:
                break
        found["runs"] += 1
        assert wait(fork(lambda folder=folder: train_to_the_end(folder))) == 0  # type: ignore[misc]
        found["bit-identical"] += same_end(folder, straight)
        found["stray files"] += strays(folder, straight)
        shutil.rmtree(folder)
    return dict(found)


def killed(folder: Path, export: Path, rng: random.Random, took: float, in_save: bool) -> tuple[bool, bool, int]:
    """Train and kill, aiming at a save or not. Whether it died of that, whether that was in the midst of a save or an export, and how often
    the export could not be loaded meanwhile."""
    reading, writing = os.pipe()
    pid = fork(lambda: watched(folder, writing))
    os.close(writing)
    broken, saves = 0, rng.randint(1, 3) if in_save else 0
    told, until = b"", None if saves else time.monotonic() + rng.uniform(0.2, 1) * took
    while (left := 0.01 if until is None else until - time.monotonic()) > 0:
        if select.select([reading], [], [], min(left, 0.01))[0]:
            more = os.read(reading, 100)
            if not more:
                break  # it has ended
            told += more
        if until is None and told.count(b"(") >= saves:
            until = time.monotonic() + 0.03 * rng.random() ** 3  # a save takes 2 to 30 ms, as the machine is fast or slow
            continue
        broken += not loads(export)
    os.kill(pid, signal.SIGKILL)
    died = wait(pid) == -signal.SIGKILL
    while more := os.read(reading, 100):
        told += more
    os.close(reading)
    return died, died and told.count(b"(") > told.count(b")"), broken + (not loads(export))


def watched(folder: Path, pipe: int) -> None:
    """Train, and say in the pipe when a save or an export begins and ends."""
    for module in (checkpoint, formats):

        def told(*arguments: Any, save: Callable[..., Any] = module.save, **options: Any) -> Any:
            os.write(pipe, b"(")
            result = save(*arguments, **options)
            os.write(pipe, b")")
            return result

        module.save = told  # type: ignore[attr-defined]
    train_to_the_end(folder)


def loads(file: Path) -> bool:
    try:
        return all(tensor.isfinite().all() for tensor in load_file(file).values())
    except Exception:
        return False


def signals(place: Place, count: int, seed: int = 1) -> Figures:
    """SIGINT or SIGTERM at random moments behind the start: the run ends by itself with code 0, and goes on to the same bits."""
    rng = random.Random(seed)
    began = time.monotonic()
    straight = place.finished()
    took = time.monotonic() - began
    found = dict.fromkeys(("signals", "ended with code 0", "runs", "bit-identical", "stray files"), 0)
    while found["signals"] < count:
        folder, steps = place.make(), 0
        while steps < STEPS:
            reading, writing = os.pipe()
            pid = fork(lambda folder=folder, writing=writing: train_until_asked(folder, writing))  # type: ignore[misc]
            os.close(writing)
            os.read(reading, 1)  # the handlers stand
            os.close(reading)
            time.sleep(rng.uniform(0, took))
            os.kill(pid, rng.choice([signal.SIGINT, signal.SIGTERM]))
            found["ended with code 0"] += wait(pid) == 0
            found["signals"] += 1
            steps = max([0, *(step for step, _ in series(folder))])
        found["runs"] += 1
        found["bit-identical"] += same_end(folder, straight)
        found["stray files"] += strays(folder, straight)
    return dict(found)


def train_until_asked(folder: Path, pipe: int) -> None:
    of = run.open_run(folder)
    sys.stderr = io.StringIO()  # "Stopping after this step"
    with stop_on_signals(of, at_once=True):
        os.write(pipe, b"x")
        os.close(pipe)
        torch.set_num_threads(1)
        with of.locked():
            for _ in events.record(train(of), of.events):
                pass
            of.stop_file.unlink(missing_ok=True)


# ---------------------------------------------------------------- failing calls


class Calls:
    """Counts what is asked of the file system, and lets one call fail."""

    HOOKED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir")

    def __init__(self) -> None:
        self.active, self.seen, self.fails = False, 0, -1
        sys.addaudithook(self.audit)

    def audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.active and name in self.HOOKED:
            self.tick(name)

    def tick(self, name: str) -> None:
        self.seen += 1
        if self.seen - 1 == self.fails:
            raise OSError(errno.EIO, f"{name} fails")

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            self.tick(call.__name__)
            return call(*arguments, **options)

        return counting

    @contextmanager
    def failing(self, number: int) -> Iterator[None]:
        """The call of this number, from 0, fails inside; none for -1."""
        kept = {(os, "fsync"): os.fsync, (shutil, "disk_usage"): shutil.disk_usage, (io, "open"): io.open}
        for (module, name), call in kept.items():
            setattr(module, name, self.counted(call))
        io.open = lambda *arguments, **options: Written(kept[io, "open"](*arguments, **options), self.tick)  # type: ignore[assignment]
        self.active, self.seen, self.fails = True, 0, number
        try:
            yield
        finally:
            self.active = False
            for (module, name), call in kept.items():
                setattr(module, name, call)


class Written:
    """A file whose writes are counted."""

    def __init__(self, file: Any, tick: Callable[[str], None]):
        self.file, self.tick = file, tick

    def write(self, data: bytes) -> Any:
        self.file.write(data[: len(data) // 2])  # what a failing write leaves
        self.tick("write")
        return self.file.write(data[len(data) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def small_state(step: int) -> Checkpoint:
    return Checkpoint(step, {part: {"a/down": torch.full((2, 3), float(step))} for part in ("adapter", "optimizer")}, {"bad_steps": 0})


def two_checkpoints(folder: Path) -> Path:
    for step in (1, 2) if not folder.exists() else ():
        checkpoint.save(folder, small_state(step), keep=2)
    return folder


def failing_calls(folder: Path) -> Figures:
    """Each call of a save fails once; and each call of an export."""
    calls = Calls()
    found = dict.fromkeys(("calls of a save", "a valid checkpoint stays", "calls of an export", "a valid export stays", "stray files"), 0)
    for number in range(-1, 10_000):
        at = shutil.copytree(two_checkpoints(folder / "whole"), folder / str(number))
        with calls.failing(number), suppress(OSError):
            checkpoint.save(at, small_state(3), keep=2)
        if number >= calls.seen:
            break
        newest = checkpoint.load_newest(at)
        assert newest is not None
        valid = not newest.damaged and torch.equal(newest.tensors["adapter"]["a/down"], torch.full((2, 3), float(newest.step)))
        checkpoint.save(at, small_state(3), keep=2)
        files.sweep(at)
        found["stray files"] += {path.name for path in at.iterdir()} != {"step-00000002", "step-00000003"}
        found["calls of a save"] += number >= 0
        found["a valid checkpoint stays"] += number >= 0 and valid and newest.step in (2, 3)
    export, changes = folder / "a.safetensors", {"unet.a.to_q": Change(Factors(torch.ones(2, 3), torch.ones(4, 2), 1.0))}
    for number in range(-1, 10_000):
        formats.save(export, changes, 1.0, {"written": "before"})
        with calls.failing(number), suppress(OSError):
            formats.save(export, changes, 1.0, {"written": "anew"})
        if number >= calls.seen:
            break
        found["calls of an export"] += number >= 0
        found["a valid export stays"] += number >= 0 and formats.load(export)[1]["written"] in ("before", "anew")
        files.sweep(folder)
    found["stray files"] += sum(path.name.startswith(files.DRAFT_PREFIX) for path in folder.iterdir())
    return dict(found)


# ---------------------------------------------------------------- full disks


# Where the disk becomes full: what is called for which time.
STAGES: dict[str, tuple[Any, str, int]] = {
    "before a save": (checkpoint, "check_room", 1),
    "at a checkpoint's first file": (checkpoint, "write_synced", 1),
    "at its second": (checkpoint, "write_synced", 2),
    "at its third": (checkpoint, "write_synced", 3),
    "at its state": (checkpoint, "write_synced", 4),
    "at its manifest": (checkpoint, "write_synced", 5),
    "in a step, so that events wait": (Objective, "__call__", 5),
    "at the last checkpoint": (checkpoint, "write_synced", 18),
    "at the export": (formats, "write", 1),
    "at a preview": (preview, "save_picture", 2),
}
DISK = 3 * 2**20  # bytes


def full_disks(place: Place) -> Figures:
    """The disk becomes full at each stage, and has room again when the run waits or, for a preview, when it has gone without."""
    options = {"prompts": "a cat --s 2", "preview.every": 4}
    straight = place.finished(**options)
    found = dict.fromkeys(("stages", "told", "bit-identical", "stray files"), 0)
    for stage in STAGES:
        with small_disk(place.folder / "disk") as disk:
            if disk is None:
                return {}
            folder = place.make(runs=disk / "runs", **options)
            assert wait(fork(lambda folder=folder, disk=disk, stage=stage: on_full_disk(folder, disk, *STAGES[stage]))) == 0  # type: ignore[misc]
            warned = [e.message for e in events.read(folder / "events.jsonl") if isinstance(e, events.Warned)]
            found["stages"] += 1
            found["told"] += any("is full" in text or "no preview" in text for text in warned)
            found["bit-identical"] += same_end(folder, straight)
            found["stray files"] += strays(folder, straight)
    return dict(found)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """None where mounting is not permitted."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def on_full_disk(folder: Path, disk: Path, module: Any, name: str, number: int) -> None:
    """Train; the disk is full from the call of `name` of this number on."""
    ballast, called, real = disk / "ballast", [0], getattr(module, name)

    def fill() -> None:
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def hooked(*arguments: Any, **options: Any) -> Any:
        called[0] += 1
        if called[0] == number:
            fill()
        try:
            return real(*arguments, **options)
        finally:
            if module is preview:
                ballast.unlink(missing_ok=True)

    setattr(module, name, hooked)
    saving.time = type("Clock", (), {"sleep": staticmethod(lambda seconds: ballast.unlink(missing_ok=True))})  # type: ignore[assignment]
    train_to_the_end(folder)


# ---------------------------------------------------------------- damage


def corruptions(folder: Path, count: int, seed: int = 2) -> Figures:
    """The newest checkpoint is damaged in a random place: the one before is loaded, and it is said."""
    rng = random.Random(seed)
    found = dict.fromkeys(("corruptions", "the previous one is loaded and the damage told"), 0)
    for number in range(count):
        at = shutil.copytree(two_checkpoints(folder / "whole"), folder / str(number))
        victim = rng.choice(sorted((at / "step-00000002").iterdir()))
        data = bytearray(victim.read_bytes())
        place = rng.randrange(len(data))
        match rng.choice(["flip", "cut", "zeros", "gone", "empty"]):
            case "flip":
                data[place] ^= 1 << rng.randrange(8)
            case "cut":
                del data[place:]
            case "zeros":
                data[place:] = bytes(len(data) - place)
            case "empty":
                data.clear()
            case "gone":
                victim.unlink()
        if victim.exists():
            if data == victim.read_bytes():
                continue  # those bytes were zeros
            victim.write_bytes(data)
        newest = checkpoint.load_newest(at)
        found["corruptions"] += 1
        told = newest is not None and len(newest.damaged) == 1
        found["the previous one is loaded and the damage told"] += newest is not None and newest.step == 1 and told
    return dict(found)


# ---------------------------------------------------------------- resuming, and long runs


def resumes(place: Place, variants: dict[str, dict[str, Any]], steps: int = 6) -> Figures:
    """Go on from every step of a short run."""
    found = dict.fromkeys(("variants", "resumes", "bit-identical"), 0)
    for options in variants.values():
        options = {"steps": steps, "checkpoint_every": 1, "keep_checkpoints": steps, "preview.every": 3, **options}
        straight = place.finished(**options)
        for step in range(1, steps):
            folder = place.make(**options)
            for done in range(1, step + 1):
                shutil.copytree(straight / "checkpoints" / f"step-{done:08d}", folder / "checkpoints" / f"step-{done:08d}")
            assert wait(fork(lambda folder=folder: train_to_the_end(folder))) == 0  # type: ignore[misc]
            kept = series(straight)[step:]
            newest, of_straight = (at / "checkpoints" / f"step-{steps:08d}" for at in (folder, straight))
            same = all(same_tensors(newest / file.name, file) for file in of_straight.glob("*.safetensors"))
            found["resumes"] += 1
            found["bit-identical"] += same and series(folder) == kept
        found["variants"] += 1
    return dict(found)


def long_run(place: Place, steps: int) -> Figures:
    """Memory and open files of one run, over its second half."""
    folder = place.make(steps=steps, checkpoint_every=500, **{"lora.text_encoder": "[]", "lora.unet": '["projection"]'})
    reading, writing = os.pipe()

    def work() -> None:
        torch.set_num_threads(1)
        me, of, rows = psutil.Process(), run.open_run(folder), []
        for event in events.record(train(of), of.events):
            if isinstance(event, events.Stepped) and event.step % 100 == 0 and event.step >= steps // 2:
                rows.append((event.step, me.memory_info().rss, me.num_fds()))
        os.write(writing, json.dumps(rows).encode())

    pid = fork(work)
    os.close(writing)
    told = b""
    while more := os.read(reading, 65536):
        told += more
    assert wait(pid) == 0
    at, bytes_, opened = (torch.tensor(row, dtype=torch.float64) for row in zip(*json.loads(told), strict=True))
    slope = float(((at - at.mean()) * (bytes_ - bytes_.mean())).sum() / ((at - at.mean()) ** 2).sum())  # least squares
    return {"steps": steps, "MB per 1,000 steps": round(slope * 1000 / 1e6, 3), "open files more": float(opened[-1] - opened[0])}


# ---------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signals", type=int, default=6)
    parser.add_argument("--all", action="store_true", help="every optimizer and kind resumed at every step, 50 signals, a long run")
    parser.add_argument("--steps", type=int, default=10_000, help="of the long run")
    parser.add_argument("--only", nargs="*", help="names of what to measure, as printed")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parsed = parser.parse_args()
    wanted: dict[str, Callable[[Place], Figures]] = {
        "SIGKILL": lambda place: kills(place, parsed.kills, a_run=5),
        "signals": lambda place: signals(place, 50 if parsed.all else parsed.signals),
        "failing calls": lambda place: failing_calls(place.folder / "failing"),
        "full disks": full_disks,
        "corruptions": lambda place: corruptions(place.folder / "corrupt", 220),
        "resumed at every step": lambda place: resumes(place, EVERY_KIND | EVERY_OPTIMIZER if parsed.all else {"plain": {}}),
    }
    if parsed.all:
        wanted["long run"] = lambda place: long_run(place, parsed.steps)
    told: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "failing").mkdir()
        place = Place(Path(folder))
        for name in parsed.only or wanted:
            began = time.monotonic()
            told[name] = wanted[name](place)
            figures = ", ".join(f"{figure} {value}" for figure, value in told[name].items()) or "not measured: mounting is not permitted"
            print(f"{name}: {figures}   ({time.monotonic() - began:.0f} s)", flush=True)
    if parsed.json:
        parsed.json.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
