"""The page as a user has it: a real browser, the embedded model, and processes of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if not os.environ.get("SDLORA_BROWSER"):
    pytest.skip("set SDLORA_BROWSER=1 to test the page in a browser, which takes minutes", allow_module_level=True)
if CHROMIUM is None:
    pytest.skip("there is no chromium: install it to test the page in a browser", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")
expect = sync_api.expect

FISH = Path(__file__).parents[2] / "datasets" / "fish"
LONG = 180_000  # ms: a training process imports its libraries, on a machine that may be busy
# A run of seconds.
SHORT = {
    "preview.prompts": "a red heart on a pink background",
    "preview.sampling_steps": "2",
    "loss.prior": "0",
    "train.batch_size": "1",
    "lora.rank": "2",
}
PAGES = ("Train", "Runs", "Generate", "Dataset")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("page")
    shutil.copytree(FISH, place / "fish")
    return place


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[str]:
    """Its address."""
    command = [sys.executable, "-m", "sdlora", "ui", "--port", "0", "--no-browser"]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, text=True) as process:
        told = process.stdout.readline()  # type: ignore[union-attr]
        yield re.search(r"http://\S+", told)[0]  # type: ignore[index]
        process.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: sync_api.Browser, server: str) -> Iterator[sync_api.Page]:
    """A new visitor's; whatever it asks for must come from the page's own server, and nothing may go wrong unseen."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    opened(page, server)
    yield page
    context.close()
    assert not [url for url in asked if not url.startswith((server, "data:", "blob:"))]
    assert not wrong


def opened(page: sync_api.Page, address: str) -> sync_api.Page:
    page.goto(address)
    expect(page.locator("#start")).to_be_visible(timeout=LONG)
    return page


def set_options(page: sync_api.Page, texts: dict[str, str]) -> None:
    if not page.locator("#form").is_visible():
        page.locator("#options > button").click()
    for name, text in texts.items():
        page.locator("#form [type=search]").fill(name)
        page.locator(f'[data-option="{name}"]').fill(text)
    page.locator("#form [type=search]").fill("")


def start(page: sync_api.Page, name: str, texts: dict[str, str]) -> None:
    page.get_by_label("Name").fill(name)
    set_options(page, SHORT | texts)
    page.locator("#start").click()
    expect(page.locator("#status header b")).to_have_text(name, timeout=LONG)


def badge(page: sync_api.Page, text: str) -> None:
    expect(page.locator("#status .sd-badge")).to_have_text(text, timeout=LONG)


def step_of(page: sync_api.Page) -> int:
    found = re.search(r"Step ([\d,]+) of", page.locator("#status").inner_text())
    return int(found[1].replace(",", "")) if found else 0


def test_a_run_is_started_watched_and_taken_home(page: sync_api.Page, place: Path) -> None:
    start(page, "first", {"train.steps": "6", "preview.every": "3"})
    badge(page, "Finished")
    assert step_of(page) == 6
    for plot in ("Loss", "Learning rate", "Embedding-norm drift", "Learned alphas"):
        expect(page.locator(".sd-plot", has_text=plot).locator("polyline").first).to_be_attached()
    expect(page.locator("#gallery figcaption")).to_have_text(["step 6", "step 3", "base model"])
    page.wait_for_function("[...document.querySelectorAll('#gallery img')].every((one) => one.complete && one.naturalWidth === 64)")
    with page.expect_download() as download:
        page.locator(".sd-download").click()
    assert Path(download.value.path()).read_bytes() == (place / "runs/first/first.safetensors").read_bytes()
    expect(page.locator("#resume")).to_be_disabled()

    page.get_by_role("tab", name="Generate").click()
    page.locator("#prompt textarea").fill("a <b>red</b> heart")
    page.locator("#lora-1 input").fill("runs/first/first.safetensors")
    page.locator("#lora-1 input").press("Enter")
    page.locator("#draw").click()
    drawn = page.locator("#pictures figcaption", has_text="a <b>red</b> heart <lora:first:1>")
    expect(drawn).to_contain_text("Steps: 20", timeout=LONG)


