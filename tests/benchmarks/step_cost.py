"""What each mechanism adds to a training step, as a ratio to the same step without it.

    python tests/benchmarks/step_cost.py              # on the embedded model; about five minutes on two cores
    python tests/benchmarks/step_cost.py --rows prior

Each row runs beside the plain step in the same process, a step of one after a step of the other, so that both meet the same noise of the
machine. Printed is the median of the pairs' ratios, with the quartiles; seconds are only the plain step's median, for orientation.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from spread import spread

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "configs" / "mini.toml"
PLAIN = {
    "data.folder": str(ROOT / "datasets" / "fish"),
    "loss.prior": "0",
    "loss.embedding_norm": "0",
    "preview.prompts": "[]",
    "checkpoint_every": "0",
    "steps": "100000",
}
ROWS: dict[str, dict[str, str]] = {
    "plain again (should be 1)": {},
    "embedding norm": {"loss.embedding_norm": "0.1"},
    "pinned embeddings": {"loss.pinned_embedding": "1"},
    "prior, 1 sample a batch of 4": {"loss.prior": "1", "prior_samples": "1"},
    "prior, 2 samples a batch of 4": {"loss.prior": "1", "prior_samples": "2"},
    "DoRA": {"lora.kind": "dora"},
    "MoRA": {"lora.kind": "mora"},
    "full": {"lora.kind": "full"},
    "PiSSA": {"lora.init": "pissa"},
    "dropout of inputs": {"lora.dropout": "0.1"},
    "max-norm": {"lora.max_norm": "1"},
    "matched rate": {"optimizer.matched": "true"},
    "Prodigy": {"algorithm": "prodigy", "rate": "1", "text_encoder_rate": "1"},
    "CAME": {"algorithm": "came"},
    "Adafactor": {"algorithm": "adafactor"},
    "Lion": {"algorithm": "lion"},
    "schedule-free": {"algorithm": "schedule_free", "schedule": "constant"},
    "EMA": {"ema": "0.99"},
}


def steps(folder: Path, changes: dict[str, str]) -> Iterator[float]:
    """Seconds of each training step."""
    from sdlora import config, events, run
    from sdlora.train import train

    flags = PLAIN | changes | {"output.runs": str(folder), "train.threads": "1"}
    for event in train(run.create(config.load([CONFIG], list(flags.items())))):
        if isinstance(event, events.Stepped):
            yield event.seconds


def ratios(changes: dict[str, str], pairs: int) -> tuple[list[float], float]:
    """Of the changed step's time to that of the plain step before it, and the plain step's median in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        plain, changed = steps(Path(folder), {}), steps(Path(folder), changes)
        for _ in range(12):  # first steps allocate, and matched rates look at each of the first ten
            next(plain), next(changed)
        times = [(next(plain), next(changed)) for _ in range(pairs)]
    return [b / a for a, b in times], median(a for a, _ in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=[""], help="rows whose name has one of these words in it; all by default")
    parser.add_argument("--pairs", type=int, default=30)
    options = parser.parse_args()
    print("| row | times the plain step | quartiles | plain step |\n|---|---|---|---|")
    for row, changes in ROWS.items():
        if any(word in row for word in options.rows):
            found, seconds = ratios(changes, options.pairs)
            print(f"| {row} | {spread(found)} | {seconds:.2f} s |", flush=True)


if __name__ == "__main__":
    main()
