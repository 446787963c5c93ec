"""The preset against the field's usual recipe, at equal steps: what is learned, what is kept, what leaks, and what repair brings back.

    python tests/studies/default_against_usual.py            # trains and measures what is missing; kill it and start it again at will
    python tests/studies/default_against_usual.py --table    # only prints the table of tests/studies/default_against_usual.jsonl

The usual recipe: rank 16, alpha 16, a Kaiming start with up at zero, fixed alphas, one rate for UNet and text encoder, no regulariser. On
the layers of the preset, so that only the recipe differs. Its rate of 1.6e-3 is not tuned: Adam moves a weight by scale times rate, and the
preset's scale of 8 (alpha 32 over the root of 16) at 2e-4 moves it as far. 1e-4 is what the field writes.
"""

from __future__ import annotations

from pathlib import Path

from study import LOOSE, Figures, Study, export_of, intruders, judged, repaired, usual

ROWS = {"preset": {}, "usual recipe, rate 1.6e-3": usual("1.6e-3"), "usual recipe, rate 1e-4": usual("1e-4")}
COLUMNS = {
    "concept right": ("concept", 100.0, 0),
    "known things kept": ("kept", 100.0, 0),
    "leakage": ("leakage", 1.0, 3),
    "to the class noun": ("leakage to the noun", 1.0, 3),
    "fish unasked": ("unasked", 100.0, 0),
    "intruders a layer": ("intruders", 1.0, 2),
    "at 0.8": ("intruders at 0.8", 1.0, 2),
    "kept, intruders at 0.8 halved": ("kept, halved", 100.0, 0),
    "concept then": ("concept, halved", 100.0, 0),
    "kept, taken out": ("kept, taken out", 100.0, 0),
    "concept, taken out": ("concept, taken out", 100.0, 0),
}
REPAIRS = {"halved": 0.5, "taken out": 0.0}
ASKED_SEED = 40_000  # of prompts that leakage is measured on, which nothing else uses


def figures(folder: Path) -> Figures:
    from sdlora.mini.measure import Options, measure

    file = export_of(folder)
    found = measure(Options(lora=file))
    result = {
        **judged(found),
        "intruders": intruders(file),
        "intruders at 0.8": intruders(file, LOOSE),
        **leakages(file),
    }
    for name, scale in REPAIRS.items():
        then = judged(measure(Options(lora=repaired(file, LOOSE, scale))) if result["intruders at 0.8"] else found)
        result |= {f"{of}, {name}": then[of] for of in ("kept", "concept")}
    return result


def leakages(file: Path) -> Figures:
    import torch

    from sdlora.analysis import leakage
    from sdlora.lora import formats
    from sdlora.mini.measure import CONCEPT, TRIGGER, base_scenes, concept_scenes, prompt_of
    from sdlora.models import families

    family, model = families.load("mini", torch.float32, torch.device("cpu"))
    trained = [prompt_of(scene) for scene in concept_scenes(8, ASKED_SEED)]
    groups = {
        "trained": trained,
        "noun": [prompt.replace(TRIGGER, CONCEPT) for prompt in trained],
        "others": [prompt_of(scene) for scene in base_scenes(24, ASKED_SEED + 1)],
    }
    asked = {group: leakage.ask(family, model, prompts) for group, prompts in groups.items()}
    before = {group: leakage.answers(family, model, of) for group, of in asked.items()}
    formats.merge(model.parts, formats.load(file)[0])
    changes = {group: leakage.changes(before[group], leakage.answers(family, model, of)) for group, of in asked.items()}
    return {
        "leakage": leakage.leakage(changes["others"], changes["trained"]),
        "leakage to the noun": leakage.leakage(changes["noun"], changes["trained"]),
    }


if __name__ == "__main__":
    Study(Path(__file__), ROWS, COLUMNS).main(__doc__, figures, at_once=1)
