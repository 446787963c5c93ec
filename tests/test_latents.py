"""Latents: encoded once, read when asked for, computed anew where they are missing or damaged, never of another picture."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdlora import latents as latents_module
from sdlora.data.buckets import Placed
from sdlora.data.cache import TensorCache
from sdlora.data.dataset import Example, Mask
from sdlora.errors import DataError
from sdlora.items import Item
from sdlora.latents import Latents, latents_key


class Encoder:
    """In the VAE's place: a latent is the mean of each channel over 8 x 8 pixels; remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def __call__(self, model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.batches.append(tuple(pixels.shape))
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return mean, mean.abs() / 2


class FakeModel:
    device = torch.device("cpu")
    vae = torch.nn.Linear(1, 1)
    vae_fingerprint = "vae"


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    """Seven pictures of two sizes, one of them with a mask of its left half."""
    found = []
    for number in range(7):
        size = (32, 16) if number % 2 else (16, 16)
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
        mask = None
        if number == 2:
            half = np.zeros((16, 16), dtype=np.uint8)
            half[:, :8] = 255
            Image.fromarray(half).save(tmp_path / "mask.png")
            mask = Mask(tmp_path / "mask.png", "digest of mask", False)
        found.append(Item(Example(path, "a", size, f"digest {number}", mask), Placed(size, size, (0, 0, *size)), False))
    return found


def latents_of(folder: Path, items: Sequence[Item], encoder: Encoder) -> Latents:
    model: Any = FakeModel()
    return Latents(TensorCache(folder / "cache", "fake"), model, items, encoder)


def expected(item: Item) -> Tensor:
    with Image.open(item.example.path) as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
    return torch.nn.functional.avg_pool2d(pixels, 8)


