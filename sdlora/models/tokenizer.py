"""CLIP's tokenizer (Radford et al. 2021), which single files do not bring along."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path

from transformers import CLIPTokenizer

from sdlora.models.local import local_path

# Or text is split where the padding stands in it, which is "!" for OpenCLIP's encoders: but "cat!" ends with another token, 256, than the
# "!" that pads, 0, and "!!!" is one of its own.
AS_WRITTEN = {"split_special_tokens": True}
MERGES = Path(__file__).parent / "configs" / "clip_merges.txt.gz"


def tokenizer_of(base: str) -> CLIPTokenizer:
    """What a base model splits prompts with: its own where it is a folder, else CLIP's."""
    folder = local_path(base) / "tokenizer"
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True, **AS_WRITTEN) if folder.is_dir() else clip_tokenizer()


@cache
def clip_merges() -> list[str]:
    return gzip.decompress(MERGES.read_bytes()).decode().splitlines()


def clip_tokenizer(pad_token: str | None = None) -> CLIPTokenizer:
    """The same in every family but for its padding; by default the end of the text pads it."""
    byte_values = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    # Bytes that are no visible sign stand behind the others, as signs from 256 on: GPT-2's reversible bytes (Radford et al. 2019).
    letters = [chr(value) for value in byte_values] + [chr(256 + n) for n in range(256 - len(byte_values))]
    merges = clip_merges()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    pairs = [tuple(merge.split()) for merge in merges]
    options = {} if pad_token is None else {"pad_token": pad_token}
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77, **AS_WRITTEN, **options)
