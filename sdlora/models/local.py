"""Where a base model lies on this machine."""

from pathlib import Path

import sdlora.mini


def local_path(base: str) -> Path:
    """Of "mini" the embedded model's folder; anything else is a path already, or a name on the hub, which is none."""
    return sdlora.mini.WEIGHTS_DIR if base == "mini" else Path(base)
