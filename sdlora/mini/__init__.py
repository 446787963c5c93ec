"""The embedded model: a Stable Diffusion 1.x in miniature, its world, its oracle, its weights, and the script that trained it."""

from pathlib import Path

WEIGHTS_DIR = Path(__file__).parent / "weights"
