"""The page's own process asks no other machine for anything, whatever a library of its would like to look up or a visitor posts.

Gradio fetches an address that stands in the place of an uploaded file. A hook below all libraries refuses that, and cannot be taken away
again; the processes that the page starts have none, as a training run may fetch its model.
"""

from __future__ import annotations

import sys
from typing import Any

from .guard import is_own

LOOK_UPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
SENDINGS = ("socket.connect", "socket.sendto", "socket.sendmsg")


def ask_nobody() -> None:
    """From now on, until this process ends."""
    sys.addaudithook(refuse)


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Raises OSError. What listens on this machine is refused, too; but Windows has two ends of one process joined that way."""
    if event in LOOK_UPS:
        host = arguments[0]
    elif event in SENDINGS and isinstance(arguments[1], tuple):  # else a path, or an answer on what is connected
        host = arguments[1][0]
    else:
        return
    if not (sys.platform == "win32" and event == "socket.connect" and is_own(host)):
        raise OSError(f"The page asks no other machine for anything, and not for {host!r}.")
