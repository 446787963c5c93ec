"""What is said of a folder, on pictures made to have each fault once."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from sdlora import config
from sdlora.cli import main
from sdlora.data import dataset
from sdlora.data.buckets import Placed, place
from sdlora.data.check import Look, check, lines, look_alikes, looks, short
from sdlora.data.dataset import Example
from sdlora.data.images import examine
from sdlora.data.sheet import CELL, FRAME, GAP, HEADING, draw_sheet
from sdlora.errors import DataError
from sdlora.items import find_items


def example(name: str, size: tuple[int, int] = (512, 512), caption: str = "a cat", digest: str = "") -> tuple[Example, Placed]:
    return Example(Path(name), caption, size, digest or name), place(size, resolution=512)


def words(caption: str) -> int:
    return len(caption.split())


def blobs(seed: int, size: tuple[int, int] = (300, 200)) -> Image.Image:
    """Something like a photograph: large soft shapes."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def test_a_report_by_hand() -> None:
    places = [
        example("a.png", digest="same"),
        example("a.png", digest="same"),  # its mirror image is placed alike
        example("b.png", digest="same", caption="a dog"),
        example("c.png", (640, 384)),
        example("d.png", (256, 256), caption=""),
        example("e.png", (600, 600), caption="word " * 76),
    ]
    skipped = [(Path("f.png"), "the file is empty (0 bytes)"), (Path("g.txt"), "a caption without a picture of the same name")]
    report = check(places, skipped, tokens=words, refusals=["no", "and no"])
    assert len(report.sizes) == 5 and report.captions == 4
    assert report.buckets == {(512, 512): 4, (640, 384): 1}
    assert report.copies == [[Path("a.png"), Path("b.png")]] and report.alike == []
    assert report.enlarged == {Path("d.png"): 2.0}
    assert report.uncaptioned == [Path("d.png")] and report.overlong == {Path("e.png"): 76}
    assert report.unreadable == skipped[:1] and report.unused == skipped[1:]
    page = "\n".join(lines(report))
    for text in ("5, 256 to 640 px wide and 256 to 600 px high", "512x512 (4), 640x384 (1)", "a.png = b.png", "d.png, 256x256, 2.00 times"):
        assert text in page
    assert "e.png, 76" in page and "f.png: the file is empty" in page and page.endswith("Training would refuse (2):\n  no\n  and no")
    assert list(short(report)) == [
        "Exact copies: 1, as a.png = b.png.",
        "Pictures smaller than their bucket, so enlarged: 1, as d.png, 256x256, 2.00 times.",
        "Empty captions: 1, as d.png.",
        "Captions longer than 75 tokens: 1, as e.png, 76.",
    ]


def test_names_that_several_folders_have_are_told_with_their_folders() -> None:
    places = [example("1_cat/a.png", digest="same", caption=""), example("2_dog/a.png", digest="same")]
    page = "\n".join(lines(check(places, [], tokens=words)))
    assert "1_cat/a.png = 2_dog/a.png" in page.replace("\\", "/") and "Empty captions (1):\n  1_cat" in page


def test_lines_to_pick_from_are_measured_one_by_one() -> None:
    places = [example("a.png", caption="word " * 50 + "\n" + "word " * 60), example("b.png", caption="word " * 5 + "\n" + "word " * 80)]
    assert check(places, [], tokens=words).overlong == {Path("b.png"): 80}


def test_nothing_to_say_is_not_said() -> None:
    report = check([example("a.png")], [], tokens=words)
    assert list(short(report)) == []
    assert list(lines(report))[-1] == "Training would start." and len(list(lines(report))) == 5


def test_look_alikes_are_found_whatever_their_size_and_format(tmp_path: Path) -> None:
    picture = blobs(0)
    picture.save(tmp_path / "a.png")
    picture.resize((90, 60)).save(tmp_path / "small.jpg", quality=60)
    ImageEnhance.Brightness(picture).enhance(1.05).save(tmp_path / "brighter.webp")
    for seed in range(1, 40):
        blobs(seed).save(tmp_path / f"other{seed}.png")
    names = sorted(tmp_path.iterdir())
    assert look_alikes(looks(names)) == [[tmp_path / name for name in ("a.png", "brighter.webp", "small.jpg")]]


def test_drawings_on_plain_paper_are_not_alike(tmp_path: Path) -> None:
    for name, colour in (("red", "red"), ("blue", "blue")):
        paper = Image.new("RGB", (64, 64), "white")
        paper.paste(colour, (16, 16, 48, 48))
        paper.save(tmp_path / f"{name}.png")
    found = looks([tmp_path / "red.png", tmp_path / "blue.png"])
    assert len({look.code for look in found.values()}) == 1  # by their hashes alone they would be
    assert look_alikes(found) == []


def test_groups_are_joined() -> None:
    chain = {Path(f"{n}"): Look((1 << 4 * n) - 1, (0,) * 216) for n in range(4)}  # each 4 bits from the next
    apart = {Path("x"): Look((1 << 64) - 1, (0,) * 216)}
    assert look_alikes(chain | apart) == [list(chain)]
    assert look_alikes({}) == []


