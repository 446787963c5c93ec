"""Serves the page until Ctrl-C; runs that it started go on."""

from __future__ import annotations

import gc
import inspect
import os
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from typing import TYPE_CHECKING, Any

from sdlora.errors import ConfigError

from . import alone, guard, launch
from .paths import Places

if TYPE_CHECKING:
    from starlette.types import ASGIApp

CLOSING_SECONDS = 1  # that an open page is waited for
UNUSED = frozenset({"pandas"})  # what Gradio imports for components that the page has none of, dear to load


def serve(places: Places, *, host: str, port: int, auth: str | None, browser: bool) -> None:
    """Raises ConfigError for an address that others can reach without a password, or that cannot be had."""
    guard.check(host, auth)
    listening = listen(host, port)
    shown_host = f"[{host}]" if ":" in host else host
    address = f"http://{shown_host}:{listening.getsockname()[1]}/"
    with tempfile.TemporaryDirectory(prefix="sdlora-") as uploads:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads}  # read when gradio is imported
        # Gradio sets its backend round every event, which would import it while the first page waits, and does without where there is none.
        sys.modules["matplotlib"] = None  # type: ignore[assignment]
        import uvicorn

        app = application(places, host, auth)
        launch.keep_working(places.runs)
        alone.ask_nobody()
        print(f"sdlora ui: {address}   (Ctrl-C ends the page; runs go on)", flush=True)
        if browser:
            threading.Timer(1.0, webbrowser.open, [address]).start()
        options = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=CLOSING_SECONDS)
        uvicorn.Server(options).run(sockets=[listening])


def application(places: Places, host: str, auth: str | None) -> ASGIApp:
    """The whole page behind its guard."""
    with quickly():
        return _application(places, host, auth)


def _application(places: Places, host: str, auth: str | None) -> ASGIApp:
    import gradio as gr
    from fastapi import FastAPI

    from . import app, files

    whole = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, routes=[*files.routes(places)])
    gr.mount_gradio_app(
        whole,
        app.build(places),
        path="/",
        theme=app.theme(),
        css_paths=app.STYLE,
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        allowed_paths=[],  # pictures and results have a route of their own, which follows no link out of the roots
        enable_monitoring=False,
        mcp_server=False,
    )
    return guard.Guard(whole, host=host, auth=auth)


@contextmanager
def quickly() -> Iterator[None]:
    """Import gradio inside, and it takes half as long. It would write a file of type hints for each of its components into its own folder,
    at every import; for a class whose source cannot be found it does not. What is UNUSED is loaded when first looked into, if ever. Nor is
    there any garbage to look for yet."""
    real = inspect.getfile

    def getfile(object: Any) -> str:
        if isinstance(object, type) and object.__module__.startswith("gradio."):
            raise OSError("no hints for this one")
        return real(object)

    collects = gc.isenabled()
    gc.disable()
    inspect.getfile = getfile
    sys.meta_path.insert(0, Later)
    try:
        yield
    finally:
        sys.meta_path.remove(Later)
        inspect.getfile = real
        if collects:
            gc.enable()


class Later(MetaPathFinder):
    """Finds what is UNUSED, and puts off its loading."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in UNUSED else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    if os.name == "posix":
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()  # whoever reads the address may come at once, and waits
    except (OSError, OverflowError) as error:
        listening.close()
        raise ConfigError(f"--port {port} of {host} cannot be had ({error}): give another, or 0 for one that is free.") from None
    return listening
