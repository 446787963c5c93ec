"""LoRA files with their strengths, as they are written on the command line."""

from pathlib import Path

import pytest

from sdlora.commands.strengths import Wanted, parse
from sdlora.errors import ConfigError


def test_what_stands_behind_the_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("a.safetensors") == Wanted(Path("a.safetensors"))
    assert parse("a.safetensors:0.5") == Wanted(Path("a.safetensors"), 0.5)
    assert parse("a.safetensors:-1,mid=0,te.0-5=0.3") == Wanted(Path("a.safetensors"), -1.0, {"mid": 0.0, "te.0-5": 0.3})
    assert parse("a.safetensors:down.0=2") == Wanted(Path("a.safetensors"), 1.0, {"down.0": 2.0})
    assert parse("C:\\a.safetensors") == Wanted(Path("C:\\a.safetensors"))
    assert parse("C:\\a.safetensors:0.8") == Wanted(Path("C:\\a.safetensors"), 0.8)
    for wrong in ("a.safetensors:strong", "a.safetensors:0.8,mid=", "a.safetensors:"):
        with pytest.raises(ConfigError, match=r"is no strength; write FILE:0\.8"):
            parse(wrong)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:2").touch()
    assert parse("a:2") == Wanted(Path("a:2"))


def test_strengths_of_layers() -> None:
    names = ["unet.conv_in", "unet.mid_block.resnets.0.conv1", "text_encoder.text_model.x", "text_encoder_2.text_model.x"]
    assert list(Wanted(Path("a"), 0.5, {"unet": 0.7, "mid": 0.0, "te": 0.3}).strengths(names).values()) == [0.7, 0.0, 0.3, 0.3]
    assert list(Wanted(Path("a"), 0.5, {"te2": 0.1, "unet.resnet": 2.0}).strengths(names).values()) == [0.5, 2.0, 0.5, 0.1]
    with pytest.raises(ConfigError, match=r"--lora a: 'down\.0' matches no"):
        Wanted(Path("a"), 0.5, {"down.0": 1.0}).strengths(names)
