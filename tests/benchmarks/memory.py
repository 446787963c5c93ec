"""The estimated and the measured peak of a training step, for Stable Diffusion 1.5 at full size with random weights; and the estimates
for the presets on a GPU.

    python tests/benchmarks/memory.py                          # up to 8 GB of memory and 2.3 GB of disk; a minute or four a row
    python tests/benchmarks/memory.py --rows "256 px" "prior"
    python tests/benchmarks/memory.py --model FOLDER           # another model, or the same again
    python tests/benchmarks/memory.py --presets                # what stands in configs/*low_vram.toml: estimates alone, two minutes

Each row trains two steps in a process of its own. On a CPU what counts is the process's resident memory, looked at every 10 ms from the
first step on; on CUDA what the allocator held. Ratios above 1 promise too much memory, below 1 too little.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT / "tests"))  # for full_size
SHARED = {"steps": "2", "checkpoint_every": "0", "rank": "16", "precision": "fp32", "batch_size": "1", "train.threads": "1"}
ROWS: dict[str, dict[str, str]] = {
    "256 px": {"resolution": "256"},
    "256 px, checkpointing": {"resolution": "256", "gradient_checkpointing": "true"},
    "256 px, batch of 2": {"resolution": "256", "batch_size": "2"},
    "256 px, text encoder untrained": {"resolution": "256", "text_encoder": "[]"},
    "256 px, rank 128": {"resolution": "256", "rank": "128"},
    "256 px, prior": {"resolution": "256", "prior": "1"},
    "512 px": {"resolution": "512"},
    "512 px, checkpointing": {"resolution": "512", "gradient_checkpointing": "true"},
    "512 px, weights in bf16, checkpointing": {"resolution": "512", "base_precision": "bf16", "gradient_checkpointing": "true"},
    "256 px, weights in fp8": {"resolution": "256", "base_precision": "fp8"},
    "64 px, weights in bf16": {"resolution": "64", "base_precision": "bf16"},
    "64 px, bf16": {"resolution": "64", "precision": "bf16"},  # a hundred times as slow where the CPU has no bf16
    "512 px, bf16, checkpointing": {"resolution": "512", "precision": "bf16", "gradient_checkpointing": "true"},
}


def full_size_model(folder: Path) -> Path:
    from full_size import build

    return build("sd1", folder)


def pictures(folder: Path, side: int) -> Path:
    from PIL import Image

    for number in range(2):  # as many as the largest batch
        Image.effect_noise((side, side), 50 + 10 * number).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a cat")
    return folder


def measure(model: Path, row: str) -> None:
    """In the child: print the estimate, and the peak over the steps, in bytes."""
    import torch

    from sdlora import config, events, run
    from sdlora.train import train

    flags = SHARED | ROWS[row]
    with tempfile.TemporaryDirectory() as folder:
        shown = pictures(Path(tempfile.mkdtemp(dir=folder)), int(flags["resolution"]))
        flags |= {"model.base": str(model), "data.folder": str(shown), "output.runs": folder}
        estimated = 0
        with resident() as peak:
            for event in train(run.create(config.load([], list(flags.items())))):
                if isinstance(event, events.Planned):
                    estimated = event.memory_bytes
                if isinstance(event, events.Cached):  # encoding pictures and prompts is no part of a step
                    peak[0] = 0
                    if torch.cuda.is_available():
                        torch.cuda.reset_peak_memory_stats()
                if isinstance(event, events.Stepped) and event.step == event.steps:
                    measured = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak[0]
                    print(json.dumps([estimated, measured, event.seconds]), flush=True)


@contextmanager
def resident() -> Iterator[list[int]]:
    """The largest resident memory of this process since it was last set to 0, kept in a list of one."""
    import psutil

    process, peak, ended = psutil.Process(), [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.01):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def presets() -> Iterator[tuple[str, int]]:
    """Estimates for a GPU, in bytes: of each model's preset, and with the partial ones behind it."""
    from full_size import work_on_meta

    from sdlora import config
    from sdlora.footprint import estimate

    folder = ROOT / "configs"
    for family, preset, side in (("sd1", "sd15", 512), ("sdxl", "sdxl", 1024)):
        for partial in ("", "low_vram", "very_low_vram"):
            files = [folder / f"{name}.toml" for name in (preset, partial) if name]
            chosen = config.load(files)
            yield f"{preset} {partial}", estimate(work_on_meta(family, chosen, side, reads_prompts=chosen.data.caption_dropout > 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=[""], help="rows whose name has one of these in it; all by default")
    parser.add_argument("--model", type=Path, help="a model folder; unset: SD 1.5 is built for the occasion")
    parser.add_argument("--presets", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.presets:
        for name, peak in presets():
            print(f"{name:22} {peak / 2**30:.1f} GiB", flush=True)
        return
    if options.child:
        measure(options.model, options.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or full_size_model(Path(folder))
        print("| row | estimated | measured | ratio | s a step |\n|---|---|---|---|---|")
        for row in ROWS:
            if any(word in row for word in options.rows):
                began = time.perf_counter()
                command = [sys.executable, __file__, "--model", str(model), "--child", row]
                found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
                estimated, measured, seconds = json.loads(found)
                ratio = estimated / measured
                print(f"| {row} | {estimated / 2**30:.2f} GiB | {measured / 2**30:.2f} GiB | {ratio:.2f} | {seconds:.0f} |", flush=True)
                print(f"  {row}: {time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
