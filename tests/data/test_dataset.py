"""A folder as users have it: what becomes an example, what is left out, and what is said."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdlora.data.dataset import Found, Subset, find_examples, find_subsets
from sdlora.errors import DataError


def picture(path: Path, size: tuple[int, int] = (6, 4)) -> Path:
    Image.new("RGB", size, "red").save(path, {"jpeg": "jpeg"}.get(path.suffix))
    return path


def captioned(folder: Path, name: str, caption: str = "a cat") -> None:
    path = picture(folder / name)
    path.with_suffix(".txt").write_text(caption)


def find(folder: Path, **options: Any) -> Found:
    return find_examples(folder, **{"missing_caption": "error", "trigger": "", "on_bad_image": "error"} | options)


def captions(found: Found) -> dict[str, str]:
    return {example.path.name: example.caption for example in found.examples}


def reasons(found: Found) -> dict[str, str]:
    return {path.name: reason for path, reason in found.skipped}


def test_an_example_has_path_caption_size_and_digest(tmp_path: Path) -> None:
    path = picture(tmp_path / "cat.png", (30, 20))
    (tmp_path / "cat.txt").write_text("a cat\n")
    (example,) = find(tmp_path).examples
    assert (example.path, example.caption, example.size) == (path, "a cat", (30, 20))
    assert example.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert find(tmp_path).skipped == ()


def test_the_size_is_that_of_the_upright_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "cat.jpg", exif=exif)
    assert find(tmp_path, missing_caption="empty").examples[0].size == (20, 30)


def test_names_sort_as_people_count(tmp_path: Path) -> None:
    names = ["10.png", "2.png", "a1.png", "A2.png", "a10.png", "B.png", "a.png", "a01.png"]
    for name in names:
        picture(tmp_path / name)
    found = [example.path.name for example in find(tmp_path, missing_caption="empty").examples]
    assert found == ["2.png", "10.png", "a.png", "a01.png", "a1.png", "A2.png", "a10.png", "B.png"]


def test_a_caption_belongs_to_the_exact_stem(tmp_path: Path) -> None:
    for name, caption in {"cat.v2.png": "one", "cat.png": "two", "cat (1).JPG": "three"}.items():
        captioned(tmp_path, name, caption)
    assert captions(find(tmp_path)) == {"cat.v2.png": "one", "cat.png": "two", "cat (1).JPG": "three"}
    picture(tmp_path / "dog.png")
    for near in ("dog.png.txt", "Dog.txt", "dog_.txt", "dog .txt"):
        (tmp_path / near).write_text("a dog")
    found = find(tmp_path, missing_caption="empty")
    assert captions(found)["dog.png"] == ""
    assert reasons(found) == dict.fromkeys(["Dog.txt", "dog_.txt", "dog .txt"], "a caption without a picture of the same name") | {
        "dog.png.txt": "a caption's name leaves the extension of its picture out: call it dog.txt"
    }


def test_txt_comes_before_caption_and_the_other_is_told(tmp_path: Path) -> None:
    for stem, contents in {"both": ("tags", "prose"), "blank": (" ", "prose"), "one": (None, "prose")}.items():
        picture(tmp_path / f"{stem}.png")
        for suffix, content in zip((".txt", ".caption"), contents, strict=True):
            if content is not None:
                (tmp_path / f"{stem}{suffix}").write_text(content)
    found = find(tmp_path)
    assert captions(found) == {"blank.png": "prose", "both.png": "tags", "one.png": "prose"}
    assert reasons(found) == {
        "both.caption": "the caption is taken from both.txt",
        "blank.txt": "the caption is taken from blank.caption",
    }
    for extension in (".caption", "caption"):
        assert set(captions(find(tmp_path, caption_extension=extension)).values()) == {"prose"}
    with pytest.raises(DataError, match=r"^2 of 3 .*\(blank.png, one.png\); .* ends in .txt, or"):
        find(tmp_path, caption_extension=".txt")


@pytest.mark.parametrize(("policy", "expected"), [("empty", ""), ("trigger", "sks")])
def test_missing_captions_follow_the_policy(tmp_path: Path, policy: str, expected: str) -> None:
    captioned(tmp_path, "a.png", "a cat")
    captioned(tmp_path, "b.png", " \n")
    picture(tmp_path / "c.png")
    assert captions(find(tmp_path, missing_caption=policy, trigger="sks")) == {"a.png": "sks, a cat", "b.png": expected, "c.png": expected}


def test_missing_captions_are_counted_and_named(tmp_path: Path) -> None:
    captioned(tmp_path, "a.png")
    for name in ("c1.png", "c2.png", "c3.png", "c10.png"):
        picture(tmp_path / name)
    with pytest.raises(DataError, match=r"^4 of 5 pictures .* no caption \(c1.png, c2.png, c3.png, \.\.\.\); .*missing_caption"):
        find(tmp_path)


def test_a_placeholder_needs_a_trigger(tmp_path: Path) -> None:
    captioned(tmp_path, "a.png", "a {trigger} cat")
    assert captions(find(tmp_path, trigger="sks")) == {"a.png": "a sks cat"}
    with pytest.raises(DataError, match=r"a.txt has \{trigger\}"):
        find(tmp_path)


def test_bad_pictures_stop_or_are_left_out(tmp_path: Path) -> None:
    captioned(tmp_path, "a.png")
    captioned(tmp_path, "empty.png")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.effect_noise((64, 64), 50).save(tmp_path / "half.jpg")  # no caption either, but that is not its trouble
    (tmp_path / "half.jpg").write_bytes((tmp_path / "half.jpg").read_bytes()[:-500])
    with pytest.raises(DataError, match=r"empty.png cannot be read: the file is empty .*on_bad_image"):
        find(tmp_path)
    found = find(tmp_path, on_bad_image="skip")
    assert captions(found) == {"a.png": "a cat"}
    assert list(reasons(found)) == ["empty.png", "half.jpg"]
    assert reasons(found)["empty.png"] == "the file is empty (0 bytes)" and "truncated" in reasons(found)["half.jpg"]
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"None of the 2 pictures .* empty.png: the file is empty"):
        find(tmp_path, on_bad_image="skip")


def test_only_what_matters_is_told_of_other_files(tmp_path: Path) -> None:
    captioned(tmp_path, "a.png")
    captioned(tmp_path, "readme.png")  # a picture and its caption, whatever the name
    for name in (".DS_Store", "._a.png", "Thumbs.db", "desktop.ini", "LICENSE", "README.md", "LICENCE.txt", "clip.mp4", "b.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "more").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / ".git").mkdir()
    found = find(tmp_path)
    assert captions(found) == {"a.png": "a cat", "readme.png": "a cat"}
    subfolder = "a subfolder; only the pictures directly in the folder are used"
    assert reasons(found) == {
        "more": subfolder,
        "folder.png": subfolder,
        "clip.mp4": "not a picture",
        "b.txt": "a caption without a picture of the same name",
    }


def test_two_pictures_cannot_share_a_caption(tmp_path: Path) -> None:
    picture(tmp_path / "cat.png")
    picture(tmp_path / "cat.jpg")
    assert len(find(tmp_path, missing_caption="empty").examples) == 2  # without one there is nothing to share
    (tmp_path / "cat.txt").write_text("a cat")
    with pytest.raises(DataError, match=r"cat.jpg and cat.png in .* share the caption cat.txt"):
        find(tmp_path)


def test_a_folder_without_pictures_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no pictures .*: it is empty\.$"):
        find(tmp_path)
    for name in ("a.txt", "b.txt", "c.TXT", "d.psd", "notes"):
        (tmp_path / name).write_text("x")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"it holds 3 .txt, 1 .psd, 1 without extension; subfolders: one, two \(they are not searched"):
        find(tmp_path)


def test_a_wrong_path_gets_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    captioned(tmp_path / "pictures", "a.png")
    with pytest.raises(DataError, match=r"did you mean .*pictures\?$"):
        find(tmp_path / "picturs")
    with pytest.raises(DataError, match=r"does not exist; check the path\.$"):
        find(tmp_path / "elsewhere" / "x")
    with pytest.raises(DataError, match=r"a.png is a file; give the folder"):
        find(tmp_path / "pictures" / "a.png")


def test_the_order_and_the_findings_are_the_same_each_time(tmp_path: Path) -> None:
    for number in range(12):
        captioned(tmp_path, f"{number}.png", str(number))
    assert find(tmp_path) == find(tmp_path)
    assert [example.caption for example in find(tmp_path).examples] == [str(number) for number in range(12)]


def test_a_mask_belongs_to_the_picture_of_its_stem_and_is_no_picture(tmp_path: Path) -> None:
    captioned(tmp_path, "cat.png")
    captioned(tmp_path, "dog.jpg")
    mask = picture(tmp_path / "cat-masklabel.png")
    found = find(tmp_path, masks="file")
    assert [(e.path.name, e.mask and e.mask.path) for e in found.examples] == [("cat.png", mask), ("dog.jpg", None)]
    assert found.examples[0].mask is not None and found.examples[0].mask.digest == hashlib.sha256(mask.read_bytes()).hexdigest()
    off = find(tmp_path)
    assert [e.mask for e in off.examples] == [None, None] and reasons(off) == {mask.name: "a mask; set data.masks = 'file' to use it"}
    alpha = find(tmp_path, masks="alpha").examples[0].mask
    assert alpha is not None and alpha.alpha and alpha.path.name == "cat.png"


def test_masks_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    captioned(tmp_path, "cat.png")
    with pytest.raises(DataError, match="no NAME-masklabel"):
        find(tmp_path, masks="file")
    picture(tmp_path / "cta-masklabel.png")
    with pytest.raises(DataError, match=r"cta-masklabel.png belongs to no picture"):
        find(tmp_path, masks="file")
    (tmp_path / "cta-masklabel.png").unlink()
    (tmp_path / "cat-masklabel.png").unlink(missing_ok=True)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    mask = picture(tmp_path / "broken-masklabel.png")
    assert [e.path.name for e in find(tmp_path, masks="file", on_bad_image="skip").examples] == ["cat.png"]
    mask.unlink()
    (tmp_path / "broken.png").unlink()
    picture(tmp_path / "cat-masklabel.png", (4, 6))
    with pytest.raises(DataError, match="has 4x6 pixels, and the picture 6x4"):
        find(tmp_path, masks="file")


def test_the_table_is_right_where_a_text_file_says_something_else(tmp_path: Path) -> None:
    for name in ("both.png", "same.png", "blank.png", "only.png"):
        picture(tmp_path / name)
    rows = {"both.png": "a cat", "same.png": "a dog", "blank.png": ""}
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": name, "text": text}) for name, text in rows.items()))
    for name, text in {"both": "a fox", "same": "a dog", "blank": "a hen", "only": "an ox"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    found = find(tmp_path, trigger="sks")
    assert captions(found) == {"both.png": "sks, a cat", "same.png": "sks, a dog", "blank.png": "sks, a hen", "only.png": "sks, an ox"}
    assert reasons(found) == {"both.txt": "the caption is taken from metadata.jsonl"}


def test_a_table_reaches_into_subfolders_for_what_it_names(tmp_path: Path) -> None:
    for name in ("in/a.png", "in/b.png", "in/a-masklabel.png", "in/b-masklabel.png", "out/c.png", "a.png", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(tmp_path / name)
    (tmp_path / "in" / "a.txt").write_text("a dog")
    (tmp_path / "in" / "b.txt").write_text("not mine")
    (tmp_path / "a.txt").write_text("a fox")
    (tmp_path / "metadata.csv").write_text("file_name,caption\nin/a.png,a cat\n.hidden.png,a hen\n")
    found = find(tmp_path, masks="file")
    by_path = {example.path.relative_to(tmp_path).as_posix(): example for example in found.examples}
    assert {name: example.caption for name, example in by_path.items()} == {"a.png": "a fox", "in/a.png": "a cat"}
    assert by_path["a.png"].mask is None  # one stem, two pictures: the mask is beside the other
    assert by_path["in/a.png"].mask is not None and by_path["in/a.png"].mask.path == tmp_path / "in" / "a-masklabel.png"
    assert {path.relative_to(tmp_path).as_posix(): reason for path, reason in found.skipped} == {
        "out": "a subfolder; only the pictures directly in the folder are used",
        ".hidden.png": "a hidden file",
        "in/a.txt": "the caption is taken from metadata.csv",
    }


def test_a_picture_that_is_a_link_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    captioned(folder, "a.png")
    (folder / "b.png").symlink_to(folder / "a.png")
    (folder / "c.png").symlink_to(picture(tmp_path / "secret.png"))
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "b.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "a-masklabel.png").symlink_to(tmp_path / "secret.png")
    found = find(folder, on_bad_image="skip", missing_caption="empty")
    assert captions(found) == {"a.png": "a cat", "b.png": ""}
    assert reasons(found) == dict.fromkeys(["c.png", "b.txt", "a-masklabel.png"], "it is a link that leads out of the folder")
    with pytest.raises(DataError, match=r"c\.png cannot be read: it is a link"):
        find(folder, missing_caption="empty")


def test_a_fallback_is_the_caption_of_pictures_without_one(tmp_path: Path) -> None:
    captioned(tmp_path, "a.png", "a big cat")
    picture(tmp_path / "b.png")
    assert captions(find(tmp_path, fallback="sks cat", trigger="sks")) == {"a.png": "sks, a big cat", "b.png": "sks cat"}
    assert captions(find(tmp_path, fallback="cat", trigger="sks", around="{trigger}: ")) == {"a.png": "a big cat", "b.png": "cat"}


def test_lines_of_a_caption_stay_apart_where_one_is_to_be_picked(tmp_path: Path) -> None:
    captioned(tmp_path, "a.png", "a cat\nsks on grass\n")
    assert captions(find(tmp_path, trigger="sks")) == {"a.png": "a cat sks on grass"}
    assert captions(find(tmp_path, trigger="sks", caption_lines="pick")) == {"a.png": "sks, a cat\nsks on grass"}


def test_kohyas_subfolders_are_sets_with_their_repeats_and_captions(tmp_path: Path) -> None:
    for name in ("10_ohwx cat", "2_my_style ", "1_", "0_no", "cats", "3x_cat", "20240101_trip"):
        (tmp_path / name).mkdir()
    (tmp_path / "sample.txt").write_text("x")
    (tmp_path / "README.md").write_text("x")
    subsets, left_out = find_subsets(tmp_path)
    assert subsets == [Subset(tmp_path / "2_my_style ", 2, "my_style"), Subset(tmp_path / "10_ohwx cat", 10, "ohwx cat")]
    other = "its name is not of the form <repeats>_<token> <class>, as those beside it"
    assert {path.name: reason for path, reason in left_out} == dict.fromkeys(["1_", "0_no", "cats", "3x_cat", "20240101_trip"], other) | {
        "sample.txt": "not in one of the <repeats>_ folders"
    }
    picture(tmp_path / "a.png")  # a folder with pictures of its own is one set, and says so of its subfolders
    assert find_subsets(tmp_path) == ([Subset(tmp_path)], [])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
@pytest.mark.parametrize("on_bad_image", ["skip", "error"])
def test_only_regular_files_inside_the_folder_are_opened(tmp_path: Path, on_bad_image: str) -> None:
    folder, outside = tmp_path / "pictures", tmp_path / "secret"
    folder.mkdir()
    outside.mkdir()
    for path in (folder / "a.png", outside / "b.png"):
        Image.new("RGB", (8, 8)).save(path)
    (outside / "words.txt").write_text("not for training")
    (folder / "linked.png").symlink_to(folder / "a.png")  # within: welcome
    if on_bad_image == "error":
        (folder / "b.png").symlink_to(outside / "b.png")
        with pytest.raises(DataError, match=r"b\.png cannot be read: it is a link that leads out of"):
            find(folder, on_bad_image="error", missing_caption="empty")
        return
    (folder / "b.png").symlink_to(outside / "b.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "round.png").symlink_to(folder / "round.png")
    os.mkfifo(folder / "pipe.png")  # to open either would wait for ever
    os.mkfifo(folder / "linked.txt")
    (folder / "a.txt").symlink_to(outside / "words.txt")
    found = find(folder, on_bad_image="skip", missing_caption="empty")
    assert captions(found) == {"a.png": "", "linked.png": ""}
    told = reasons(found)
    assert "leads out" in told["b.png"] and "leads out" in told["a.txt"]
    assert "regular" in told["pipe.png"] and "regular" in told["linked.txt"]
    assert told["gone.png"] == "no such file or directory" and "round.png" in told


def test_the_cap_on_pixels_names_its_option(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    assert find(tmp_path, missing_caption="empty", max_pixels=1200).examples
    with pytest.raises(DataError, match=r"a\.png cannot be read: it has 40x30 pixels, above data\.max_pixels = 1199"):
        find(tmp_path, missing_caption="empty", max_pixels=1199)


def test_captions_that_are_no_text_are_all_told_where_a_check_asks(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        captioned(tmp_path, name)
    for name in ("a.txt", "c.txt"):
        (tmp_path / name).write_bytes("Kätzchen".encode("latin-1"))
    told: list[str] = []
    found = find(tmp_path, refuse=told.append)
    assert len(found.examples) == 3 and captions(found)["b.png"] == "a cat"
    assert [sentence.split(" is not UTF-8")[0] for sentence in told] == [str(tmp_path / "a.txt"), str(tmp_path / "c.txt")]
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8"):
        find(tmp_path)


def test_what_could_have_been_meant_is_told(tmp_path: Path) -> None:
    captioned(tmp_path, "a.png")
    for name in ("captions.jsonl", "metadata.json", "Metadata.CSV"):
        (tmp_path / name).write_text("{}")
    table = "a table of captions is read where it is called metadata.jsonl or metadata.csv"
    assert reasons(find(tmp_path)) == dict.fromkeys(["captions.jsonl", "metadata.json", "Metadata.CSV"], table)
    other = tmp_path / "other"
    (other / "cats").mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"subfolders: cats \(they are not searched: give one of them, or several as \[\[data\.sets\]\]\)\.$"
    ):
        find(other)
    (other / "train.parquet").touch()
    with pytest.raises(DataError, match=r"it holds 1 \.parquet; .*a dataset is read as .* save_to_disk\.$"):
        find(other)
