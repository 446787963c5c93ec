"""Names of layers: real architectures against frozen lists, and every spelling back to the one name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from spellings import spellings
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.lora.names import WEBUI, diffusers_path, readable, sgm_path
from sdlora.lora.targets import TEXT_ENCODER_GROUPS, UNET_GROUPS, find_targets, readable_name

GOLDEN = Path(__file__).parents[1] / "golden"
COUNTS = {"sd1": (192, 278, 72), "sd2": (192, 278, 138), "sdxl": (722, 788, 264)}  # UNet, with convolutions, text encoders

SD: dict[str, Any] = {"block_out_channels": (320, 640, 1280, 1280)}
UNETS: dict[str, tuple[dict[str, Any], int]] = {  # configuration, parameters
    "sd1": (SD | {"cross_attention_dim": 768, "attention_head_dim": 8}, 859_520_964),
    "sd2": (SD | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}, 865_910_724),
    "sdxl": (
        {
            "cross_attention_dim": 2048,
            "block_out_channels": (320, 640, 1280),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        2_567_463_684,
    ),
}


def encoder(width: int, layers: int, projection: int | None = None) -> nn.Module:
    config = CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, projection_dim=projection or 512)
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


@pytest.fixture(scope="module", params=UNETS)
def architecture(request: pytest.FixtureRequest) -> tuple[str, dict[str, nn.Module]]:
    """Family and parts at full size, without memory."""
    config, parameters = UNETS[request.param]
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {"unet": UNet2DConditionModel(**config)}
        parts["text_encoder"] = encoder(1024, 23) if request.param == "sd2" else encoder(768, 12)
        if request.param == "sdxl":
            parts["text_encoder_2"] = encoder(1280, 32, 1280)
    assert sum(p.numel() for p in parts["unet"].parameters()) == parameters
    return request.param, parts


def test_names_of_webui_files_are_the_frozen_ones(architecture: tuple[str, dict[str, nn.Module]]) -> None:
    family, parts = architecture
    default = ["attention", "feed_forward", "projection"]
    unet = find_targets("unet", parts["unet"], [group for group in UNET_GROUPS if group != "input_output"])
    encoders = [name for part in parts if part != "unet" for name in find_targets(part, parts[part], TEXT_ENCODER_GROUPS)]
    projections = [name for name in encoders if name.endswith("text_projection")]
    assert [WEBUI[family](name) for name in projections] == (["lora_te2_text_projection"] if family == "sdxl" else [])
    names = [WEBUI[family](name) for name in [*unet, *encoders] if name not in projections]
    assert (len(find_targets("unet", parts["unet"], default)), len(unet), len(encoders) - len(projections)) == COUNTS[family]
    assert len(names) == len(set(names))
    assert set(names) == set((GOLDEN / f"names_{family}.txt").read_text().split())


def test_frozen_lists_have_the_counts_of_the_readers_sources() -> None:
    for family, (_, unet, encoders) in COUNTS.items():
        names = (GOLDEN / f"names_{family}.txt").read_text().split()
        assert len(names) == len(set(names)) == unet + encoders
        assert sum(name.startswith("lora_unet_") for name in names) == unet


@pytest.mark.parametrize(
    ("path", "family", "theirs"),
    [
        ("down_blocks.0.attentions.0.proj_in", "sd1", "input_blocks.1.1.proj_in"),
        ("down_blocks.2.resnets.1.conv_shortcut", "sdxl", "input_blocks.8.0.skip_connection"),
        ("down_blocks.1.downsamplers.0.conv", "sdxl", "input_blocks.6.0.op"),
        ("mid_block.resnets.1.norm2", "sd2", "middle_block.2.out_layers.0"),
        ("mid_block.attentions.0.transformer_blocks.3.ff.net.0.proj", "sdxl", "middle_block.1.transformer_blocks.3.ff.net.0.proj"),
        ("up_blocks.0.upsamplers.0.conv", "sd1", "output_blocks.2.1.conv"),
        ("up_blocks.0.upsamplers.0.conv", "sdxl", "output_blocks.2.2.conv"),
        ("up_blocks.2.upsamplers.0.conv", "sd2", "output_blocks.8.2.conv"),
        ("up_blocks.1.resnets.2.time_emb_proj", "sdxl", "output_blocks.5.0.emb_layers.1"),
        ("add_embedding.linear_2", "sdxl", "label_emb.0.2"),
        ("conv_out", "sd1", "out.2"),
    ],
)
def test_paths_in_original_checkpoints(path: str, family: str, theirs: str) -> None:
    assert sgm_path(path, family) == theirs
    assert diffusers_path(theirs) == path


def test_every_module_has_a_path_and_spellings_of_its_own(architecture: tuple[str, dict[str, nn.Module]]) -> None:
    family, parts = architecture
    stems: dict[str, str] = {}
    for part, model in parts.items():
        for path, module in model.named_modules():
            if not list(module.parameters(recurse=False)) or isinstance(module, nn.Embedding):
                continue  # no LoRA changes embeddings
            name = readable_name(part, path)
            if part == "unet":
                assert diffusers_path(sgm_path(path, family)) == path
            assert spellings(name, family)[0] == WEBUI[family](name)
            for stem in spellings(name, family):
                assert readable(stem) == name, stem
                assert stems.setdefault(stem, name) == name
    assert readable("model.weight") is None
