"""Intruder dimensions: large singular directions of an adapted weight that the base weight does not have.

Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv 2410.21228): they come with LoRA, hardly with
full fine-tuning, and go together with forgetting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sdlora.analysis import THRESHOLD, TOP
from sdlora.analysis.blocks import figure_of
from sdlora.analysis.spectrum import Directions, Spectra, directions
from sdlora.errors import WeightsError
from sdlora.lora.change import Change
from sdlora.lora.checkpoints import Checkpoint
from sdlora.lora.formats import LoraFile
from sdlora.lora.merge import require_fit


@dataclass(frozen=True)
class Layer:
    """One layer of a LoRA beside the base weight that it changes."""

    name: str  # readable
    base: Tensor  # (O, ...), as the checkpoint has it
    change: Change
    directions: Directions

    @property
    def similarities(self) -> Tensor:
        """(k,) in 0..1: the largest |cosine| of each direction with any left singular vector of the base."""
        return self.directions.cosines.amax(dim=1)

    def intruders(self, threshold: float = THRESHOLD) -> Tensor:
        """(k,) bool: which directions are."""
        return self.similarities < threshold

    def count(self, threshold: float = THRESHOLD) -> int:
        return int(self.intruders(threshold).sum())


def layers(file: LoraFile, checkpoint: Checkpoint, spectra: Spectra, top: int = TOP) -> Iterator[Layer]:
    """Every layer of which the file changes a matrix, one at a time. Raises WeightsError where the file does not fit the checkpoint."""
    for name in file.layers:
        change = file.change(name)
        require_fit(checkpoint, str(file.path), name, change)
        if has_matrix(change):
            base = checkpoint.read(f"{name}.weight")
            if not base.float().isfinite().all():
                raise WeightsError(f"{checkpoint.path}: {name} holds numbers that are not finite.")
            yield Layer(name, base, change, directions(base, spectra.of(base), change, top))
    spectra.flush()


def has_matrix(change: Change) -> bool:
    """False for what changes biases or norms alone."""
    return change.shape is not None and len(change.shape) > 1


def plot_similarities(layer: Layer, path: Path, most: int, threshold: float) -> None:
    """|cosine| of the largest left singular vectors, the adapted weight's from top to bottom, the base's from left to right: where nothing
    was changed a diagonal. Intruders are marked at the left: dark rows, but for what the base has further to the right."""
    cosines = layer.directions.cosines[:most, :most]
    figure = figure_of(7.5, 6.4)
    axes = figure.subplots()
    image = axes.imshow(cosines.numpy(), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    rows = layer.intruders(threshold)[:most].nonzero().flatten().tolist()
    axes.scatter([-1.5] * len(rows), rows, marker=">", s=18, color="crimson", clip_on=False, linewidths=0)
    axes.set_xlim(-2, cosines.shape[1] - 0.5)
    axes.set_xlabel("left singular vectors of the base, largest first")
    axes.set_ylabel(f"of the adapted weight (red: {len(rows)} intruders of {len(cosines)})")
    axes.set_title(layer.name, fontsize="small")
    figure.colorbar(image, label="|cosine|")
    figure.savefig(path, dpi=120)
