"""What it takes to find the intruder dimensions of a LoRA of a whole model of full size, with random numbers in both.

    python tests/benchmarks/intruders.py                  # SD 1.5, rank 16; some 10 minutes of one core, 4 GB of disk
    python tests/benchmarks/intruders.py --family sdxl

Every matrix of UNet and text encoders is adapted, convolutions among them. The first row computes the base's spectra, which stay in the
cache; the second finds them there, as every further LoRA of that base does.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from file_tools import PREFIXES, taken, write_checkpoint, write_lora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=PREFIXES, default="sd1")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the large files go (default: the system's folder for such)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        base, lora, cache = Path(name) / "base.safetensors", Path(name) / "lora.safetensors", Path(name) / "cache"
        write_checkpoint(base, options.family, torch.float16)
        write_lora(lora, base, options.family, options.rank, seed=0, layers="everything")
        command = [str(word) for word in ("inspect", lora, "--base", base, "--cache", cache)]
        inspect, _ = taken(["inspect", str(lora)])
        for row in ("first look at a base", "further LoRAs of it"):
            seconds, peak = taken(command)
            print(
                f"{options.family}, rank {options.rank}: {row:20} {seconds:6.0f} s of a processor, peak {peak / 2**30:.2f} GiB", flush=True
            )
        held = sum(path.stat().st_size for path in cache.rglob("*.safetensors"))
        print(f"inspect alone: {inspect:.0f} s; the cache holds {held / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
