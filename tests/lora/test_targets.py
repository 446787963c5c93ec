"""Which layers are found, under which names: against the frozen list of SD 1.5's names in WebUI files."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdlora.lora.formats import webui_name
from sdlora.lora.layers import LoraLayer
from sdlora.lora.targets import TEXT_ENCODER_GROUPS, UNET_GROUPS, find_targets, inject, readable_name, seeded_generator

FROZEN = set((Path(__file__).parent / "names_sd15.txt").read_text().split())


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
    assert {webui_name(name) for name in names} == FROZEN
    assert len(names) == len(FROZEN) == 278 + 72


def test_input_and_output_layers(sd15: dict[str, nn.Module]) -> None:
    found = [webui_name(name) for name in find_targets("unet", sd15["unet"], ["input_output"])]
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
    layers = inject(text_encoder, targets, lambda name, base: LoraLayer(base, 2, 2, "kaiming", True, seeded_generator(0, name)))
    assert list(layers) == [f"text_encoder.text_model.encoder.layers.0.mlp.{fc}" for fc in ("fc1", "fc2")]
    assert all(text_encoder.get_submodule(path) is layers[name] for name, path in targets.items())


def test_each_layer_has_a_start_of_its_own() -> None:
    first, again, other = (torch.rand(3, generator=seeded_generator(1, n)) for n in ("a", "a", "b"))
    assert torch.equal(first, again) and not torch.equal(first, other)
