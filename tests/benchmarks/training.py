"""A training step of ours beside the usual ones, and beside our own with one thing changed: how long it takes, what it holds, and how
long until the first.

    python tests/benchmarks/training.py --model mini --pixels 64 --batch 4        # the embedded model; two minutes
    python tests/benchmarks/training.py --pixels 256                              # SD 1.5 at full size, random weights; 20 GB
    python tests/benchmarks/training.py --pixels 256 --sides "rank 4" "rank 128"  # our own; the first named is what others are held against
    python tests/benchmarks/training.py --device cuda --precision bf16 --pixels 512 --batch 4 --sides ours compiled graphs example floor
    python tests/benchmarks/training.py --device cuda --precision bf16 --model sdxl --pixels 1024 --sides "low vram" ours example floor

LoRAs of rank 16 on attention and feed-forward layers of the UNet. Each side runs in a process of its own and takes a step when it is its
turn, so that all meet the same noise of the machine; printed are medians of the rounds' ratios. On a CPU time is what the process had of
processors, which others on the machine change less than what a clock says; until the first step it is what the clock says.

* example: what example scripts do: peft's layers, AdamW, the picture and its caption encoded anew in each step;
* cached: the same loop with latents and embeddings computed before;
* bare: forward and backward of diffusers' UNet without any adapter, nothing learned;
* floor: as many operations as bare, in square products of matrices: what the processor can do at best. Its time over that of another
  side is what that makes of the processor (model FLOPs utilisation);
* text, text and norms: ours with LoRAs on the text encoder too, without and with the embedding-norm loss;
* compiled, graphs: ours with train.compile, and with what is compiled recorded as CUDA graphs;
* checkpointed, low vram: ours with train.gradient_checkpointing, as in the presets, and with configs/low_vram.toml;
* rank 4, rank 128, batch of 2, batch of 4: ours.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from spread import spread

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # for full_size
RANK = 16
WARMUP = 2  # rounds that allocate
TARGETS = r".*(attn\d\.to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|attentions\.\d\.proj_(in|out))"


# ---------------------------------------------------------------- sides: each yields once a step


def ours(options: argparse.Namespace, folder: Path, presets: tuple[Path, ...] = (), **changes: object) -> Iterator[None]:
    from sdlora import config, events, run
    from sdlora.train import train

    flags = {
        "model.base": options.model,
        "data.folder": folder / "pictures",
        "data.cache": folder / "cache",
        "output.runs": folder / "runs",
        "resolution": options.pixels,
        "bucket_step": 32 if options.model == "mini" else 64,
        "batch_size": options.batch,
        "repeats": 4 * options.batch,  # of few pictures: no batch may be short
        "precision": options.precision,
        "train.device": options.device,
        "train.threads": options.threads,
        "lora.text_encoder": "[]",
        "lora.unet": '["attention+ff"]',
        "rank": RANK,
        "steps": 100_000,
        "checkpoint_every": 0,
        **changes,
    }
    for event in train(run.create(config.load(presets, [(name, str(value)) for name, value in flags.items()]))):
        if isinstance(event, events.Stepped):
            yield


def graphs(options: argparse.Namespace, folder: Path) -> Iterator[None]:
    import torch._inductor.config

    torch._inductor.config.triton.cudagraphs = True
    return ours(options, folder, **COMPILED)


def example(options: argparse.Namespace, folder: Path) -> Iterator[None]:
    return peft_loop(options, folder, cached=False)


def cached(options: argparse.Namespace, folder: Path) -> Iterator[None]:
    return peft_loop(options, folder, cached=True)


def peft_loop(options: argparse.Namespace, folder: Path, cached: bool) -> Iterator[None]:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    from PIL import Image
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    device, dtype, base = options.device, dtype_of(options), base_of(options)
    unet: Any = UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=dtype).to(device).requires_grad_(False)
    vae: Any = AutoencoderKL.from_pretrained(base / "vae", torch_dtype=dtype).to(device).requires_grad_(False)
    encoders: list[tuple[Any, Any]] = []
    # not sdlora.models.sources', whose import would count as theirs
    kinds: dict[str, Any] = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    for part, kind in kinds.items():
        if (base / part).is_dir():
            text = kind.from_pretrained(base / part, torch_dtype=dtype).to(device).requires_grad_(False)
            encoders.append((CLIPTokenizer.from_pretrained(base / part.replace("text_encoder", "tokenizer")), text))
    scheduler = DDPMScheduler.from_pretrained(base / "scheduler")
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    @torch.no_grad()
    def encoded(path: Path) -> tuple[Any, ...]:
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].to(device, dtype) / 127.5 - 1
        caption, said = path.with_suffix(".txt").read_text(), []
        for tokenizer, text in encoders:
            tokens = tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
            said.append(text(tokens, output_hidden_states=len(encoders) > 1))
        latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        if len(encoders) == 1:
            return latents, said[0].last_hidden_state
        return latents, torch.cat([of.hidden_states[-2] for of in said], -1), said[1].text_embeds

    paths = sorted((folder / "pictures").glob("*.png"))
    known = {path: encoded(path) for path in paths} if cached else {}
    number = 0
    while True:
        batch = [paths[(number + k) % len(paths)] for k in range(options.batch)]
        number += options.batch
        seen = zip(*(known[path] if cached else encoded(path) for path in batch), strict=True)
        latents, embeds, *pooled = (torch.cat(of) for of in seen)
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (options.batch,), device=device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            added = added_to(unet, options, *pooled)
            predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, embeds, added_cond_kwargs=added).sample
        loss = F.mse_loss(predicted.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        yield


def added_to(unet: Any, options: argparse.Namespace, pooled: Any = None) -> dict[str, Any] | None:
    """What SDXL's UNet is told beside the prompt: its pooled embedding, and the sizes of the picture."""
    import torch

    if unet.config.addition_embed_type is None:
        return None
    sizes = torch.tensor([[options.pixels, options.pixels, 0, 0, options.pixels, options.pixels]] * options.batch, device=unet.device)
    return {
        "text_embeds": torch.zeros(options.batch, 1280, device=unet.device, dtype=unet.dtype) if pooled is None else pooled,
        "time_ids": sizes,
    }


