"""HTML from text that others wrote: names, prompts, captions, messages and metadata go through `text`."""

from __future__ import annotations

import html
from pathlib import Path
from urllib.parse import quote

# Gradio fills templates with Handlebars and as JavaScript template strings; no text of ours or of others may be taken for code there.
SIGNS = str.maketrans({sign: f"&#{ord(sign)};" for sign in "`${}\\"})


def text(of: object) -> str:
    """Shown as it is, whatever stands in it; control characters become visible."""
    visible = str(of)
    if not visible.isprintable():
        visible = "".join(sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in visible)
    return html.escape(visible).translate(SIGNS)


def file_url(path: Path, *, thumbnail: bool = False) -> str:
    """Where the page's own route serves a file; a new time of change makes a new address, so that browsers may keep what they have."""
    route = "thumbnail" if thumbnail else "file"
    return f"/{route}?path={quote(str(path), safe='')}&changed={path.stat().st_mtime_ns}"


def error(message: str) -> str:
    """One line beside the button that was pressed; nothing for no message."""
    return f'<p class="sd-error" role="alert">{text(message)}</p>' if message else ""


def note(message: str) -> str:
    return f'<p class="sd-note" role="status">{text(message)}</p>' if message else ""


def duration(seconds: float) -> str:
    """ "45 s", "12 min 05 s", "3 h 20 min" """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
