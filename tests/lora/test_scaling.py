"""The scale of an update, by hand."""

from sdlora.lora.scaling import SCALINGS


def test_scales_by_hand() -> None:
    assert SCALINGS["standard"](16) == 1 / 16
    assert SCALINGS["rank_stabilised"](16) == 1 / 4
    assert 32 * SCALINGS["rank_stabilised"](16) == 8