def bare(options: argparse.Namespace, folder: Path) -> Iterator[None]:
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_pretrained(base_of(options) / "unet", torch_dtype=dtype_of(options))
    return forward_and_backward(unet.to(options.device).requires_grad_(False), options, dtype_of(options))


def forward_and_backward(unet: Any, options: argparse.Namespace, dtype: Any) -> Iterator[None]:
    import torch

    side, device = options.pixels // (4 if options.model == "mini" else 8), unet.device
    while True:
        shapes = ((options.batch, 4, side, side), (options.batch, 77, unet.config.cross_attention_dim))
        latents, embeds = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
        timesteps = torch.full((options.batch,), 500, device=device)
        loss = unet(latents, timesteps, embeds, added_cond_kwargs=added_to(unet, options)).sample.float().square().mean()
        loss.backward()
        yield


def floor(options: argparse.Namespace, folder: Path) -> Iterator[None]:
    import torch
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base_of(options) / "unet")).requires_grad_(False)
        with FlopCounterMode(display=False) as counted:
            next(forward_and_backward(unet, options, torch.float32))
    operations = counted.get_total_flops()
    side = 2048 if operations > 100 * 2048**3 else 256  # a model as small as the embedded one
    left, right = (torch.randn(side, side, device=options.device, dtype=dtype_of(options)) for _ in range(2))
    while True:
        for _ in range(round(operations / (2 * side**3))):
            left @ right
        yield


