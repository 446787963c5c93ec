"""Datasets that Hugging Face's library saved: read as a folder of the same pictures is, and refused by row."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from sdlora.cli import main
from sdlora.data import saved
from sdlora.data.dataset import Found, find_examples
from sdlora.data.images import decode, decode_mask
from sdlora.errors import DataError


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def pictures(folder: Path, count: int = 3) -> list[Path]:
    """Of different sizes, colours and kinds, the last one half transparent."""
    folder.mkdir(parents=True)
    paths = []
    for number in range(count):
        suffix = "jpg" if number == 1 else "png"
        shades = np.random.default_rng(number).integers(0, 256, (16 + number, 24, 4 if number == 2 else 3), dtype=np.uint8)
        Image.fromarray(shades).save(folder / f"{number}.{suffix}")
        paths.append(folder / f"{number}.{suffix}")
    return paths


def save(folder: Path, pictures: list[Any], column: str = "image", **columns: Any) -> datasets.Dataset:
    made = datasets.Dataset.from_dict({column: [p if p is None or isinstance(p, dict) else str(p) for p in pictures], **columns})
    made = made.cast_column(column, datasets.Image())
    made.save_to_disk(folder)
    return made


def find(folder: Path, **options: Any) -> Found:
    return find_examples(folder, **{"missing_caption": "error", "trigger": "", "on_bad_image": "error"} | options)


def test_a_saved_dataset_is_read_as_a_folder_of_the_same_pictures(tmp_path: Path) -> None:
    paths, captions = pictures(tmp_path / "plain"), ["a cat", "a dog,\non grass", "a fox"]
    for path, caption in zip(paths, captions, strict=True):
        path.with_suffix(".txt").write_text(caption)
    save(tmp_path / "saved", paths, text=captions, label=[0, 1, 0])
    plain, rows = find(tmp_path / "plain", masks="alpha", trigger="sks"), find(tmp_path / "saved", masks="alpha", trigger="sks")
    assert [example.path for example in rows.examples] == [tmp_path / "saved" / f"row {number}" for number in range(3)]
    assert rows.skipped == ()
    for row, file in zip(rows.examples, plain.examples, strict=True):
        assert (row.caption, row.size, row.digest) == (file.caption, file.size, file.digest)  # so that both have the same cache
        assert np.array_equal(decode(row.path), decode(file.path))
        assert np.array_equal(decode_mask(row.path, True), decode_mask(file.path, True))
    assert find(tmp_path / "saved", caption_lines="pick").examples[1].caption == "a dog,\non grass"


def test_rows_are_those_that_were_saved_last(tmp_path: Path) -> None:
    paths = pictures(tmp_path / "plain")
    made = save(tmp_path / "saved", paths, text=["a", "b", "c"])
    assert [example.caption for example in find(tmp_path / "saved").examples] == ["a", "b", "c"]
    made.filter(lambda row: row["text"] != "b").save_to_disk(tmp_path / "other")
    (tmp_path / "saved").rename(tmp_path / "old")
    (tmp_path / "other").rename(tmp_path / "saved")
    found = find(tmp_path / "saved")
    assert [example.caption for example in found.examples] == ["a", "c"]
    assert np.array_equal(decode(found.examples[1].path), decode(paths[2]))


def test_several_shards_are_one_dataset(tmp_path: Path) -> None:
    paths = pictures(tmp_path / "plain", 5)
    save(tmp_path / "one", paths, text=list("abcde")).save_to_disk(tmp_path / "saved", num_shards=3)
    assert len(list((tmp_path / "saved").glob("*.arrow"))) == 3
    for path, example in zip(paths, find(tmp_path / "saved").examples, strict=True):
        assert np.array_equal(decode(example.path), decode(path))


def test_rows_without_a_readable_picture_are_named(tmp_path: Path) -> None:
    (first, *_) = pictures(tmp_path / "plain")
    cells = [first.read_bytes(), first.read_bytes()[:200], None, None]
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": cell, "path": "gone.png"} for cell in cells[:-1]] + [None], "text": list("abcd")}
    )
    rows.save_to_disk(tmp_path / "saved")  # as early versions did it, which kept the names of files alone: the type is written behind it
    info = tmp_path / "saved" / "dataset_info.json"
    written = json.loads(info.read_text())
    written["features"]["image"] = {"_type": "Image"}
    info.write_text(json.dumps(written))
    found = find(tmp_path / "saved", on_bad_image="skip")
    assert [example.caption for example in found.examples] == ["a"]
    reasons = {path.name: reason for path, reason in found.skipped}
    assert list(reasons) == ["row 1", "row 2", "row 3"]
    assert "truncated" in reasons["row 1"].lower() and "gone.png" in reasons["row 2"] and reasons["row 3"] == "the row has no picture"
    with pytest.raises(DataError, match=r"saved/row 1 cannot be read: .*2 more"):
        find(tmp_path / "saved")


def test_the_column_of_captions_has_a_usual_name_or_is_said(tmp_path: Path) -> None:
    paths = pictures(tmp_path / "plain")
    save(tmp_path / "saved", paths, prompt=["a", "b", None], caption=["c", "d", "e"], words=["f", "", "h"])
    found = find(tmp_path / "saved")
    assert [example.caption for example in found.examples] == ["c", "d", "e"]
    assert [reason for _, reason in found.skipped] == ["its column 'prompt' is not used: captions are taken from 'caption'"]
    assert [e.caption for e in find(tmp_path / "saved", caption_column="words", missing_caption="empty").examples] == ["f", "", "h"]
    with pytest.raises(DataError, match=r"1 of 3 pictures .* no caption \(row 1\); set missing_caption"):
        find(tmp_path / "saved", caption_column="words")
    with pytest.raises(DataError, match=r"no column called wrods, .*data\.caption_column .*it has image, prompt, caption, words"):
        find(tmp_path / "saved", caption_column="wrods")
    save(tmp_path / "other", paths, label=[0, 1, 2])
    with pytest.raises(DataError, match=r"other has no captions: .*set data\.caption_column to one of image, label"):
        find(tmp_path / "other")
    with pytest.raises(DataError, match=r"row 0: label is 0, which is no text"):
        find(tmp_path / "other", caption_column="label")


def test_the_column_of_pictures_is_clear_or_refused(tmp_path: Path) -> None:
    paths = pictures(tmp_path / "plain")
    save(tmp_path / "one", paths, column="jpg", text=list("abc"))
    assert len(find(tmp_path / "one").examples) == 3
    two = datasets.Dataset.from_dict({name: list(map(str, paths)) for name in ("before", "after")} | {"text": list("abc")})
    two = two.cast_column("before", datasets.Image()).cast_column("after", datasets.Image())
    two.save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"several columns of pictures, before, after; rename"):
        find(tmp_path / "two")
    two.rename_column("after", "image").save_to_disk(tmp_path / "named")
    assert len(find(tmp_path / "named").examples) == 3
    datasets.Dataset.from_dict({"text": list("abc")}).save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match=r"no column of pictures among text; .*cast_column"):
        find(tmp_path / "none")


def test_several_splits_damage_and_a_missing_package_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = save(tmp_path / "saved", pictures(tmp_path / "plain"), text=list("abc"))
    datasets.DatasetDict(train=made, test=made).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"several splits; give .*splits/train, .*splits/test"):
        find(tmp_path / "splits")
    assert len(find(tmp_path / "splits" / "train").examples) == 3
    (arrow,) = (tmp_path / "splits" / "test").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(DataError, match=r"splits/test cannot be opened"):
        find(tmp_path / "splits" / "test")
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    saved._load.cache_clear()
    with pytest.raises(DataError, match=r"pip install 'sdlora\[datasets\]'"):
        find(tmp_path / "saved")


def test_a_file_that_is_called_like_a_row_is_none(tmp_path: Path) -> None:
    pictures(tmp_path / "plain")
    (tmp_path / "plain" / "row 1").write_text("x")
    found = find(tmp_path / "plain", missing_caption="empty")
    assert len(found.examples) == 3 and [(path.name, reason) for path, reason in found.skipped] == [("row 1", "not a picture")]


def test_the_check_and_its_sheet_show_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = pictures(tmp_path / "plain")
    save(tmp_path / "saved", [*paths, paths[0], None], text=["a", "b", "", "d", "e"])
    flags = ["--resolution", "32", "--bucket_step", "8", "--sheet", str(tmp_path / "sheet.png")]
    assert main(["data", "check", str(tmp_path / "saved"), *flags]) == 1
    told = capsys.readouterr().out
    for line in ("row 0 = row 3", "Empty captions (1):\n  row 2", "Pictures that are not used (1):\n  row 4: the row has no picture"):
        assert line in told
    assert (tmp_path / "sheet.png").is_file()


# ---------------------------------------------------------------- image folders, as the library documents them


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize(("table_in", "pictures_in"), [("", ""), ("", "sub"), ("train", "train")])
def test_an_image_folder_is_read_as_the_library_reads_it(tmp_path: Path, kind: str, table_in: str, pictures_in: str) -> None:
    """https://huggingface.co/docs/datasets/image_dataset: the table's file_name is relative to it; splits are folders with one each."""
    root, captions = tmp_path / "root", ['a "cat", sits', "ein Kätzchen", "a fox"]
    paths = pictures(root / pictures_in)
    names = [path.relative_to(root / table_in).as_posix() for path in paths]
    if kind == "jsonl":
        rows = [json.dumps({"file_name": name, "text": caption}) for name, caption in zip(names, captions, strict=True)]
    else:
        rows = ["file_name,text", *('{},"{}"'.format(n, c.replace('"', '""')) for n, c in zip(names, captions, strict=True))]
    (root / table_in / f"metadata.{kind}").write_text("\n".join(rows) + "\n", encoding="utf-8")
    theirs = datasets.load_dataset("imagefolder", data_dir=str(root), cache_dir=str(tmp_path / "cache"), split="train")
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    ours = find(root / table_in).examples
    assert len(ours) == len(theirs) == 3
    assert {example.path: example.caption for example in ours} == {Path(row["image"]["path"]): row["text"] for row in theirs}
