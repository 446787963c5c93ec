"""From sets of pictures to what an epoch shows: how often, with which weight, and told how."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdlora import config as configs
from sdlora.data.batches import BatchPlan
from sdlora.data.buckets import Placed
from sdlora.data.captions import CaptionRules
from sdlora.data.dataset import Example
from sdlora.errors import DataError
from sdlora.items import Item, as_often, find_items


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pictures(folder: Path, *names: str, caption: str = "") -> None:
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (32, 32)).save(folder / f"{name}.png")
        if caption:
            (folder / f"{name}.txt").write_text(caption)


def find(toml: str) -> tuple[list[Item], list[tuple[Path, str]]]:
    Path("a.toml").write_text(toml)
    return find_items(configs.load([Path("a.toml")], [("resolution", "32"), ("bucket_step", "32")]))


def told(items: list[Item]) -> list[tuple[Any, ...]]:
    return [(item.example.path.stem, item.example.caption, item.repeats, item.weight, item.regularises) for item in items]


def test_each_set_has_its_own_repeats_weight_and_captions(place: Path) -> None:
    pictures(place / "cats", "a", "b", caption="grass, sky")
    pictures(place / "dogs", "c")
    items, skipped = find("""
[data]
trigger = "ohwx"
caption_dropout = 0.1
[[data.sets]]
folder = "cats"
repeats = 3
shuffle_tags = true
keep_tags = 2
caption_prefix = "a photo of {trigger}, "
[[data.sets]]
folder = "dogs"
weight = 0.5
missing_caption = "trigger"
trigger = "sks"
flip = true
colour_variants = 1
caption_dropout = 0.0
tag_dropout = 0.2
""")
    assert told(items) == [
        ("a", "grass, sky", 3, 1.0, False),
        ("b", "grass, sky", 3, 1.0, False),
        *[("c", "sks", 1, 0.5, False)] * 4,
    ]
    assert [(item.mirrored, item.colours) for item in items[2:]] == [(False, 0), (False, 1), (True, 0), (True, 1)]
    assert not any(item.mirrored or item.colours for item in items[:2])
    assert items[0].rules == CaptionRules(dropout=0.1, shuffle=True, keep_tags=2, prefix="a photo of ohwx, ")
    assert items[2].rules == CaptionRules(tag_dropout=0.2, keep_tags=1)
    assert skipped == []


def test_kohyas_folders_repeat_and_caption_what_they_hold(place: Path) -> None:
    pictures(place / "img" / "4_ohwx cat", "a")
    pictures(place / "img" / "1_ohwx style", "b", caption="a house")
    pictures(place / "img" / "more", "c")
    pictures(place / "reg" / "1_cat", "d", "e")
    items, skipped = find('[data]\nfolder = "img"\nregularisation_folder = "reg"\nrepeats = 2')
    assert told(items) == [
        ("b", "a house", 2, 1.0, False),
        ("a", "ohwx cat", 8, 1.0, False),
        ("d", "cat", 5, 1.0, True),
        ("e", "cat", 5, 1.0, True),
    ]
    assert [path.name for path, _ in skipped] == ["more"]


def test_sets_that_regularise_are_shown_as_often_as_all_others_together(place: Path) -> None:
    pictures(place / "cats", "a", "b", caption="a cat")
    pictures(place / "dogs", "c", "d", "e")
    toml = """
[data]
class_noun = "a dog"
trigger = "ohwx"
[loss]
regularisation = 0.5
[[data.sets]]
folder = "cats"
repeats = REPEATS
[[data.sets]]
folder = "dogs"
regularises = true
weight = 0.5
"""
    items, skipped = find(toml.replace("REPEATS", "4"))
    assert told(items)[2:] == [("c", "a dog", 3, 0.25, True), ("d", "a dog", 3, 0.25, True), ("e", "a dog", 2, 0.25, True)]
    assert skipped == []
    plan = BatchPlan([item.placed.bucket for item in items], [item.repeats for item in items], 2, seed=0)
    shown = Counter(items[index].regularises for step in range(plan.steps_per_epoch) for index in plan.batch(step))
    assert shown == {False: 8, True: 8}
    items, skipped = find(toml.replace("REPEATS", "1"))
    assert [name for name, *_ in told(items)] == ["a", "b", "c", "d"]
    ((folder, reason),) = skipped
    assert folder.name == "dogs" and reason.startswith("the last 1 of its pictures")
    with pytest.raises(DataError, match="every set regularises"):
        find('[[data.sets]]\nfolder = "dogs"\nregularises = true\nclass_noun = "a dog"')


def test_what_regularises_is_shared_out_by_its_repeats(place: Path) -> None:
    pictures(place / "dogs", "a", "b", caption="a dog")
    items, _ = find('[data]\nfolder = "dogs"')
    one, two = items[0], replace(items[1], repeats=3)
    for times in range(30):
        shares = {item.example.path.stem: item.repeats for item in as_often([one, two], times)}
        assert sum(shares.values()) == times
        assert 0 not in shares.values() and abs(shares.get("b", 0) - 0.75 * times) <= 1
    assert as_often([], 7) == []


def test_time_ids_are_of_the_picture_as_it_is_shown(place: Path) -> None:
    """Height before width, the crop's top before its left; mirrored, what was cut off at the right lies at the left."""
    placed = Placed((64, 32), (96, 40), (10, 3, 74, 35))
    item = Item(Example(place / "a.png", "a", (480, 200), "digest"), placed, False)
    assert item.time_ids == (200, 480, 3, 10, 32, 64)
    assert replace(item, mirrored=True).time_ids == (200, 480, 3, 96 - 74, 32, 64)


def test_a_salient_crop_is_where_the_detail_is(place: Path) -> None:
    (place / "pictures").mkdir()
    pixels = np.full((32, 96, 3), 128, dtype=np.uint8)
    pixels[:, 64:] = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(place / "pictures" / "right.png")
    Image.fromarray(pixels[:, ::-1]).save(place / "pictures" / "left.png")
    Image.fromarray(pixels[:, 64:]).save(place / "pictures" / "whole.png")
    told = '[data]\nmissing_caption = "empty"\nmax_side = 32\ncrop = "{}"'
    crops = {item.example.path.stem: item.placed.crop for item in find(told.format("salient"))[0]}
    assert crops == {"left": (0, 0, 32, 32), "right": (64, 0, 96, 32), "whole": (0, 0, 32, 32)}
    assert find(told.format("salient")) == find(told.format("salient"))
    assert {item.placed.crop for item in find(told.format("centre"))[0]} == {(32, 0, 64, 32), (0, 0, 32, 32)}
