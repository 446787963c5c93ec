"""What each mechanism does to the demo's concept and to what the base model knew, at equal steps and by the oracle.

    python tests/studies/ablation.py            # trains what is missing, two runs at a time; kill it and start it again at will
    python tests/studies/ablation.py --table    # only prints the table of tests/studies/ablation.jsonl, and draws ablation.png

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
HIGH = {"optimizer.text_encoder_rate": "1.4e-3", **OFF}
# Row -> options beside the preset's. Order of importance: a study that is cut short has the first rows with all seeds.
ROWS: dict[str, dict[str, str]] = {
    "no regulariser": OFF,
    "preset: norm 0.1, prior 1": {},
    "text encoder at 10x its rate": HIGH,
    "10x, embedding norm 1": HIGH | {"loss.embedding_norm": "1"},
    "10x, pinned embeddings 1": HIGH | {"loss.pinned_embedding": "1"},
    "10x, prior 1": HIGH | {"loss.prior": "1"},
    "norm 0.1 alone": OFF | {"loss.embedding_norm": "0.1"},
    "pinned embeddings 1 alone": OFF | {"loss.pinned_embedding": "1"},
    "prior 1 alone": OFF | {"loss.prior": "1"},
    "alpha not learned": OFF | {"lora.learned_alpha": "false"},
    "init orthonormal (down frozen)": OFF | {"lora.init": "orthonormal"},
    "init PiSSA": OFF | {"lora.init": "pissa"},
    "init LoRA-GA": OFF | {"lora.init": "gradient"},
    "DoRA": OFF | {"lora.kind": "dora"},
    "MoRA": OFF | {"lora.kind": "mora"},
    "matched rate": OFF | {"optimizer.matched": "true"},
    "full fine-tuning": OFF | {"lora.kind": "full"},
    "ReLoRA, 4 rounds": OFF | {"lora.merge_every": "150"},
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
    told = events.read(RUNS / name / "events.jsonl")
    drifts = [e.embedding_norm_drift for e in told if isinstance(e, events.Stepped)]
    turned = [e.pinned_drift for e in told if isinstance(e, events.Measured)]
    figures = {
        "concept": found["concept"]["kind"],
        "kept": found["base prompts"]["kind"],
        "not pinned": found["not pinned"]["kind"],
        "unasked": found["base prompts"]["concept unasked"],
        "drift": mean(drifts[-50:]),
        "turned": turned[-1],
        "intruders": intruders(RUNS / name / f"{name}.safetensors"),
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"row": row, "seed": seed, "figures": figures}) + "\n")


def intruders(file: Path) -> float:
    """Intruder dimensions among the ten largest singular vectors of an adapted layer, mean over layers."""
    from sdlora.analysis.intruders import layers
    from sdlora.analysis.spectrum import Spectra
    from sdlora.data.cache import TensorCache
    from sdlora.lora import lorafile
    from sdlora.lora.checkpoints import open_checkpoint
    from sdlora.models.local import local_path

    spectra = Spectra(TensorCache(RUNS / "_cache" / "spectra", "mini"))
    with lorafile.opened([file], folded=False) as (lora,):
        return mean(layer.count() for layer in layers(lora, open_checkpoint(local_path("mini")), spectra))


# Column -> key of a figure, what it is multiplied by, digits
COLUMNS: dict[str, tuple[str, float, int]] = {
    "concept right": ("concept", 100, 0),
    "known things kept": ("kept", 100, 0),
    "kinds no pinned prompt names": ("not pinned", 100, 0),
    "fish unasked": ("unasked", 100, 0),
    "norm drift": ("drift", 100, 1),
    "pinned prompts turned": ("turned", 100, 1),
    "intruders a layer": ("intruders", 1, 2),
}


def table() -> str:
    """Mean and, from two seeds on, half the range between the smallest and the largest."""
    by_row: dict[str, list[dict[str, float]]] = defaultdict(list)
    for (row, _), figures in results().items():
        by_row[row].append(figures)
    lines = [f"| row | seeds | {' | '.join(COLUMNS)} |", f"|---|---|{'---|' * len(COLUMNS)}"]
    for row in ROWS:
        cells = []
        for key, factor, digits in COLUMNS.values():
            values = [factor * figures[key] for figures in by_row.get(row, [])]
            if values:
                spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{mean(values):.{digits}f}{spread}{' %' if factor == 100 else ''}")
        if cells:
            lines.append(f"| {row} | {len(by_row[row])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: Path) -> None:
    """A dot for each run: the concept against what was kept; a row's dots have one colour and its name beside their middle."""
    from matplotlib.figure import Figure

    by_row: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (row, _), figures in results().items():
        by_row[row].append((100 * figures["concept"], 100 * figures["kept"]))
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in ROWS if row in by_row]
    for number, row in enumerate(rows):
        xs, ys = zip(*by_row[row], strict=True)
        marker = "osD^vP*X"[number // 10]
        axes.scatter(xs, ys, s=42, alpha=0.8, color=f"C{number % 10}", marker=marker, linewidths=0, label=f"{number + 1} {row}")
        axes.annotate(str(number + 1), (mean(xs), mean(ys)), xytext=(5, 4), textcoords="offset points", fontsize=9, color=f"C{number % 10}")
    axes.set_xlabel("concept right, % of 50 pictures on backgrounds that no training picture shows")
    axes.set_ylabel("known things kept, % of 200 pictures")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


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
    plot(RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
