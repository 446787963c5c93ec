"""Caption files in the encodings people have, the trigger word, and what a step sees."""

import random
from pathlib import Path

import pytest

from sdlora.data.captions import apply_trigger, choose_caption, read_caption
from sdlora.errors import DataError


@pytest.mark.parametrize(
    "content",
    [
        "ein Kätzchen, 猫".encode(),
        "ein Kätzchen, 猫".encode("utf-8-sig"),
        "ein Kätzchen, 猫\r\n".encode("utf-16"),
        b"\xfe\xff" + "ein Kätzchen, 猫".encode("utf-16-be"),
        "\r\n  ein Kätzchen, \r\n\r\n 猫  \r\n".encode(),
        "ein Kätzchen,\r猫".encode(),
    ],
)
def test_every_encoding_and_line_end_reads_the_same(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cat.txt"
    path.write_bytes(content)
    assert read_caption(path) == "ein Kätzchen, 猫"


@pytest.mark.parametrize("content", [b"", b" \r\n\t\n", b"\xef\xbb\xbf\n"])
def test_white_space_only_is_empty(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cat.txt"
    path.write_bytes(content)
    assert read_caption(path) == ""


@pytest.mark.parametrize("content", ["Kätzchen".encode("latin-1"), "cat".encode("utf-16-le"), b"\xff\xfea", b"\x89PNG\r\n\x1a\n\0"])
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cat.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cat\.txt is not UTF-8"):
        read_caption(path)


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a cat", "", "a cat"),
        ("a {trigger}", "", "a {trigger}"),
        ("a cat", "sks", "sks, a cat"),
        ("", "sks", "sks"),
        ("a {trigger} cat", "sks", "a sks cat"),
        ("{trigger} and {trigger}", "sks", "sks and sks"),
        ("a SKS cat", "sks", "a SKS cat"),
        ("sks", "sks", "sks"),
        ("asks the cat", "sks", "sks, asks the cat"),
        ("skss", "sks", "sks, skss"),
        ("a <cat>, grass", "<cat>", "a <cat>, grass"),
        ("a cat", "c.t", "c.t, a cat"),
        ("my old dog sleeps", "old dog", "my old dog sleeps"),
    ],
)
def test_the_trigger_goes_in_once(caption: str, trigger: str, expected: str) -> None:
    assert apply_trigger(caption, trigger) == expected
    assert apply_trigger(expected, trigger) == expected  # putting it in again changes nothing


def test_a_trigger_with_backslashes_is_taken_literally() -> None:
    assert apply_trigger(r"a {trigger}", r"\1") == r"a \1"


def test_dropout_takes_its_share() -> None:
    shown = [choose_caption("cat", random.Random(seed), dropout=0.25, shuffle=False, keep_tokens=0) for seed in range(4000)]
    assert set(shown) == {"", "cat"}
    assert shown.count("") / 4000 == pytest.approx(0.25, abs=0.03)  # 4.4 standard deviations


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, "a, b"), (1.0, "")])
def test_dropout_at_its_ends_is_certain(dropout: float, expected: str) -> None:
    assert {choose_caption("a, b", random.Random(seed), dropout=dropout, shuffle=False, keep_tokens=0) for seed in range(200)} == {expected}


def test_shuffling_keeps_the_first_tags_and_reaches_every_order_of_the_rest() -> None:
    shown = {choose_caption("sks, x,a ,b,, c", random.Random(seed), dropout=0.0, shuffle=True, keep_tokens=2) for seed in range(200)}
    assert shown == {f"sks, x, {rest}" for rest in ("a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a")}


def test_unshuffled_text_is_left_as_it_is_and_prose_survives_shuffling() -> None:
    rng = random.Random(0)
    assert choose_caption("a,b ,  c", rng, dropout=0.0, shuffle=False, keep_tokens=0) == "a,b ,  c"
    assert choose_caption("A cat sleeps.", rng, dropout=0.0, shuffle=True, keep_tokens=0) == "A cat sleeps."


def test_the_choice_is_a_function_of_the_seed() -> None:
    def choose() -> list[str]:
        return [choose_caption("a, b, c, d", random.Random(seed), dropout=0.3, shuffle=True, keep_tokens=1) for seed in range(20)]

    assert choose() == choose()
    # Frozen: another order here would change every run that is resumed.
    assert choose()[:3] == ["a, d, c, b", "", "a, c, d, b"]
