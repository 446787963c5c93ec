"""`sdlora generate`: pictures through the exported file, as a WebUI would draw them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sdlora.commands import Commands, strengths
from sdlora.commands.terminal import lines_of, positive, quiet_libraries, say
from sdlora.config import TOKENS_A_CHUNK
from sdlora.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from sdlora.models.family import Family, Model

MAX_TOKENS = (75, 150, 225)
GRID = "-grid"  # behind the number of its last picture


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
    command.add_argument("--each", action="store_true", help="draw with each --lora alone, not with all together, and a grid of it")
    command.add_argument(
        "--strengths",
        type=float,
        nargs="+",
        metavar="FACTOR",
        help="draw at each of these times the strengths of --lora, 0 being the base model, and a labelled grid of it",
    )
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
    lines = prompt_lines(parsed)

    from sdlora import preview
    from sdlora.lora import formats, lorafile
    from sdlora.models.sampling import generate

    prompts = [preview.parse_prompt(line, steps=20, guidance=7.0) for line in lines]
    wanted = [strengths.parse(text) for text in parsed.lora]
    is_grid = parsed.each or parsed.strengths is not None
    rows, columns = variants(wanted, parsed.each, parsed.strengths or [1.0], [prompt.text for prompt in prompts])
    with lorafile.opened([of.path for of in wanted], folded=False) as files:
        family, model = load(parsed, as_trained(files[0].metadata if files else {}))
        for prompt in prompts:
            preview.check_size(prompt, model.size_multiple)
        number = 1 + max((int(p.stem[:5]) for p in parsed.out.glob("*.png") if p.stem[:5].isdigit()), default=-1)
        merged, file_of = formats.Merged(model.parts, restorable=is_grid), {file.path: file for file in files}

        def draw(variant: list[strengths.Wanted]) -> Iterator[Image.Image]:
            """A picture of each prompt."""
            nonlocal number
            merged.restore()
            for of in variant:
                file = file_of[of.path]
                own = of.strengths(file.layers)
                for strength in set(own.values()):
                    merged.merge({name: file.change(name) for name in file.layers if own[name] == strength}, strength)
            used = "".join(f" <lora:{of.path.stem}:{of.strength:g}>" for of in variant)
            parsed.out.mkdir(parents=True, exist_ok=True)  # not for a file that cannot be read
            for prompt in prompts:
                path = parsed.out / f"{number:05d}.png"
                (picture,) = generate(family, model, [prompt])
                preview.save_picture(picture, path, prompt, model=Path(parsed.base).name, lora=used)
                say(f"{path}  {prompt.text}{used}")
                number += 1
                yield picture

        drawn = [(label, [picture for variant in row for picture in draw(variant)]) for label, row in rows]
    if is_grid:
        path = parsed.out / f"{number - 1:05d}{GRID}.png"
        used = "".join(f" <lora:{of.path.stem}:{of.strength:g}>" for of in wanted)
        preview.save_picture(
            preview.grid(drawn, columns), path, prompts[0], model=Path(parsed.base).name, lora=used, size=drawn[0][1][0].size
        )
        say(f"Grid: {path}")
    return 0


def prompt_lines(parsed: argparse.Namespace) -> list[str]:
    lines = [line for line in parsed.prompt if line and not line.startswith("#")]
    if parsed.prompts:
        lines += lines_of("--prompts", parsed.prompts)
    if not lines:
        raise ConfigError("There is no prompt: write one in quotes, or name a file with --prompts.")
    return lines


def load(parsed: argparse.Namespace, trained: tuple[int, int]) -> tuple[Family, Model]:
    """The base model; what is not said of it is as the first LoRA was `trained`."""
    from sdlora.models import families
    from sdlora.models.device import DTYPES, pick_device

    clip_skip, max_tokens = parsed.clip_skip or trained[0], parsed.max_tokens or trained[1]
    family, model = families.load(
        parsed.base,
        DTYPES[parsed.precision],
        pick_device(parsed.device),
        clip_skip=clip_skip,
        chunks=max_tokens // TOKENS_A_CHUNK,
        prompt_weights=parsed.prompt_weights,
        vae=parsed.vae,
        prediction_type=parsed.prediction_type,
    )
    for line in model.notes:
        say(f"Assumed: {line}")
    if (clip_skip, max_tokens) != (1, TOKENS_A_CHUNK):
        say(f"Clip skip {clip_skip}, prompts of {max_tokens} tokens")
    return family, model


def variants(
    wanted: list[strengths.Wanted], each: bool, factors: list[float], prompts: list[str]
) -> tuple[list[tuple[str, list[list[strengths.Wanted]]]], list[str]]:
    """The rows of a grid, each with its label and the LoRAs of its columns; and the columns' captions. Columns are factors where several
    are wanted of several files, and else prompts. Raises ConfigError for a grid of three sides."""
    groups = [(of.path.stem, [of]) for of in wanted] if each else [(", ".join(of.path.stem for of in wanted) or "base model", wanted)]
    if len(groups) > 1 and len(factors) > 1:
        if len(prompts) > 1:
            raise ConfigError("A grid has two sides: give one prompt, one --lora or one of --strengths.")
        return [(label, [scaled(group, factor) for factor in factors]) for label, group in groups], [f"{of:g}" for of in factors]
    if len(factors) > 1:
        return [(f"{factor:g}", [scaled(groups[0][1], factor)]) for factor in factors], prompts
    return [(label, [scaled(group, factors[0])]) for label, group in groups], prompts


def scaled(wanted: list[strengths.Wanted], factor: float) -> list[strengths.Wanted]:
    """Times a factor; none at all at 0."""
    return [of.times(factor) for of in wanted] if factor else []


def as_trained(metadata: Mapping[str, str]) -> tuple[int, int]:
    """Clip skip and the longest prompt that a LoRA file says it was trained with; what it does not say is as usual. SDXL has no choice
    of layers, and what kohya's scripts write there means nothing."""
    skip, longest = metadata.get("ss_clip_skip", ""), metadata.get("ss_max_token_length", "")  # "None" where it was not set
    is_xl = metadata.get("ss_base_model_version", "").startswith("sdxl")
    clip_skip = int(skip) if skip.isdigit() and not is_xl else 1
    return max(clip_skip, 1), int(longest) if longest in map(str, MAX_TOKENS) else TOKENS_A_CHUNK
