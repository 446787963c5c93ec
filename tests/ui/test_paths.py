"""What the page may touch: text that leads elsewhere is refused, whatever field or route it comes by."""

import os
from pathlib import Path

import pytest
from sdlora_ui.captions import read, write
from sdlora_ui.paths import Places
from sdlora_ui.server import application
from starlette.testclient import TestClient

from sdlora import config
from sdlora.errors import SdloraError

UP = [
    "..",
    "../",
    "../..",
    "../../",
    "../../../../../../../../etc/passwd",
    "a/../../secret.png",
    "./../secret.png",
    "pictures/../../secret.png",
]
ABSOLUTE = [
    "/",
    "/etc/passwd",
    "/etc/shadow",
    "//etc/passwd",
    "///etc/passwd",
    "/proc/self/environ",
    "/proc/self/root/etc/passwd",
    "/dev/zero",
]
WINDOWS = [
    "..\\secret.png",
    "..\\..\\..\\windows\\win.ini",
    "C:\\Windows\\win.ini",
    "C:/Windows/win.ini",
    "c:secret.png",
    "\\\\host\\share\\a.png",
    "//host/share/a.png",
    "\\\\?\\C:\\a.png",
    "\\\\.\\pipe\\a",
    "pictures\\..\\..\\secret.png",
    "a.png::$DATA",
    "a.png:stream",
]
ODD = [
    "~",
    "~root",
    "~/.ssh/id_rsa",
    "file:///etc/passwd",
    "http://example.org/a.png",
    "a\0.png",
    "\0",
    "a\n/etc/passwd",
    "a\u202egnp.exe",
    "\ud800",
]
EMPTY = ["", " ", "\t"]
HIDDEN = [".git/config", ".env", "pictures/.hidden.png", ".ssh/id_rsa"]
LINKS = ["out/secret.png", "out", "out/../secret.png", "linked.png"]
TRAVERSALS = [*UP, *ABSOLUTE, *WINDOWS, *ODD, *EMPTY, *HIDDEN, *LINKS]
# Names like others, which a careless decoder would turn into one of the above: they stay where they are.
ENCODED = [
    "%2e%2e/secret.png",
    "..%2fsecret.png",
    "%2e%2e%2fsecret.png",
    "..%252fsecret.png",
    "..%c0%afsecret.png",
    "....//secret.png",
    "\uff0e\uff0e/secret.png",
    "a/…/secret.png",
]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    (tmp_path / "secret.png").write_bytes(b"treasure")
    root = tmp_path / "root"
    (root / "pictures").mkdir(parents=True)
    (root / "pictures" / "a.png").write_bytes(b"picture")
    (root / "pictures" / ".hidden.png").write_bytes(b"treasure")
    (root / ".env").write_text("treasure")
    (root / "out").symlink_to(tmp_path, target_is_directory=True)
    (root / "linked.png").symlink_to(tmp_path / "secret.png")
    monkeypatch.chdir(root)
    return Places.at(root / "runs", [root])


def test_there_are_enough_of_them() -> None:
    assert len(set(TRAVERSALS + ENCODED)) >= 40


def test_what_lies_below_a_root_is_found(places: Places) -> None:
    root = places.roots[0]
    assert places.resolve("pictures/a.png", "f") == root / "pictures/a.png" == places.resolve(f" {root}/pictures/./a.png ", "f")
    assert places.resolve("runs", "f") == places.runs
    assert places.resolve("pictures/new", "f") == root / "pictures/new", "what is yet to be made"


def test_a_root_may_lie_in_a_hidden_folder_of_another(places: Places) -> None:
    """As the shipped pictures do in the `.venv` of the folder where the page is started."""
    inside = places.roots[0] / ".venv" / "fish"
    inside.mkdir(parents=True)
    both = Places.at(places.runs, [places.roots[0], inside])
    assert both.resolve(".venv/fish/a.png", "field") == inside / "a.png"
    with pytest.raises(SdloraError, match="hidden"):
        both.resolve(".venv/other", "field")


@pytest.mark.parametrize("text", TRAVERSALS)
def test_text_that_leads_elsewhere_is_refused(places: Places, text: str) -> None:
    with pytest.raises(SdloraError):
        places.resolve(text, "field")
    with pytest.raises(SdloraError):
        places.run(text)
    with pytest.raises(SdloraError):
        read(places, text)
    with pytest.raises(SdloraError):
        write(places, text, {"a.png": "changed"}, {"a.png": ""})
    if text.isprintable() and text.strip():
        for name in ("data.folder", "lora.alpha_from", "data.cache", "data.regularisation_folder", "model.base", "model.vae"):
            with pytest.raises(SdloraError):
                places.check(config.load([], [(name, text)]))


@pytest.mark.parametrize("text", ENCODED)
def test_nothing_is_decoded(places: Places, text: str) -> None:
    try:
        found = places.resolve(text, "field")
    except SdloraError as refusal:
        assert text.startswith("."), refusal  # hidden, by its name
    else:
        assert found.is_relative_to(places.roots[0])


def test_a_run_is_named_not_pointed_at(places: Places) -> None:
    for name in ("_cache", "runs/a", "a/b", "/a", ".", "a-sweep/", "a-sweep/..", "../a-sweep/b", "a-sweep/b/c", "a-sweep\\b", "_a-sweep/b"):
        with pytest.raises(SdloraError, match="not the name of a run"):
            places.run(name)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    """The whole page, with one root of its own."""
    root = tmp_path_factory.mktemp("page") / "root"
    root.mkdir()
    (root / "a.png").write_bytes(b"picture")
    (root / "notes.txt").write_text("a text")
    (root / "lora.safetensors").write_bytes(b"lora")
    (root.parent / "secret.png").write_bytes(b"treasure")
    (root / "linked.png").symlink_to(root.parent / "secret.png")
    before = os.getcwd()
    os.chdir(root)
    yield TestClient(application(Places.at(root / "runs", [root]), "127.0.0.1", None), base_url="http://127.0.0.1:7860")
    os.chdir(before)


def test_the_routes_serve_pictures_and_results(page: TestClient) -> None:
    assert page.get("/file", params={"path": "a.png"}).content == b"picture"
    told = page.get("/file", params={"path": "lora.safetensors"})
    assert told.content == b"lora" and "attachment" in told.headers["content-disposition"]
    assert page.get("/file", params={"path": "notes.txt"}).status_code == 404, "neither a picture nor a result"
    assert page.get("/thumbnail", params={"path": "a.png"}).status_code == 415, "no picture inside"


@pytest.mark.parametrize("text", [*(text for text in TRAVERSALS if text != "\ud800"), *ENCODED])
def test_no_route_follows_them(page: TestClient, text: str) -> None:
    for route in ("/file", "/thumbnail"):
        assert page.get(route, params={"path": text}).status_code == 404
    told = page.get(f"/gradio_api/file={text}" if text.isprintable() else "/gradio_api/file=..")
    assert b"treasure" not in told.content and b"root:" not in told.content


def test_gradio_reads_no_file_of_the_roots_by_itself(page: TestClient) -> None:
    """Its own route follows links, so it gets nothing to follow."""
    for name in ("a.png", "linked.png", "notes.txt"):
        assert page.get(f"/gradio_api/file={os.getcwd()}/{name}").status_code in (403, 404)