def test_a_run_outlives_the_page_and_shows_on_others(page: sync_api.Page, server: str, browser: sync_api.Browser, place: Path) -> None:
    start(page, "second", {"train.steps": "5000", "preview.every": "0"})
    page.wait_for_function("/Step \\d/.test(document.querySelector('#status').innerText)", timeout=LONG)
    page.reload()
    expect(page.locator("#status header b")).to_have_text("second", timeout=LONG)
    expect(page.get_by_label("Name")).to_have_value("second")  # what was typed is there, too
    other = browser.new_context().new_page()
    opened(other, server)
    expect(other.locator("#status header b")).to_have_text("second", timeout=LONG)
    other.locator("#stop").click()
    badge(other, "Stopped")
    badge(page, "Stopped")
    reached = step_of(page)
    assert 0 < reached < 5000
    page.locator("#resume").click()
    badge(other, "Training")
    page.wait_for_function(f"Number(/Step ([\\d,]+)/.exec(document.querySelector('#status').innerText)[1]) > {reached}", timeout=LONG)
    page.locator("#stop").click()
    badge(page, "Stopped")
    other.context.close()

    page.get_by_role("tab", name="Runs").click()
    expect(page.locator("#runs-table tbody tr").first).to_contain_text("second")
    page.locator("#runs-several input").click()
    for name in ("second", "first"):
        page.get_by_role("option", name=name, exact=True).click()
    expect(page.locator("#runs-losses polyline")).to_have_count(2)
    expect(page.locator("#runs-differences")).to_contain_text("train.steps")
    page.keyboard.press("Escape")
    page.locator("#runs-delete").click()
    expect(page.locator("#runs-question")).to_contain_text("second")
    page.locator("#runs-yes").click()
    expect(page.locator("#runs-message")).to_contain_text("second is deleted")
    assert not (place / "runs/second").exists() and (place / "runs/first").exists()


def test_a_mistake_is_told_in_one_line_that_names_the_field(page: sync_api.Page, place: Path) -> None:
    before = sorted((place / "runs").glob("*"))
    for name, text, told in (
        ("base", "", "model.base"),
        ("folder", "nowhere", "data.folder"),
        ("folder", "/etc", "data.folder"),
        ("name", "<b>", "output.name"),
    ):
        field = page.locator(f"#{name} input, #{name} textarea")
        kept = field.input_value()
        field.fill(text)
        page.locator("#start").click()
        expect(page.locator("#error .sd-error")).to_contain_text(told)
        field.fill(kept)
    assert sorted((place / "runs").glob("*")) == before


def test_options_are_found_marked_and_kept(page: sync_api.Page) -> None:
    set_options(page, {"lora.rank": "7"})
    expect(page.locator('[data-name="lora.rank"]')).to_have_class(re.compile("changed"))
    page.locator("#form [type=search]").fill("matched full fine-tuning")
    assert page.locator(".sd-option:visible").evaluate_all("(found) => found.map((one) => one.dataset.name)") == ["optimizer.matched"]
    page.locator("#form [type=search]").fill("no such thing")
    expect(page.locator(".sd-none")).to_be_visible()

    page.locator("#config > button").click()
    page.locator("#toml-show").click()
    expect(page.locator("#toml textarea")).to_have_value(re.compile(r"^rank = 7$", re.MULTILINE))
    page.locator("#toml textarea").fill('[lora]\nrank = 9\n[output]\nname = "mine"\n')
    page.locator("#toml-use").click()
    expect(page.get_by_label("Name")).to_have_value("mine")
    expect(page.locator('[data-option="lora.rank"]')).to_have_value("9")
    page.wait_for_timeout(500)  # what is typed is kept a moment later
    page.reload()
    expect(page.get_by_label("Name")).to_have_value("mine")
    page.locator("#options > button").click()
    expect(page.locator('[data-option="lora.rank"]')).to_have_value("9")


def test_captions_are_edited(page: sync_api.Page, place: Path) -> None:
    page.get_by_role("tab", name="Dataset").click()
    page.locator("#dataset-folder textarea, #dataset-folder input").fill("fish")
    page.locator("#dataset-load").click()
    expect(page.locator("#dataset-grid figure")).to_have_count(16)
    field = page.locator('[data-name="fish-00.png"]')
    field.fill("<b>a fish</b> ${x}")
    field.blur()
    expect(page.locator("figure", has=field).locator("output")).to_have_text("Saved")
    assert (place / "fish/fish-00.txt").read_text() == "<b>a fish</b> ${x}\n"
    page.locator("#dataset-tag textarea, #dataset-tag input").fill("photo")
    page.locator("#dataset-first").click()
    expect(page.locator("#dataset-message")).to_contain_text("16 captions changed")
    expect(field).to_have_value("photo, <b>a fish</b> ${x}")
    page.locator("#dataset-undo").click()
    expect(field).to_have_value("<b>a fish</b> ${x}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_narrow_and_enlarged_windows(browser: sync_api.Browser, server: str, scheme: str, tmp_path: Path) -> None:
    """And look well: the pictures are for people, in the folder that SDLORA_SCREENSHOTS names."""
    folder = Path(os.environ.get("SDLORA_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    for width, enlarged in ((1280, 1), (640, 2), (390, 1)):  # 200 % leaves half the width
        context = browser.new_context(viewport={"width": width, "height": 900}, device_scale_factor=enlarged, color_scheme=scheme)
        page = opened(context.new_page(), server)
        for name in PAGES:
            page.get_by_role("tab", name=name).click()
            if name == "Dataset":
                page.locator("#dataset-load").click()
                expect(page.locator("#dataset-grid figure")).to_have_count(16)
            page.wait_for_timeout(1500)
            page.screenshot(path=folder / f"{name.lower()}-{scheme}-{width}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        context.close()
