"""What merge, extract, resize, convert and inspect take on checkpoints and LoRAs of full size, with random numbers in them.

    python tests/benchmarks/file_tools.py                             # SDXL; half an hour on one core, 20 GB of disk
    python tests/benchmarks/file_tools.py --family sd1 --rows merge   # some

Each tool runs as a process of its own. Beside its processor time stands the most memory that it held, as a share of the checkpoint's size:
what loading it whole, as the usual scripts do, takes at the least.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from diffusers import UNet2DConditionModel
from originals import PREFIXES, open_clip, original_unet
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.lora import tensor_file
from sdlora.lora.change import Change, Factors
from sdlora.lora.checkpoints import open_checkpoint
from sdlora.lora.formats import webui_tensors
from sdlora.lora.targets import groups_of, selects
from sdlora.tensors import body_of

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "sdlora" / "models" / "configs"
TUNED_BY = 32  # rank of what separates the second checkpoint from the first
SEED = 0


def shapes(family: str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's UNet and text encoders on meta, by its original key."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / family / "unet"))
        found = {f"model.diffusion_model.{key}": tensor for key, tensor in original_unet(unet).items()}
        for part, prefix in PREFIXES[family].items():
            config = CLIPTextConfig.from_pretrained(CONFIGS / family / part)
            model = CLIPTextModelWithProjection(config) if part == "text_encoder_2" else CLIPTextModel(config)
            own = {key if key.startswith("text_") else f"text_model.{key}": tensor for key, tensor in model.state_dict().items()}
            found |= {prefix + key: tensor for key, tensor in (open_clip(own, config) if prefix.endswith("model.") else own).items()}
    return found


def write_checkpoint(path: Path, family: str, dtype: torch.dtype, tuned: bool = False) -> None:
    """The same numbers each time; `tuned`: with matrices of a low rank beside them."""
    generator, others = torch.Generator().manual_seed(SEED), torch.Generator().manual_seed(SEED + 1)
    with body_of(path) as body:
        for key, like in shapes(family).items():
            tensor = torch.randn(like.shape, generator=generator) * 0.02
            if tuned and tensor.dim() > 1:
                rows, columns = len(tensor), tensor[0].numel()
                up, down = torch.randn(rows, TUNED_BY, generator=others), torch.randn(TUNED_BY, columns, generator=others)
                tensor += (up @ down).view_as(tensor) * 1e-4
            body.add(key, tensor.to(dtype))


def write_lora(path: Path, checkpoint: Path, family: str, rank: int, seed: int, layers: str = "attention+ff") -> None:
    """Of layers of the UNet and of all text encoders: one of targets.PRESETS."""
    generator = torch.Generator().manual_seed(seed)
    base, wanted = open_checkpoint(checkpoint), groups_of([layers])

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for parameter in base.places:
            name, _, kind = parameter.rpartition(".")
            shape = base.shape(parameter)
            if kind == "weight" and len(shape) > 1 and any(selects(selector, name) for selector in wanted):
                down, up = (torch.randn(*of, generator=generator) * 0.01 for of in ((rank, *shape[1:]), (shape[0], rank)))
                yield from webui_tensors(name, Change(Factors(down, up, float(rank))), family, float(rank)).items()

    tensor_file.write(path, tensors(), {}, "fp16")


# Row -> arguments of the command; {a} and {b} are checkpoints, {one} and {two} LoRAs, {out} what is written.
ROWS: dict[str, str] = {
    "merge": "merge --base {a} --lora {one}:0.8 --lora {two}:0.5 --out {out}",
    "join": "merge --lora {one}:0.8 --lora {two}:0.5 --out {out}",
    "resize": "resize {one} --rank 16 --out {out}",
    "convert": "convert {one} --to diffusers --out {out}",
    "inspect": "inspect {one}",
    "extract": "extract --base {a} --tuned {b} --rank 32 --out {out}",
}


# The system's own figure for a child counts what its parent held when it began.
PROGRAM = """
import sys, time
from sdlora.cli import main
code = main(sys.argv[1:])
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(code, time.process_time(), peak * 1024)
"""


def taken(arguments: list[str]) -> tuple[float, int]:
    """Processor seconds and peak bytes of a command of ours. For Linux."""
    command, environment = [sys.executable, "-c", PROGRAM, *arguments], {**os.environ, "PYTHONPATH": str(ROOT)}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    code, seconds, peak = told.splitlines()[-1].split()
    if code != "0":
        raise SystemExit(f"{' '.join(arguments)} failed")
    return float(seconds), int(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=PREFIXES, default="sdxl")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRAs")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--folder", type=Path, help="where the large files go (default: the system's folder for such)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        places = {of: Path(name) / f"{of}.safetensors" for of in ("a", "b", "one", "two", "out")}
        write_checkpoint(places["a"], options.family, torch.float16)
        if "extract" in options.rows:
            write_checkpoint(places["b"], options.family, torch.float16, tuned=True)
        for seed, of in enumerate(("one", "two")):
            write_lora(places[of], places["a"], options.family, options.rank, seed)
        size, of_lora = (places[of].stat().st_size for of in ("a", "one"))
        print(f"{options.family}: a checkpoint of {size / 2**30:.2f} GiB, LoRAs of rank {options.rank} of {of_lora / 2**30:.2f} GiB")
        for row in options.rows:
            seconds, peak = taken([part.format(**places) for part in ROWS[row].split()])
            print(
                f"{row:8} {seconds:7.0f} s of a processor, peak {peak / 2**30:5.2f} GiB, {peak / size:5.2f} of the checkpoint", flush=True
            )
            places["out"].unlink(missing_ok=True)


if __name__ == "__main__":
    main()
