"""Durable writes: the old file or the new one, nothing beside it, readable by others."""

import os
import stat
from pathlib import Path

import pytest

from sdlora.files import copy_durably, durable, durable_folder, remove_folder, sweep, write_durably


def test_the_file_is_replaced_as_a_whole_and_whoever_reads_the_old_one_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_durably(path, b"old")
    with path.open("rb") as reader:
        write_durably(path, b"new one")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new one" and os.listdir(tmp_path) == ["a"]


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_durably(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_durably(path, b"new one")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_durably(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (told.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (told.append("name"), replace(a, b))[1])
    write_durably(tmp_path / "a", b"x")
    assert told == ["file", "name", "folder"][: 3 if os.name == "posix" else 2]


def test_what_is_written_piece_by_piece_is_there_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with durable(path) as file:
        file.write(b"one ")
        file.write(b"two")
        assert not path.exists()
    assert path.read_bytes() == b"one two"
    with pytest.raises(ValueError, match="halfway"), durable(path) as file:
        file.write(b"three")
        raise ValueError("halfway")
    assert path.read_bytes() == b"one two" and os.listdir(tmp_path) == ["a"]


def test_a_folder_appears_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x")
    with durable_folder(tmp_path / "a") as draft:
        copy_durably(tmp_path / "source", draft / "b")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "b").read_bytes() == b"x"
    with pytest.raises(KeyError), durable_folder(tmp_path / "c") as draft:
        copy_durably(tmp_path / "source", draft / "b")
        raise KeyError
    assert sorted(os.listdir(tmp_path)) == ["a", "source"]


def test_what_killed_processes_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a" / ".tmp-1-b" / ".tmp-1-c").mkdir(parents=True)
    for name in ("a/d", "a/.tmp-2-d", "a/.tmp-1-b/e", ".hidden"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [".hidden", "a", str(Path("a/d"))]


def test_a_folder_that_is_half_removed_has_a_drafts_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.setattr("sdlora.files.shutil.rmtree", lambda path: None)
    remove_folder(tmp_path / "a")
    monkeypatch.undo()
    assert [p.name.startswith(".tmp-") for p in tmp_path.iterdir()] == [True]
    sweep(tmp_path)
    assert os.listdir(tmp_path) == []
