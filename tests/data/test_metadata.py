"""Tables of captions: both formats, what they may name, and every refusal in one sentence that names its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from sdlora.data.metadata import read_table
from sdlora.errors import DataError


def write(folder: Path, rows: list[dict[str, Any]], pictures: tuple[str, ...] = ("a.png", "b.png")) -> Path:
    for name in pictures:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    path = folder / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def captions(folder: Path, separator: str = " ") -> dict[str, str]:
    table = read_table(folder, separator)
    assert table is not None
    return {path.relative_to(folder).as_posix(): caption for path, caption in table.captions.items()}


def test_both_formats_say_the_same(tmp_path: Path) -> None:
    assert read_table(tmp_path) is None
    path = write(tmp_path, [{"file_name": "a.png", "text": 'a "cat", sits\n on grass', "width": 3}, {"file_name": "b.png", "text": None}])
    expected = {"a.png": 'a "cat", sits on grass', "b.png": ""}
    assert captions(tmp_path) == expected
    assert captions(tmp_path, "\n")["a.png"] == 'a "cat", sits\non grass'
    path.unlink()
    table = 'width,file_name,text\r\n3,a.png,"a ""cat"", sits\n on grass"\r\n4,b.png,\r\n'
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "metadata.csv").write_bytes(table.encode(encoding))
        assert captions(tmp_path) == expected
    path.touch()
    with pytest.raises(DataError, match=r"both metadata\.jsonl and metadata\.csv"):
        read_table(tmp_path)


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_captions_have_three_names(tmp_path: Path, column: str) -> None:
    write(tmp_path, [{"file_name": "a.png", column: "a cat"}])
    assert captions(tmp_path) == {"a.png": "a cat"}


def test_one_column_is_right_and_the_others_are_told(tmp_path: Path) -> None:
    path = write(tmp_path, [{"file_name": "a.png", "prompt": "p"}, {"file_name": "b.png", "caption": "c", "prompt": "p"}])
    table = read_table(tmp_path)
    assert table is not None and captions(tmp_path) == {"a.png": "", "b.png": "c"}
    assert table.skipped == ((path, "its column 'prompt' is not used: captions are taken from 'caption'"),)


def test_another_column_can_be_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, [{"file_name": "a.png", "text": "t", "tags": "x, y"}, {"file_name": "b.png", "text": "t"}])
    table = read_table(tmp_path, column="tags")
    assert table is not None and list(table.captions.values()) == ["x, y", ""] and table.skipped == ()
    with pytest.raises(DataError, match=r"no column called tag, as data\.caption_column says; it has file_name, text, tags\."):
        read_table(tmp_path, column="tag")
    path.unlink()
    (tmp_path / "metadata.csv").write_text("file_name,words\na.png,a cat,and more\n")  # a cell too many has no name
    with pytest.raises(DataError, match=r"or set data\.caption_column to one of file_name, words\."):
        read_table(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    with pytest.raises(DataError, match=r"no metadata\.jsonl or metadata\.csv with the column of data\.caption_column = 'words'"):
        read_table(tmp_path, column="words")


def test_pictures_in_subfolders_are_named_and_missing_ones_told(tmp_path: Path) -> None:
    write(tmp_path, [{"file_name": name, "text": name} for name in ("sub/a.png", "./b.png", "c.png", "x" * 300)], ("sub/a.png", "b.png"))
    table = read_table(tmp_path)
    assert table is not None and captions(tmp_path) == {"sub/a.png": "sub/a.png", "b.png": "./b.png"}
    assert [path.name for path, reason in table.skipped if "no such file" in reason] == ["c.png", "x" * 300]


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a.png", "sub/../../a.png", "C:\\a.png", "C:a.png", "..\\a.png", "\\\\host\\a.png", "a\0.png"]
)
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, [{"file_name": "a.png", "text": "a"}, {"file_name": name, "text": "a"}])
    with pytest.raises(DataError, match=r"metadata\.jsonl, line 2: file_name .* leads out"):
        read_table(tmp_path)


def test_links_that_lead_out_are_refused_and_others_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    write(folder, [{"file_name": "link.png", "text": "a"}])
    (folder / "link.png").symlink_to(folder / "a.png")
    assert captions(folder) == {"link.png": "a"}
    (tmp_path / "secret.png").touch()
    (folder / "link.png").unlink()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"'link\.png' is a link that leads out"):
        read_table(folder)
    (folder / "link.png").unlink()
    (folder / "sub").symlink_to(tmp_path)
    write(folder, [{"file_name": "sub/secret.png", "text": "a"}])
    with pytest.raises(DataError, match=r"'sub/secret\.png' is a link"):
        read_table(folder)
    (folder / "metadata.csv").symlink_to((folder / "metadata.jsonl").rename(tmp_path / "metadata.csv"))
    with pytest.raises(DataError, match=r"metadata\.csv is a link that leads out"):
        read_table(folder)
    (folder / "metadata.csv").unlink()
    (folder / "round.png").symlink_to("round.png")
    write(folder, [{"file_name": "round.png", "text": "a"}])
    assert captions(folder) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ('{"file_name": "a.png"}', "has no captions: it needs a column called text, caption or prompt"),
        ('{"text": "a"}', "line 1: every row needs a file_name"),
        ('{"file_name": 3, "text": "a"}', "line 1: every row needs a file_name"),
        ('["a.png", "a"]', "line 1: every row needs a file_name"),
        ('\n{"file_name": "a.png", "text": ["a"]}', r'line 2: text is \["a"\], which is no text'),
        ('{"file_name": "a.png", "text": "a"}\n{"file_name": "./a.png", "text": "b"}', r"line 2: \./a\.png has a row already"),
        ('{"file_name": "a.png", "text": "a"}\n{"file_name', "line 2 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_rows_that_cannot_be_read_are_refused_by_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path)


def test_names_that_windows_wrote_are_read_everywhere(tmp_path: Path) -> None:
    write(tmp_path, [{"file_name": "sub\\a.png", "text": "a"}, {"file_name": ".\\b.png", "text": "b"}], ("sub/a.png", "b.png"))
    assert captions(tmp_path) == {"sub/a.png": "a", "b.png": "b"}


def test_a_csv_without_commas_is_refused_by_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name;text\na.png;a cat\n")
    with pytest.raises(DataError, match=r"metadata\.csv has no column called file_name: .* first line, with commas"):
        read_table(tmp_path)


def test_a_broken_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"' + "x" * 200_000)
    with pytest.raises(DataError, match="is not CSV"):
        read_table(tmp_path)
