"""What the generate page asks for, and how it shows pictures."""

import signal
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sdlora_ui import jobs
from sdlora_ui.generate import gallery, numbers_of, prompt_line

from sdlora.errors import ConfigError

NUMBERS = (3, 20, 7.5, "64", "")


def test_a_line_of_the_prompt_file() -> None:
    assert prompt_line("a\ncat ", "blurry", *NUMBERS) == "a cat --n blurry --w 64 --d 3 --s 20 --l 7.5"
    assert prompt_line("a -- b, --", "", 0, 1, 0.0, "", "") == "a -- b, -- --d 0 --s 1 --l 0.0"


@pytest.mark.parametrize("text", ["a --d 5", "--n x", "a --s", "", "  ", "# a note"])
def test_text_that_would_be_a_setting_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        prompt_line(text, "", *NUMBERS)


def test_numbers_are_numbers() -> None:
    with pytest.raises(ConfigError, match="Negative prompt"):
        prompt_line("a", "b --d 5", *NUMBERS)
    with pytest.raises(ConfigError, match="Width"):
        prompt_line("a", "", 0, 1, 7.0, "64 --d 5", "")
    with pytest.raises(ConfigError, match="each need a number"):
        prompt_line("a", "", None, 1, 7.0, "", "")


def test_strengths_are_numbers() -> None:
    assert numbers_of("0, 0.5 1") == [0, 0.5, 1] and numbers_of(" ") == []
    with pytest.raises(ConfigError, match="Strengths"):
        numbers_of("0..1")


def save(path: Path, parameters: str) -> None:
    info = PngInfo()
    info.add_text("parameters", parameters)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


def test_a_picture_is_shown_with_its_parameters_as_text(tmp_path: Path) -> None:
    save(tmp_path / "00000.png", "<b>cat</b> <lora:x:1>\nSteps: 20, Seed: 3")
    shown = gallery(tmp_path)
    assert "&lt;b&gt;cat&lt;/b&gt; &lt;lora:x:1&gt;" in shown and "<b>cat" not in shown and "Steps: 20, Seed: 3" in shown
    (tmp_path / "00001.png").write_bytes((tmp_path / "00000.png").read_bytes()[:10])
    (tmp_path / "mine.png").write_bytes((tmp_path / "00000.png").read_bytes())
    assert gallery(tmp_path).count("<figure") == 1, "one is no picture, and one is not ours"


def test_a_picture_is_compared_with_the_base_models_of_the_same(tmp_path: Path) -> None:
    save(tmp_path / "00000.png", "a cat\nSeed: 3")
    save(tmp_path / "00001.png", "a cat\nSeed: 4")
    save(tmp_path / "00002.png", "a cat <lora:x:1>\nSeed: 3")
    save(tmp_path / "00002-grid.png", "a cat <lora:x:1>\nSeed: 3")
    shown = gallery(tmp_path)
    compared, _, rest = shown.partition("</figure>")
    assert "sd-compare" in compared and "00002.png" in compared and "00000.png" in compared and "00001" not in compared
    assert rest.count("<figure") == 4 and rest.count('class="small grid"') == 1
    (tmp_path / "00000.png").unlink()
    assert "sd-compare" not in gallery(tmp_path), "of another seed it says nothing"


def test_a_job_is_followed_to_its_end_or_cancelled(tmp_path: Path) -> None:
    job = jobs.Job(tmp_path / "log" / "log.txt", "Looking")
    assert job.status() == "" and not job.is_busy
    job.start(["inspect", str(tmp_path / "none.safetensors")])
    with pytest.raises(ConfigError, match="still going on"):
        job.start(["options"])
    assert "Looking" in job.status() and job.process is not None
    assert job.process.wait(60) == 2 and "sd-error" in job.status() and "none.safetensors" in job.status() and not job.is_done
    # A shell's background job ignores Ctrl-C, and so would what it starts; the page's server has a handler of its own.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        job.start(["generate", "a cat", "--base", "mini", "--out", str(tmp_path)])  # seconds, so that it surely is at it
    finally:
        signal.signal(signal.SIGINT, before)
    job.cancel()
    assert job.process.wait(60) != 0 and "was cancelled" in job.status()
