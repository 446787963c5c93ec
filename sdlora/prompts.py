"""What the base text encoder says of prompts: those that a run is sure to ask for are on disk, the others in memory."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence

import torch
from torch import Tensor

from sdlora import events
from sdlora.data.cache import TensorCache, fingerprint
from sdlora.lora.embedding_norm import AT_ONCE, Remembered
from sdlora.lora.layers import Adapter, disabled
from sdlora.models.device import on_device
from sdlora.models.family import Family, Model, PromptEmbeds

EMBEDDINGS_VERSION = 2  # part of the key: raise it when a family comes to encode the same prompt otherwise
FLUSH_EVERY = 8 * AT_ONCE  # prompts; 60 MB in SD 1.x


class BasePrompts:
    """Prompts -> what the text encoders say of them without adapters, on the model's device."""

    def __init__(self, cache: TensorCache, family: Family, model: Model, layers: Iterable[Adapter]) -> None:
        self._cache, self._family, self._model, self._layers = cache, family, model, list(layers)
        self._recent = Remembered(self._find, most=512)  # a quarter of a MB each in SD 1.x

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        return PromptEmbeds.of(self._recent(prompts))

    def fill(self, prompts: Iterable[str]) -> Generator[events.Cached, None, None]:
        """Put these on disk, so that the text encoder is not needed for them any more."""
        keys = {self._key(prompt): prompt for prompt in prompts}
        missing = [(key, prompt) for key, prompt in keys.items() if key not in self._cache]
        try:
            for start in range(0, len(missing), AT_ONCE):
                part = missing[start : start + AT_ONCE]
                for (key, _), *rows in zip(part, *self._encode([prompt for _, prompt in part]), strict=True):
                    self._cache.put(key, {str(number): row for number, row in enumerate(rows)})
                if (start + AT_ONCE) % FLUSH_EVERY == 0:
                    self._cache.flush()
                yield events.Cached(len(keys) - len(missing) + start + len(part), len(keys), "captions")
        finally:
            self._cache.flush()

    def _find(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """From disk, and what is not there, or damaged, from the text encoders."""
        rows: dict[str, tuple[Tensor, ...]] = {}
        for prompt in prompts:
            entry = self._cache.get(self._key(prompt))
            if entry is not None:
                rows[prompt] = tuple(entry[str(number)].to(self._model.device) for number in range(len(entry)))
        absent = [prompt for prompt in prompts if prompt not in rows]
        if absent:
            rows |= zip(absent, zip(*self._encode(absent), strict=True), strict=True)
        return tuple(torch.stack(of) for of in zip(*(rows[prompt] for prompt in prompts), strict=True))

    def _encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        with torch.no_grad(), disabled(self._layers), on_device(self._model, *self._model.text_encoders):
            return self._family.encode_prompts(self._model, prompts).tensors

    def _key(self, prompt: str) -> str:
        return fingerprint(EMBEDDINGS_VERSION, prompt, self._model.text_fingerprint)