def test_the_sheet_frames_what_the_crop_keeps(tmp_path: Path) -> None:
    Image.new("RGB", (1000, 500), "black").save(tmp_path / "a.png")
    placed = Placed((256, 256), (512, 256), (256, 0, 512, 256))  # the right half
    sheet = np.asarray(draw_sheet([(Example(tmp_path / "a.png", "", (1000, 500), ""), placed)])).astype(int)
    top, middle = GAP + HEADING, GAP + HEADING + CELL // 4
    frame = [int(FRAME[at : at + 2], 16) for at in (1, 3, 5)]
    assert sheet[middle, GAP + 20].tolist() == pytest.approx([178, 178, 178], abs=1)  # 0.7 of white
    assert sheet[middle, GAP + CELL - 20].tolist() == [0, 0, 0]
    assert sheet[middle, GAP + CELL // 2].tolist() == sheet[top, GAP + CELL - 20].tolist() == frame
    assert sheet[middle, GAP + CELL + 3].tolist() == [255, 255, 255]


# ---------------------------------------------------------------- the command


def folder_of(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        blobs(number, (96, 64)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a cat")
    return folder


def test_the_command_prints_a_page_and_draws_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, sheet = folder_of(tmp_path), tmp_path / "out" / "sheet.png"
    assert (
        main(["data", "check", str(folder), "--resolution", "32", "--bucket_step", "8", "--sheet", str(sheet), "--places", f"{sheet}.json"])
        == 0
    )
    rows = json.loads(Path(f"{sheet}.json").read_text())
    assert rows and all(row["bucket"] == [row["crop"][2] - row["crop"][0], row["crop"][3] - row["crop"][1]] for row in rows)
    told = capsys.readouterr().out
    assert "3, 96 to 96 px wide" in told and "40x24 (3)" in told and "Training would start." in told
    with Image.open(sheet) as picture:
        assert picture.width > 3 * CELL


def test_the_command_says_why_training_would_refuse_and_all_else_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path)
    (folder / "bad.png").touch()
    (folder / "2.txt").unlink()
    assert main(["data", "check", str(folder)]) == 1
    told = capsys.readouterr().out
    assert "bad.png: the file is empty (0 bytes)" in told and "Empty captions (1):\n  2.png" in told
    refused = told.split("Training would refuse (2):\n")[1].splitlines()
    assert "bad.png cannot be read" in refused[0] and "1 of 3 pictures" in refused[1] and "no caption (2.png)" in refused[1]
    assert main(["data", "check", str(folder), "--on_bad_image", "skip", "--missing_caption", "empty"]) == 0
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["data", "check", str(empty)]) == 1
    assert "has no pictures" in capsys.readouterr().out


def test_every_refusal_is_told_at_once_and_every_picture_decoded_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, decoded = folder_of(tmp_path), []
    blobs(7, (96, 64)).save(folder / "0.jpg")  # which shares the caption of 0.png
    (folder / "1.txt").write_text("a {trigger}")
    (folder / "2.txt").unlink()
    blobs(8, (16, 16)).save(folder / "small.png")
    (folder / "small.txt").write_text("small")
    for name in ("bad.png", "worse.png"):
        (folder / name).touch()
    blobs(9, (5, 5)).save(folder / "no-masklabel.png")
    monkeypatch.setattr(dataset, "examine", lambda path, max_pixels: decoded.append(path.name) or examine(path, max_pixels))
    flags = ["--resolution", "64", "--bucket_step", "32", "--upscale", "false", "--masks", "file"]
    assert main(["data", "check", str(folder), *flags]) == 1
    refused = capsys.readouterr().out.split("Training would refuse (6):\n")[1].splitlines()
    words = ("share the caption 0.txt", "1.txt has {trigger}", "bad.png cannot be read", "(2.png)", "belongs to no picture", "16x16 pixels")
    for sentence, word in zip(refused, words, strict=True):
        assert word in sentence
    assert "remove it and 1 more that cannot" in refused[2]
    assert sorted(decoded) == ["0.jpg", "0.png", "1.png", "2.png", "bad.png", "small.png", "worse.png"]
    with pytest.raises(DataError, match=r"share the caption 0\.txt"):  # training stops at the first
        find_items(config.load([], [("data.folder", str(folder))]))


def test_the_command_reads_a_config_and_counts_by_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, base = folder_of(tmp_path), tmp_path / "base" / "tokenizer"
    base.mkdir(parents=True)
    tokens = ["a", "t", "a</w>", "t</w>", "<|startoftext|>", "<|endoftext|>"]
    (base / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (base / "merges.txt").write_text("#version: 0.2\n")
    (folder / "0.txt").write_text("ta" * 40)  # one word, 80 tokens
    written = tmp_path / "config.toml"
    written.write_text(f'[model]\nbase = "{base.parent.as_posix()}"\n[data]\nfolder = "{folder.as_posix()}"\nresolution = 64\n')
    assert main(["data", "check", str(written)]) == 0
    assert "Captions longer than 75 tokens (1):\n  0.png, 80" in capsys.readouterr().out
    assert main(["data", "check", str(written), "--no_such", "1"]) == 2
