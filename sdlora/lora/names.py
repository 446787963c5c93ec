"""How layers are named: by us, in the files of WebUIs and other trainers, and in original (SGM, LDM) checkpoints.

Our readable name is `<part>.<module path in diffusers or transformers>`. A program writes a *stem* and appends what a tensor is
(`.lora_down.weight`, `.alpha`). WebUIs' own stems are flat, `<prefix>_<path with . as _>`; SDXL's follow the path in original checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from sdlora.lora.targets import readable_name

UNET, TEXT_ENCODER, TEXT_ENCODER_2 = "unet", "text_encoder", "text_encoder_2"

# ---------------------------------------------------------------- paths in original checkpoints

# Each block of diffusers is three of an original checkpoint: on the way down two resnets and a downsampler, behind the first convolution;
# on the way up three resnets, the last with the upsampler. In each, 0 is the resnet and 1 its attention.
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_SINGLE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET_BACK = {theirs: ours for ours, theirs in _RESNET.items()}
_SINGLE_BACK = {theirs: ours for ours, theirs in _SINGLE.items()}


def sgm_path(path: str, family: str) -> str:
    """A UNet module's path in diffusers -> in original checkpoints: `down_blocks.0.attentions.0.proj_in` -> `input_blocks.1.1.proj_in`.

    Only the first upsampler asks for the family: it is the third of its block behind an attention, which SDXL has there and SD 1.x and
    2.x lack. A path that is no such module's is returned as it is.
    """
    if path in _SINGLE:
        return _SINGLE[path]
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", path)
    if not found:
        return path
    side, block, kind, number, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "downsamplers":
        return f"input_blocks.{3 * block + 3}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * block + 2}.{1 if block == 0 and family != 'sdxl' else 2}.{rest}"
    is_resnet = kind == "resnets"
    rest = _RESNET.get(rest, rest) if is_resnet else rest
    if side is None:
        return f"middle_block.{2 * number if is_resnet else 1}.{rest}"
    of_side = f"input_blocks.{3 * block + number + 1}" if side == "down" else f"output_blocks.{3 * block + number}"
    return f"{of_side}.{0 if is_resnet else 1}.{rest}"


def diffusers_path(path: str) -> str:
    """The way back, of any family. A path that is not an original checkpoint's is returned as it is."""
    if path in _SINGLE_BACK:
        return _SINGLE_BACK[path]
    found = re.fullmatch(r"(?:(in|out)put_blocks\.(\d+)|middle_block)\.(\d+)\.(.+)", path)
    if not found:
        return path
    side, place, rest = found[1], int(found[3]), found[4]
    block, number = divmod(int(found[2] or 0) - (side == "in"), 3)
    if side == "in" and number == 2:
        return f"down_blocks.{block}.downsamplers.0.{rest.replace('op', 'conv')}"
    if side == "out" and rest == "conv":
        return f"up_blocks.{block}.upsamplers.0.conv"
    of_side, number = ("mid_block", place // 2) if side is None else (f"{'down' if side == 'in' else 'up'}_blocks.{block}", number)
    return f"{of_side}.attentions.{number}.{rest}" if place == 1 else f"{of_side}.resnets.{number}.{_RESNET_BACK.get(rest, rest)}"


# ---------------------------------------------------------------- stems

# What canonical stems begin with, by family and part.
_ONE_ENCODER = {UNET: "lora_unet", TEXT_ENCODER: "lora_te"}
PREFIXES: dict[str, dict[str, str]] = {
    "sd1": _ONE_ENCODER,
    "sd2": _ONE_ENCODER,
    "sdxl": {UNET: "lora_unet", TEXT_ENCODER: "lora_te1", TEXT_ENCODER_2: "lora_te2"},
}


def _with_diffusers_paths(name: str, family: str) -> str:
    part, _, path = name.partition(".")
    return f"{PREFIXES[family][part]}_{path.replace('.', '_')}"


def _with_sgm_paths(name: str, family: str) -> str:
    part, _, path = name.partition(".")
    return _with_diffusers_paths(f"{part}.{sgm_path(path, family)}" if part == UNET else name, family)


# Family -> (readable name -> stem of the keys in a WebUI file). A1111 takes SDXL's first upsampler for another layer by diffusers' name.
WEBUI: dict[str, Callable[[str], str]] = {
    "sd1": partial(_with_diffusers_paths, family="sd1"),
    "sd2": partial(_with_diffusers_paths, family="sd2"),
    "sdxl": partial(_with_sgm_paths, family="sdxl"),
}

# What stems begin with in any program's files, by part: `_` begins a flat path and `.` one with dots. kohya's, LyCORIS', OneTrainer's,
# diffusers' and ComfyUI's.
ANY_PREFIX: dict[str, tuple[str, ...]] = {
    TEXT_ENCODER_2: ("lora_te2_", "lycoris_te2_", "lora_te2.", "clip_g.", "text_encoder_2.", "text_encoders.clip_g.transformer."),
    TEXT_ENCODER: (
        *("lora_te_", "lora_te1_", "lycoris_te_", "lycoris_te1_", "lora_te.", "lora_te1.", "clip_l."),
        *("text_encoder.", "text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer."),
    ),
    UNET: ("lora_unet_", "lycoris_unet_", "lycoris_", "lora_unet.", "unet.", "diffusion_model.", "model.diffusion_model."),
}
# Files of one part alone may name none.
BARE = {
    TEXT_ENCODER: re.compile(r"(text_model|encoder|final_layer_norm)\b"),
    UNET: re.compile(
        r"(down_blocks|mid_block|up_blocks|conv_in|conv_norm_out|conv_out|(time|add)_embedding)\b"
        r"|(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.\d"
    ),
}
PEFT = "base_model.model."  # before any of these
# Module names with an underscore of their own, the longer first where one begins another: `_` stands for `.` between words only.
_WORDS = (
    *("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "proj_in", "proj_out", "to_out", "to_q", "to_k", "to_v"),
    *("conv_in", "conv_norm_out", "conv_out", "conv_shortcut", "time_emb_proj", "time_embedding", "add_embedding", "linear_1", "linear_2"),
    *("input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers", "skip_connection"),
    *("time_embed", "label_emb", "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("layer_norm1", "layer_norm2", "final_layer_norm", "text_projection"),
)
_WORD = re.compile("|".join((*(rf"{word}(?![a-z])" for word in _WORDS), "[^_]+")))
# What diffusers wrote before it used peft.
OLD = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def readable(stem: str) -> str | None:
    """The readable name that any program's stem stands for, or None where it begins like none that is known."""
    stem = stem.removeprefix(PEFT)
    known = ((part, prefix) for part, prefixes in ANY_PREFIX.items() for prefix in prefixes if stem.startswith(prefix))
    bare = ((part, "") for part, pattern in BARE.items() if pattern.match(stem))
    found = next(known, None) or next(bare, None)
    if found is None:
        return None
    part, prefix = found
    path = stem.removeprefix(prefix)
    if prefix.endswith("_"):
        path = ".".join(_WORD.findall(path))
    if part == UNET:
        path = path.replace(".processor.", ".")
        return f"{UNET}.{diffusers_path(f'{path}.0' if path.endswith('.to_out') else path)}"
    head, _, last = path.rpartition(".")
    return readable_name(part, f"{head}.{OLD[last]}" if last in OLD else path)
