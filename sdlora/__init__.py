"""sdlora: a Stable Diffusion LoRA trainer that does not break the model it trains on."""

__version__ = "0.3.0"
