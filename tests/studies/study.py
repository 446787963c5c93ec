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

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "configs" / "mini.toml"

Figures = dict[str, float]


@dataclass(frozen=True)
class Study:
    script: Path  # its file; results lie beside it, runs below .work
    rows: dict[str, dict[str, str]]  # row -> options beside the preset's. In order of importance: a study may be cut short
    columns: dict[str, tuple[str, float, int]]  # title -> key of a figure, what it is multiplied by, digits
    figures: Callable[[Path], Figures]  # of a run's folder
    at_once: int  # runs, each with one thread

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

    def train_and_measure(self, row: str, seed: int) -> None:
        """A run that has finished already is only measured."""
        folder = self.folder(row, seed)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with (self.runs / f"{folder.name}.log").open("a") as log:
            if not export_of(folder).exists():
                shutil.rmtree(folder, ignore_errors=True)
                fixed = {"preview.prompts": "[]", "output.runs": str(self.runs), "output.name": folder.name}
                options = fixed | {"train.seed": str(seed), "train.threads": "1"} | self.rows[row]
                flags = [word for key, value in options.items() for word in (f"--{key}", value)]
                program = [sys.executable, "-m", "sdlora", "train", str(CONFIG), *flags]
                subprocess.run(program, env=environment, stdout=log, stderr=log, check=True)
            program = [sys.executable, str(self.script), "--measure", row, str(seed)]
            subprocess.run(program, env=environment, stdout=log, stderr=log, check=True)

    def measure(self, row: str, seed: int) -> None:
        import torch

        torch.set_num_threads(1)
        figures = self.figures(self.folder(row, seed))
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

    def main(self, description: str | None) -> bool:
        """Whether there is a table now: not where it only measured a run, for another process of the study."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--table", action="store_true", help="only print the table")
        parser.add_argument("--rows", nargs="*", default=list(self.rows), choices=list(self.rows), help="rows to train; all by default")
        parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
        parser.add_argument("--measure", nargs=2, metavar=("ROW", "SEED"), help=argparse.SUPPRESS)
        options = parser.parse_args()
        if options.measure:
            self.measure(options.measure[0], int(options.measure[1]))
            return False
        if not options.table:
            self.runs.mkdir(parents=True, exist_ok=True)
            done = self.read()
            wanted = [(row, seed) for seed in options.seeds for row in options.rows if (row, seed) not in done]
            with ThreadPoolExecutor(self.at_once) as pool:
                list(pool.map(lambda pair: self.train_and_measure(*pair), wanted))
        print(self.table())
        return True


def export_of(folder: Path) -> Path:
    return folder / f"{folder.name}.safetensors"


def judged(found: Mapping[str, Any]) -> Figures:
    """What the oracle says of a LoRA, out of all that mini/measure.py found."""
    drawn, known = found["concept"], found["base prompts"]
    return {"concept": drawn["kind"], "kept": known["kind"], "unasked": known["concept unasked"]}


def intruders(file: Path, threshold: float = 0.5) -> float:
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
