"""Prompts to tokens and to what CLIP's text encoders say of them, in chunks as WebUIs encode long prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdlora.data.prompt_weights import weigh, weighted_tokens
from sdlora.errors import WeightsError
from sdlora.models.device import arithmetic
from sdlora.models.family import Model


class Encoded(NamedTuple):
    """What one text encoder says of B prompts, in fp32."""

    states: Tensor  # (B, T, D), as they come out of the layer that was asked
    pooled: Tensor | None  # (B, P) of the first chunk, from encoders with a projection


def encode(
    model: Model, part: str, prompts: Sequence[str], clip_skip: int, norm: Callable[[Tensor], Tensor] = lambda states: states
) -> Encoded:
    """By the text encoder `part`, up to its `clip_skip`-th last layer, and through `norm`. Chunks are encoded each for itself and stand one
    behind the other; what is said of a whole prompt is said of its first chunk, as in WebUIs and kohya's scripts. Weights are each
    encoder's own affair, chunk by chunk, and do not reach what is said of the whole."""
    ids, _, weights = tokenise(model, part, prompts)
    encoder: Any = model.parts[part]
    with arithmetic(model):
        out = encoder(ids.flatten(0, 1).to(model.device), output_hidden_states=True)
        states = norm(out.hidden_states[-clip_skip]).float()  # (B * chunks, L, D)
    if model.prompt_weights:
        states = weigh(states, weights.flatten(0, 1).to(states.device))
    pooled = getattr(out, "text_embeds", None)
    return Encoded(
        states.reshape(len(ids), model.prompt_tokens, -1),
        None if pooled is None else pooled.float().reshape(len(ids), model.chunks, -1)[:, 0],
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


class Tokens(NamedTuple):
    """Of B prompts, all (B, chunks, L)."""

    ids: Tensor
    used: Tensor  # which are no padding
    weights: Tensor


def tokenise(model: Model, part: str, prompts: Sequence[str]) -> Tokens:
    """Every chunk has a start, an end and padding of its own, as in WebUIs and kohya's scripts; a chunk without words is padding
    throughout, but for the first. Words beyond the last chunk are cut off."""
    tokenizer, chunks = model.tokenizers[part], model.chunks
    length = tokenizer.model_max_length
    room = length - 2

    def ids_of(prompt: str) -> list[int]:
        return list(tokenizer(prompt, add_special_tokens=False).input_ids)

    ids, used, weights = [], [], []
    for prompt in prompts:
        own, own_weights = weighted_tokens(prompt, ids_of) if model.prompt_weights else ((found := ids_of(prompt)), [1.0] * len(found))
        for start in range(0, chunks * room, room):
            piece = own[start : start + room]
            rest = length - 2 - len(piece)
            ids.append([tokenizer.bos_token_id, *piece, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * rest])
            used.append(len(piece) + 2 if piece or not start else 0)
            weights.append([1.0, *own_weights[start : start + room], 1.0, *[1.0] * rest])
    shape = (len(prompts), chunks, length)
    return Tokens(
        torch.tensor(ids).view(shape), (torch.arange(length) < torch.tensor(used)[:, None]).view(shape), torch.tensor(weights).view(shape)
    )


def token_masks(model: Model, prompts: Sequence[str]) -> Tensor:
    """Which tokens of the prompts are no padding, start and end included: (B, T) bool, the same for all text encoders."""
    return tokenise(model, model.text_encoders[0], prompts).used.flatten(1)
