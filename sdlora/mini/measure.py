"""Measure the embedded model, and what a LoRA does to it, by the oracle.

    python -m sdlora.mini.measure                                  # the base model's gates
    python -m sdlora.mini.measure --lora runs/fish/fish.safetensors  # the concept on unseen backgrounds, and what was forgotten

Prompts and seeds are fixed; none of them is used to train or tune anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import tyro
from PIL import Image

from sdlora.files import write_durably
from sdlora.lora import formats
from sdlora.mini import oracle, world
from sdlora.mini.sets import SEEN_BACKGROUNDS, TRIGGERS
from sdlora.models import families
from sdlora.models.family import Family, Model, PicturePrompt
from sdlora.models.sampling import generate

CONCEPT = "fish"
TRIGGER = TRIGGERS[CONCEPT]
STEPS, GUIDANCE = 20, 4.0  # the demo's sampler: DPM-Solver++ 2M
AT_ONCE = 10  # pictures drawn together


@dataclass(frozen=True)
class Options:
    lora: Path | None = None
    """A LoRA of the fish; without one the base model alone is measured."""
    base: str = "mini"
    strength: float = 1.0
    pictures: int = 0
    """Pictures a measurement; 0 takes the gate's own number: 200 of base prompts, 50 of the concept."""
    seed: int = 20_000
    pinned: tuple[str, ...] = ()
    """Prompts that training pinned: base prompts with kinds that none of them names are then measured on their own, too."""
    json: Path | None = None
    """Write the figures there, too."""
    sheet: Path | None = None
    """Write the pictures that were judged, as one PNG."""


def base_scenes(count: int, seed: int) -> list[world.Scene]:
    """Captions that the base model's training never showed."""
    rng = Random(seed)
    scenes: list[world.Scene] = []
    while len(scenes) < count:
        scene = world.sample_scene(rng)
        if world.held_out(scene):
            scenes.append(scene)
    return scenes


def concept_scenes(count: int, seed: int, kind: str = CONCEPT) -> list[world.Scene]:
    """A concept alone, on backgrounds that its training set never shows."""
    rng = Random(seed)
    scenes: list[world.Scene] = []
    while len(scenes) < count:
        scene = world.sample_scene(rng, (kind,), pairs=0)
        if scene.background not in SEEN_BACKGROUNDS:
            scenes.append(scene)
    return scenes


def prompt_of(scene: world.Scene) -> str:
    """The caption, with the trigger word before a concept's noun."""
    caption = scene.caption
    for kind, words in TRIGGERS.items():
        caption = caption.replace(f" {kind}", f" {words}")
    return caption


def draw(family: Family, model: Model, scenes: Sequence[world.Scene], seed: int) -> list[Image.Image]:
    prompts = [PicturePrompt(prompt_of(scene), seed=seed + number, steps=STEPS, guidance=GUIDANCE) for number, scene in enumerate(scenes)]
    return generate(family, model, prompts, AT_ONCE)


def judge(scenes: Iterable[world.Scene], pictures: Iterable[Image.Image]) -> dict[str, float]:
    """Share of pictures that are right, for each thing the oracle can tell."""
    verdicts = [oracle.agrees(scene, picture) for scene, picture in zip(scenes, pictures, strict=True)]
    return {
        name: sum(getattr(v, name) for v in verdicts) / len(verdicts) for name in ("kind", "colour", "background", "place", "size", "all")
    }


def named(scene: world.Scene, prompts: Sequence[str]) -> bool:
    """Whether any of these prompts names a kind that the scene shows."""
    return any(thing.kind in prompt.split() for thing in scene.things for prompt in prompts)


def reconstructions(model: Model, scenes: Sequence[world.Scene], seed: int) -> list[Image.Image]:
    from sdlora.data.images import to_tensor

    rng, pictures = Random(seed), []
    for scene in scenes:
        pixels = to_tensor(world.render(scene, rng))[None]
        with torch.no_grad():
            decoded = model.vae.decode(model.vae.encode(pixels).latent_dist.mean).sample[0]
        pictures.append(Image.fromarray(((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()))
    return pictures


def measure(options: Options) -> dict[str, Any]:
    family, model = families.load(options.base, torch.float32, torch.device("cpu"))
    base, concept = base_scenes(options.pictures or 200, options.seed), concept_scenes(options.pictures or 50, options.seed + 1)
    results: dict[str, Any] = {}
    if options.lora is None:
        any_kind = [world.sample_scene(Random(options.seed + n), (*world.SHAPES, *world.FILES)) for n in range(len(base))]
        results["reconstructions"] = judge(any_kind, reconstructions(model, any_kind, options.seed))
    else:
        formats.merge(model.parts, formats.load(options.lora)[0], options.strength)
    drawn = {
        "base prompts": (base, draw(family, model, base, options.seed)),
        "concept": (concept, draw(family, model, concept, options.seed)),
    }
    for name, (scenes, pictures) in drawn.items():
        results[name] = judge(scenes, pictures)
    if options.lora is not None:  # leakage: the concept where nobody asked for it
        seen = [oracle.see(picture) for picture in drawn["base prompts"][1]]
        results["base prompts"]["concept unasked"] = sum(any(t.kind == CONCEPT for t in s.things) for s in seen) / len(seen)
        rare = [pair for pair in zip(*drawn["base prompts"], strict=True) if not named(pair[0], options.pinned)]
        if options.pinned and rare:
            results["not pinned"] = judge(*zip(*rare, strict=True))
    if options.sheet:
        contact_sheet([picture for _, pictures in drawn.values() for picture in pictures]).save(options.sheet)
    return results


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 20, gap: int = 4) -> Image.Image:
    cell = world.RESOLUTION + gap
    sheet = Image.new("RGB", (columns * cell, -(-len(pictures) // columns) * cell), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * cell, number // columns * cell))
    return sheet


def main() -> None:
    options = tyro.cli(Options)
    found = measure(options)
    if options.json:
        write_durably(options.json, json.dumps(found, indent=2).encode())
    for name, shares in found.items():
        print(f"{name:16}" + "  ".join(f"{key} {share:6.1%}" for key, share in shares.items()), flush=True)


if __name__ == "__main__":
    main()
