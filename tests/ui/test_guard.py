"""Who may talk to the page."""

import base64

import pytest
from sdlora_ui.guard import Guard, check, hosts
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from sdlora.errors import ConfigError

OWN = {"host": "127.0.0.1:7860"}


def page(host: str = "127.0.0.1", auth: str | None = None) -> TestClient:
    return TestClient(Guard(PlainTextResponse("hello"), host=host, auth=auth), base_url="http://127.0.0.1:7860")


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860", "LOCALHOST"])
def test_its_own_names_are_answered(host: str) -> None:
    assert page().get("/", headers={"host": host}).text == "hello"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "192.168.1.5", "[::2]", "[", "", "localhost@evil.example"]
)
def test_a_name_that_was_pointed_here_is_not(host: str) -> None:
    if host == "localhost@evil.example":
        assert not hosts("127.0.0.1")("evil.example")
    told = page().get("/", headers={"host": host})
    assert told.status_code == 400 and "hello" not in told.text


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "http://127.0.0.1:7860.evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_another_site_may_not_post(headers: dict[str, str]) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert page().request(method, "/", headers=OWN | headers).status_code == 403


def test_the_page_itself_may() -> None:
    own = OWN | {"origin": "http://127.0.0.1:7860", "sec-fetch-site": "same-origin"}
    assert page().post("/", headers=own).text == "hello"
    assert page().post("/").text == "hello", "a program that is no browser says nothing of a site"


@pytest.mark.parametrize("address", ["http://example.org/a.png", "HTTPS://example.org", "%68ttp://example.org", "ftp://a", "http:/a"])
def test_the_server_fetches_nothing_for_anybody(address: str) -> None:
    for route in ("/gradio_api/file=", "/gradio_api/proxy=", "/file="):
        assert page().get(route + address, headers=OWN).status_code == 404
    assert page().get("/gradio_api/file=C:\\a.png", headers=OWN).text == "hello", "what is no address is for others to judge"


def test_nothing_is_fetched_from_elsewhere_or_framed() -> None:
    policy = page().get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "http" not in policy


def test_a_password_opens_every_route_and_method() -> None:
    asking = page("0.0.0.0", "anna:öl")
    own = {"host": "192.168.1.5:7860"}

    def told(text: str) -> dict[str, str]:
        return own | {"authorization": "Basic " + base64.b64encode(text.encode()).decode()}

    for method in ("GET", "POST", "HEAD"):
        assert asking.request(method, "/gradio_api/x", headers=own).status_code == 401
        assert asking.request(method, "/gradio_api/x", headers=told("anna:oil")).status_code == 401
        assert asking.request(method, "/gradio_api/x", headers=told("anna:öl")).status_code == 200
    assert asking.get("/", headers=own | {"authorization": "Basic ???"}).status_code == 401
    assert asking.get("/", headers=told("anna:öl") | {"host": "evil.example"}).status_code == 400


def test_others_come_in_with_a_password_alone() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        check(host, None)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", ""):
        with pytest.raises(ConfigError, match="--auth"):
            check(host, None)
        check(host, "a:b")
    for auth in ("", "a", "a:", ":b"):
        with pytest.raises(ConfigError, match="NAME:PASSWORD"):
            check("127.0.0.1", auth)
