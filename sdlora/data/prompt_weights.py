"""Weights inside prompts, `a (red:1.3) cat`, as WebUIs read them: what each part of a text weighs, and what that does to its embedding.

The grammar is that of AUTOMATIC1111's WebUI (its wiki, "Features", attention/emphasis).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import Tensor

STRONGER = 1.1  # a pair of round brackets without a number; a pair of square ones is 1 / 1.1
_TOKEN = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|(?P<opens>[(\[])"
    r"|(?P<closes>\]|(?::\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*)?\))"
    r"|[^\\()\[\]:]+"
    r"|."  # a backslash or a colon that is neither of these
)


def weighted_parts(prompt: str) -> list[tuple[str, float]]:
    r"""The prompt's text in parts of one weight each; neighbours differ.

    (x) weighs 1.1, [x] 1 / 1.1, (x:1.5) 1.5, and brackets inside others multiply. \( \) \[ \] are brackets that are meant as such, and \\
    is a backslash. Nothing fails: a bracket that is never closed reaches to the end, and one that was never opened is text.
    """
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # numbers of the texts behind brackets that are open

    def close(bracket: str, weight: float) -> None:
        for number in range(opened[bracket].pop(), len(texts)):
            weights[number] *= weight

    for token in _TOKEN.finditer(prompt):
        bracket = {"]": "[", ")": "("}.get(token[0][-1]) if token["closes"] else None
        if token["opens"]:
            opened[token[0]].append(len(texts))
        elif bracket == "[" and opened["["]:
            close("[", 1 / STRONGER)
        elif bracket == "(" and opened["("]:
            close("(", float(token["weight"]) if token["weight"] else STRONGER)
        else:
            texts.append(token["escaped"] or token[0])
            weights.append(1.0)
    while opened["("]:
        close("(", STRONGER)
    while opened["["]:
        close("[", 1 / STRONGER)
    return _joined(texts, weights)


def _joined(texts: Sequence[str], weights: Sequence[float]) -> list[tuple[str, float]]:
    """Neighbours of one weight as one part."""
    parts: list[tuple[str, float]] = []
    for text, weight in zip(texts, weights, strict=True):
        before = parts.pop()[0] if parts and parts[-1][1] == weight else ""
        parts.append((before + text, weight))
    return parts


def weighted_tokens(prompt: str, tokenise: Callable[[str], Sequence[int]]) -> tuple[list[int], list[float]]:
    """Token ids of a prompt, and the weight of each. `tokenise` is asked for each part by itself, as in the WebUI, and puts neither start
    nor end round it."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in weighted_parts(prompt):
        found = tokenise(text)
        ids += found
        weights += [weight] * len(found)
    return ids, weights


def weigh(prompt_embeds: Tensor, weights: Tensor) -> Tensor:
    """Each token's embedding times its weight, and the whole scaled back to the mean that it had, as AUTOMATIC1111's WebUI does ("Original"
    among its emphasis modes). prompt_embeds (B, T, D), weights (B, T), 1 for start, end and padding; a row is one chunk of a prompt.
    """
    weighted = prompt_embeds * weights[..., None].to(prompt_embeds.dtype)
    mean, changed = (embeds.mean(dim=(1, 2), keepdim=True) for embeds in (prompt_embeds, weighted))  # (B, 1, 1)
    return weighted * (mean / changed)
