"""What the cache of latents costs and saves: memory, filling, reading, and data's share of a training step.

    python tests/benchmarks/data_loading.py                        # all; about five minutes on two cores
    python tests/benchmarks/data_loading.py --rows memory read     # some
    python tests/benchmarks/data_loading.py --rows sd15            # models of SD 1.5's size and random weights; 5 GB, minutes on a CPU

Ratios are medians of pairs, one of each kind after the other, so that both meet the same noise of the machine.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent.parent
SIZE = (1536, 1024)  # of the pictures that are filled and read: as a camera's, made smaller
PICTURES = 48
ENTRIES = 100_000

MEMORY = """
import random, sys, time, torch
from pathlib import Path
from sdlora.data.cache import TensorCache
def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024
folder, count = Path(sys.argv[1]), int(sys.argv[2])
keys = [f"{number:064x}" for number in range(count)]
order = random.Random(0).sample(keys, count)
cache = TensorCache(folder, "m")
start, began = held(), time.perf_counter()
assert keys[0] in cache
indexed, opened = held(), time.perf_counter() - began
began = time.perf_counter()
for key in order:
    assert cache.get(key) is not None
print(start, indexed, held(), opened, (time.perf_counter() - began) / count)
"""


def memory(options: argparse.Namespace) -> None:
    """RSS of a process that reads every entry of a cache in random order."""
    import torch

    from sdlora.data.cache import TensorCache
    from sdlora.latents import FLUSH_EVERY

    with tempfile.TemporaryDirectory() as folder:
        writer, tensors = TensorCache(Path(folder), "m"), {"mean": torch.randn(4, 16, 16), "std": torch.rand(4, 16, 16)}
        for number in range(options.entries):
            writer.put(f"{number:064x}", tensors)
            if number % FLUSH_EVERY == FLUSH_EVERY - 1:
                writer.flush()
        writer.flush()
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
        command = [sys.executable, "-c", MEMORY, folder, str(options.entries)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    start, indexed, end, opened, read = map(float, told.split())
    print(f"memory: {options.entries:,} entries, {size:.0f} MB on disk; the process holds {indexed - start:.0f} MB more with the keys read")
    print(f"  and {end - indexed:.0f} MB more when every entry has been read; index {opened:.2f} s, a random read {read * 1e6:.0f} us")


def make_pictures(folder: Path) -> list[Path]:
    """JPEGs that take as long to decode as photographs do: noise on shapes."""
    from PIL import Image, ImageDraw

    paths = []
    for number in range(PICTURES):
        picture = Image.effect_noise(SIZE, 30).convert("RGB")
        draw = ImageDraw.Draw(picture)
        for k in range(20):
            draw.ellipse((60 * k, 40 * k, 60 * k + 300, 40 * k + 200), fill=((k * 37 + number) % 256, k * 11, 255 - k * 9))
        paths.append(folder / f"{number:03d}.jpg")
        picture.save(paths[-1], quality=92)
    return paths


def plain_loop(paths: Sequence[Path], size: tuple[int, int], encode: Callable[[Any], Any]) -> None:
    """What one writes without us: a Dataset that opens, resizes and crops with Pillow, and a DataLoader."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    class Pictures(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> Any:
            with Image.open(paths[index]) as opened:
                picture = ImageOps.fit(opened.convert("RGB"), size, Image.Resampling.LANCZOS)
            return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1

    for pixels in torch.utils.data.DataLoader(Pictures(), batch_size=1):
        encode(pixels)


def fill_and_read(options: argparse.Namespace) -> None:
    """Against the plain loop on the same files: the encoder is cheap, so that what is measured is the loading."""
    import torch

    from sdlora.config import Config
    from sdlora.data.cache import TensorCache
    from sdlora.items import find_items
    from sdlora.latents import Latents

    def encode(model: Any, pixels: Any) -> Any:
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return mean, mean.abs()

    model: Any = argparse.Namespace(device=torch.device("cpu"), vae=torch.nn.Linear(1, 1), vae_fingerprint="none")
    with tempfile.TemporaryDirectory() as folder:
        paths = make_pictures(Path(folder))
        config = Config.model_validate({"data": {"folder": folder, "missing_caption": "empty"}})
        items, _ = find_items(config)
        size = items[0].placed.bucket

        def plain() -> None:
            plain_loop(paths, size, lambda pixels: encode(model, pixels))

        fresh = (Latents(TensorCache(Path(folder) / f"cache-{n}", "none"), model, items, encode) for n in itertools.count())
        kept = Latents(TensorCache(Path(folder) / "kept", "none"), model, items, encode)
        list(kept.fill())
        for name, ours in (("fill", lambda: list(next(fresh).fill())), ("read", lambda: [kept[index] for index in range(len(items))])):
            if name in options.rows:
                pairs = [(seconds(plain), seconds(ours)) for _ in range(options.pairs)]
                ratios = sorted(a / b for a, b in pairs)
                low, _, high = quantiles(ratios, n=4)
                a, b = (len(items) / median(times) for times in zip(*pairs, strict=True))
                verb = "filled" if name == "fill" else "read in an epoch"
                print(f"{name}: {b:.0f} pictures a second {verb}, the plain loop {a:.0f}: ", end="")
                print(f"{median(ratios):.2f} times ({low:.2f} to {high:.2f})")


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def share_on_mini(options: argparse.Namespace) -> None:
    """Data's share of a step on the embedded model, one picture a step and no prior: the cheapest step that there is."""
    for name, cached in (("with the cache", True), ("without, each picture decoded and encoded when it is shown", False)):
        with tempfile.TemporaryDirectory() as folder:
            shares = list(itertools.islice(data_shares(Path(folder), cached), 5, 5 + options.pairs * 3))
        low, middle, high = quantiles(shares, n=4)
        print(f"mini: data takes {middle:.2%} of a step {name} ({low:.2%} to {high:.2%})", flush=True)