def test_any_number_of_workers_gives_the_same_pictures_in_the_same_order(items: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [{f"{number} {k}": item for k, item in enumerate(items)} for number in range(4)]

    def by(workers: int) -> list[dict[str, Any]]:
        monkeypatch.setattr("os.cpu_count", lambda: workers)
        return list(latents_module.decoded(batches))

    alone = by(1)
    for workers in (2, 7):
        for ours, theirs in zip(by(workers), alone, strict=True):
            assert list(ours) == list(theirs)
            assert all(torch.equal(ours[key].pixels, theirs[key].pixels) for key in ours)


@pytest.mark.parametrize("together", [1, 2 * 16 * 16, 10**9])
def test_a_fill_encodes_each_once_and_every_item_gets_its_own(
    tmp_path: Path, items: list[Item], monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(latents_module, "at_once", lambda model: together)
    encoder = Encoder()
    latents = latents_of(tmp_path, [*items, items[0]], encoder)  # one is shown twice, as regularisation pictures are
    told = list(latents.fill())
    assert (told[-1].done, told[-1].total) == (7, 7) and [e.done for e in told] == sorted({e.done for e in told})
    sizes = {1: {1}, 2 * 16 * 16: {1, 2}, 10**9: {3, 4}}[together]
    assert {batch[0] for batch in encoder.batches} == sizes and sum(batch[0] for batch in encoder.batches) == 7
    again = Encoder()
    for reader in (latents, latents_of(tmp_path, [*items, items[0]], again)):
        assert not list(reader.fill()) and len(reader) == 8
        for posterior, item in zip(reader, [*items, items[0]], strict=True):
            assert torch.allclose(posterior.mean, expected(item), atol=1e-6)
            assert torch.equal(posterior.std, posterior.mean.abs() / 2)
            assert (posterior.mask is None) == (item.example.mask is None)
        assert reader[2].mask is not None and reader[2].mask.tolist() == [[[1, 0], [1, 0]]]
    assert not again.batches


def test_a_fill_that_is_cut_off_goes_on_where_it_was(tmp_path: Path, items: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents_module, "FLUSH_EVERY", 2)
    killed = latents_of(tmp_path, items, Encoder())
    stream = killed.fill()
    for _ in range(5):
        next(stream)
    second = Encoder()
    told = list(latents_of(tmp_path, items, second).fill())  # the first, as if it had been killed, has written two shards and no more
    assert len(second.batches) == 3 and (told[0].done, told[-1].done) == (5, 7)
    stream.close()
    assert len(TensorCache(tmp_path / "cache", "x")._index()) == 7


def test_closing_a_fill_saves_what_it_has(tmp_path: Path, items: list[Item]) -> None:
    stream = latents_of(tmp_path, items, Encoder()).fill()
    for _ in range(5):
        next(stream)
    stream.close()
    assert len(TensorCache(tmp_path / "cache", "x")._index()) == 5


def test_only_some_items_are_filled_and_others_come_when_asked_for(tmp_path: Path, items: list[Item]) -> None:
    encoder = Encoder()
    latents = latents_of(tmp_path, items, encoder)
    list(latents.fill([1, 2, 1]))
    assert len(encoder.batches) == 2
    assert torch.allclose(latents[5].mean, expected(items[5]), atol=1e-6)
    assert len(encoder.batches) == 3
    assert torch.equal(latents_of(tmp_path, items, encoder)[5].mean, latents[5].mean)  # it has been kept
    assert len(encoder.batches) == 3


def test_a_damaged_entry_is_computed_anew_while_training(tmp_path: Path, items: list[Item]) -> None:
    first = latents_of(tmp_path, items, Encoder())
    list(first.fill())
    whole = [posterior.mean for posterior in first]
    (shard,) = (tmp_path / "cache").iterdir()
    content = bytearray(shard.read_bytes())
    content[content.index(whole[3].numpy().tobytes())] ^= 1
    shard.write_bytes(content)
    encoder = Encoder()
    latents = latents_of(tmp_path, items, encoder)
    assert all(torch.equal(latents[index].mean, mean) for index, mean in enumerate(whole))
    assert len(encoder.batches) == 1


def test_latents_that_are_not_finite_name_their_picture(tmp_path: Path, items: list[Item]) -> None:
    class Overflowing(Encoder):
        def __call__(self, model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
            mean, std = super().__call__(model, pixels)
            return mean, std / (pixels.shape[3] != 32)

    with pytest.raises(DataError, match=r"1\.png: its latents are not finite"):
        list(latents_of(tmp_path, items, Overflowing()).fill())


def test_an_unreadable_picture_ends_the_fill_with_its_name(tmp_path: Path, items: list[Item]) -> None:
    items[4].example.path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"4\.png"):
        list(latents_of(tmp_path, items, Encoder()).fill())


def test_a_colour_variant_has_its_own_latents_and_the_mask_of_its_picture(tmp_path: Path, items: list[Item]) -> None:
    variants = [dataclasses.replace(items[2], colours=number) for number in range(3)]
    latents = latents_of(tmp_path, variants, Encoder())
    list(latents.fill())
    assert torch.allclose(latents[0].mean, expected(items[2]), atol=1e-6)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(latents[a].mean, latents[b].mean)
        assert torch.equal(latents[a].mask, latents[b].mask)  # type: ignore[arg-type]


def test_the_key_moves_with_each_thing_that_latents_depend_on(items: list[Item]) -> None:
    item, model = items[2], FakeModel()
    mask = item.example.mask
    assert mask is not None

    def key(item: Item, vae: str = "vae") -> str:
        model.vae_fingerprint = vae
        return latents_key(item, model)  # type: ignore[arg-type]

    def of(**changes: Any) -> Item:
        return dataclasses.replace(item, example=dataclasses.replace(item.example, **changes))

    others = [
        key(item, "another"),
        key(of(digest="edited")),
        key(of(mask=None)),
        key(of(mask=dataclasses.replace(mask, digest="edited"))),
        key(of(mask=dataclasses.replace(mask, alpha=True))),
        key(dataclasses.replace(item, mirrored=True)),
        key(dataclasses.replace(item, colours=1)),
        key(dataclasses.replace(item, colours=2)),
        key(dataclasses.replace(item, placed=Placed((16, 16), (17, 16), (0, 0, 16, 16)))),
        key(dataclasses.replace(item, placed=Placed((16, 16), (17, 16), (1, 0, 17, 16)))),
    ]
    assert len({key(item), *others}) == len(others) + 1
    same = [of(path=Path("elsewhere.png")), of(caption="told otherwise"), dataclasses.replace(item, weight=2.0)]
    assert {key(other) for other in same} == {key(item)}
