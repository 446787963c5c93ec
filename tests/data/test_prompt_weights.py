"""Weights in prompts: the grammar by hand-worked cases, and what a weight does to an embedding."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from sdlora.data.prompt_weights import weigh, weighted_parts, weighted_tokens


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", []),
        ("a cat", [("a cat", 1.0)]),
        ("a (red) cat", [("a ", 1.0), ("red", 1.1), (" cat", 1.0)]),
        ("((x))", [("x", 1.21)]),
        ("[x]", [("x", 1 / 1.1)]),
        ("[[x]]", [("x", 1 / 1.21)]),
        ("([x])", [("x", 1.0)]),
        ("(x:1.5)", [("x", 1.5)]),
        ("(x: 0.5 )y", [("x", 0.5), ("y", 1.0)]),
        ("(x:.5)(y:2)(z:+1.)(u:-1)(v:0)", [("x", 0.5), ("y", 2.0), ("z", 1.0), ("u", -1.0), ("v", 0.0)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("((a:2):3)", [("a", 6.0)]),
        (r"fate_\(series\), \[x\]", [("fate_(series), [x]", 1.0)]),
        (r"(\(x\):2)", [("(x)", 2.0)]),
        (r"a\\(b)", [("a\\", 1.0), ("b", 1.1)]),
        (r"a\b", [(r"a\b", 1.0)]),
        ("ratio 3:2, a:1.5", [("ratio 3:2, a:1.5", 1.0)]),
        ("(a:b:1.5)", [("a:b", 1.5)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("[x:1.5]", [("x:1.5", 1 / 1.1)]),  # square brackets take no number
        ("a (b", [("a ", 1.0), ("b", 1.1)]),
        ("a ((b", [("a ", 1.0), ("b", 1.21)]),
        ("[a (b", [("a ", 1 / 1.1), ("b", 1.0)]),
        ("a) b]", [("a) b]", 1.0)]),
        ("a:1.5) b", [("a:1.5) b", 1.0)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)]),  # each kind finds its own
        ("()", []),
        ("two\nlines (of\nit)", [("two\nlines ", 1.0), ("of\nit", 1.1)]),
    ],
)
def test_the_grammar_by_hand(prompt: str, parts: list[tuple[str, float]]) -> None:
    found = weighted_parts(prompt)
    assert [text for text, _ in found] == [text for text, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


def test_no_text_fails_and_no_letter_is_lost() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        prompt = "".join(rng.choice("ab (()[]])\\,\n:1.5") for _ in range(rng.randrange(25)))
        parts = weighted_parts(prompt)
        letters = "".join(text for text, _ in parts)
        assert [letter for letter in letters if letter in "ab,"] == [letter for letter in prompt if letter in "ab,"]
        assert all(before[1] != after[1] for before, after in itertools.pairwise(parts))
        escaped = "".join("\\" + sign if sign in "()[]\\" else sign for sign in prompt)
        assert weighted_parts(escaped) == ([(prompt, 1.0)] if prompt else [])


def test_every_token_has_the_weight_of_its_part() -> None:
    asked: list[str] = []

    def tokenise(text: str) -> list[int]:
        asked.append(text)
        return [ord(letter) for letter in text if letter != " "]

    assert weighted_tokens("ab (cd:1.5) e", tokenise) == ([97, 98, 99, 100, 101], [1.0, 1.0, 1.5, 1.5, 1.0])
    assert asked == ["ab ", "cd", " e"]
    assert weighted_tokens("", tokenise) == ([], [])


def test_weighing_by_hand() -> None:
    embeds = torch.tensor([[[1.0, 3.0], [2.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]]])
    weights = torch.tensor([[1.0, 3.0], [1.0, 1.0]])
    # Weighted: 1 3 6 6, whose mean is 4; it was 2; so all of it is halved. The other row has no weights.
    assert weigh(embeds, weights).tolist() == [[[0.5, 1.5], [3.0, 3.0]], [[1.0, 1.0], [1.0, 1.0]]]


def test_weighing_keeps_the_mean_and_weights_of_one_change_no_bit() -> None:
    embeds = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)) + 1
    weights = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) + 0.5
    assert torch.equal(weigh(embeds, torch.ones(3, 7)), embeds)
    weighted = weigh(embeds, weights)
    assert torch.allclose(weighted.mean(dim=(1, 2)), embeds.mean(dim=(1, 2)), atol=1e-6)
    ratio = weighted / embeds  # of each token: its weight times one number for the whole prompt
    assert torch.allclose(ratio / weights[..., None], (ratio / weights[..., None])[:, :1, :1].expand_as(ratio), rtol=1e-4)
    assert torch.equal(weigh(embeds[1:2], weights[1:2])[0], weighted[1])  # whatever stands beside it
