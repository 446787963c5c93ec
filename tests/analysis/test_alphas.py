"""Alphas as numbers."""

from sdlora.analysis.alphas import histogram


def test_histogram_counts_every_layer_once() -> None:
    rows = histogram({str(n): float(n) for n in range(11)}, bins=5)
    assert [count for *_, count in rows] == [2, 2, 2, 2, 3]  # the largest belongs to the last
    assert rows[0][:2] == (0, 2) and rows[-1][:2] == (8, 10)
    assert sum(count for *_, count in histogram({"a": 3.0, "b": 3.0})) == 2
