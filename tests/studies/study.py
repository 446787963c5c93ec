"""What studies on the embedded model share: rows of options, trained at equal steps with several seeds and measured in processes of their
own, a line of JSON each, so that a study can be killed and started again at will; and their table."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from sdlora.analysis import THRESHOLD

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "configs" / "mini.toml"

LOOSE = 0.8  # finds what is half new, too: the paper's threshold of 0.5 finds hardly any at the preset's rank and scale

Figures = dict[str, float]


@dataclass(frozen=True)
class Study:
    script: Path  # its file; results lie beside it, runs below .work
    rows: dict[str, dict[str, str]]  # row -> options beside the preset's. In order of importance: a study may be cut short
    columns: dict[str, tuple[str, float, int]]  # title -> key of a figure, what it is multiplied by, digits

    @property
    def results(self) -> Path:
        return self.script.with_suffix(".jsonl")

    @property
    def runs(self) -> Path:
        return ROOT / ".work" / self.script.stem

    def read(self) -> dict[tuple[str, int], Figures]:
        """By row and seed."""
        lines = self.results.read_text(encoding="utf-8").splitlines() if self.results.exists() else []
        read = [json.loads(line) for line in lines]
        return {(r["row"], r["seed"]): r["figures"] for r in read}

    def by_row(self) -> dict[str, list[Figures]]:
        found: dict[str, list[Figures]] = defaultdict(list)
        for (row, _), figures in self.read().items():
            found[row].append(figures)
        return found

    def folder(self, row: str, seed: int) -> Path:
        return self.runs / f"{list(self.rows).index(row)}-{seed}"

    def train(self, name: str, seed: int, options: Mapping[str, str]) -> Path:
        """The run's LoRA, trained unless it has been already."""
        folder = self.runs / name
        if not export_of(folder).exists():
            shutil.rmtree(folder, ignore_errors=True)
            fixed = {"preview.prompts": "[]", "output.runs": str(self.runs), "output.name": name}
            options = fixed | {"train.seed": str(seed), "train.threads": "1"} | dict(options)
            flags = [word for key, value in options.items() for word in (f"--{key}", value)]
            self.call(name, "-m", "sdlora", "train", str(CONFIG), *flags)
        return export_of(folder)

    def call(self, name: str, *words: str) -> None:
        """Python in a process of its own, which writes what it says into a log of this name."""
        self.runs.mkdir(parents=True, exist_ok=True)
        with (self.runs / f"{name}.log").open("a") as log:
            subprocess.run([sys.executable, *words], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=True)

    def train_and_measure(self, row: str, seed: int) -> None:
        name = self.folder(row, seed).name
        self.train(name, seed, self.rows[row])
        self.call(name, str(self.script), "--measure", row, str(seed))

    def note(self, row: str, seed: int, figures: Figures) -> None:
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"row": row, "seed": seed, "figures": figures}) + "\n")

    def table(self) -> str:
        """Mean and, from two seeds on, half the range between the smallest and the largest."""
        by_row = self.by_row()
        lines = [f"| row | seeds | {' | '.join(self.columns)} |", f"|---|---|{'---|' * len(self.columns)}"]
        for row in self.rows:
            cells = []
            for key, factor, digits in self.columns.values():
                values = [factor * figures[key] for figures in by_row.get(row, [])]
                if values:
                    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
                    cells.append(f"{mean(values):.{digits}f}{spread}{' %' if factor == 100 else ''}")
            if cells:
                lines.append(f"| {row} | {len(by_row[row])} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def main(self, description: str | None, figures: Callable[[Path], Figures], at_once: int) -> bool:
        """Train and measure what is missing, `at_once` runs with a thread each; `figures` of a run's folder. Whether there is a table now:
        not where it only measured a run, for another process of the study."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--table", action="store_true", help="only print the table")
        parser.add_argument("--rows", nargs="*", default=list(self.rows), choices=list(self.rows), help="rows to train; all by default")
        parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
        parser.add_argument("--measure", nargs=2, metavar=("ROW", "SEED"), help=argparse.SUPPRESS)
        options = parser.parse_args()
        if options.measure:
            import torch

            torch.set_num_threads(1)
            row, seed = options.measure[0], int(options.measure[1])
            self.note(row, seed, figures(self.folder(row, seed)))
            return False
        if not options.table:
            done = self.read()
            wanted = [(row, seed) for seed in options.seeds for row in options.rows if (row, seed) not in done]
            with ThreadPoolExecutor(at_once) as pool:
                list(pool.map(lambda pair: self.train_and_measure(*pair), wanted))
        print(self.table())
        return True


def usual(rate: str) -> dict[str, str]:
    """The field's usual recipe: alpha as the rank, one rate for UNet and text encoder, nothing that keeps the base."""
    plain = {"lora.alpha": "16", "lora.scaling": "standard", "lora.learned_alpha": "false"}
    return plain | {"loss.prior": "0", "loss.embedding_norm": "0", "optimizer.rate": rate, "optimizer.text_encoder_rate": rate}


def export_of(folder: Path) -> Path:
    return folder / f"{folder.name}.safetensors"


def judged(found: Mapping[str, Any]) -> Figures:
    """What the oracle says of a LoRA, out of all that mini/measure.py found."""
    drawn, known = found["concept"], found["base prompts"]
    return {"concept": drawn["kind"], "kept": known["kind"], "unasked": known["concept unasked"]}


def repaired(file: Path, threshold: float, scale: float) -> Path:
    """With the intruders at this threshold scaled."""
    from sdlora.cli import main

    out = file.with_name(f"repaired-{threshold:g}-{scale:g}.safetensors")
    out.unlink(missing_ok=True)
    words = ["repair", str(file), "--base", "mini", "--threshold", str(threshold), "--scale", str(scale), "--out", str(out)]
    if main([*words, "--cache", str(file.parent.parent / "_cache")]):
        raise SystemExit(f"{file} could not be repaired")
    return out


def intruders(file: Path, threshold: float = THRESHOLD) -> float:
    """Intruder dimensions among the ten largest singular vectors of an adapted layer, mean over layers."""
    from sdlora.analysis.intruders import layers
    from sdlora.analysis.spectrum import Spectra
    from sdlora.data.cache import TensorCache
    from sdlora.lora import lorafile
    from sdlora.lora.checkpoints import open_checkpoint
    from sdlora.models.local import local_path

    spectra = Spectra(TensorCache(ROOT / ".work" / "spectra", "mini"))
    with lorafile.opened([file], folded=False) as (lora,):
        return mean(layer.count(threshold) for layer in layers(lora, open_checkpoint(local_path("mini")), spectra))
