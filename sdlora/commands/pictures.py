"""`sdlora generate`: pictures through the exported file, as a WebUI would draw them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from sdlora.commands import Commands, strengths
from sdlora.commands.terminal import lines_of, positive, quiet_libraries, say
from sdlora.config import TOKENS_A_CHUNK
from sdlora.errors import ConfigError

MAX_TOKENS = (75, 150, 225)


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "generate",
        help="make pictures, with or without a LoRA file",
        description="Make pictures. A prompt may end in --n negative --w width --h height --d seed --s steps --l guidance.",
    )
    command.add_argument("prompt", nargs="*", help="what to draw")
    command.add_argument("--prompts", type=Path, help="file with one prompt a line")
    command.add_argument("--base", default="mini", help="base model, as model.base: a .safetensors file, a folder, or 'mini' (default)")
    command.add_argument("--vae", help="another VAE than the base's own: a .safetensors file, or a folder")
    command.add_argument("--prediction-type", choices=("epsilon", "v_prediction"), help="what the base predicts (default: what it says)")
    command.add_argument("--lora", action="append", default=[], metavar=strengths.METAVAR, help=strengths.HELP)
    command.add_argument(
        "--clip-skip",
        type=positive,
        metavar="N",
        help="text encoder's layer to hear, from the last, 1 (default: what the first LoRA says, or 1)",
    )
    command.add_argument(
        "--max-tokens", type=int, choices=MAX_TOKENS, help="tokens of a prompt that are heard (default: what the first LoRA says, or 75)"
    )
    command.add_argument("--prompt-weights", action="store_true", help="read (word:1.2) and [word] in prompts as WebUIs do")
    command.add_argument("--out", type=Path, default=Path("pictures"), help="folder for the pictures (default: pictures)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    command.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    command.set_defaults(call=generate_command)


def generate_command(parsed: argparse.Namespace) -> int:
    quiet_libraries()
    lines = [line for line in parsed.prompt if line and not line.startswith("#")]
    if parsed.prompts:
        lines += lines_of("--prompts", parsed.prompts)
    if not lines:
        raise ConfigError("There is no prompt: write one in quotes, or name a file with --prompts.")

    from sdlora import preview
    from sdlora.lora import formats, lorafile
    from sdlora.models import families
    from sdlora.models.device import DTYPES, pick_device
    from sdlora.models.sampling import generate

    prompts = [preview.parse_prompt(line, steps=20, guidance=7.0) for line in lines]
    wanted = [strengths.parse(text) for text in parsed.lora]
    with lorafile.opened([of.path for of in wanted], folded=False) as files:
        clip_skip, max_tokens = as_trained(files[0].metadata if files else {})
        clip_skip, max_tokens = parsed.clip_skip or clip_skip, parsed.max_tokens or max_tokens
        device, chunks = pick_device(parsed.device), max_tokens // TOKENS_A_CHUNK
        family, model = families.load(
            parsed.base,
            DTYPES[parsed.precision],
            device,
            clip_skip=clip_skip,
            chunks=chunks,
            prompt_weights=parsed.prompt_weights,
            vae=parsed.vae,
            prediction_type=parsed.prediction_type,
        )
        for line in model.notes:
            say(f"Assumed: {line}")
        for prompt in prompts:
            preview.check_size(prompt, model.size_multiple)
        for of, file in zip(wanted, files, strict=True):
            own = of.strengths(file.layers)
            for strength in set(own.values()):
                changes = {name: file.change(name) for name in file.layers if own[name] == strength}
                formats.merge(model.parts, changes, strength)
    if (clip_skip, max_tokens) != (1, TOKENS_A_CHUNK):
        say(f"Clip skip {clip_skip}, prompts of {max_tokens} tokens")
    parsed.out.mkdir(parents=True, exist_ok=True)
    used = "".join(f" <lora:{of.path.stem}:{of.strength:g}>" for of in wanted)
    number = 1 + max((int(p.stem) for p in parsed.out.glob("*.png") if p.stem.isdigit()), default=-1)
    for offset, prompt in enumerate(prompts):
        path = parsed.out / f"{number + offset:05d}.png"
        (picture,) = generate(family, model, [prompt])
        preview.save_picture(picture, path, prompt, model=Path(parsed.base).name, lora=used)
        say(f"{path}  {prompt.text}")
    return 0


def as_trained(metadata: Mapping[str, str]) -> tuple[int, int]:
    """Clip skip and the longest prompt that a LoRA file says it was trained with; what it does not say is as usual. SDXL has no choice
    of layers, and what kohya's scripts write there means nothing."""
    skip, longest = metadata.get("ss_clip_skip", ""), metadata.get("ss_max_token_length", "")  # "None" where it was not set
    is_xl = metadata.get("ss_base_model_version", "").startswith("sdxl")
    clip_skip = int(skip) if skip.isdigit() and not is_xl else 1
    return max(clip_skip, 1), int(longest) if longest in map(str, MAX_TOKENS) else TOKENS_A_CHUNK
