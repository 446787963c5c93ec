"""Stable Diffusion 1.x, and the miniature that is built like it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from sdlora.data.cache import fingerprint
from sdlora.diffusion.schedule import NoiseSchedule
from sdlora.errors import WeightsError
from sdlora.models.family import Family, Model, PicturePrompt

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def load(folder: Path, dtype: torch.dtype, device: torch.device, clip_skip: int = 1) -> Model:
    """Load a folder in diffusers' layout, offline. Text encoder and UNet in `dtype`, the VAE in fp32: SD 1.x's overflows in fp16
    and loses tones in bf16. Raises WeightsError."""
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise WeightsError(f"model.base: {folder} is not a Stable Diffusion folder in diffusers' layout: it has no {', '.join(missing)}.")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True, dtype=dtype)
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True, torch_dtype=dtype)
        vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True, torch_dtype=torch.float32)
        scheduler = DDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(f"model.base: cannot load {folder}: {reason}") from error
    if unet.config.in_channels != 4:
        raise WeightsError(
            f"model.base: {folder} is an inpainting or other special UNet ({unet.config.in_channels} input channels, not 4)."
        )
    skip_layers(text_encoder, clip_skip)
    for module in (text_encoder, unet, vae):
        module.requires_grad_(False).eval().to(device)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return Model(
        parts={"unet": unet, "text_encoder": text_encoder},
        vae=vae,
        tokenizer=tokenizer,
        noise_schedule=NoiseSchedule(scheduler.alphas_cumprod.to(device), scheduler.config.prediction_type),
        scheduler_config={**scheduler.config, "clip_sample": False},  # a pixel-space habit that pipelines warn of
        size_multiple=factor * 2 ** (len(unet.config.block_out_channels) - 1),
        vae_fingerprint=fingerprint(weights_fingerprint(vae), vae.config.scaling_factor),
        text_fingerprint=text_fingerprint(text_encoder, tokenizer),
        dtype=dtype,
        device=device,
    )


def skip_layers(text_encoder: CLIPTextModel, clip_skip: int) -> None:
    """Take away the layers behind the one that embeddings come from, counted from the last, which is 1, as WebUIs count. The final norm
    follows the layer that is last now, as it does there; and no adapter goes to layers that nobody hears."""
    layers = text_encoder.encoder.layers
    if clip_skip > len(layers):
        raise WeightsError(f"model.clip_skip = {clip_skip}: the text encoder has {len(layers)} layers only.")
    text_encoder.encoder.layers = layers[: len(layers) + 1 - clip_skip]


def text_fingerprint(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> str:
    """Of all that a prompt's embedding depends on; the precision of the weights is part of their bytes."""
    config = text_encoder.config
    read = (config.hidden_act, config.layer_norm_eps, config.num_attention_heads)
    return fingerprint(
        weights_fingerprint(text_encoder), read, tokenizer.get_vocab(), tokenizer.model_max_length, tokenizer.pad_token_id
    )


def weights_fingerprint(module: nn.Module) -> str:
    """sha256 over names and bytes of all weights."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def arithmetic(model: Model) -> AbstractContextManager[Any]:
    """Mixed precision of the forward pass; a no-op in fp32."""
    return torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32)


def tokenise(model: Model, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids of each chunk, and which of them are no padding: both (B, chunks, L).

    Every chunk has a start, an end and padding of its own, as in WebUIs and kohya's scripts; a chunk without words is
    padding throughout, but for the first. Words beyond the last chunk are cut off.
    """
    tokenizer = model.tokenizer
    length = tokenizer.model_max_length
    room = length - 2
    texts = tokenizer(list(prompts), add_special_tokens=False, truncation=True, max_length=model.chunks * room).input_ids
    chunks = [text[start : start + room] for text in texts for start in range(0, model.chunks * room, room)]
    padding = [tokenizer.pad_token_id] * length
    ids = [[tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id, *padding][:length] for chunk in chunks]
    used = [len(chunk) + 2 if chunk or number % model.chunks == 0 else 0 for number, chunk in enumerate(chunks)]
    shape = (len(texts), model.chunks, length)
    return torch.tensor(ids).view(shape), (torch.arange(length) < torch.tensor(used)[:, None]).view(shape)


def encode_prompts(model: Model, prompts: Sequence[str]) -> Tensor:
    """Chunks are encoded each for itself and stand one behind the other."""
    ids, _ = tokenise(model, prompts)
    with arithmetic(model):
        hidden = model.parts["text_encoder"](ids.flatten(0, 1).to(model.device)).last_hidden_state.float()  # (B * chunks, L, D)
    return cast(Tensor, hidden.reshape(len(ids), model.prompt_tokens, -1))


def token_masks(model: Model, prompts: Sequence[str]) -> Tensor:
    return tokenise(model, prompts)[1].flatten(1)


@torch.no_grad()
def encode_images(model: Model, pixels: Tensor) -> tuple[Tensor, Tensor]:
    posterior = model.vae.encode(pixels.to(model.device)).latent_dist
    scale = model.vae.config.scaling_factor
    return posterior.mean * scale, posterior.std * scale


def predict(model: Model, noisy_latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
    with arithmetic(model):
        return cast(Tensor, model.parts["unet"](noisy_latents, timesteps, prompt_embeds).sample)


def generate(model: Model, prompts: Sequence[PicturePrompt], at_once: int = 1) -> list[Image.Image]:
    """DPM-Solver++ 2M (Lu et al. 2022), the WebUIs' usual sampler; latents are drawn on the CPU, so a seed means one picture everywhere.

    Up to `at_once` pictures of one size, step count and guidance are drawn together: faster, and equal but for rounding.
    """
    pictures: dict[int, Image.Image] = {}
    alike: dict[tuple[object, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        alike.setdefault((prompt.width, prompt.height, prompt.steps, prompt.guidance), []).append(number)
    for numbers in alike.values():
        for start in range(0, len(numbers), at_once):
            part = numbers[start : start + at_once]
            pictures |= zip(part, _generate_alike(model, [prompts[number] for number in part]), strict=True)
    return [pictures[number] for number in range(len(prompts))]


@torch.no_grad()
def _generate_alike(model: Model, prompts: Sequence[PicturePrompt]) -> list[Image.Image]:
    pipeline = StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.parts["text_encoder"],
        tokenizer=model.tokenizer,
        unet=model.parts["unet"],
        scheduler=DPMSolverMultistepScheduler.from_config(model.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    unet, first = cast(UNet2DConditionModel, model.parts["unet"]), prompts[0]
    own = unet.config.sample_size * pipeline.vae_scale_factor
    with arithmetic(model):
        texts = [*(prompt.text for prompt in prompts), *(prompt.negative for prompt in prompts)]
        prompt_embeds, negative_embeds = encode_prompts(model, texts).to(unet.dtype).chunk(2)
        latents = pipeline(
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_embeds,
            width=first.width or own,
            height=first.height or own,
            num_inference_steps=first.steps,
            guidance_scale=first.guidance,
            generator=[torch.Generator().manual_seed(prompt.seed) for prompt in prompts],
            output_type="latent",
        ).images
    decoded = model.vae.decode(latents.float() / model.vae.config.scaling_factor).sample
    pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu()
    return [Image.fromarray(picture.numpy()) for picture in pixels]


def metadata(model: Model) -> dict[str, str]:
    return {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.prediction_type": "v" if model.noise_schedule.prediction_type == "v_prediction" else "epsilon",
    }


SD = Family("sd", load, encode_prompts, token_masks, encode_images, predict, generate, metadata)
