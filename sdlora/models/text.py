"""Prompts to tokens and to what CLIP's text encoders say of them, in chunks as WebUIs encode long prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdlora.errors import WeightsError
from sdlora.models.device import arithmetic
from sdlora.models.family import Model


class Encoded(NamedTuple):
    """What one text encoder says of B prompts."""

    states: Tensor  # (B, T, D), as they come out of the layer that was asked, before the final norm
    pooled: Tensor | None  # (B, P) of the first chunk, from encoders with a projection


def encode(model: Model, part: str, prompts: Sequence[str], clip_skip: int) -> Encoded:
    """By the text encoder `part`, up to its `clip_skip`-th last layer. Chunks are encoded each for itself and stand one behind the
    other; what is said of a whole prompt is said of its first chunk, as in WebUIs and kohya's scripts."""
    ids, _ = tokenise(model.tokenizers[part], prompts, model.chunks)
    encoder: Any = model.parts[part]
    with arithmetic(model):
        out = encoder(ids.flatten(0, 1).to(model.device), output_hidden_states=True)
    states = out.hidden_states[-clip_skip]  # (B * chunks, L, D)
    pooled = getattr(out, "text_embeds", None)
    return Encoded(
        states.reshape(len(ids), model.prompt_tokens, -1),
        None if pooled is None else pooled.reshape(len(ids), model.chunks, -1)[:, 0],
    )


def layers_of(model: Model, part: str) -> Any:
    encoder: Any = model.parts[part]
    return getattr(encoder, "text_model", encoder).encoder.layers


def skipped(model: Model, part: str, clip_skip: int) -> tuple[str, ...]:
    """How the names of the layers behind the `clip_skip`-th last one begin. Raises WeightsError where there are not so many."""
    count = len(layers_of(model, part))
    if clip_skip > count:
        raise WeightsError(f"model.clip_skip = {clip_skip}: the text encoder has {count} layers only.")
    return tuple(f"{part}.text_model.encoder.layers.{number}." for number in range(count + 1 - clip_skip, count))


def tokenise(tokenizer: Any, prompts: Sequence[str], chunks: int) -> tuple[Tensor, Tensor]:
    """Token ids of each chunk, and which of them are no padding: both (B, chunks, L).

    Every chunk has a start, an end and padding of its own, as in WebUIs and kohya's scripts; a chunk without words is
    padding throughout, but for the first. Words beyond the last chunk are cut off.
    """
    length = tokenizer.model_max_length
    room = length - 2
    texts = tokenizer(list(prompts), add_special_tokens=False, truncation=True, max_length=chunks * room).input_ids
    pieces = [text[start : start + room] for text in texts for start in range(0, chunks * room, room)]
    padding = [tokenizer.pad_token_id] * length
    ids = [[tokenizer.bos_token_id, *piece, tokenizer.eos_token_id, *padding][:length] for piece in pieces]
    used = [len(piece) + 2 if piece or number % chunks == 0 else 0 for number, piece in enumerate(pieces)]
    shape = (len(texts), chunks, length)
    return torch.tensor(ids).view(shape), (torch.arange(length) < torch.tensor(used)[:, None]).view(shape)


def token_masks(model: Model, prompts: Sequence[str]) -> Tensor:
    """Which tokens of the prompts are no padding, start and end included: (B, T) bool, the same for all text encoders."""
    return tokenise(model.tokenizer, prompts, model.chunks)[1].flatten(1)
