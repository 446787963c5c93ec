"""What the generate page asks for, and how it shows pictures."""

from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sdlora_ui.generate import figure, gallery, last_line, prompt_line

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


def test_a_picture_is_shown_with_its_parameters_as_text(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("parameters", "<b>cat</b> <lora:x:1>\nSteps: 20, Seed: 3")
    Image.new("RGB", (8, 8)).save(tmp_path / "00000.png", pnginfo=info)
    shown = figure(tmp_path / "00000.png")
    assert "&lt;b&gt;cat&lt;/b&gt; &lt;lora:x:1&gt;" in shown and "<b>cat" not in shown and "Steps: 20, Seed: 3" in shown
    (tmp_path / "00001.png").write_bytes((tmp_path / "00000.png").read_bytes()[:10])
    assert gallery(tmp_path, False).count("<figure") == 1, "one is still being written"
    assert "Being drawn" in gallery(tmp_path, True) and "Being drawn" not in gallery(tmp_path, False)
    (tmp_path / "log.txt").write_text("x\nsdlora: No such file.\n\n")
    assert last_line(tmp_path / "log.txt") == "No such file."