def data_shares(folder: Path, cached: bool) -> Iterator[float]:
    from sdlora import config, events, run
    from sdlora.data.cache import TensorCache
    from sdlora.latents import Latents
    from sdlora.train import train

    flags = {"data.folder": str(ROOT / "datasets" / "fish"), "preview.prompts": "[]", "output.runs": str(folder), "steps": "100000"}
    flags |= {"batch_size": "1", "loss.prior": "0", "checkpoint_every": "0", "train.threads": "1"}
    spent = [0.0]
    read = Latents.__getitem__

    def timed(latents: Latents, index: int) -> Any:
        began = time.perf_counter()
        try:
            return read(latents, index)
        finally:
            spent[0] += time.perf_counter() - began

    def forgets(cache: TensorCache, key: str) -> None:
        return None

    nothing: dict[str, Any] = {} if cached else {"get": forgets, "flush": lambda cache: None}
    with mock.patch.object(Latents, "__getitem__", timed), mock.patch.multiple(TensorCache, **nothing) if nothing else mock.MagicMock():
        for event in train(run.create(config.load([ROOT / "configs" / "mini.toml"], list(flags.items())))):
            if isinstance(event, events.Stepped):
                yield spent[0] / event.seconds
                spent[0] = 0.0


def share_on_sd15(options: argparse.Namespace) -> None:
    """Data's share of a step on SD 1.5 at full size, of random weights: reading one picture's latents and its caption's embeddings, or
    decoding and encoding them, beside a forward and a backward pass of the UNet.

    Below 512 x 512 the share is an upper bound: reading costs much the same, and the UNet less.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from sdlora.data import images
    from sdlora.data.buckets import place
    from sdlora.data.cache import TensorCache

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # a CPU without bf16 units takes a minute a step in it
    widths, side, embeds = (320, 640, 1280, 1280), options.pixels // 8, torch.randn(77, 768)
    torch.set_default_dtype(dtype)
    unet: Any = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, block_out_channels=widths).to(device)
    torch.set_default_dtype(torch.float32)
    unet.requires_grad_(False)

    def step() -> None:
        latents, prompt_embeds = (torch.randn(1, *shape, device=device, dtype=dtype) for shape in ((4, side, side), (77, 768)))
        predicted = unet(latents.requires_grad_(), torch.tensor([500], device=device), prompt_embeds.requires_grad_()).sample
        predicted.float().square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    step()
    of_step = median(seconds(step) for _ in range(options.steps))
    with tempfile.TemporaryDirectory() as folder:
        writer = TensorCache(Path(folder), "sd15")
        for number in range(256):
            writer.put(str(number), {"mean": torch.randn(4, side, side), "std": torch.rand(4, side, side), "prompt_embeds": embeds})
            if number % 4 == 3:  # more shards than are kept open: the dearest reads
                writer.flush()
        cache, numbers = TensorCache(Path(folder), "sd15"), itertools.count()
        assert "0" in cache
        read = median(seconds(lambda: cache.get(str(next(numbers) * 37 % 256))) for _ in range(256))
        (path, *_), placed = make_pictures(Path(folder)), place(SIZE, resolution=options.pixels)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae: Any = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **blocks).to(device)
        text: Any = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
        text = text.to(device)

        @torch.no_grad()
        def compute() -> None:
            picture = images.crop_to(images.decode(path, at_least=placed.resized), placed.resized, placed.crop)
            vae.encode(images.to_tensor(picture)[None].to(device)).latent_dist.mean.cpu()
            text(torch.ones(1, 77, dtype=torch.long, device=device)).last_hidden_state.cpu()

        compute()
        computed = median(seconds(compute) for _ in range(options.steps))
    print(f"sd15: a step at {options.pixels} px on {device} takes {of_step:.2f} s; data is", end=" ")
    print(f"{read / (of_step + read):.3%} of it with the cache ({read * 1e3:.2f} ms; the aim: below 2 %)", end=" ")
    print(f"and {computed / (of_step + computed):.1%} without, decoded and encoded when it is shown ({computed:.2f} s)")


def main() -> None:
    rows = {"memory": memory, "fill": fill_and_read, "read": fill_and_read, "mini": share_on_mini, "sd15": share_on_sd15}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=rows, default=list(rows))
    parser.add_argument("--entries", type=int, default=ENTRIES)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="of SD 1.5")
    parser.add_argument("--pixels", type=int, default=256, help="side of the pictures of SD 1.5")
    options = parser.parse_args()
    for measure in dict.fromkeys(rows[row] for row in options.rows):
        measure(options)


if __name__ == "__main__":
    main()
