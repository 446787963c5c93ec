"""Captions beside pictures, as the dataset page changes them."""

from pathlib import Path

import pytest
from sdlora_ui import captions
from sdlora_ui.paths import Places

from sdlora.errors import DataError


@pytest.fixture
def places(tmp_path: Path) -> Places:
    for name in ("a.png", "b.jpg", "c.webp"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.txt").write_text("a cat, sitting\n")
    (tmp_path / "b.caption").write_text("a dog", encoding="utf-8-sig")
    return Places.at(tmp_path / "runs", [tmp_path])


def test_read_and_write_go_round(places: Places, tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert captions.read(places, folder) == {"a.png": "a cat, sitting", "b.jpg": "a dog", "c.webp": ""}
    told = {"a.png": "a cat, sitting", "b.jpg": "<b>${x}</b>", "c.webp": "new ", "d.png": "none"}
    now = captions.read(places, folder)
    assert captions.differing(told, now).keys() == {"b.jpg", "c.webp"}
    assert captions.write(places, folder, told, now) == captions.read(places, folder)
    assert captions.read(places, folder) == {"a.png": "a cat, sitting", "b.jpg": "<b>${x}</b>", "c.webp": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.txt", "b.caption", "b.jpg", "c.txt", "c.webp"], "no second file"


def test_what_cannot_be_edited_is_said(places: Places, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        captions.read(places, str(tmp_path))
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(DataError, match=r"in metadata\.jsonl"):
        captions.read(places, str(tmp_path), only="a.png")


def test_links_that_lead_out_are_left_alone(places: Places, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "x.png").write_bytes(b"")
    (outside / "c.txt").write_text("treasure")
    (tmp_path / "x.png").symlink_to(outside / "x.png")
    (tmp_path / "c.txt").symlink_to(outside / "c.txt")
    assert captions.read(places, str(tmp_path)) == {"a.png": "a cat, sitting", "b.jpg": "a dog", "c.webp": ""}
    captions.write(places, str(tmp_path), {"c.webp": "mine"}, captions.read(places, str(tmp_path), only="c.webp"))
    assert (outside / "c.txt").read_text() == "treasure" and (tmp_path / "c.txt").read_text() == "mine\n"


def test_tags() -> None:
    assert captions.add_first("x")("a, b") == "x, a, b" == captions.add_first("x")("a, x, b")
    assert captions.add_first("x")("") == "x" == captions.add_last("x")("")
    assert captions.add_last("x")("a") == "a, x" and captions.add_last("x")("x, a") == "x, a"
    assert captions.remove("b")("a, b, c") == "a, c" and captions.remove("b")("a b,c") == "a b,c"
    assert captions.replace("cat", "dog")("a cat") == "a dog"


def test_one_picture_is_read_by_its_name_alone(places: Places, tmp_path: Path) -> None:
    assert captions.read(places, str(tmp_path), only="b.jpg") == {"b.jpg": "a dog"}
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "x.png").write_bytes(b"")
    for name in ("below/x.png", "../x.png", "a.txt", ".a.png", "none.png", "", str(tmp_path / "a.png")):
        assert captions.read(places, str(tmp_path), only=name) == {}
