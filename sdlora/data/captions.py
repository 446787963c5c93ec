"""Caption text: reading it, putting the trigger word in, and choosing what one step sees. What varies is a function of (text, rng).

A caption that offers alternatives has each on a line of its own.
"""

import codecs
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdlora.errors import DataError

PLACEHOLDER = "{trigger}"
SEPARATORS = {"join": " ", "pick": "\n"}  # what `data.caption_lines` puts between the lines of a file
_INNERMOST = re.compile(r"\{([^{}]*)\}")
# Stand for braces that are no wildcard's while others are looked for: Unicode keeps these two out of all text.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


@dataclass(frozen=True)
class CaptionRules:
    """How a caption varies from one showing to the next, and what stands around it."""

    dropout: float = 0.0  # chance of the empty caption
    tag_dropout: float = 0.0  # chance of each tag to be left out
    shuffle: bool = False
    keep_tags: int = 0  # leading tags that are neither moved nor left out
    prefix: str = ""  # around the tags as they stand, the trigger already in them
    suffix: str = ""


def read_caption(path: Path, separator: str = " ") -> str:
    """The file's lines with `separator` between them, "" when there is only white space; raises DataError as `read_text` does."""
    return tidy(read_text(path), separator)


def read_text(path: Path) -> str:
    """Raises DataError for anything but UTF-8 or UTF-16 with its mark."""
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    refusal = DataError(f"{path} is not UTF-8 text; save it again with the encoding UTF-8.")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        raise refusal from None
    if "\0" in text:  # what UTF-16 without its mark, or a binary file, looks like as UTF-8
        raise refusal
    return text


def tidy(text: str, separator: str = " ") -> str:
    """Lines stripped, blank ones left out, the rest with `separator` between them."""
    return separator.join(line.strip() for line in text.splitlines() if line.strip())


def apply_trigger(caption: str, trigger: str, around: str = "") -> str:
    """Each line with the trigger in it once: at {trigger}, where it already stands, or else in front as the first tag.

    around: what will stand before and behind the caption; a trigger in there does for the caption, too.
    """
    if not trigger:
        return caption
    in_place = PLACEHOLDER in around or _names(trigger, around)
    lines = []
    for line in caption.split("\n"):
        if PLACEHOLDER in line:
            lines.append(line.replace(PLACEHOLDER, trigger))
        elif in_place or _names(trigger, line):
            lines.append(line)
        else:
            lines.append(f"{trigger}, {line}" if line else trigger)
    return "\n".join(lines)


def _names(trigger: str, text: str) -> bool:
    # CLIP's tokenizer lower-cases, so case makes no other word. Not \b: a trigger may begin or end with a sign, as in <cat>.
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.IGNORECASE) is not None


# ---------------------------------------------------------------- what one showing sees


def choose_caption(caption: str, rng: random.Random, rules: CaptionRules) -> str:
    """What one sample of one step is told."""
    if rng.random() < rules.dropout:
        return ""
    text = expand_wildcards(pick_line(caption, rng), rng)
    if rules.shuffle or rules.tag_dropout:
        tags = [tag.strip() for tag in text.split(",") if tag.strip()]
        if rules.shuffle:
            tags = shuffle_tags(tags, rng, rules.keep_tags)
        text = ", ".join(drop_tags(tags, rng, rules.keep_tags, rules.tag_dropout))
    before, behind = expand_wildcards(rules.prefix, rng), expand_wildcards(rules.suffix, rng)
    return before + text + behind if text else (before.rstrip(" ,") + behind).strip(" ,")


def fixed_caption(caption: str, rules: CaptionRules) -> str | None:
    """What every sample is told that is not told nothing; None where that varies."""
    written = caption + rules.prefix + rules.suffix
    varies = rules.shuffle or rules.tag_dropout or "\n" in caption or ("{" in written and "|" in written)
    return None if varies else choose_caption(caption, random.Random(0), replace(rules, dropout=0.0))


def pick_line(caption: str, rng: random.Random) -> str:
    return _pick(caption.split("\n"), rng)


def expand_wildcards(text: str, rng: random.Random) -> str:
    """One alternative of each {a|b|c}, all equally likely, also of those inside others; braces without a | stay as they are."""
    while match := _INNERMOST.search(text):
        alternatives = match[1].split("|")
        chosen = _pick(alternatives, rng) if len(alternatives) > 1 else f"{_OPEN}{match[1]}{_CLOSE}"
        text = text[: match.start()] + chosen + text[match.end() :]
    return text.replace(_OPEN, "{").replace(_CLOSE, "}")


def shuffle_tags(tags: Sequence[str], rng: random.Random, keep: int) -> list[str]:
    """The first `keep` tags, then the others in random order."""
    # Sorted by random(), whose sequence Python promises to keep between versions; it does not promise that of shuffle().
    return [*tags[:keep], *sorted(tags[keep:], key=lambda _: rng.random())]


def drop_tags(tags: Sequence[str], rng: random.Random, keep: int, share: float) -> list[str]:
    """The first `keep` tags, then the others, each left out with chance `share`."""
    return [*tags[:keep], *(tag for tag in tags[keep:] if rng.random() >= share)]


def _pick(alternatives: Sequence[str], rng: random.Random) -> str:
    """One of them, all equally likely; draws nothing where there is no choice."""
    return alternatives[int(rng.random() * len(alternatives))] if len(alternatives) > 1 else alternatives[0]
