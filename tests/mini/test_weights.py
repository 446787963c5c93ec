"""The shipped weights draw what their model card says, within what a small sample can tell."""

import math
import re

import pytest

from sdlora.mini import WEIGHTS_DIR
from sdlora.mini.measure import Options, measure

SAMPLE = 40


def card(row: str) -> dict[str, float]:
    """A row of the card's table of figures: column -> share."""
    lines = (WEIGHTS_DIR / "README.md").read_text(encoding="utf-8").splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines if line.startswith("|")}
    return {name: float(cell[:-1]) / 100 for name, cell in zip(cells["figure"], cells[row], strict=True) if re.fullmatch(r"[\d.]+%", cell)}


@pytest.mark.parametrize("seed", [31_000])
def test_shipped_weights_score_what_the_card_says(seed: int) -> None:
    found = measure(Options(pictures=SAMPLE, seed=seed))
    for row in ("reconstructions", "base prompts"):
        for name, share in card(row).items():
            slack = 3 * math.sqrt(max(share * (1 - share), 0.01) / SAMPLE)
            assert found[row][name] >= share - slack, (row, name)
    assert found["concept"]["kind"] <= 0.1  # it has never seen one
    assert sum(p.stat().st_size for p in WEIGHTS_DIR.rglob("*.safetensors")) < 20e6
