"""What the loop needs of a model family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sdlora.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class Model:
    """A loaded base model. `parts` by the name that layer names start with."""

    parts: dict[str, nn.Module]  # "unet", "text_encoder"
    vae: Any
    tokenizer: Any
    noise_schedule: NoiseSchedule
    scheduler_config: dict[str, Any]
    size_multiple: int  # picture sides must be multiples of this many px
    vae_fingerprint: str  # what cached latents depend on
    text_fingerprint: str  # what cached prompt embeddings of the base model depend on
    dtype: torch.dtype
    device: torch.device
    notes: tuple[str, ...] = field(default=())  # what was assumed while loading
    chunks: int = 1  # of a prompt: each is as long as the tokenizer's longest text

    @property
    def prompt_tokens(self) -> int:
        """T of every prompt's embedding."""
        return self.chunks * int(self.tokenizer.model_max_length)


@dataclass(frozen=True)
class PicturePrompt:
    """One picture to draw."""

    text: str
    negative: str = ""
    width: int | None = None  # px; None: the model's own size
    height: int | None = None
    seed: int = 0
    steps: int = 20
    guidance: float = 7.0


@dataclass(frozen=True)
class Family:
    name: str
    load: Callable[[Path, torch.dtype, torch.device, int], Model]
    """The last is clip_skip: at which of the text encoder's layers embeddings are taken, 1 for the last."""
    encode_prompts: Callable[[Model, Sequence[str]], Tensor]
    """Captions -> prompt_embeds (B, T, D); gradients flow into text-encoder adapters."""
    token_masks: Callable[[Model, Sequence[str]], Tensor]
    """Captions -> which of their tokens are no padding, start and end included: (B, T) bool."""
    encode_images: Callable[[Model, Tensor], tuple[Tensor, Tensor]]
    """Pictures (B, 3, H, W) in -1..1 -> mean and deviation of the latents' posterior, scaled to unit variance."""
    predict: Callable[[Model, Tensor, Tensor, Tensor], Tensor]
    """Noisy latents, timesteps, prompt_embeds -> prediction."""
    generate: Callable[[Model, Sequence[PicturePrompt], int], list[Image.Image]]
    """Prompts, and how many pictures may be drawn together -> pictures."""
    metadata: Callable[[Model], dict[str, str]]
    """Which base model an exported file says it is for."""
