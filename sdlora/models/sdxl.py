"""Stable Diffusion XL's base model (Podell et al. 2023): two text encoders, one of which also speaks for the whole prompt, and a UNet that
is told the sizes of its picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from sdlora.errors import WeightsError
from sdlora.models import sampling, text
from sdlora.models.device import arithmetic
from sdlora.models.family import Family, Model, PicturePrompt, PromptEmbeds

FIRST, SECOND = "text_encoder", "text_encoder_2"
CLIP_SKIP = 2  # both encoders are heard at their last layer but one, without the final norm


def encode_prompts(model: Model, prompts: Sequence[str]) -> PromptEmbeds:
    first, second = (text.encode(model, part, prompts, CLIP_SKIP) for part in (FIRST, SECOND))
    assert second.pooled is not None
    return PromptEmbeds((first.states.float(), second.states.float()), second.pooled.float())


def idle(model: Model) -> tuple[str, ...]:
    """All of the second encoder is heard, as its pooled embedding comes from its last layer."""
    if model.clip_skip != 1:
        raise WeightsError(f"model.clip_skip = {model.clip_skip}: SDXL always hears its text encoders' last layers but one; leave it at 1.")
    return (*text.skipped(model, FIRST, CLIP_SKIP), f"{FIRST}.text_model.final_layer_norm")


def predict(model: Model, noisy_latents: Tensor, timesteps: Tensor, prompts: PromptEmbeds, time_ids: Tensor) -> Tensor:
    added = {"text_embeds": prompts.pooled, "time_ids": time_ids}
    with arithmetic(model):
        unet = model.parts["unet"]
        return cast(Tensor, unet(noisy_latents, timesteps, prompts.prompt_embeds, added_cond_kwargs=added).sample)


@torch.no_grad()
def sample(model: Model, prompts: Sequence[PicturePrompt]) -> Tensor:
    """Pictures are asked for whole and of their own size. An empty negative prompt is a zero embedding, as in diffusers and A1111."""
    pipeline = StableDiffusionXLPipeline(
        vae=model.vae,
        text_encoder=model.parts[FIRST],
        text_encoder_2=model.parts[SECOND],
        tokenizer=model.tokenizers[FIRST],
        tokenizer_2=model.tokenizers[SECOND],
        unet=model.parts["unet"],
        scheduler=sampling.solver(model),
        add_watermarker=False,
    )
    positive = encode_prompts(model, [prompt.text for prompt in prompts])
    negative = encode_prompts(model, [prompt.negative for prompt in prompts])
    says_something = torch.tensor([float(prompt.negative != "") for prompt in prompts], device=model.device)
    assert positive.pooled is not None and negative.pooled is not None
    return sampling.run(
        pipeline,
        model,
        prompts,
        prompt_embeds=positive.prompt_embeds,
        pooled_prompt_embeds=positive.pooled,
        negative_prompt_embeds=negative.prompt_embeds * says_something[:, None, None],
        negative_pooled_prompt_embeds=negative.pooled * says_something[:, None],
    )


SDXL = Family("sdxl", encode_prompts, predict, sample, idle)
