"""Several processes of one run, as torchrun starts them: each computes its share of a batch, and all take the same step.

Every process holds the whole model, adapter and optimizer, draws the same order of pictures and the same start, and gets the same
gradient, so nothing but gradients is sent while training goes on. The first process alone writes. Alone, all here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from sdlora.errors import TrainingError, first_line

PATIENCE = timedelta(hours=6)  # while the first process encodes many pictures, or draws; that one has died is noticed at once
LONGEST = 8192  # bytes of what tell() tells, which is a path


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, of: int) -> range:
        """Which of a batch's samples are this process's: as many as the others', or one more or less."""
        return range(of * self.rank // self.count, of * (self.rank + 1) // self.count)

    def average(self, parameters: Sequence[Tensor]) -> None:
        """Put the mean over processes in the place of each parameter's gradient; one that no process has a gradient of keeps none."""
        if self.count == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        present = torch.tensor([p.grad is not None for p in parameters], device=_device())
        whole = self._reduced(torch.cat([*(of.flatten().float() for of in gradients), present.float()]), distributed.ReduceOp.SUM)
        *sums, heard = whole.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, found, is_there in zip(parameters, sums, heard.tolist(), strict=True):
            parameter.grad = (found / self.count).view_as(parameter).to(parameter) if is_there else None

    def mean(self, values: Sequence[float]) -> list[float]:
        """Of each value over processes."""
        return self._together(values, distributed.ReduceOp.SUM, 1 / self.count)

    def most(self, value: float) -> float:
        """The largest of the processes' values."""
        return self._together([value], distributed.ReduceOp.MAX)[0]

    def any(self, value: bool) -> bool:
        """Whether it is true in one of the processes: the same answer in all."""
        return self.most(float(value)) > 0

    def wait(self) -> None:
        """Until all others are here, too."""
        self.any(False)

    def tell(self, text: str) -> str:
        """The first process's text, in all of them."""
        if self.count == 1:
            return text
        said = text.encode().ljust(LONGEST, b"\0") if self.is_first else bytes(LONGEST)
        heard = self._reduced(torch.tensor(list(said), dtype=torch.uint8, device=_device()), distributed.ReduceOp.MAX)
        return bytes(heard.tolist()).rstrip(b"\0").decode()

    def _together(self, values: Sequence[float], how: distributed.ReduceOp.RedOpType, times: float = 1.0) -> list[float]:
        if self.count == 1:
            return list(values)
        found: list[float] = (self._reduced(torch.tensor(values, dtype=torch.float64, device=_device()), how) * times).tolist()
        return found

    def _reduced(self, tensor: Tensor, how: distributed.ReduceOp.RedOpType) -> Tensor:
        try:
            distributed.all_reduce(tensor, how)
        except RuntimeError as error:
            raise TrainingError(
                f"Process {self.rank} of {self.count} has lost another one ({first_line(error)[:200]}); `sdlora resume` under "
                "torchrun goes on from the last checkpoint."
            ) from error
        return tensor


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun started with this one, each with a GPU of its own where there are GPUs; ALONE without torchrun."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield Processes(distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()


def _device() -> torch.device:
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
