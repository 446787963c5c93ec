"""How pictures are cut, as the dataset page draws it; and pictures turned as their cameras say."""

import io
import json
from pathlib import Path

from PIL import Image
from sdlora_ui import dataset, files
from sdlora_ui.dataset import Cut


def test_cuts_are_drawn_where_they_are(tmp_path: Path) -> None:
    """A bucket of 64 x 48 px that shows the middle of 96 x 48 leaves 16 at either side."""
    row = {"file": "a.png", "size": [100, 50], "bucket": [64, 48], "resized": [96, 48], "crop": [16, 0, 80, 48], "mirrored": False}
    (tmp_path / "places.json").write_text(json.dumps([row, row | {"mirrored": True}, row | {"colours": 1}]))
    cuts = dataset.cuts_in(tmp_path / "places.json")
    assert cuts == {"a.png": [Cut((64, 48), (96, 48), (16, 0, 80, 48))]}, "mirrored and in other colours it is the same"
    drawn = dataset.frames(cuts["a.png"])
    assert 'viewBox="0 0 96 48"' in drawn and 'd="M0 0H96V48H0ZM16 0H80V48H16Z"' in drawn, "all but the box is dimmed"
    half = Cut((32, 24), (48, 24), (8, 0, 40, 24))
    assert dataset.frames([*cuts["a.png"], half]).count("M16 0H80V48H16Z") == 2, "the same at half the size"
    assert dataset.cuts_in(tmp_path / "none.json") == {}


def test_a_card_shows_cuts_and_text_as_it_is(tmp_path: Path) -> None:
    picture = tmp_path / "<b>.png"
    picture.write_bytes(b"")
    shown = dataset.card(picture, "</textarea>${x}", [Cut((64, 48), (128, 48), (0, 0, 64, 48)), Cut((64, 48), (128, 48), (64, 0, 128, 48))])
    assert "M0 0H64V48H0ZM64 0H128V48H64Z" in shown and "cut to 64 x 48</figcaption>" in shown
    assert "<b>" not in shown and shown.count("</textarea>") == 1 and "${" not in shown


def test_thumbnails_are_turned_as_the_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(io.BytesIO(files.small(tmp_path / "a.jpg"))) as small:
        assert small.size == (20, 40)
