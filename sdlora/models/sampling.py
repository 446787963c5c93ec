"""From prompts to pictures, by any family's pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor

from sdlora.models.device import arithmetic
from sdlora.models.family import Family, Model, PicturePrompt
from sdlora.models.images import decode_latents


def generate(family: Family, model: Model, prompts: Sequence[PicturePrompt], at_once: int = 1) -> list[Image.Image]:
    """A picture for each prompt.

    Up to `at_once` pictures of one size, step count and guidance are drawn together: faster, and equal but for rounding.
    """
    pictures: dict[int, Image.Image] = {}
    alike: dict[tuple[object, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        alike.setdefault((prompt.width, prompt.height, prompt.steps, prompt.guidance), []).append(number)
    for numbers in alike.values():
        for start in range(0, len(numbers), at_once):
            part = numbers[start : start + at_once]
            latents = family.sample(model, [prompts[number] for number in part])
            pictures |= zip(part, decode_latents(model, latents), strict=True)
    return [pictures[number] for number in range(len(prompts))]


@torch.no_grad()
def run(pipeline: Any, model: Model, prompts: Sequence[PicturePrompt], **embeds: Tensor) -> Tensor:
    """Latents (B, C, h, w) from a pipeline with DPM-Solver++ 2M (Lu et al. 2022), the WebUIs' usual sampler; noise is drawn on the CPU, so
    a seed means one picture everywhere. `embeds`: what the pipeline takes in the place of texts."""
    pipeline.set_progress_bar_config(disable=True)
    unet: Any = model.parts["unet"]
    first, own = prompts[0], unet.config.sample_size * model.latent_factor
    with arithmetic(model):
        latents: Tensor = pipeline(
            **{name: tensor.to(unet.dtype) for name, tensor in embeds.items()},
            width=first.width or own,
            height=first.height or own,
            num_inference_steps=first.steps,
            guidance_scale=first.guidance,
            generator=[torch.Generator().manual_seed(prompt.seed) for prompt in prompts],
            output_type="latent",
        ).images
    return latents


def solver(model: Model) -> Any:
    return DPMSolverMultistepScheduler.from_config(model.scheduler_config)
