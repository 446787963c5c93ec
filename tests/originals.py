"""Random checkpoints of a few hundred KB in their original single-file layout, made from diffusers' and transformers' own networks by
walking through them block by block, as the original networks were built."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

PREFIXES = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
}


@dataclass
class Original:
    path: Path
    tensors: dict[str, Tensor]  # as the file has them
    parameters: dict[str, Tensor]  # by readable name, as diffusers and transformers have them
    vae: dict[str, Tensor]  # as diffusers has them


def build_original(path: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Original:
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**unet_config(family))
    tensors = {f"model.diffusion_model.{key}": tensor for key, tensor in original_unet(unet).items()}
    parameters = {f"unet.{key}": tensor for key, tensor in unet.state_dict().items()}
    for number, (part, prefix) in enumerate(PREFIXES[family].items()):
        is_open_clip = prefix.endswith("model.")
        config = text_config(family, part)
        model = CLIPTextModelWithProjection(config) if number else CLIPTextModel(config)
        own = {key if key.startswith("text_") else f"text_model.{key}": tensor for key, tensor in model.state_dict().items()}
        parameters |= {f"{part}.{key}": tensor for key, tensor in own.items()}
        tensors |= {prefix + key: tensor for key, tensor in (open_clip(own, config) if is_open_clip else own).items()}
    parameters = {key: tensor.to(dtype) for key, tensor in parameters.items()}
    tensors = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
    vae = AutoencoderKL(**VAE_CONFIG)
    tensors |= {f"first_stage_model.{key}": tensor.to(dtype).contiguous() for key, tensor in original_vae(vae).items()}
    tensors["model_ema.num_updates"] = torch.tensor(7)
    save_file(tensors, path, {"format": "pt", "note": "of the base"})
    return Original(path, tensors, parameters, {key: tensor.to(dtype) for key, tensor in vae.state_dict().items()})


def save_configs(folder: Path, family: str) -> None:
    """Of the architectures that `build_original` writes, as diffusers and transformers keep them."""
    with torch.device("meta"):
        UNet2DConditionModel(**unet_config(family)).save_config(folder / family / "unet")
        AutoencoderKL(**VAE_CONFIG).save_config(folder / family / "vae")
    for part in PREFIXES[family]:
        text_config(family, part).save_pretrained(folder / family / part)
    DDIMScheduler(beta_schedule="scaled_linear").save_config(folder / family / "scheduler")


VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (8, 12),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}


def text_config(family: str, part: str) -> CLIPTextConfig:
    is_open_clip = PREFIXES[family][part].endswith("model.")
    return CLIPTextConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=9,
        projection_dim=6,
        hidden_act="gelu" if is_open_clip else "quick_gelu",
        bos_token_id=18,
        eos_token_id=19,
        pad_token_id=0,
    )


def original_vae(vae: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def put(module: Any, at: str) -> None:
        found.update({f"{at}.{key}": tensor for key, tensor in module.state_dict().items()})

    def put_resnet(module: Any, at: str) -> None:
        for name in ("norm1", "conv1", "norm2", "conv2"):
            put(getattr(module, name), f"{at}.{name}")
        if module.conv_shortcut is not None:
            put(module.conv_shortcut, f"{at}.nin_shortcut")

    def put_middle(block: Any, at: str) -> None:
        put_resnet(block.resnets[0], f"{at}.block_1")
        put_resnet(block.resnets[1], f"{at}.block_2")
        attention = block.attentions[0]
        put(attention.group_norm, f"{at}.attn_1.norm")
        for theirs, module in (("q", attention.to_q), ("k", attention.to_k), ("v", attention.to_v), ("proj_out", attention.to_out[0])):
            found[f"{at}.attn_1.{theirs}.weight"] = module.weight.detach()[:, :, None, None]  # a convolution there
            found[f"{at}.attn_1.{theirs}.bias"] = module.bias.detach()

    for half, blocks in (("encoder", vae.encoder.down_blocks), ("decoder", vae.decoder.up_blocks)):
        module, side = getattr(vae, half), "down" if half == "encoder" else "up"
        put(module.conv_in, f"{half}.conv_in")
        put_middle(module.mid_block, f"{half}.mid")
        for place, block in enumerate(blocks):
            number = place if half == "encoder" else len(blocks) - 1 - place  # by size, not by order
            for inner, resnet in enumerate(block.resnets):
                put_resnet(resnet, f"{half}.{side}.{number}.block.{inner}")
            for resampler in getattr(block, f"{side}samplers") or []:
                put(resampler.conv, f"{half}.{side}.{number}.{side}sample.conv")
        put(module.conv_norm_out, f"{half}.norm_out")
        put(module.conv_out, f"{half}.conv_out")
    put(vae.quant_conv, "quant_conv")
    put(vae.post_quant_conv, "post_quant_conv")
    assert len(found) == len(vae.state_dict())
    return found


def unet_config(family: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 12),
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "use_linear_projection": family != "sd1",
    }
    if family == "sdxl":
        config |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "cross_attention_dim": 16,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 + 6 * 4,
        }
    return config


def original_unet(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def put(module: Any, at: str) -> None:
        found.update({f"{at}.{key}": tensor for key, tensor in module.state_dict().items()})

    def put_resnet(module: Any, at: str) -> None:
        put(module.norm1, f"{at}.in_layers.0")
        put(module.conv1, f"{at}.in_layers.2")
        put(module.time_emb_proj, f"{at}.emb_layers.1")
        put(module.norm2, f"{at}.out_layers.0")
        put(module.conv2, f"{at}.out_layers.3")
        if module.conv_shortcut is not None:
            put(module.conv_shortcut, f"{at}.skip_connection")

    def put_layers(block: Any, side: str, number: int) -> int:
        """A block's resnets, each with its attention; the number behind them."""
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            put_resnet(resnet, f"{side}.{number}.0")
            if attention is not None:
                put(attention, f"{side}.{number}.1")
            number += 1
        return number

    put(unet.time_embedding.linear_1, "time_embed.0")
    put(unet.time_embedding.linear_2, "time_embed.2")
    if unet.config.addition_embed_type:
        put(unet.add_embedding.linear_1, "label_emb.0.0")
        put(unet.add_embedding.linear_2, "label_emb.0.2")
    put(unet.conv_in, "input_blocks.0.0")
    number = 1
    for block in unet.down_blocks:
        number = put_layers(block, "input_blocks", number)
        if block.downsamplers:
            put(block.downsamplers[0].conv, f"input_blocks.{number}.0.op")
            number += 1
    put_resnet(unet.mid_block.resnets[0], "middle_block.0")
    put(unet.mid_block.attentions[0], "middle_block.1")
    put_resnet(unet.mid_block.resnets[1], "middle_block.2")
    number = 0
    for block in unet.up_blocks:
        number = put_layers(block, "output_blocks", number)
        if block.upsamplers:
            put(block.upsamplers[0].conv, f"output_blocks.{number - 1}.{2 if hasattr(block, 'attentions') else 1}.conv")
    put(unet.conv_norm_out, "out.0")
    put(unet.conv_out, "out.2")
    assert len(found) == len(unet.state_dict())
    return found


