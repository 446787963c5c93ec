"""Intruder dimensions on weights whose singular vectors are known."""

import torch

from sdlora.analysis.intruders import count_intruders, similarities


def test_an_unchanged_or_scaled_weight_has_none() -> None:
    base = torch.randn(12, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    assert count_intruders(base, base) == 0
    assert count_intruders(base, -3 * base) == 0


def test_a_large_direction_between_the_bases_own_is_an_intruder() -> None:
    # Base: singular vectors e0..e4 with values 5..1. The update adds 100 along (1, 1, 1, 1, 1) / sqrt(5), whose cosine with each is 0.447.
    base = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))
    direction = torch.full((5,), 5**-0.5)
    adapted = base + 100 * torch.outer(direction, direction)
    found = similarities(base, adapted, top=1)
    assert abs(float(found[0]) - 5**-0.5) < 0.02
    assert count_intruders(base, adapted, top=1) == 1
    assert count_intruders(base, base + 0.01 * torch.outer(direction, direction), top=1) == 0


def test_full_rank_bases_of_fewer_columns_leave_room_for_intruders() -> None:
    # Left singular vectors of a 4 x 2 base span two of four directions: a third one is orthogonal to all of them.
    base = torch.zeros(4, 2)
    base[0, 0], base[1, 1] = 2.0, 1.0
    adapted = base.clone()
    adapted[2, 0] = 50.0
    assert similarities(base, adapted, top=1)[0] < 0.1
