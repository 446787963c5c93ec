"""`sdlora ui` where it does not start."""

import socket
from pathlib import Path

import pytest

from sdlora.cli import main


def test_others_are_let_in_with_a_password_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--host", "0.0.0.0"]) == 2
    assert capsys.readouterr().err == "sdlora: --host 0.0.0.0 lets others in: add --auth NAME:PASSWORD.\n"
    assert main(["ui", "--auth", "secret"]) == 2
    assert "written NAME:PASSWORD" in capsys.readouterr().err


def test_a_port_or_root_that_cannot_be_had_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["ui", "--no-browser", "--port", str(port)]) == 2
    assert f"--port {port} of 127.0.0.1 cannot be had" in capsys.readouterr().err
    assert main(["ui", "--roots", str(tmp_path / "nowhere")]) == 2
    assert "--roots: there is no folder" in capsys.readouterr().err
