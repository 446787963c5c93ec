"""The page as a user has it: a real browser, the embedded model, and processes of their own.

Nothing here waits without an end: each wait of the browser has its own, and `within` takes browser, server and runs away from a test that
takes longer than all of them should, so that the test fails and the suite goes on.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from sdlora import config, events
from sdlora import run as runs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("there is no chromium: install it to test the page in a browser", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")
expect = sync_api.expect
expect.set_options(timeout=30_000)

ROOT = Path(__file__).parents[2]
FISH = ROOT / "datasets" / "fish"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
STARTING = 60  # s, of the server and of the browser
LONG = 150_000  # ms: a training process imports its libraries, on a machine that may be busy
LONGEST = 480  # s, of a test
# A run of seconds.
SHORT = {
    "preview.prompts": "a red heart on a pink background",
    "preview.sampling_steps": "2",
    "loss.prior": "0",
    "train.batch_size": "1",
    "lora.rank": "2",
}
PAGES = ("Train", "Runs", "Generate", "Dataset", "Inspect")


@contextmanager
def within(seconds: float, others: set[psutil.Process]) -> Iterator[None]:
    """All that this process started, but the `others`, is killed after so many seconds: whatever waits for it fails then."""

    def end() -> None:
        for child in set(psutil.Process().children()) - others:
            kill(child)

    watch = threading.Timer(seconds, end)
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def kill(process: psutil.Process) -> None:
    """And all that it started, runs among them."""
    with suppress(psutil.NoSuchProcess):
        family = [process, *process.children(recursive=True)]
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(family, timeout=10)


@pytest.fixture(scope="module")
def others() -> set[psutil.Process]:
    """Children that other tests left."""
    return set(psutil.Process().children())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("page")
    shutil.copytree(FISH, place / "fish")
    return place


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[str]:
    """Its address."""
    command = [sys.executable, "-m", "sdlora", "ui", "--port", "0", "--no-browser"]
    log = place / "server.log"  # a file: a pipe that says nothing would be waited for
    with log.open("wb") as told:
        process = psutil.Popen(command, cwd=place, stdin=subprocess.DEVNULL, stdout=told, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + STARTING
        while not (address := re.search(r"http://\S+", log.read_text())):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield address[0]
    finally:
        kill(process)


@pytest.fixture(scope="module")
def browser(others: set[psutil.Process]) -> Iterator[sync_api.Browser]:
    with within(STARTING, others):
        playwright = sync_api.sync_playwright().start()
        try:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS, timeout=1000 * STARTING)
        except sync_api.Error as error:
            playwright.stop()
            pytest.skip(f"{CHROMIUM} does not start here: {error.message.splitlines()[0]}")
    yield browser
    with within(STARTING, others), suppress(sync_api.Error):  # it may have been taken away
        browser.close()
    playwright.stop()


@pytest.fixture
def page(browser: sync_api.Browser, server: str, others: set[psutil.Process]) -> Iterator[sync_api.Page]:
    """A new visitor's; whatever it asks for must come from the page's own server, and nothing may go wrong unseen."""
    with within(LONGEST, others):
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        context.set_default_timeout(LONG)
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


def start(page: sync_api.Page, name: str, texts: dict[str, str], button: str = "#start") -> None:
    page.get_by_label("Name").fill(name)
    set_options(page, SHORT | texts)
    page.locator(button).click()
    expect(page.locator("#status header b")).to_have_text(name, timeout=LONG)


def choose(page: sync_api.Page, dropdown: str, name: str) -> None:
    page.locator(f"{dropdown} input").click()
    page.get_by_role("option", name=name, exact=True).click()
    expect(page.locator(f"{dropdown} input")).to_have_value(name)


def badge(page: sync_api.Page, text: str) -> None:
    expect(page.locator("#status .sd-badge")).to_have_text(text, timeout=LONG)


def step_of(page: sync_api.Page) -> int:
    found = re.search(r"Step ([\d,]+) of", page.locator("#status").inner_text())
    return int(found[1].replace(",", "")) if found else 0


def test_runs_are_started_queued_watched_left_stopped_resumed_and_taken_home(page: sync_api.Page, server: str, place: Path) -> None:
    """In one test, as importing what training needs takes most of the time."""
    start(page, "long", {"train.steps": "5000", "preview.every": "0"})
    start(page, "short", {"train.steps": "6", "preview.every": "3"}, button="#enqueue")
    badge(page, "Not begun")
    start(page, "other", {}, button="#enqueue")
    page.get_by_role("tab", name="Runs").click()
    waiting = page.locator("#runs-queue li")
    expect(waiting).to_have_text(["short", "other"])
    choose(page, "#runs-chosen", "other")
    page.locator("#runs-up").click()
    expect(waiting).to_have_text(["other", "short"])
    page.locator("#runs-out").click()
    expect(waiting).to_have_text(["short"])
    choose(page, "#runs-chosen", "long")
    page.locator("#runs-open").click()
    expect(page.locator("#status header b")).to_have_text("long", timeout=LONG)

    page.wait_for_function("/Step \\d/.test(document.querySelector('#status').innerText)", timeout=LONG)
    page.locator("#sample").click()
    page.locator("#save").click()
    expect(page.locator("#gallery figcaption")).to_have_text([re.compile(r"step \d"), "base model"], timeout=LONG)
    expect(page.locator(".sd-download")).to_contain_text("Download long-step", timeout=LONG)
    page.reload()
    expect(page.locator("#status header b")).to_have_text("long", timeout=LONG)
    expect(page.get_by_label("Name")).to_have_value("other")  # what was typed is there, too
    other = opened(page.context.new_page(), f"{server}?run=short")
    badge(other, "Not begun")  # while another trains
    page.locator("#stop").click()
    badge(page, "Stopped")
    reached = step_of(page)
    assert 0 < reached < 5000
    badge(other, "Training")  # in its turn
    page.locator("#resume").click()

    badge(other, "Finished")
    assert step_of(other) == 6
    assert not (place / "runs/other/events.jsonl").exists()
    for plot in ("Loss", "Learning rate", "Embedding-norm drift", "Learned alphas"):
        expect(other.locator(".sd-plot", has_text=plot).locator("polyline").first).to_be_attached()
    expect(other.locator("#gallery figcaption")).to_have_text(["step 6", "step 3", "base model"])
    other.wait_for_function("[...document.querySelectorAll('#gallery img')].every((one) => one.complete && one.naturalWidth === 64)")
    with other.expect_download() as download:
        other.locator(".sd-download").click()
    assert Path(download.value.path()).read_bytes() == (place / "runs/short/short.safetensors").read_bytes()
    expect(other.locator("#resume")).to_be_disabled()
    other.get_by_role("tab", name="Generate").click()
    other.locator("#prompt textarea").fill("a <b>red</b> heart")
    other.locator("#lora-1 input").fill("runs/short/short.safetensors")
    other.locator("#lora-1 input").press("Enter")
    other.locator("#without input").check()
    other.locator("#draw").click()

    page.wait_for_function(f"Number(/Step ([\\d,]+)/.exec(document.querySelector('#status').innerText)[1]) > {reached}", timeout=LONG)
    page.locator("#stop").click()
    badge(page, "Stopped")
    drawn = other.locator("#pictures .sd-pictures figure:not(.grid) figcaption", has_text="a <b>red</b> heart <lora:short:1>")
    expect(drawn).to_contain_text("Steps: 20", timeout=LONG)
    expect(other.locator("#pictures .grid img")).to_be_visible(timeout=LONG)
    other.locator(".sd-compare input").fill("100")
    assert other.locator(".sd-compare i").evaluate("(of) => of.offsetLeft >= of.parentNode.clientWidth")

    other.get_by_role("tab", name="Inspect").click()
    other.locator("#inspect-file input").fill("runs/short/short.safetensors")
    other.locator("#inspect-file input").press("Enter")
    other.locator("#inspect-look").click()
    expect(other.locator(".sd-report")).to_contain_text("rank 2", timeout=LONG)
    assert other.locator("#inspect-report rect").count() > 100


def test_runs_are_compared_and_deleted(page: sync_api.Page, place: Path) -> None:
    for name, steps in (("one", 6), ("two", 9)):
        run = runs.create(
            config.load(
                [], [("data.folder", str(FISH)), ("output.runs", str(place / "runs")), ("output.name", name), ("steps", str(steps))]
            )
        )
        told = [events.Stepped(step, steps, 1 / step, 1e-4, 0.0, 0.0, 0.1) for step in range(1, steps + 1)]
        for _ in events.record([*told, events.Finished(steps, "x")], run.events):
            pass
    page.get_by_role("tab", name="Runs").click()
    expect(page.locator("#runs-table tbody tr").first).to_contain_text("two")
    page.locator("#runs-several input").click()
    for name in ("two", "one"):
        page.get_by_role("option", name=name, exact=True).click()
    expect(page.locator("#runs-losses polyline")).to_have_count(2)
    expect(page.locator("#runs-differences")).to_contain_text("train.steps")
    page.keyboard.press("Escape")
    page.locator("#runs-delete").click()
    expect(page.locator("#runs-question")).to_contain_text("two")
    page.locator("#runs-yes").click()
    expect(page.locator("#runs-message")).to_contain_text("two is deleted")
    assert not (place / "runs/two").exists() and (place / "runs/one").exists()


def test_a_sweep_is_checked_begun_and_shown(page: sync_api.Page, place: Path) -> None:
    page.get_by_label("Name").fill("grid")
    set_options(page, SHORT)
    page.locator("#sweep > button").click()
    page.locator("#sweep-values textarea").fill("lora.rank=2,0")
    page.locator("#sweep-start").click()
    expect(page.locator("#sweep-error .sd-error")).to_contain_text("lora.rank = 0")
    page.locator("#sweep-values textarea").fill("lora.rank=2,4")
    page.locator("#sweep-start").click()
    expect(page.locator("#sweeps-shown tbody tr")).to_have_count(2, timeout=LONG)
    expect(page.locator("#sweeps-shown tbody tr").first).to_contain_text("running", timeout=LONG)
    page.locator("#sweeps-stop").click()
    expect(page.locator("#sweeps-message")).to_contain_text("It stops after this step")
    expect(page.locator("#sweeps-shown tbody tr").first).to_contain_text("stopped", timeout=LONG)
    assert [path.name for path in sorted((place / "runs/grid-sweep").glob("*-rank-*"))] == ["00-rank-2", "01-rank-4"]
    page.locator("#sweeps-shown tbody a").first.click()
    expect(page.locator("#status header b")).to_have_text("00-rank-2", timeout=LONG)
    badge(page, "Stopped")
    page.get_by_role("tab", name="Runs").click()
    page.locator("#sweeps-delete").click()
    expect(page.locator("#sweeps-question")).to_contain_text("grid-sweep")
    page.locator("#sweeps-yes").click()
    expect(page.locator("#sweeps-message")).to_contain_text("grid-sweep is deleted")
    expect(page.locator("#sweeps-shown")).to_contain_text("No sweep yet")
    assert not (place / "runs/grid-sweep").exists()


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
    with page.expect_response(lambda answer: '"mine"' in (told := answer.request.post_data or "") and '"lora.rank":"9"' in told):
        page.locator("#toml-use").click()
    expect(page.get_by_label("Name")).to_have_value("mine")
    expect(page.locator('[data-option="lora.rank"]')).to_have_value("9")
    page.wait_for_timeout(200)  # from the answer, which the wait above was for, to the browser's store
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
    field.fill("not left yet")
    page.reload()
    page.get_by_role("tab", name="Dataset").click()
    page.locator("#dataset-folder textarea, #dataset-folder input").fill("fish")
    page.locator("#dataset-load").click()
    expect(field).to_have_value("not left yet")
    field.focus()
    field.blur()
    expect(page.locator("figure", has=field).locator("output")).to_have_text("Saved")
    assert (place / "fish/fish-00.txt").read_text() == "not left yet\n"
    page.locator("#dataset-check").click()
    expect(page.locator("#dataset-grid svg .frame")).to_have_count(16, timeout=LONG)
    expect(page.locator("#dataset-report")).to_contain_text("Training would start.")


def test_pages_fit_narrow_and_enlarged_windows_and_look_well(page: sync_api.Page) -> None:
    """Their pictures are for people, in the folder that SDLORA_SCREENSHOTS names."""
    folder = Path(os.environ.get("SDLORA_SCREENSHOTS", ROOT / "screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    for name in PAGES:
        page.set_viewport_size({"width": 1280, "height": 900})
        page.get_by_role("tab", name=name).click()
        if name == "Dataset":
            page.locator("#dataset-load").click()
            expect(page.locator("#dataset-grid figure")).to_have_count(16)
        for width in (1280, 640, 390):  # a desk's, the same enlarged to 200 %, and a phone's
            page.set_viewport_size({"width": width, "height": 900})
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                expect(page.locator("body.dark")).to_have_count(int(scheme == "dark"))
                page.screenshot(path=folder / f"{name.lower()}-{scheme}-{width}.png", full_page=True, animations="disabled")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
