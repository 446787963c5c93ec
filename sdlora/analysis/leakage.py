"""How much of a LoRA's change of the model reaches prompts that did not ask for it, on any model and without labels.

Each prompt's own latents, as the base model draws them, get fixed noise at fixed timesteps, and the model predicts with and without the
LoRA. A prompt's change is the norm of the difference over the norm of the base's prediction. **Leakage** is the mean change of prompts that
the LoRA should leave alone over the mean change of those that it was trained for: 0 for a LoRA that answers to its trigger alone, 1 for
one that changes everything alike. As a ratio it does not grow with the LoRA's strength, or with how much of a prediction is plain noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

import torch
from torch import Tensor

from sdlora.models.family import Family, Model, PicturePrompt, PromptEmbeds

TIMESTEPS = (100, 300, 500, 700, 900)
NOISES = 2  # a prompt and timestep
STEPS, GUIDANCE = 10, 4.0  # of the drawing: rough, but of the kind that the model sees
SEED = 0
AT_ONCE = 8  # predictions


@dataclass(frozen=True)
class Asked:
    """Everything that the model is asked, the same with the LoRA as without."""

    prompts: tuple[str, ...]
    latents: Tensor  # (P, C, h, w), on the CPU


def ask(family: Family, model: Model, prompts: Sequence[str]) -> Asked:
    """By the base model: what it draws for each prompt."""
    pictures = [PicturePrompt(prompt, seed=SEED + number, steps=STEPS, guidance=GUIDANCE) for number, prompt in enumerate(prompts)]
    drawn = [family.sample(model, [picture]) for picture in pictures]
    return Asked(tuple(prompts), torch.cat(drawn).float().cpu())


@torch.no_grad()
def answers(family: Family, model: Model, asked: Asked) -> Tensor:
    """What the model as it is now predicts: (P, TIMESTEPS * NOISES, C, h, w), fp32 on the CPU."""
    shape, found = asked.latents.shape[1:], []
    noise = torch.randn((NOISES, *shape), generator=torch.Generator().manual_seed(SEED))
    timesteps = torch.tensor(TIMESTEPS).repeat_interleave(NOISES).to(model.device)
    noises = noise.repeat(len(TIMESTEPS), 1, 1, 1).to(model.device)  # (TIMESTEPS * NOISES, C, h, w)
    height, width = (side * model.latent_factor for side in shape[1:])
    for prompt, latents in zip(asked.prompts, asked.latents.to(model.device), strict=True):
        noisy = model.noise_schedule.add_noise(latents.expand_as(noises), noises, timesteps)
        encoded = family.encode_prompts(model, [prompt])
        parts = []
        for part in torch.arange(len(timesteps)).split(AT_ONCE):
            embeds = PromptEmbeds.of([of.expand(len(part), *of.shape[1:]) for of in encoded.tensors])
            time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=model.device).float().expand(len(part), -1)
            parts.append(family.predict(model, noisy[part], timesteps[part], embeds, time_ids).float().cpu())
        found.append(torch.cat(parts))
    return torch.stack(found)


def changes(before: Tensor, after: Tensor) -> list[float]:
    """Of each prompt, see above."""
    difference, whole = (of.flatten(1).norm(dim=1) for of in (after - before, before))
    return [float(share) for share in difference / whole]


def leakage(of_others: Sequence[float], of_trigger: Sequence[float]) -> float:
    """Infinite where what it was trained for does not change."""
    wanted = fsum(of_trigger) / len(of_trigger)
    return fsum(of_others) / len(of_others) / wanted if wanted else float("inf")
