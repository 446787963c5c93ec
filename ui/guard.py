"""Who may talk to the page: its own address alone, no other site's pages, and where it is asked for, who knows the password."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
import secrets
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdlora.errors import ConfigError

READING = ("GET", "HEAD")
FETCHES = re.compile(r"/(file|proxy)=\s*[a-z][a-z+.-]*:/", re.IGNORECASE)  # Gradio's routes that would ask another machine for an address
# Nothing is fetched from elsewhere, and no other page may show this one in a frame. Gradio writes its styles and makes its templates
# at run time, which is what the words 'unsafe' are for.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "connect-src 'self' data: blob:; base-uri 'self'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def check(host: str, auth: str | None) -> None:
    """Raises ConfigError where others could come in unasked."""
    if not is_own(host) and auth is None:
        raise ConfigError(f"--host {host} lets others in: add --auth NAME:PASSWORD.")
    if auth is not None and not all(auth.partition(":")):
        raise ConfigError("--auth takes a name and a password, written NAME:PASSWORD.")


class Guard:
    """ASGI middleware round the whole page, so that no route can be forgotten."""

    def __init__(self, app: ASGIApp, *, host: str, auth: str | None) -> None:
        self.app = app
        self.auth = auth
        self.is_host = hosts(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self.refusal(scope.get("method", "POST"), scope["path"], headers)  # a websocket has no method, and writes
        if refusal is None:
            await self.app(scope, receive, with_headers(send))
        elif scope["type"] == "http":
            code, reason = refusal
            asking = {"www-authenticate": 'Basic realm="sdlora", charset="UTF-8"'} if code == 401 else {}
            await PlainTextResponse(reason, code, asking | HEADERS)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def refusal(self, method: str, path: str, headers: Headers) -> tuple[int, str] | None:
        """Status and reason, None where all is well."""
        host = headers.get("host", "")
        # A site that points its name at this machine (DNS rebinding) still sends that name.
        if not self.is_host(hostname(host)):
            return 400, "This page does not answer to that name."
        if method not in READING:
            origin = headers.get("origin")
            if (origin is not None and urlsplit(origin).netloc != host) or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
                return 403, "Another site's page asked for this."
        if self.auth is not None and not knows(headers.get("authorization", ""), self.auth):
            return 401, "Name and password, please."
        if FETCHES.search(path):
            return 404, "This page asks no other machine for anything."
        return None


def with_headers(send: Send) -> Send:
    async def adding(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
        await send(message)

    return adding


def knows(authorization: str, auth: str) -> bool:
    scheme, _, told = authorization.partition(" ")
    try:
        return scheme.lower() == "basic" and secrets.compare_digest(base64.b64decode(told, validate=True), auth.encode())
    except binascii.Error:
        return False


def hosts(host: str) -> Callable[[str], bool]:
    """Whether a name in a request is the page's. One that listens to others has as many addresses as the machine; no site can have an
    address for its name, so those are all well."""
    if is_own(host):
        return {"localhost", "127.0.0.1", "::1", host}.__contains__
    names = {"localhost", host.lower(), socket.gethostname().lower()}
    return lambda name: name in names or is_address(name)


def hostname(netloc: str) -> str:
    """ "[::1]:80" -> "::1"; empty for what is none."""
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""


def is_own(host: str) -> bool:
    """Whether only this machine can reach the address."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
