"""`--lora FILE:0.8,mid=0,te=0.3`: a LoRA file, its strength, and those of some of its layers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from sdlora.errors import ConfigError

METAVAR = "FILE[:STRENGTH][,LAYERS=STRENGTH]"
HELP = "LoRA file, with its strength (default 1) and those of blocks (down.0, mid, te, up.1-3), groups (attention, unet.resnet) or globs"


@dataclass(frozen=True)
class Wanted:
    path: Path
    strength: float = 1.0
    own: dict[str, float] = field(default_factory=dict)  # by selector, later ones over earlier ones

    def times(self, factor: float) -> Wanted:
        return Wanted(self.path, factor * self.strength, {selector: factor * of for selector, of in self.own.items()})

    def strengths(self, names: Collection[str]) -> dict[str, float]:
        """Of each of these layers, by readable name. Raises ConfigError for a selector that names none."""
        from sdlora.lora.targets import by_layer

        return by_layer(f"--lora {self.path.name}", list(names), dict.fromkeys(names, self.strength), self.own)


def parse(text: str) -> Wanted:
    """A colon that belongs to the path, as a Windows drive's does, is left alone. Raises ConfigError."""
    head, colon, tail = text.rpartition(":")
    if Path(text).exists() or not colon or "/" in tail or "\\" in tail:
        return Wanted(Path(text))
    strength, own = 1.0, {}
    for word in tail.split(","):
        selector, equals, value = word.rpartition("=")
        try:
            if equals:
                own[selector] = float(value)
            else:
                strength = float(value)
        except ValueError:
            raise ConfigError(f"--lora {text}: {word!r} is no strength; write FILE:0.8, or FILE:0.8,mid=0,te=0.3.") from None
    return Wanted(Path(head), strength, own)
