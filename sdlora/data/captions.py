"""Caption text: reading a sidecar file, putting the trigger word in, and choosing what one step sees."""

import codecs
import random
import re
from pathlib import Path

from sdlora.errors import DataError

PLACEHOLDER = "{trigger}"


def read_caption(path: Path) -> str:
    """The text on one line, "" when there is only white space; raises DataError for anything but UTF-8 or UTF-16 with its mark."""
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        raise DataError(f"The caption {path} is not UTF-8 text; save it again with the encoding UTF-8.") from None
    if "\0" in text:  # what UTF-16 without its mark, or a binary file, looks like as UTF-8
        raise DataError(f"The caption {path} is not UTF-8 text; save it again with the encoding UTF-8.")
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def apply_trigger(caption: str, trigger: str) -> str:
    """The caption with the trigger in it once: at {trigger}, where it already stands, or else in front as the first tag."""
    if not trigger:
        return caption
    if PLACEHOLDER in caption:
        return caption.replace(PLACEHOLDER, trigger)
    # CLIP's tokenizer lower-cases, so case makes no other word. Not \b: a trigger may begin or end with a sign, as in <cat>.
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def choose_caption(caption: str, rng: random.Random, *, dropout: float, shuffle: bool, keep_tokens: int) -> str:
    """What one sample of one step is told: "" with probability `dropout`, else the tags, those after `keep_tokens` in random order."""
    if rng.random() < dropout:
        return ""
    if not shuffle:
        return caption
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    # Sorted by random(), whose sequence Python promises to keep between versions; it does not promise that of shuffle().
    return ", ".join(tags[:keep_tokens] + sorted(tags[keep_tokens:], key=lambda _: rng.random()))
