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
from sdlora.data.buckets import Placed, place_all, random_crops
from sdlora.data.cache import TensorCache, fingerprint
from sdlora.data.dataset import Example, find_examples
from sdlora.errors import DataError
from sdlora.models.family import Family, Model


@dataclass(frozen=True)
class Item:
    """What one place in an epoch shows: a picture, upright or mirrored, in its bucket."""

    example: Example
    placed: Placed
    mirrored: bool
    weight: float = 1.0  # of its loss
    regularises: bool = False  # of the class and not of the subject
    background: tuple[int, int, int] = images.WHITE  # behind what is transparent


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
        data.folder,
        missing_caption=data.missing_caption,
        trigger=data.trigger,
        on_bad_image=data.on_bad_image,
        masks=data.masks,
        max_pixels=data.max_pixels,
    )
    items, skipped = _placed(found.examples, data), list(found.skipped)
    if data.regularisation_folder is not None:
        missing: Literal["empty", "error"] = "empty" if data.class_noun else "error"
        regular = find_examples(
            data.regularisation_folder, missing_caption=missing, trigger="", on_bad_image=data.on_bad_image, max_pixels=data.max_pixels
        )
        named = [replace(example, caption=example.caption or data.class_noun) for example in regular.examples]
        others = _placed(named, data, config.loss.regularisation, True)
        items += [others[number % len(others)] for number in range(len(items))]  # as many as training pictures, as DreamBooth has it
        skipped += regular.skipped
    return items, skipped


def _placed(examples: Sequence[Example], data: DataOptions, weight: float = 1.0, regularises: bool = False) -> list[Item]:
    """Every resolution of every picture, every crop of that, and its mirror image. Raises DataError."""
    sides, background = (False, True) if data.flip else (False,), images.colour(data.background)
    return [
        Item(example, placed, mirrored, weight, regularises, background)
        for example in examples
        for placed in _places(example, data)
        for mirrored in sides
    ]


def _places(example: Example, data: DataOptions) -> list[Placed]:
    try:
        places = place_all(
            example.size,
            data.resolutions or (data.resolution,),
            step=data.bucket_step,
            min_side=data.min_side,
            max_side=data.max_side,
            upscale=data.upscale,
        )
    except DataError as error:
        raise DataError(f"{example.path}: {error}") from None
    return places if data.crop == "centre" else [crop for placed in places for crop in random_crops(placed, example.digest)]


def cached_latents(path: Path, family: Family, model: Model, items: Sequence[Item]) -> list[Posterior]:
    """Posterior of each item; what is missing is encoded and written to `path`."""
    cache = TensorCache(path)
    latents = []
    for item in items:
        key = _key(item, model)
        entry = cache.get(key)
        if entry is None:
            picture = _shown(item, images.decode(item.example.path, item.background, at_least=item.placed.resized))
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
    placed = (item.placed.resized, item.placed.crop, item.mirrored, item.background)
    return fingerprint(images.PIXELS_VERSION, item.example.digest, *placed, model.fingerprint, *of_mask)
