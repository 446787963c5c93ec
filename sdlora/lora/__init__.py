"""Low-rank adapters: how they start, where they sit, how they are scaled, regularised and written for other programs."""
