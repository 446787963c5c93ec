"""Refuses and notes every look-up of a name that is not this machine's, and every connection to one, in each process that has this
folder on its PYTHONPATH: Python imports a module of this name before anything else. Nothing can take an audit hook away again."""

import os
import socket
import sys
from typing import Any

LOG = "SDLORA_LOOK_UPS"  # environment: the file that they are written to
HERE = {"", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::", socket.gethostname()}


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):  # else a path
        host = arguments[1][0]
    else:
        return
    name = host.decode() if isinstance(host, bytes) else host or ""
    if name not in HERE:
        with open(os.environ[LOG], "a", encoding="utf-8") as file:
            file.write(f"{event} {name} by {sys.orig_argv!r:.200}\n")
        raise OSError(f"the tests look up nobody: {event} {name}")


sys.addaudithook(refuse)
