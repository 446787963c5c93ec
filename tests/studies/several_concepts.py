"""Two concepts for one model: what a merge keeps of each, and what of the first is left when the second is trained upon it.

    python tests/studies/several_concepts.py            # trains and measures what is missing; kill it and start it again at will
    python tests/studies/several_concepts.py --table    # only prints the table of tests/studies/several_concepts.jsonl

The fish and the bear are kinds that the base model has never seen, each taught by 16 pictures under a rare word of its own: once by
the usual recipe (see default_against_usual.py), once by the preset, of configs/mini.toml, which keeps the base by its prior, and once by
the preset with prompts of the other kind among what is pinned. None of these prompts is one that is measured.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from study import CONFIG, ROOT, Figures, Study, usual

KINDS = ("fish", "bear")
KNOWN, OF_EACH = 60, 30  # pictures of known things, and of each concept
SEED = 20_000  # of prompts and noise
OTHER_PINNED = "by the preset, the other pinned"
WAYS = {"by the usual recipe": usual("1.6e-3"), "by the preset": {}, OTHER_PINNED: {}}
MERGES = {
    "summed": [],
    "TIES keeping 0.5": ["--ties", "0.5", "--rank", "32"],  # of rank 16 each: as of the sum of both
    "DARE dropping 0.5": ["--dare", "0.5", "--rank", "32"],
}

Made = tuple[Path, Path]
"""A base model, and a LoRA for it."""
MINI = ROOT / "sdlora" / "mini" / "weights"


def alone(kind: str, way: str, seed: int) -> Made:
    return MINI, trained(f"{kind} {way}", kind, way, seed, MINI)


def merged(merge: str, way: str, seed: int) -> Made:
    """Both, each trained on the base for itself."""
    loras = [word for kind in KINDS for word in ("--lora", str(alone(kind, way, seed)[1]))]
    out = STUDY.runs / f"{file_name(f'{merge} {way}', seed)}.safetensors"
    out.unlink(missing_ok=True)
    STUDY.call("merge", "-m", "sdlora", "merge", *loras, *MERGES[merge], "--seed", str(seed), "--out", str(out))
    return MINI, out


def upon(way: str, seed: int) -> Made:
    """The second kind, trained on the base into which the first has been merged."""
    base = STUDY.runs / file_name(f"_base {way}", seed)
    if not base.exists():
        first = str(alone(KINDS[0], way, seed)[1])
        STUDY.call("merge", "-m", "sdlora", "merge", "--base", str(MINI), "--lora", first, "--out", str(base))
    return base, trained(f"upon {way}", KINDS[1], way, seed, base)


def trained(name: str, kind: str, way: str, seed: int, base: Path) -> Path:
    from sdlora import config
    from sdlora.mini import sets

    pictures = STUDY.runs / "_pictures" / kind
    shutil.rmtree(pictures, ignore_errors=True)
    sets.write(pictures, sets.concept(kind))
    pinned = (
        {"loss.pinned_prompts": json.dumps([*config.load([CONFIG]).loss.pinned_prompts, *prompts_of_other(kind)])}
        if way == OTHER_PINNED
        else {}
    )
    return STUDY.train(file_name(name, seed), seed, {"model.base": str(base), "data.folder": str(pictures)} | WAYS[way] | pinned)


def prompts_of_other(kind: str) -> Iterator[str]:
    """Of the kind that this run does not teach, on backgrounds that its training pictures have."""
    from sdlora.mini.sets import SEEN_BACKGROUNDS, TRIGGERS

    (other,) = set(KINDS) - {kind}
    for background in SEEN_BACKGROUNDS:
        for words in (TRIGGERS[other], f"small {TRIGGERS[other]}"):
            yield f"a {words} on a {background} background"


def file_name(name: str, seed: int) -> str:
    return f"{re.sub(r'[^a-zA-Z0-9_]+', '-', name)}-{seed}"


def rows() -> Iterator[tuple[str, Callable[[int], Made]]]:
    for way in WAYS:
        for kind in KINDS:
            yield f"{kind} alone, {way}", partial(alone, kind, way)
        for merge in MERGES:
            yield f"both, {merge}, {way}", partial(merged, merge, way)
        yield f"bear upon the fish, {way}", partial(upon, way)


ROWS = dict(rows())
COLUMNS = {
    "known things kept": ("known", 100.0, 0),
    "fish right": ("fish", 100.0, 0),
    "bear right": ("bear", 100.0, 0),
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