TEXT = {"lora.text_encoder": '["attention", "feed_forward"]'}
COMPILED = {"train.compile": "true"}
CHANGES: dict[str, dict[str, Any]] = {  # of ours
    "compiled": COMPILED,
    "checkpointed": {"gradient_checkpointing": "true"},
    "low vram": {"presets": (ROOT / "configs" / "low_vram.toml",)},
    "text": TEXT | {"loss.embedding_norm": 0},
    "text and norms": TEXT | {"loss.embedding_norm": 0.1},
    "rank 4": {"rank": 4},
    "rank 128": {"rank": 128},
    "batch of 2": {"batch_size": 2},
    "batch of 4": {"batch_size": 4},
}
Way = Callable[[argparse.Namespace, Path], Iterator[None]]
USUAL: dict[str, Way] = {"ours": ours, "example": example, "cached": cached, "bare": bare, "floor": floor}
SIDES: dict[str, Way] = USUAL | {"graphs": graphs} | {name: partial(ours, **changes) for name, changes in CHANGES.items()}


def dtype_of(options: argparse.Namespace) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]


def base_of(options: argparse.Namespace) -> Path:
    return ROOT / "sdlora" / "mini" / "weights" if options.model == "mini" else Path(options.model)


# ---------------------------------------------------------------- processes


class Side:
    """One way to train, in a process of its own."""

    def __init__(self, name: str, arguments: list[str]):
        began = time.perf_counter()
        command = [sys.executable, __file__, *arguments, "--side", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.step()
        self.until_first = time.perf_counter() - began

    def step(self) -> float:
        """Seconds: of processors on a CPU, by the clock on CUDA."""
        return float(self._asked("step"))

    def peak(self) -> int:
        """Bytes: of the process on a CPU, of what torch holds on CUDA."""
        return int(self._asked("peak"))

    def _asked(self, what: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith("> "):
                return line[2:]
        raise SystemExit(f"a side has ended with code {self.process.wait()}")

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def largest_resident() -> int:
    """Bytes that this process has held. For Linux."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith("VmHWM"))


def serve(options: argparse.Namespace) -> None:
    """In the child: a step for each line."""
    if options.side in ("ours", "graphs", *CHANGES):
        import sdlora.train  # noqa: F401 - first, as for `sdlora train`: it says how PyTorch is to take memory
    import torch

    seconds = time.perf_counter if options.device == "cuda" else time.process_time
    torch.set_num_threads(options.threads)
    steps = SIDES[options.side](options, Path(options.folder))
    for line in sys.stdin:
        if line.strip() == "peak":
            print(">", torch.cuda.max_memory_allocated() if options.device == "cuda" else largest_resident(), flush=True)
        else:
            began = seconds()
            next(steps)
            if options.device == "cuda":
                torch.cuda.synchronize()
            print(">", seconds() - began, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd1", help="'mini', a model folder, or 'sd1' or 'sdxl', which are built for the occasion")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="that count, 2 or more")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(USUAL), metavar="SIDE")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options)
        return
    from full_size import build
    from memory import pictures

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        pictures(folder / "pictures", options.pixels)
        model = str(build(options.model, folder)) if options.model in ("sd1", "sdxl") else options.model
        shared = ["--folder", name, "--model", model]
        for option in ("pixels", "batch", "precision", "device", "threads"):
            shared += [f"--{option}", str(getattr(options, option))]
        Side("ours", shared).end()  # fills the caches: the others have what they need on disk, too
        sides = {side: Side(side, shared) for side in options.sides}
        rounds = []
        for _ in range(options.rounds + WARMUP):
            rounds.append({side: process.step() for side, process in sides.items()})
            print(*(f"{side}: {seconds:.3f} s" for side, seconds in rounds[-1].items()), sep=", ", file=sys.stderr)
        rounds = rounds[WARMUP:]
        first, *_ = options.sides
        held = {side: process.peak() for side, process in sides.items()}
        print(f"| side | s a step | {first} / it | quartiles | peak, GiB | {first} / it | until the first step, s | {first} / it |")
        print("|---|---|---|---|---|---|---|---|")
        for side, process in sides.items():
            ratios = [of[first] / of[side] for of in rounds]
            print(
                f"| {side} | {median(of[side] for of in rounds):.3f} | {spread(ratios)} "
                f"| {held[side] / 2**30:.2f} | {held[first] / held[side]:.2f} "
                f"| {process.until_first:.1f} | {sides[first].until_first / process.until_first:.2f} |",
                flush=True,
            )
        for process in sides.values():
            process.end()


if __name__ == "__main__":
    main()
