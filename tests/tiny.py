"""Random models of a few hundred KB, in diffusers' folder layout, for tests that need a model and not a picture."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
TOKENS = [*LETTERS, *(c + "</w>" for c in LETTERS), ",</w>", "<|startoftext|>", "<|endoftext|>"]
WIDTH, WIDTH_2, PROJECTED = 16, 24, 8  # D of the text encoders, P


def build_model(folder: Path, prediction_type: str = "epsilon", family: str = "sd1") -> Path:
    """Of family "sd1" or "sdxl": pictures of 32 px, latents of 16 x 16, two blocks, prompts of 16 letters at most."""
    torch.manual_seed(0)
    is_xl = family == "sdxl"
    save_tokenizer(folder / "tokenizer")
    save_text_encoder(CLIPTextModel(text_config(WIDTH)), folder / "text_encoder")
    if is_xl:
        save_tokenizer(folder / "tokenizer_2", pad_token=",</w>")  # not the end, as in SDXL
        config = text_config(WIDTH_2, num_hidden_layers=3, projection_dim=PROJECTED)
        save_text_encoder(CLIPTextModelWithProjection(config), folder / "text_encoder_2")
    UNet2DConditionModel(**unet_config(family)).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
    ).save_pretrained(folder / "vae")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, prediction_type=prediction_type
    ).save_pretrained(folder / "scheduler")
    classes = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if is_xl:
        classes |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer_2": ["transformers", "CLIPTokenizer"]}
        options: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    else:
        options = {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(options | classes))
    return folder


def unet_config(family: str) -> dict[str, Any]:
    shared = {
        "sample_size": 16,
        "block_out_channels": (16, 24),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    if family == "sd1":
        return shared | {"attention_head_dim": 2, "cross_attention_dim": WIDTH}
    return shared | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 3),
        "cross_attention_dim": WIDTH + WIDTH_2,
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": PROJECTED + 6 * 4,
    }


def text_config(width: int, **options: Any) -> CLIPTextConfig:
    end = len(TOKENS) - 1
    shared = {
        "vocab_size": len(TOKENS),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "projection_dim": width,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    return CLIPTextConfig(**(shared | options))


def save_tokenizer(folder: Path, **options: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder, model_max_length=16, **options).save_pretrained(folder)


def save_text_encoder(encoder: Any, folder: Path) -> None:
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    torch.nn.init.uniform_(norm.weight, 0.1, 2)  # all ones would make every norm the square root of the width
    encoder.save_pretrained(folder)
