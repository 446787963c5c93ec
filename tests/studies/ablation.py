"""What each mechanism does to the demo's concept and to what the base model knew, at equal steps and by the oracle.

    python tests/studies/ablation.py            # trains what is missing, two runs at a time; kill it and start it again at will
    python tests/studies/ablation.py --table    # only prints the table of tests/studies/ablation.jsonl

Rows were chosen, and configs/mini.toml tuned, on other prompts and seeds than those measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

HERE = Path(__file__).parent
RESULTS = HERE / "ablation.jsonl"
CONFIG = HERE.parent.parent / "configs" / "mini.toml"
RUNS = HERE.parent.parent / ".work" / "ablation"

OFF = {"loss.prior": "0", "loss.embedding_norm": "0"}
HIGH = {"optimizer.text_encoder_rate": "5e-3", **OFF}
ROWS: dict[str, dict[str, str]] = {
    "no regulariser": OFF,
    "embedding norm 0.1": {"loss.prior": "0"},
    "preset: norm 0.1, prior 1": {},
    "text encoder at 10x its rate": HIGH,
    "10x, embedding norm 1": HIGH | {"loss.embedding_norm": "1"},
    "10x, pinned embeddings 1": HIGH | {"loss.pinned_embedding": "1"},
    "10x, prior 1": HIGH | {"loss.prior": "1"},
    "init orthonormal": {"lora.init": "orthonormal", "loss.prior": "0"},
    "init pissa": {"lora.init": "pissa", "loss.prior": "0"},
    "alpha not learned": {"lora.learned_alpha": "false", "loss.prior": "0"},
}


def results() -> dict[tuple[str, int], dict[str, float]]:
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    read = [json.loads(line) for line in lines]
    return {(r["row"], r["seed"]): r["figures"] for r in read}


def run_name(row: str, seed: int) -> str:
    return f"{list(ROWS).index(row)}-{seed}"


def train_and_measure(row: str, seed: int) -> None:
    name = run_name(row, seed)
    shutil.rmtree(RUNS / name, ignore_errors=True)
    fixed = {"preview.prompts": "[]", "output.runs": str(RUNS), "output.name": name, "train.seed": str(seed), "train.threads": "1"}
    flags = [word for key, value in (fixed | ROWS[row]).items() for word in (f"--{key}", value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (RUNS / f"{name}.log").open("w") as log:
        subprocess.run([sys.executable, "-m", "sdlora", "train", str(CONFIG), *flags], env=environment, stdout=log, stderr=log, check=True)
        subprocess.run([sys.executable, str(Path(__file__)), "--measure", row, str(seed)], env=environment, stderr=log, check=True)


def measure(row: str, seed: int) -> None:
    import torch

    from sdlora import config, events
    from sdlora.mini.measure import Options
    from sdlora.mini.measure import measure as by_oracle

    torch.set_num_threads(1)
    name = run_name(row, seed)
    pinned = config.load([CONFIG]).loss.pinned_prompts
    found = by_oracle(Options(lora=RUNS / name / f"{name}.safetensors", pinned=pinned))
    drifts = [e.embedding_norm_drift for e in events.read(RUNS / name / "events.jsonl") if isinstance(e, events.Stepped)]
    figures = {
        "concept": found["concept"]["kind"],
        "kept": found["base prompts"]["kind"],
        "not pinned": found["not pinned"]["kind"],
        "unasked": found["base prompts"]["concept unasked"],
        "drift": mean(drifts[-50:]),
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"row": row, "seed": seed, "figures": figures}) + "\n")


def table() -> str:
    by_row: dict[str, list[dict[str, float]]] = defaultdict(list)
    for (row, _), figures in results().items():
        by_row[row].append(figures)
    lines = [
        "| row | seeds | concept right | known things kept | of these, kinds no pinned prompt names | fish unasked | norm drift |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        if row in by_row:
            cells = [", ".join(f"{100 * f[key]:.0f}" for f in by_row[row]) + " %" for key in ("concept", "kept", "not pinned", "unasked")]
            drift = ", ".join(f"{100 * f['drift']:.1f}" for f in by_row[row]) + " %"
            lines.append(f"| {row} | {len(by_row[row])} | {' | '.join(cells)} | {drift} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), help="rows to train; all by default")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--measure", nargs=2, metavar=("ROW", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], int(options.measure[1]))
        return
    if not options.table:
        RUNS.mkdir(parents=True, exist_ok=True)
        done = results()
        wanted = [(row, seed) for seed in options.seeds for row in options.rows if (row, seed) not in done]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda pair: train_and_measure(*pair), wanted))
    print(table())


if __name__ == "__main__":
    main()
