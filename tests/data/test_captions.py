"""Caption files in the encodings people have, the trigger word, and what a step sees."""

import random
from pathlib import Path

import pytest

from sdlora.data.captions import (
    CaptionRules,
    apply_trigger,
    choose_caption,
    drop_tags,
    expand_wildcards,
    fixed_caption,
    pick_line,
    read_caption,
    shuffle_tags,
)
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
    shown = [choose_caption("cat", random.Random(seed), CaptionRules(dropout=0.25, shuffle=False, keep_tags=0)) for seed in range(4000)]
    assert set(shown) == {"", "cat"}
    assert shown.count("") / 4000 == pytest.approx(0.25, abs=0.03)  # 4.4 standard deviations


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, "a, b"), (1.0, "")])
def test_dropout_at_its_ends_is_certain(dropout: float, expected: str) -> None:
    assert {
        choose_caption("a, b", random.Random(seed), CaptionRules(dropout=dropout, shuffle=False, keep_tags=0)) for seed in range(200)
    } == {expected}


def test_shuffling_keeps_the_first_tags_and_reaches_every_order_of_the_rest() -> None:
    shown = {
        choose_caption("sks, x,a ,b,, c", random.Random(seed), CaptionRules(dropout=0.0, shuffle=True, keep_tags=2)) for seed in range(200)
    }
    assert shown == {f"sks, x, {rest}" for rest in ("a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a")}


def test_unshuffled_text_is_left_as_it_is_and_prose_survives_shuffling() -> None:
    rng = random.Random(0)
    assert choose_caption("a,b ,  c", rng, CaptionRules(dropout=0.0, shuffle=False, keep_tags=0)) == "a,b ,  c"
    assert choose_caption("A cat sleeps.", rng, CaptionRules(dropout=0.0, shuffle=True, keep_tags=0)) == "A cat sleeps."


def test_the_choice_is_a_function_of_the_seed() -> None:
    def choose() -> list[str]:
        return [
            choose_caption("a, b, c, d", random.Random(seed), CaptionRules(dropout=0.3, shuffle=True, keep_tags=1)) for seed in range(20)
        ]

    assert choose() == choose()
    # Frozen: another order here would change every run that is resumed.
    assert choose()[:3] == ["a, d, c, b", "", "a, c, d, b"]


@pytest.mark.parametrize(
    ("caption", "around", "expected"),
    [
        ("grass", "a photo of {trigger}, ", "grass"),
        ("grass", "a photo of SKS, ", "grass"),
        ("", "by {trigger}", ""),
        ("a {trigger}", "by {trigger}", "a sks"),
        ("grass", "asks", "sks, grass"),
        ("one\na {trigger}\nsks two", "", "sks, one\na sks\nsks two"),
    ],
)
def test_a_trigger_around_the_caption_does_for_it_and_each_line_gets_its_own(caption: str, around: str, expected: str) -> None:
    assert apply_trigger(caption, "sks", around) == expected


def test_lines_are_joined_or_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "cat.txt"
    path.write_bytes(b" a cat,\r\n\r\n on grass \r\n")
    assert (read_caption(path), read_caption(path, "\n")) == ("a cat, on grass", "a cat,\non grass")


def test_each_line_is_picked_about_as_often() -> None:
    picked = [pick_line("a\nb\nc", random.Random(seed)) for seed in range(3000)]
    assert set(picked) == {"a", "b", "c"}
    assert all(picked.count(line) / 3000 == pytest.approx(1 / 3, abs=0.04) for line in "abc")  # 4.6 standard deviations
    drawn = random.Random(0)
    assert pick_line("a, b", drawn) == "a, b" and drawn.random() == random.Random(0).random()  # no choice, no draw


