"""What a run trains on: pictures of a folder, placed in buckets, as latents that are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image
from torch import Tensor

from sdlora.config import Config, DataOptions
from sdlora.data import images
from sdlora.data.buckets import Placed, place
from sdlora.data.cache import TensorCache, fingerprint
from sdlora.data.dataset import Example, find_examples
from sdlora.models.family import Family, Model


@dataclass(frozen=True)
class Item:
    """What one place in an epoch shows: a picture, upright or mirrored, in its bucket."""

    example: Example
    placed: Placed
    mirrored: bool
    weight: float = 1.0  # of its loss
    regularises: bool = False  # of the class and not of the subject


class Posterior(NamedTuple):
    """What the VAE says of a picture, on the CPU."""

    mean: Tensor  # (C, h, w)
    std: Tensor
    mask: Tensor | None  # (1, h, w) in 0..1: what is trained


def find_items(config: Config) -> tuple[list[Item], list[tuple[Path, str]]]:
    """Items in the order of their names, regularisation pictures behind the training pictures; and what was skipped, with the reason.
    Raises DataError."""
    data = config.data
    found = find_examples(
        data.folder, missing_caption=data.missing_caption, trigger=data.trigger, on_bad_image=data.on_bad_image, masks=data.masks
    )
    items, skipped = _placed(found.examples, data), list(found.skipped)
    if data.regularisation_folder is not None:
        missing: Literal["empty", "error"] = "empty" if data.class_noun else "error"
        regular = find_examples(data.regularisation_folder, missing_caption=missing, trigger="", on_bad_image=data.on_bad_image)
        named = [replace(example, caption=example.caption or data.class_noun) for example in regular.examples]
        others = _placed(named, data, config.loss.regularisation, True)
        items += [others[number % len(others)] for number in range(len(items))]  # as many as training pictures, as DreamBooth has it
        skipped += regular.skipped
    return items, skipped


def _placed(examples: Sequence[Example], data: DataOptions, weight: float = 1.0, regularises: bool = False) -> list[Item]:
    sides = (False, True) if data.flip else (False,)
    return [
        Item(example, place(example.size, resolution=data.resolution, step=data.bucket_step), mirrored, weight, regularises)
        for example in examples
        for mirrored in sides
    ]


def cached_latents(path: Path, family: Family, model: Model, items: Sequence[Item]) -> list[Posterior]:
    """Posterior of each item; what is missing is encoded and written to `path`."""
    cache = TensorCache(path)
    latents = []
    for item in items:
        key = _key(item, model)
        entry = cache.get(key)
        if entry is None:
            picture = _shown(item, images.decode(item.example.path))
            mean, std = family.encode_images(model, images.to_tensor(picture)[None])
            entry = {"mean": mean[0].cpu(), "std": std[0].cpu()}
            if item.example.mask is not None:
                mask = images.decode_mask(item.example.mask.path, item.example.mask.alpha)
                height, width = entry["mean"].shape[1:]
                entry["mask"] = images.mask_to_tensor(_shown(item, mask), (height, width))
            cache.put(key, entry)
        latents.append(Posterior(entry["mean"], entry["std"], entry.get("mask")))
    cache.save()
    return latents


def _shown(item: Item, picture: Image.Image) -> Image.Image:
    picture = images.crop_to(picture, item.placed.resized, item.placed.crop)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if item.mirrored else picture


def _key(item: Item, model: Model) -> str:
    """All that the cached latents depend on."""
    mask = item.example.mask
    of_mask = () if mask is None else (mask.digest, mask.alpha)
    placed = (item.placed.resized, item.placed.crop, item.mirrored)
    return fingerprint(images.PIXELS_VERSION, item.example.digest, *placed, model.fingerprint, *of_mask)
