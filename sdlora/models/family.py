"""What the loop needs of a model family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sdlora.data.cache import fingerprint
from sdlora.diffusion.schedule import NoiseSchedule
from sdlora.tensors import tensor_bytes


@dataclass(frozen=True)
class Model:
    """A loaded base model. `parts` by the name that layer names start with."""

    family: str
    parts: dict[str, nn.Module]  # "unet", "text_encoder", and in SDXL "text_encoder_2"
    vae: Any
    tokenizers: dict[str, Any]  # of each text encoder
    noise_schedule: NoiseSchedule
    scheduler_config: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    program_bytes: int = 0  # of memory, that the process held beside its weights when it was loaded
    notes: tuple[str, ...] = ()  # what was assumed while loading
    clip_skip: int = 1  # at which of the text encoder's layers embeddings are taken, 1 for the last
    chunks: int = 1  # of a prompt: each is as long as the tokenizer's longest text
    prompt_weights: bool = False  # whether brackets in prompts weigh what is in them
    idle: tuple[str, ...] = ()  # how the names of layers begin that no prediction depends on
    loaders: dict[str, Callable[[], Any]] = field(default_factory=dict)  # of "vae" and text encoders: the part, read from its files
    digests: dict[str, str] = field(default_factory=dict)  # of these parts' weights, as far as they are known

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of parts."""
        return tuple(self.tokenizers)

    @property
    def tokenizer(self) -> Any:
        """Of the first text encoder; the second's splits texts alike, and pads them otherwise."""
        return next(iter(self.tokenizers.values()))

    @property
    def prompt_tokens(self) -> int:
        """T of every prompt's embedding."""
        return self.chunks * int(self.tokenizer.model_max_length)

    @property
    def latent_factor(self) -> int:
        """Pixels along one latent pixel's side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def size_multiple(self) -> int:
        """Picture sides must be multiples of this many px."""
        unet: Any = self.parts["unet"]
        return int(self.latent_factor * 2 ** (len(unet.config.block_out_channels) - 1))

    @cached_property
    def vae_fingerprint(self) -> str:
        """What cached latents depend on."""
        tiles = ("tile", self.vae.tile_sample_min_size) if self.vae.use_tiling else ()
        return fingerprint(self.digests.get("vae") or digest(self.vae), self.vae.config.scaling_factor, *tiles)

    @cached_property
    def text_fingerprint(self) -> str:
        """What cached prompt embeddings of the base model depend on; the precision of the weights is part of their bytes. To be asked for
        before the model is adapted."""
        read: list[object] = []
        for name, tokenizer in self.tokenizers.items():
            encoder: Any = self.parts[name]
            config = encoder.config
            read.append((config.hidden_act, config.layer_norm_eps, config.num_attention_heads))
            read.append(
                (self.digests.get(name) or digest(encoder), tokenizer.get_vocab(), tokenizer.model_max_length, tokenizer.pad_token_id)
            )
        return fingerprint(self.clip_skip, self.chunks, self.prompt_weights, *read)


def digest(module: nn.Module) -> str:
    """sha256, hex, over names and bytes of all weights."""
    import hashlib

    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(tensor_bytes(tensor))
    return found.hexdigest()


@dataclass(frozen=True)
class PromptEmbeds:
    """What the text encoders say of B prompts."""

    states: tuple[Tensor, ...]  # of each encoder, (B, T, D)
    pooled: Tensor | None = None  # (B, P): of whole prompts, by SDXL's second encoder

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> PromptEmbeds:
        """From `tensors`, of which a pooled one has no axis for tokens."""
        pooled = [tensor for tensor in tensors if tensor.dim() == 2]
        return cls(tuple(tensor for tensor in tensors if tensor.dim() == 3), pooled[0] if pooled else None)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.states if self.pooled is None else (*self.states, self.pooled)

    @property
    def vectors(self) -> tuple[Tensor, ...]:
        """All of them as (B, n, D): the pooled one counts as a token of its own."""
        return self.states if self.pooled is None else (*self.states, self.pooled[:, None])

    @property
    def prompt_embeds(self) -> Tensor:
        """(B, T, sum of all D), as cross-attention reads them."""
        return torch.cat(self.states, dim=-1)


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
    name: str  # "sd1", "sd2", "sdxl"
    encode_prompts: Callable[[Model, Sequence[str]], PromptEmbeds]
    """Gradients flow into text-encoder adapters."""
    predict: Callable[[Model, Tensor, Tensor, PromptEmbeds, Tensor], Tensor]
    """Noisy latents (B, C, h, w), timesteps (B,), prompts, and of each picture (B, 6) its original height and width, the top and left
    of its crop, and the height and width that are shown, in px -> prediction (B, C, h, w)."""
    sample: Callable[[Model, Sequence[PicturePrompt]], Tensor]
    """Prompts of one size, step count and guidance -> latents (B, C, h, w), at the VAE's own scale."""
    idle: Callable[[Model], tuple[str, ...]]
    """How the readable names of layers begin that no prediction depends on."""