def open_clip(own: dict[str, Tensor], config: CLIPTextConfig) -> dict[str, Tensor]:
    found = {
        "token_embedding.weight": own["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": own["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": own["text_model.final_layer_norm.weight"],
        "ln_final.bias": own["text_model.final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
    }
    if "text_projection.weight" in own:
        found["text_projection"] = own["text_projection.weight"].T
    for number in range(config.num_hidden_layers):
        layer, block = f"text_model.encoder.layers.{number}", f"transformer.resblocks.{number}"
        for end in ("weight", "bias"):
            found[f"{block}.attn.in_proj_{end}"] = torch.cat([own[f"{layer}.self_attn.{of}_proj.{end}"] for of in "qkv"])
            found[f"{block}.attn.out_proj.{end}"] = own[f"{layer}.self_attn.out_proj.{end}"]
            found[f"{block}.mlp.c_fc.{end}"] = own[f"{layer}.mlp.fc1.{end}"]
            found[f"{block}.mlp.c_proj.{end}"] = own[f"{layer}.mlp.fc2.{end}"]
            found[f"{block}.ln_1.{end}"] = own[f"{layer}.layer_norm1.{end}"]
            found[f"{block}.ln_2.{end}"] = own[f"{layer}.layer_norm2.{end}"]
    return found
