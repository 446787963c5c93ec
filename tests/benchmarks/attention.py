"""The backward pass of attention (sdlora/models/attention.py) beside PyTorch's kernel, in bf16 on a CPU with AMX.

    python tests/benchmarks/attention.py                # one thread; a minute
    python tests/benchmarks/attention.py --threads 2

Eight heads, of the sizes that SD 1.5 has at 256 and 512 px; both sides in turn, medians of ratios. Times are of processors on one thread,
and by the clock on several. Errors are those of the gradients of query, key and value, of their norm, beside fp32's.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

from spread import spread

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT)]
SHAPES = (  # queries, keys, numbers of a head
    (4096, 4096, 40),
    (4096, 77, 40),
    (1024, 1024, 80),
    (1024, 1024, 40),
    (1024, 77, 40),
    (256, 256, 80),
    (256, 77, 80),
    (64, 77, 160),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    import sdlora.train  # noqa: F401 - first, as for `sdlora train`: it says how PyTorch is to take memory

    # isort: split
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from sdlora.models.attention import BlockwiseAttention
    from sdlora.models.device import return_freed_memory

    return_freed_memory(thoroughly=False)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    seconds = time.process_time if options.threads == 1 else time.perf_counter
    ways = {"PyTorch's": F.scaled_dot_product_attention, "blocks": BlockwiseAttention.apply}
    print("| queries x keys x numbers of a head | PyTorch's, ms | blocks / it | quartiles | errors of PyTorch's | of blocks |")
    print("|---|---|---|---|---|---|")
    for queries, keys, numbers in SHAPES:
        given = [torch.randn(1, count, 8 * numbers, dtype=torch.bfloat16, requires_grad=True) for count in (queries, keys, keys)]
        grad = torch.randn(1, queries, 8 * numbers, dtype=torch.bfloat16)

        def gradients(way: str, tensors: list[Tensor], grad: Tensor = grad) -> tuple[float, tuple[Tensor, ...]]:
            """And the milliseconds that they took."""
            result = ways[way](*(tensor.unflatten(-1, (8, -1)).transpose(1, 2) for tensor in tensors)).transpose(1, 2).flatten(2)
            began = seconds()
            found = torch.autograd.grad(result, tensors, grad)
            return 1000 * (seconds() - began), found

        exact = gradients("PyTorch's", [tensor.detach().float().requires_grad_() for tensor in given], grad.float())[1]
        errors = {
            way: " ".join(
                f"{float((found.float() - wanted).norm() / wanted.norm()):.1e}"
                for found, wanted in zip(gradients(way, given)[1], exact, strict=True)
            )
            for way in ways
        }
        pairs = [tuple(gradients(way, given)[0] for way in ways) for _ in range(options.rounds + 1)][1:]
        ratios = [after / before for before, after in pairs]
        columns = (
            f"{queries} x {keys} x {numbers}",
            f"{median(before for before, _ in pairs):.1f}",
            spread(ratios),
            *errors.values(),
        )
        print("|", " | ".join(columns), "|", flush=True)


if __name__ == "__main__":
    main()
