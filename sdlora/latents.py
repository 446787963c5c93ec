"""Latents of the pictures: what the VAE says of each, computed once and read from disk when a batch asks for it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from sdlora import events
from sdlora.data import images
from sdlora.data.cache import Entry, TensorCache, fingerprint
from sdlora.errors import DataError
from sdlora.items import Item
from sdlora.models.device import on_device
from sdlora.models.family import Model
from sdlora.models.images import encode_images

FLUSH_EVERY = 64  # pictures: what a killed fill loses at most; 8 MB in SD 1.x, 32 MB in SDXL
PIXELS_AT_ONCE = 8 * 512 * 512  # in the VAE: bounds its activations
MOST_AT_ONCE = 64  # pictures, however small


Encoder = Callable[[Model, Tensor], tuple[Tensor, Tensor]]
"""See images.encode_images."""


class Posterior(NamedTuple):
    """What the VAE says of a picture, on the CPU."""

    mean: Tensor  # (C, h, w)
    std: Tensor
    mask: Tensor | None  # (1, h, w) in 0..1: what is trained


class Shown(NamedTuple):
    """A picture as the VAE takes it."""

    pixels: Tensor  # (3, H, W) in -1..1
    mask: Image.Image | None  # of the same size


class Latents(Sequence[Posterior]):
    """The posterior of each item, in their order, read when it is asked for; what is missing or damaged is computed then."""

    def __init__(self, cache: TensorCache, model: Model, items: Sequence[Item], encode: Encoder = encode_images) -> None:
        self._cache, self._model, self._items, self._encode_images = cache, model, items, encode
        self._keys = [latents_key(item, model) for item in items]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Posterior:  # type: ignore[override]  # slices would read what nobody asked for
        key = self._keys[index]
        entry = self._cache.get(key)
        if entry is None:
            (entry,) = self._encode([self._items[index]], [shown(self._items[index])])
            self._cache.put(key, entry)
            self._cache.flush()
        return Posterior(entry["mean"], entry["std"], entry.get("mask"))

    def fill(self, indices: Sequence[int] | None = None) -> Generator[events.Cached, None, None]:
        """Compute what is in no shard, of all items or of these, in batches of one bucket, while threads decode the next ones.

        What is computed is on disk every FLUSH_EVERY pictures, and when the iterator is closed. Raises DataError for a picture whose
        latents are not finite.
        """
        chosen = range(len(self._items)) if indices is None else indices
        wanted = {self._keys[index]: self._items[index] for index in chosen}  # an item that is there twice is computed once
        missing = {key: item for key, item in wanted.items() if key not in self._cache}
        done, unsaved = len(wanted) - len(missing), 0
        try:
            for batch in decoded(batches(missing, at_once(self._model))):
                entries = self._encode([missing[key] for key in batch], list(batch.values()))
                for key, entry in zip(batch, entries, strict=True):
                    self._cache.put(key, entry)
                done, unsaved = done + len(batch), unsaved + len(batch)
                if unsaved >= FLUSH_EVERY:
                    self._cache.flush()
                    unsaved = 0
                yield events.Cached(done, len(wanted))
        finally:
            self._cache.flush()

    def _encode(self, items: Sequence[Item], pictures: Sequence[Shown]) -> list[Entry]:
        """Of one bucket."""
        with on_device(self._model, "vae"):
            means, stds = self._encode_images(self._model, torch.stack([picture.pixels for picture in pictures]))
        entries = []
        for item, picture, mean, std in zip(items, pictures, means.cpu(), stds.cpu(), strict=True):
            if not (mean.isfinite().all() and std.isfinite().all()):
                raise DataError(f"{item.example.path}: its latents are not finite, so nothing could be learned from it; is the VAE whole?")
            entry = {"mean": mean, "std": std}
            if picture.mask is not None:
                entry["mask"] = images.mask_to_tensor(picture.mask, (mean.shape[1], mean.shape[2]))
            entries.append(entry)
        return entries


def latents_key(item: Item, model: Model) -> str:
    """All that the cached latents depend on."""
    mask = item.example.mask
    of_mask = () if mask is None else (mask.digest, mask.alpha)
    placed = (item.placed.resized, item.placed.crop, item.mirrored, item.background)
    colours = ("colours", item.colours) if item.colours else ()
    return fingerprint(images.PIXELS_VERSION, item.example.digest, *placed, model.vae_fingerprint, *of_mask, *colours)


def shown(item: Item) -> Shown:
    """Decode an item's picture and mask."""

    def placed(picture: Image.Image) -> Image.Image:
        picture = images.crop_to(picture, item.placed.resized, item.placed.crop)
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if item.mirrored else picture

    mask = item.example.mask
    picture = placed(images.decode(item.example.path, item.background, at_least=item.placed.resized))
    if item.colours:
        picture = images.vary_colour(picture, f"{item.example.digest}/{item.colours}")
    return Shown(images.to_tensor(picture), None if mask is None else placed(images.decode_mask(mask.path, mask.alpha)))


def at_once(model: Model) -> int:
    """How many pixels the VAE takes in one batch. On a CPU a batch gains nothing, and one picture's latents are then the same to the bit
    whatever stands beside it."""
    return 1 if model.device.type == "cpu" else PIXELS_AT_ONCE


def batches(items: Mapping[str, Item], pixels: int) -> Iterator[dict[str, Item]]:
    """Items of one bucket, at most so many pixels together but for a single picture."""
    by_bucket: dict[tuple[int, int], list[str]] = {}
    for key, item in items.items():
        by_bucket.setdefault(item.placed.bucket, []).append(key)
    for (width, height), keys in by_bucket.items():
        size = max(1, min(MOST_AT_ONCE, pixels // (width * height)))
        for start in range(0, len(keys), size):
            yield {key: items[key] for key in keys[start : start + size]}


def decoded(batches: Iterable[Mapping[str, Item]]) -> Iterator[dict[str, Shown]]:
    """The pictures of each batch, decoded on all cores ahead of whoever takes them: Pillow lets threads run at once."""
    workers = os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)
    waiting: deque[dict[str, Future[Shown]]] = deque()

    def next_batch() -> dict[str, Shown]:
        return {key: future.result() for key, future in waiting.popleft().items()}

    try:
        for batch in batches:
            waiting.append({key: pool.submit(shown, item) for key, item in batch.items()})
            while sum(map(len, waiting)) - len(waiting[0]) >= 2 * workers:
                yield next_batch()
        while waiting:
            yield next_batch()
    finally:
        pool.shutdown(cancel_futures=True)
