"""Alphas by block, as numbers and as a picture."""

from pathlib import Path

import pytest
from PIL import Image

from sdlora.analysis.alphas import OTHER, block_of, histogram, kind_of, plot

NAMES = {
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": ("down.1", "self-attention"),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2": ("mid", "feed-forward"),
    "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0": ("up.3", "cross-attention"),
    "lora_unet_up_blocks_3_resnets_0_conv1": ("up.3", OTHER),
    "lora_unet_conv_in": ("unet", OTHER),
    "lora_te_text_model_encoder_layers_11_mlp_fc1": ("te.11", "text feed-forward"),
    "lora_te1_text_model_encoder_layers_2_self_attn_q_proj": ("te1.2", "text attention"),
}


@pytest.mark.parametrize("name", NAMES)
def test_block_and_kind(name: str) -> None:
    assert (block_of(name), kind_of(name)) == NAMES[name]


def test_histogram_counts_every_layer_once() -> None:
    rows = histogram({str(n): float(n) for n in range(11)}, bins=5)
    assert [count for *_, count in rows] == [2, 2, 2, 2, 3]  # the largest belongs to the last
    assert rows[0][:2] == (0, 2) and rows[-1][:2] == (8, 10)
    assert sum(count for *_, count in histogram({"a": 3.0, "b": 3.0})) == 2


def test_the_picture_shows_a_dot_for_each_layer(tmp_path: Path) -> None:
    plot({name: float(n) for n, name in enumerate(NAMES)}, tmp_path / "all.png", "all")
    plot({"lora_unet_conv_in": 1.0}, tmp_path / "one.png", "one")
    with Image.open(tmp_path / "all.png") as many, Image.open(tmp_path / "one.png") as one:
        assert many.width == one.width and many.height > one.height
        assert len(many.convert("RGB").getcolors(2**24) or ()) > 50