@pytest.mark.parametrize(
    ("text", "all_of_it"),
    [
        ("a {red|blue} cat", {"a red cat", "a blue cat"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{a {big|tiny} cat|dogs}", {"a big cat", "a tiny cat", "dogs"}),
        ("cat{, running|}", {"cat, running", "cat"}),
        ("a {trigger} {x}", {"a {trigger} {x}"}),
        ("{the {trigger}|a {x}}", {"the {trigger}", "a {x}"}),
        ("}a|b{ {", {"}a|b{ {"}),
        ("{} {|}", {"{} "}),
    ],
)
def test_wildcards_reach_every_alternative_and_no_other(text: str, all_of_it: set[str]) -> None:
    assert {expand_wildcards(text, random.Random(seed)) for seed in range(100)} == all_of_it


def test_nested_alternatives_are_as_likely_as_their_level_says() -> None:
    shown = [expand_wildcards("{a|{b|c}}", random.Random(seed)) for seed in range(4000)]
    assert [shown.count(letter) / 4000 for letter in "abc"] == pytest.approx([0.5, 0.25, 0.25], abs=0.035)


@pytest.mark.parametrize("keep", [0, 1, 3, 9])
def test_shuffling_moves_tags_and_neither_makes_nor_loses_any(keep: int) -> None:
    tags = ["a", "b", "b", "c", "d", "e"]
    orders = [shuffle_tags(tags, random.Random(seed), keep) for seed in range(50)]
    assert all(sorted(order) == sorted(tags) and order[:keep] == tags[:keep] for order in orders)
    assert len({tuple(order) for order in orders}) > 1 or keep == 9


@pytest.mark.parametrize("keep", [0, 2])
def test_left_out_tags_leave_the_others_in_order(keep: int) -> None:
    tags = [f"tag {number}" for number in range(10)]
    shown = [drop_tags(tags, random.Random(seed), keep, 0.3) for seed in range(1000)]
    assert all(kept[:keep] == tags[:keep] and kept == [tag for tag in tags if tag in kept] for kept in shown)
    assert sum(map(len, shown)) / 1000 == pytest.approx(keep + 0.7 * (10 - keep), abs=0.2)  # 4.4 standard deviations
    assert drop_tags(tags, random.Random(0), keep, 0.0) == tags
    assert drop_tags(tags, random.Random(0), keep, 1.0) == tags[:keep]


def test_what_stands_around_is_neither_shuffled_nor_left_out() -> None:
    rules = CaptionRules(shuffle=True, tag_dropout=1.0, keep_tags=1, prefix="a {photo|photo} of sks, ", suffix=", b, c.")
    assert choose_caption("grass, sky", random.Random(0), rules) == "a photo of sks, grass, b, c."
    assert choose_caption("", random.Random(0), rules) == "a photo of sks, b, c."
    assert choose_caption("", random.Random(0), CaptionRules(prefix="art, ")) == "art"
    assert choose_caption("grass", random.Random(0), CaptionRules(dropout=1.0, prefix="art, ")) == ""


def test_a_line_is_chosen_before_its_wildcards_and_those_before_its_tags() -> None:
    rules = CaptionRules(shuffle=True)
    shown = {choose_caption("a, {b, c|d}\ne", random.Random(seed), rules) for seed in range(300)}
    assert shown == {"a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a", "a, d", "d, a", "e"}


def test_a_fixed_caption_is_what_every_sample_is_told() -> None:
    rules = CaptionRules(dropout=0.5, prefix="photo, ")
    assert fixed_caption("a cat, big", rules) == "photo, a cat, big"
    assert {choose_caption("a cat, big", random.Random(seed), rules) for seed in range(20)} == {"photo, a cat, big", ""}
    for caption, varied in (
        ("a, b", CaptionRules(shuffle=True)),
        ("a, b", CaptionRules(tag_dropout=0.1)),
        ("a {b|c}", CaptionRules()),
        ("a", CaptionRules(suffix="{b|c}")),
        ("a\nb", CaptionRules()),
    ):
        assert fixed_caption(caption, varied) is None
