"""Which layers are found, under which names: against the frozen list of SD 1.5's names in WebUI files."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdlora.errors import ConfigError
from sdlora.lora.layers import FullLayer
from sdlora.lora.names import WEBUI
from sdlora.lora.targets import (
    PRESETS,
    TEXT_ENCODER_GROUPS,
    UNET_GROUPS,
    block_globs,
    block_of,
    by_layer,
    find_norms,
    find_targets,
    groups_of,
    inject,
    readable_name,
    seeded_generator,
    selects,
)

FROZEN = set((Path(__file__).parents[1] / "golden" / "names_sd1.txt").read_text().split())


@pytest.fixture(scope="module")
def sd15() -> dict[str, nn.Module]:
    """The architecture at full size, without memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    return {"unet": unet, "text_encoder": text_encoder}


def test_all_groups_give_the_frozen_names(sd15: dict[str, nn.Module]) -> None:
    groups = [group for group in UNET_GROUPS if group != "input_output"]
    names = [*find_targets("unet", sd15["unet"], groups), *find_targets("text_encoder", sd15["text_encoder"], TEXT_ENCODER_GROUPS)]
    assert {WEBUI["sd1"](name) for name in names} == FROZEN
    assert len(names) == len(FROZEN) == 278 + 72


def test_input_and_output_layers(sd15: dict[str, nn.Module]) -> None:
    found = [WEBUI["sd1"](name) for name in find_targets("unet", sd15["unet"], ["input_output"])]
    assert sorted(found) == [
        "lora_unet_conv_in",
        "lora_unet_conv_out",
        "lora_unet_time_embedding_linear_1",
        "lora_unet_time_embedding_linear_2",
    ]


def test_default_groups_count(sd15: dict[str, nn.Module]) -> None:
    assert len(find_targets("unet", sd15["unet"], ["attention", "feed_forward", "projection"])) == 192
    assert len(find_targets("unet", sd15["unet"], ["attention"])) == 128
    assert find_targets("unet", sd15["unet"], []) == {}


def test_text_model_is_kept_in_names_whatever_the_library_calls_it() -> None:
    assert readable_name("text_encoder", "encoder.layers.0.mlp.fc1") == "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    assert readable_name("text_encoder", "text_model.encoder.layers.0.mlp.fc1") == "text_encoder.text_model.encoder.layers.0.mlp.fc1"


def test_inject_replaces_the_module_and_names_survive_it() -> None:
    text_encoder = CLIPTextModel(
        CLIPTextConfig(vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    targets = find_targets("text_encoder", text_encoder, ["feed_forward"])
    layers = inject(text_encoder, targets, lambda name, base: FullLayer(base))
    assert list(layers) == [f"text_encoder.text_model.encoder.layers.0.mlp.{fc}" for fc in ("fc1", "fc2")]
    assert all(text_encoder.get_submodule(path) is layers[name] for name, path in targets.items())


def test_each_layer_has_a_start_of_its_own() -> None:
    first, again, other = (torch.rand(3, generator=seeded_generator(1, n)) for n in ("a", "a", "b"))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_sets_of_groups_count_what_other_trainers_adapt(sd15: dict[str, nn.Module]) -> None:
    counts = {name: len(find_targets("unet", sd15["unet"], groups_of([name]))) for name in PRESETS}
    assert counts == {"attention+ff": 192, "all-linear": 192 + 22, "all-linear+conv": 278, "everything": 282}
    assert groups_of(["attention", "attention+ff"]) == ["attention", "feed_forward", "projection"]


def test_norms_are_found_with_weight_and_bias(sd15: dict[str, nn.Module]) -> None:
    names = find_norms("unet", sd15["unet"])
    # 22 residual blocks and 16 transformers with their own, three in each of 16 transformer blocks, and the last one
    assert len(names) == 2 * 22 + 16 + 3 * 16 + 1
    assert "unet.mid_block.resnets.0.norm1" in names and "unet.conv_norm_out" in names


def test_a_group_selects_its_part_alone() -> None:
    query, text = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"
    assert selects("attention", query) and selects("attention", text)
    assert selects("unet.attention", query) and not selects("unet.attention", text)
    assert selects("text_encoder.attention", text) and not selects("text_encoder.attention", query)
    assert not selects("resnet", query) and not selects("resnet", text)
    assert selects("mid", query) and selects("te.2-3", text) and not selects("te.4-5", text) and selects("*.attn1.*", query)


def test_the_last_entry_that_names_a_layer_wins() -> None:
    names = ["unet.mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0.proj_out"]
    assert by_layer("x", names, dict.fromkeys(names, 1), {"projection": 2, "*.proj_out": 3}) == {names[0]: 2, names[1]: 3}
    with pytest.raises(ConfigError, match=r"x: 'resnet' matches no adapted layer"):
        by_layer("x", names, dict.fromkeys(names, 1), {"resnet": 2})


def test_the_last_matching_glob_wins() -> None:
    names = ["unet.down.attn1.to_q", "unet.up.attn2.to_q", "text_encoder.fc1"]
    rates = by_layer("x", names, dict.fromkeys(names, 1.0), {"unet.*": 3.0, "*.attn2.*": 4.0})
    assert rates == {names[0]: 3.0, names[1]: 4.0, names[2]: 1.0}
    with pytest.raises(ConfigError, match="matches no adapted layer"):
        by_layer("x", names, dict.fromkeys(names, 1.0), {"unet.mid.*": 1.0})


@pytest.mark.parametrize(
    ("text", "globs"),
    [
        ("mid", ["unet.mid_block.*"]),
        ("up.3", ["unet.up_blocks.3.*"]),
        ("te.0-1", ["text_encoder.text_model.encoder.layers.0.*", "text_encoder.text_model.encoder.layers.1.*"]),
        ("unet.down_blocks.0.*", ["unet.down_blocks.0.*"]),
        ("down", ["unet.down_blocks.*"]),
        ("te", ["text_encoder.*", "text_encoder_2.*"]),
        ("downs", ["downs"]),
    ],
)
def test_block_shorthand(text: str, globs: list[str]) -> None:
    assert block_globs(text) == globs


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "down.1"),
        ("unet.mid_block.resnets.0.conv1", "mid"),
        ("unet.up_blocks.3.upsamplers.0.conv", "up.3"),
        ("text_encoder.text_model.encoder.layers.11.mlp.fc1", "te.11"),
        ("text_encoder_2.text_model.encoder.layers.2.self_attn.q_proj", "te2.2"),
    ],
)
def test_a_block_names_its_layers(name: str, block: str) -> None:
    assert block_of(name) == block
    assert selects(block, name)


def test_layers_outside_of_blocks_are_of_their_part() -> None:
    names = ("unet.conv_in", "unet.time_embedding.linear_1", "text_encoder.text_model.final_layer_norm", "text_encoder_2.text_projection")
    assert list(map(block_of, names)) == ["unet", "unet", "te", "te2"]


def test_layer_one_of_te_is_not_layer_ten() -> None:
    names = [f"text_encoder.text_model.encoder.layers.{n}.mlp.fc1" for n in (1, 10)]
    assert by_layer("x", names, dict.fromkeys(names, 1.0), {"te.1": 2.0}) == {names[0]: 2.0, names[1]: 1.0}
