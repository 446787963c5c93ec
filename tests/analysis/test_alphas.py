"""Alphas by block, as numbers and as a picture."""

from pathlib import Path

import pytest
from PIL import Image

from sdlora.analysis.alphas import OTHER, histogram, kind_of, plot

NAMES = {
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "self-attention",
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2": "feed-forward",
    "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0": "cross-attention",
    "unet.up_blocks.3.resnets.0.conv1": OTHER,
    "unet.conv_in": OTHER,
    "text_encoder.text_model.encoder.layers.11.mlp.fc1": "text feed-forward",
    "text_encoder_2.text_model.encoder.layers.2.self_attn.q_proj": "text attention",
    "text_encoder_2.text_projection": OTHER,
}


@pytest.mark.parametrize("name", NAMES)
def test_kinds(name: str) -> None:
    assert kind_of(name) == NAMES[name]


def test_histogram_counts_every_layer_once() -> None:
    rows = histogram({str(n): float(n) for n in range(11)}, bins=5)
    assert [count for *_, count in rows] == [2, 2, 2, 2, 3]  # the largest belongs to the last
    assert rows[0][:2] == (0, 2) and rows[-1][:2] == (8, 10)
    assert sum(count for *_, count in histogram({"a": 3.0, "b": 3.0})) == 2


def test_the_picture_shows_a_dot_for_each_layer(tmp_path: Path) -> None:
    plot({name: float(n) for n, name in enumerate(NAMES)}, tmp_path / "all.png", "all")
    plot({"unet.conv_in": 1.0}, tmp_path / "one.png", "one")
    with Image.open(tmp_path / "all.png") as many, Image.open(tmp_path / "one.png") as one:
        assert many.width == one.width and many.height > one.height
        assert len(many.convert("RGB").getcolors(2**24) or ()) > 50
