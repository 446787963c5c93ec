"""Convolutions as products of matrices (sdlora/models/convolutions.py) beside PyTorch's own: single layers, and the UNet of SD 1.5.

    python tests/benchmarks/convolutions.py                     # bf16; two minutes, 6 GB
    python tests/benchmarks/convolutions.py --precision fp32

Forward and backward pass of a frozen layer or UNet, on random weights and one thread; CPU time, both sides in turn, medians of ratios.
Between two layers a larger tensor is read, so that no weight is met in a cache, as none is in a step.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from spread import spread

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT)]
LAYERS = (  # inputs, outputs, kernel, side of the picture
    (1280, 1280, 3, 4),
    (1280, 1280, 3, 8),
    (2560, 1280, 3, 8),
    (1280, 1280, 3, 16),
    (640, 1280, 3, 16),
    (1280, 1280, 1, 8),
    (640, 640, 1, 32),
    (320, 320, 1, 64),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--pixels", type=int, default=256, help="of the UNet's pictures")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    import sdlora.train  # noqa: F401 - first, as for `sdlora train`: it says how PyTorch is to take memory

    # isort: split
    import torch
    from diffusers import UNet2DConditionModel

    from sdlora.models.convolutions import as_products
    from sdlora.models.device import DTYPES, return_freed_memory

    return_freed_memory(thoroughly=False)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype, between = DTYPES[options.precision], torch.zeros(2**24)
    print("| what | PyTorch's, ms | as products / it | quartiles |\n|---|---|---|---|")

    def compare(name: str, plain: Any, forward: Callable[[Any], Any]) -> None:
        products = copy.deepcopy(plain)
        as_products(products)

        def milliseconds(module: Any) -> float:
            between.add_(1)
            began = time.process_time()
            forward(module).backward()
            return 1000 * (time.process_time() - began)

        pairs = [(milliseconds(plain), milliseconds(products)) for _ in range(options.rounds + 2)][2:]
        ratios = [after / before for before, after in pairs]
        print(f"| {name} | {median(before for before, _ in pairs):.1f} | {spread(ratios)} |", flush=True)

    for inputs, outputs, kernel, side in LAYERS:
        layer = torch.nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2).to(dtype).requires_grad_(False)
        x = torch.randn(1, inputs, side, side, dtype=dtype, requires_grad=True)
        name = f"{inputs} to {outputs}, {kernel} x {kernel}, {side} x {side} px"
        compare(name, layer, lambda module, x=x: module(x).float().square().mean())

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(ROOT / "sdlora" / "models" / "configs" / "sd1" / "unet"))
    unet = unet.to_empty(device="cpu").to(dtype).requires_grad_(False)
    for parameter in unet.parameters():
        parameter.normal_(0, 0.02)
    side = options.pixels // 8
    noisy, embeds = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((1, 4, side, side), (1, 77, 768)))
    timesteps = torch.tensor([500])
    compare(f"UNet, {options.pixels} px", unet, lambda module: module(noisy, timesteps, embeds).sample.float().square().mean())


if __name__ == "__main__":
    main()
