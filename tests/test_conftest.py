"""The suite's own guard: no process of it asks for another machine."""

import socket
import subprocess
import sys

import pytest
from conftest import LOOK_UPS


def test_look_ups_are_refused_and_noted_here_and_in_children() -> None:
    kept = LOOK_UPS.read_text(encoding="utf-8")
    for call in (lambda: socket.getaddrinfo("example.org", 80), lambda: socket.socket().connect(("192.0.2.1", 9))):
        with pytest.raises(OSError, match="look up nobody"):
            call()
    code = "import socket\ntry:\n    socket.gethostbyname('example.org')\nexcept OSError:\n    pass\nsocket.getaddrinfo('localhost', 80)"
    subprocess.run([sys.executable, "-c", code], check=True)
    told = LOOK_UPS.read_text(encoding="utf-8").removeprefix(kept).splitlines()
    assert [line.split()[:2] for line in told] == [
        ["socket.getaddrinfo", "example.org"],
        ["socket.connect", "192.0.2.1"],
        ["socket.gethostbyname", "example.org"],
    ]
    LOOK_UPS.write_text(kept, encoding="utf-8")
