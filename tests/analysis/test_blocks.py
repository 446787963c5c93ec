"""Layers by block and kind, and the picture of them."""

from pathlib import Path

import pytest
from PIL import Image

from sdlora.analysis.blocks import OTHER, in_order, kind_of, plot

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


def test_blocks_stand_as_a_model_runs_through_them() -> None:
    assert in_order(["up.1", "te2.0", "down.10", "mid", "unet", "down.2", "te.1", "mid"]) == [
        *("te.1", "te2.0", "unet", "down.2", "down.10", "mid", "up.1")
    ]


def test_the_picture_shows_a_dot_for_each_layer(tmp_path: Path) -> None:
    plot({name: float(n) for n, name in enumerate(NAMES)}, tmp_path / "all.png", "all", "numbers")
    plot({"unet.conv_in": 1.0}, tmp_path / "one.png", "one", "numbers")
    with Image.open(tmp_path / "all.png") as many, Image.open(tmp_path / "one.png") as one:
        assert many.width == one.width and many.height > one.height
        assert len(many.convert("RGB").getcolors(2**24) or ()) > 50
