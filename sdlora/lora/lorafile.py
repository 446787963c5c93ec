"""LoRA files of which the tools make another: read and written a layer at a time, whatever they call a layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sdlora.errors import WeightsError
from sdlora.lora import formats
from sdlora.lora.change import Change
from sdlora.lora.formats import LoraFile
from sdlora.lora.tensor_file import write as write_tensors

HASHES = ("sshs_", "modelspec.hash_")


class Changes(Mapping[str, Change]):
    """What a file changes, by readable name; read anew each time that it is asked for."""

    def __init__(self, file: LoraFile):
        self.file = file

    def __getitem__(self, name: str) -> Change:
        return self.file.change(name)

    def __contains__(self, name: object) -> bool:
        return name in self.file.layers

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.layers)

    def __len__(self) -> int:
        return len(self.file.layers)


@contextmanager
def opened(paths: Iterable[Path], *, folded: bool) -> Iterator[list[LoraFile]]:
    """`folded`: every delta must be known without the base model, as DoRA's is not. Raises WeightsError."""
    with ExitStack() as stack:
        files = [stack.enter_context(formats.open_lora(path)) for path in paths]
        for file in files:
            file.refuse_unread()
            if folded and any({"dora_scale", "magnitude"} & roles.keys() for roles in file.layers.values()):
                way = "merge it into a checkpoint, and extract a LoRA from that"
                raise WeightsError(f"{file.path} is a DoRA, whose change depends on the base model: {way}.")
        yield files


def largest_rank(file: LoraFile) -> int:
    """0 where nothing is of low rank."""
    return max((file.shape(name, "down")[0] for name, roles in file.layers.items() if "down" in roles), default=0)


def check_alike(files: Sequence[LoraFile]) -> None:
    """Raises WeightsError where two are for different models, as far as they or their shapes show."""
    first, *others = files
    for other in others:
        if first.family and other.family and first.family != other.family:
            raise WeightsError(f"{first.path} is for {first.family} and {other.path} for {other.family}: they cannot become one file.")
        for name in first.layers.keys() & other.layers.keys():
            one, two = first.change(name).shape, other.change(name).shape
            if one is not None and two is not None and one != two:
                raise WeightsError(f"{first.path} and {other.path} are for different models: {name} has another shape.")


def shared_metadata(files: Sequence[LoraFile]) -> dict[str, str]:
    """What all files say alike, but for the hashes of their bytes and peft's options, which are for its own files."""
    common = set.intersection(*(set(file.metadata.items()) for file in files))
    return {key: value for key, value in sorted(common) if not key.startswith(HASHES) and key != formats.PEFT_CONFIG}


def write(
    path: Path | None,
    layers: Iterable[tuple[str, Change]],
    family: str,
    alpha: float,
    metadata: Callable[[int], Mapping[str, Any]],
) -> set[str]:
    """Write a WebUI file of layers by readable name as they come; without a path they are only computed and checked. `metadata` of the
    largest rank is asked for in the end, and what is no text becomes JSON. Returns the kinds of change in it, see formats.kinds_of.
    Raises WeightsError, OSError."""
    largest, kinds = 0, set[str]()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal largest
        for name, change in layers:
            kinds.update(formats.kinds_of(change))
            largest = max(largest, len(change.factors.down) if change.factors is not None else 0)
            yield from formats.webui_tensors(name, change, family, alpha).items()

    def said() -> dict[str, str]:
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata(largest).items()}

    write_tensors(path, tensors(), said, "fp32")
    return kinds
