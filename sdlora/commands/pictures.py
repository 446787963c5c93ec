"""`sdlora generate`: pictures through the exported file, as a WebUI would draw them."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdlora.commands import Commands
from sdlora.commands.terminal import quiet_libraries
from sdlora.errors import ConfigError


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "generate",
        help="make pictures, with or without a LoRA file",
        description="Make pictures. A prompt may end in --n negative --w width --h height --d seed --s steps --l guidance.",
    )
    command.add_argument("prompt", nargs="*", help="what to draw")
    command.add_argument("--prompts", type=Path, help="file with one prompt a line")
    command.add_argument("--base", default="mini", help="base model: a folder, or 'mini' (default)")
    command.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="LoRA file, as trained or from elsewhere")
    command.add_argument("--out", type=Path, default=Path("pictures"), help="folder for the pictures (default: pictures)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    command.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    command.set_defaults(call=generate_command)


def generate_command(parsed: argparse.Namespace) -> int:
    quiet_libraries()
    lines = list(parsed.prompt)
    if parsed.prompts:
        try:
            lines += [line.strip() for line in parsed.prompts.read_text(encoding="utf-8-sig").splitlines()]
        except OSError as error:
            raise ConfigError(f"--prompts: cannot read {parsed.prompts}: {error.strerror}.") from None
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ConfigError("There is no prompt: write one in quotes, or name a file with --prompts.")

    from sdlora import preview
    from sdlora.lora import formats
    from sdlora.models import families
    from sdlora.models.device import DTYPES, pick_device
    from sdlora.models.sampling import generate

    prompts = [preview.parse_prompt(line, steps=20, guidance=7.0) for line in lines]
    files = [split_strength(text) for text in parsed.lora]
    loaded = [(formats.load(path)[0], strength) for path, strength in files]
    family, model = families.load(parsed.base, DTYPES[parsed.precision], pick_device(parsed.device))
    for prompt in prompts:
        preview.check_size(prompt, model.size_multiple)
    for changes, strength in loaded:
        formats.merge(model.parts, changes, strength)
    parsed.out.mkdir(parents=True, exist_ok=True)
    used = "".join(f" <lora:{path.stem}:{strength:g}>" for path, strength in files)
    number = 1 + max((int(p.stem) for p in parsed.out.glob("*.png") if p.stem.isdigit()), default=-1)
    for offset, prompt in enumerate(prompts):
        path = parsed.out / f"{number + offset:05d}.png"
        (picture,) = generate(family, model, [prompt])
        preview.save_picture(picture, path, prompt, model=Path(parsed.base).name, lora=used)
        print(f"{path}  {prompt.text}", flush=True)
    return 0


def split_strength(text: str) -> tuple[Path, float]:
    """`file.safetensors:0.8` -> file and strength; a Windows drive's colon is left alone."""
    head, colon, tail = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            return Path(head), float(tail)
        except ValueError:
            pass
    return Path(text), 1.0
