"""Stable Diffusion 1.x and 2.x, and the miniature that is built like them: one text encoder, heard through its final norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from sdlora.models import sampling, text
from sdlora.models.device import arithmetic
from sdlora.models.family import Family, Model, PicturePrompt, PromptEmbeds

PART = "text_encoder"


def encode_prompts(model: Model, prompts: Sequence[str]) -> PromptEmbeds:
    """The final norm follows the layer that embeddings are taken from, whichever it is, as in WebUIs."""
    encoder: Any = model.parts[PART]
    states = text.encode(model, PART, prompts, model.clip_skip).states
    with arithmetic(model):
        return PromptEmbeds((encoder.final_layer_norm(states).float(),))


def idle(model: Model) -> tuple[str, ...]:
    return text.skipped(model, PART, model.clip_skip)


def predict(model: Model, noisy_latents: Tensor, timesteps: Tensor, prompts: PromptEmbeds, time_ids: Tensor) -> Tensor:
    """The sizes of pictures are not looked at."""
    with arithmetic(model):
        return cast(Tensor, model.parts["unet"](noisy_latents, timesteps, prompts.prompt_embeds).sample)


@torch.no_grad()
def sample(model: Model, prompts: Sequence[PicturePrompt]) -> Tensor:
    pipeline = StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.parts[PART],
        tokenizer=model.tokenizer,
        unet=model.parts["unet"],
        scheduler=sampling.solver(model),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    embeds = encode_prompts(model, [*(prompt.text for prompt in prompts), *(prompt.negative for prompt in prompts)])
    positive, negative = embeds.prompt_embeds.chunk(2)
    return sampling.run(pipeline, model, prompts, prompt_embeds=positive, negative_prompt_embeds=negative)


SD1 = Family("sd1", encode_prompts, predict, sample, idle)
SD2 = Family("sd2", encode_prompts, predict, sample, idle)
