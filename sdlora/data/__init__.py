"""Pictures and captions, from a folder to the batches of a step."""
