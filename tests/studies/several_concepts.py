"""Two concepts for one model: what a merge keeps of each, and what of the first is left when the second is trained upon it.

    python tests/studies/several_concepts.py            # trains and measures what is missing; kill it and start it again at will
    python tests/studies/several_concepts.py --table    # only prints the table of tests/studies/several_concepts.jsonl

The fish and the ladybug are kinds that the base model has never seen, each taught by 16 pictures under a rare word of its own.

After 250 steps the oracle takes none of the ladybugs for one, though a person does: their spots are too vague, and it wants a kind to fit
far better than any other. So the ladybug's column says nothing yet, and needs more steps or another kind. The other columns do.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from study import ROOT, Figures, Study

KINDS = ("fish", "ladybug")
KNOWN, OF_EACH = 60, 30  # pictures of known things, and of each concept
SEED = 20_000  # of prompts and noise
OPTIONS = {
    "lora.text_encoder": "[]",
    "lora.learned_alpha": "false",
    "optimizer.rate": "4e-4",
    "loss.embedding_norm": "0",
    "loss.prior": "0",
    "train.steps": "250",
    "train.checkpoint_every": "0",
}
PRIOR = {"loss.prior": "1"}  # the preset's, of two samples and its pinned prompts
RANK = 32  # of a merge that is thinned out: as of the sum of both

Made = tuple[Path, Path]
"""A base model, and a LoRA for it."""
MINI = ROOT / "sdlora" / "mini" / "weights"


def alone(kind: str, seed: int) -> Made:
    return MINI, trained(f"{kind}-{seed}", kind, seed, MINI, {})


def merged(seed: int, name: str, words: Sequence[str]) -> Made:
    """Both, each trained on the base for itself."""
    loras = [word for kind in KINDS for word in ("--lora", str(alone(kind, seed)[1]))]
    out = STUDY.runs / f"{name}-{seed}.safetensors"
    out.unlink(missing_ok=True)
    STUDY.call("merge", "-m", "sdlora", "merge", *loras, *words, "--seed", str(seed), "--out", str(out))
    return MINI, out


def upon(seed: int, name: str, options: dict[str, str]) -> Made:
    """The second kind, trained on the base into which the first has been merged."""
    base = STUDY.runs / f"_base-{seed}"
    if not base.exists():
        first = str(alone(KINDS[0], seed)[1])
        STUDY.call("merge", "-m", "sdlora", "merge", "--base", str(MINI), "--lora", first, "--out", str(base))
    return base, trained(f"{name}-{seed}", KINDS[1], seed, base, options)


def trained(name: str, kind: str, seed: int, base: Path, options: dict[str, str]) -> Path:
    from sdlora.mini import sets

    pictures = STUDY.runs / "_pictures" / kind
    shutil.rmtree(pictures, ignore_errors=True)
    sets.write(pictures, sets.concept(kind))
    return STUDY.train(name, seed, OPTIONS | {"model.base": str(base), "data.folder": str(pictures)} | options)


ROWS: dict[str, Callable[[int], Made]] = {
    "fish alone": lambda seed: alone("fish", seed),
    "ladybug alone": lambda seed: alone("ladybug", seed),
    "both, summed": lambda seed: merged(seed, "sum", []),
    "ladybug upon the fish": lambda seed: upon(seed, "upon", {}),
    "both, TIES keeping 0.5": lambda seed: merged(seed, "ties", ["--ties", "0.5", "--rank", str(RANK)]),
    "ladybug upon the fish, with the prior": lambda seed: upon(seed, "upon-prior", PRIOR),
    "both, DARE dropping 0.5": lambda seed: merged(seed, "dare", ["--dare", "0.5", "--rank", str(RANK)]),
}
COLUMNS = {
    "known things kept": ("known", 100.0, 0),
    "fish right": ("fish", 100.0, 0),
    "ladybug right": ("ladybug", 100.0, 0),
    "either unasked": ("unasked", 100.0, 0),
}


def measure(base: Path, lora: Path) -> Figures:
    """Shares of pictures whose kinds are right, and of those of known things that show a concept."""
    import torch

    from sdlora.lora import formats
    from sdlora.mini import oracle
    from sdlora.mini.measure import base_scenes, concept_scenes, draw, judge
    from sdlora.models import families

    torch.set_num_threads(1)
    family, model = families.load(str(base), torch.float32, torch.device("cpu"))
    formats.merge(model.parts, formats.load(lora)[0])
    asked = {"known": base_scenes(KNOWN, SEED)} | {kind: concept_scenes(OF_EACH, SEED + 1, kind) for kind in KINDS}
    drawn = {name: draw(family, model, scenes, SEED) for name, scenes in asked.items()}
    seen = [oracle.see(picture) for picture in drawn["known"]]
    unasked = sum(any(thing.kind in KINDS for thing in of.things) for of in seen) / len(seen)
    return {name: judge(asked[name], drawn[name])["kind"] for name in asked} | {"unasked": unasked}


STUDY = Study(Path(__file__), {row: {} for row in ROWS}, COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), help="rows to train; all by default")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    options = parser.parse_args()
    for seed in [] if options.table else options.seeds:
        for row in options.rows:
            if (row, seed) not in STUDY.read():
                STUDY.note(row, seed, measure(*ROWS[row](seed)))
    print(STUDY.table())


if __name__ == "__main__":
    main()
