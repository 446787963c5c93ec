"""A LoRA file from tensors that come one at a time, with the hashes that programs look for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sdlora.errors import WeightsError
from sdlora.tensors import body_of

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write(
    path: Path | None, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | Callable[[], Mapping[str, str]], precision: str
) -> None:
    """Atomically and durably, all in one precision, holding no more than one tensor in memory; without a path they are only computed and
    checked. `metadata`, or what gives it once all tensors have come.

    Adds `sshs_model_hash` (kohya's: sha256 of all behind the header) and, where there is a modelspec, its name for the same. Raises
    WeightsError, and leaves nothing behind, for a number that the precision cannot hold.
    """
    if path is None:
        for key, tensor in tensors:
            _rounded(key, tensor, precision)
        return
    with body_of(path) as body:
        for key, tensor in tensors:
            body.add(key, _rounded(key, tensor, precision))
        said = dict(metadata() if callable(metadata) else metadata)
        body.metadata = {**said, "sshs_model_hash": body.digest.hexdigest()}
        if "modelspec.sai_model_spec" in said:
            body.metadata["modelspec.hash_sha256"] = f"0x{body.digest.hexdigest()}"


def _rounded(key: str, tensor: Tensor, precision: str) -> Tensor:
    rounded = tensor.to(PRECISIONS[precision])
    if not rounded.isfinite().all():
        what = f"{precision} cannot hold: choose bf16 or fp32" if tensor.isfinite().all() else "are not finite"
        raise WeightsError(f"The file is not written: {key} holds numbers that {what}.")
    return rounded
