"""That the page's process asks nobody."""

import os
import subprocess
import sys
from pathlib import Path

# A server answers its visitors, whom another process plays; all that goes out from its own is refused.
CODE = """
import asyncio, socket, subprocess, sys
from sdlora_ui import alone

listening = socket.create_server(("127.0.0.1", 0))
port = listening.getsockname()[1]
alone.ask_nobody()

def attempt(how):
    try:
        how()
    except OSError as error:
        assert "asks no other machine" in str(error), error
    else:
        raise AssertionError(how)

def sending(kind, do):
    with socket.socket(type=kind) as one:
        one.settimeout(1)
        do(one)

for host in ("example.org", b"example.org", "127.0.0.1", "localhost"):
    attempt(lambda: socket.getaddrinfo(host, 80))
attempt(lambda: socket.gethostbyname("example.org"))
attempt(lambda: sending(socket.SOCK_STREAM, lambda one: one.connect(("192.0.2.1", 80))))
attempt(lambda: sending(socket.SOCK_STREAM, lambda one: one.connect_ex(("192.0.2.1", 80))))
attempt(lambda: sending(socket.SOCK_DGRAM, lambda one: one.sendto(b"x", ("192.0.2.1", 53))))
attempt(lambda: sending(socket.SOCK_DGRAM, lambda one: one.sendmsg([b"x"], [], 0, ("192.0.2.1", 53))))
if sys.platform != "win32":
    attempt(lambda: socket.create_connection(("127.0.0.1", port), timeout=1))
asyncio.run(asyncio.sleep(0))
visit = f"import socket; print(socket.create_connection(('127.0.0.1', {port}), timeout=10).recv(9).decode(), end='')"
visitor = subprocess.Popen([sys.executable, "-c", visit], stdout=subprocess.PIPE, text=True)
visit, _ = listening.accept()
visit.sendall(b"hello")
visit.close()
assert visitor.communicate(timeout=30)[0] == "hello"
"""


def test_nothing_goes_out_and_visitors_are_answered() -> None:
    paths = os.environ["PYTHONPATH"].split(os.pathsep)  # without what refuses the tests' own
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if Path(path).name != "offline")}
    told = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0, told.stderr
