"""What the inspect page says of a file, and draws of it."""

import json
import re
from pathlib import Path
from typing import Any

from sdlora_ui import jobs, loras

MARKUP = "<img src=x>${a}"


def told(tmp_path: Path, **others: Any) -> Path:
    layer = {"name": "unet.mid_block.a", "kinds": ["lora"], "encoding": "lora", "rank": 4, "alpha": 4.0, "scale": 1.0, "norm": 0.5}
    report = {
        "path": "a.safetensors",
        "size": 2**20,
        "family": "sd1",
        "naming": "webui",
        "precision": "fp16",
        "layers": [layer, layer | {"name": "text_encoder.b", "rank": None, "alpha": None}],
        "metadata": {"ss_output_name": MARKUP},
        "about": {"title": MARKUP},
        "tags": [[MARKUP, 3]],
        "readers": [],
        "learned_alphas": {},
        "blocks": {"te": ["text_encoder.b"], "mid": ["unet.mid_block.a"]},
    }
    (tmp_path / "log.txt").write_text("a warning\n" + json.dumps(report | others) + "\n")
    return tmp_path / "log.txt"


def test_a_report_says_what_a_file_is_as_text(tmp_path: Path) -> None:
    shown = loras.report_of(told(tmp_path))
    assert "1.0 MiB, fp16, sd1, webui names" in shown and "<dd>2, rank 4</dd>" in shown
    assert "<img" not in shown and "${" not in shown and shown.count("&lt;img src=x&gt;") == 3
    assert "Every program that was tried reads it rightly." in shown and shown.count("<rect") == 3
    assert "<li>A1111 drops it.</li>" in loras.report_of(told(tmp_path, readers=["a1111 drops it".capitalize()]))


def test_learned_alphas_are_drawn_where_the_file_tells_them(tmp_path: Path) -> None:
    assert "unet.mid_block.a: 4</title>" in loras.report_of(told(tmp_path))
    shown = loras.report_of(told(tmp_path, learned_alphas={"unet.mid_block.a": 7.0}))
    assert "Learned alpha" in shown and "unet.mid_block.a: 7</title>" in shown


def test_bars_stand_in_the_order_of_blocks_to_scale() -> None:
    """Three bars and the gap between two blocks share 1000 units; the ticks are 0, 1 and 2. The text encoder's two are one block's."""
    blocks = {"te.0": ["a"], "te.11": ["b"], "up.1": ["c", "no value"], "unet": ["none at all"]}
    shown = loras.chart("Norms", {"c": 2.0, "a": 1.0, "b": 0.5}, blocks, 0)
    bars = re.findall(r'x="([\d.]+)" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"><title>([^:]*)', shown)
    assert [(float(x), float(y), float(height), name) for x, y, height, name in bars] == [
        (0, 500, 500, "a"),
        (250, 750, 250, "b"),
        (750, 0, 1000, "c"),
    ]
    assert '<span style="left:0.00%;width:50.00%"><b>te</b><i>te</i>' in shown
    assert '<span style="left:75.00%;width:25.00%"><b>up.1</b><i>u1</i>' in shown and shown.count("<b>") == 3
    assert loras.chart("Norms", {}, blocks, 0) == ""


def test_what_a_file_does_to_its_base_is_shown_with_its_picture(tmp_path: Path) -> None:
    job = jobs.Job(tmp_path / "log.txt", "Looking")
    assert loras.effect_of(job, tmp_path / "effect.png") == ""
    job.start(["options"])
    assert job.process is not None and job.process.wait(60) == 0
    assert "sd-log" in loras.effect_of(job, tmp_path / "effect.png") and "<img" not in loras.effect_of(job, tmp_path / "effect.png")
    (tmp_path / "effect.png").write_bytes(b"")
    assert "<img" in loras.effect_of(job, tmp_path / "effect.png")
