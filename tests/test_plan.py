"""The plan's table: what it says of layers, rates and shares is what training does."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny import build_model

from sdlora import config as configs
from sdlora.cli import main
from sdlora.errors import DataError
from sdlora.items import find_items, write_pictures
from sdlora.lora import formats
from sdlora.plan import plan


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("plan") / "tiny")


def test_rows_by_hand(base: Path) -> None:
    flags = {
        "model.base": base,
        "rank": 4,
        "alpha": 8,
        "scaling": "rank_stabilised",
        "up_ratio": 16,
        "rate": 1e-3,
        "text_encoder_rate": 1e-4,
    }
    found = plan(configs.load([], [*((k, str(v)) for k, v in flags.items()), ("layer_rates", '{"mid" = 0, "down.0" = 1e-2}')]))
    rows = {row.name: row for row in found.layers}
    assert not any(".mid_block." in name for name in rows)
    query = rows["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]
    assert (query.shape, query.rank, query.scale, query.down_rate) == ((16, 16), 4, 4.0, 1e-2)
    assert query.up_rate == pytest.approx(0.16) and query.parameters == 4 * (16 + 16) + 1
    assert rows["text_encoder.text_model.encoder.layers.0.mlp.fc1"].down_rate == 1e-4
    assert 0 < found.adapted_weights["unet"] < found.adapted_weights["text_encoder"] < 1


def test_a_frozen_down_has_no_rate(base: Path) -> None:
    found = plan(configs.load([], [("model.base", str(base)), ("init", "orthonormal"), ("learned_alpha", "false")]))
    assert {row.down_rate for row in found.layers} == {0.0} and found.alpha_rate == 0


def test_matched_rates_are_shown_as_expected(base: Path) -> None:
    flags = [("model.base", str(base)), ("rank", "4"), ("alpha", "8"), ("matched", "true"), ("rate", "1e-4"), ("up_ratio", "2")]
    row = next(row for row in plan(configs.load([], flags)).layers if row.name.endswith("0.attn1.to_q"))
    # kaiming: rate * sqrt(3 I / R) / (scale * up_ratio) with I = 16, R = 4, scale = 2, but for the draw of down
    assert row.down_rate == pytest.approx(1e-4 * 12**0.5 / 4, rel=0.15) and row.up_rate == pytest.approx(2 * row.down_rate)


def test_the_command_prints_it(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model.base", str(base), "--rank", "2"]) == 0
    told = capsys.readouterr().out
    assert "unet.mid_block.attentions.0.proj_in" in told and "Weights that adapters change" in told
    assert main(["plan", "--rnk", "2"]) == 2
    assert "rank" in capsys.readouterr().err


def test_the_pictures_of_an_epoch_are_written_down(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, size in (("a", (96, 64)), ("b", (32, 32))):
        Image.new("RGB", size).save(folder / f"{name}.png")
    flags = {"data.folder": folder, "missing_caption": "empty", "resolutions": "[32, 64]", "bucket_step": 8, "flip": "true", "repeats": 3}
    chosen = configs.load([], [(name, str(value)) for name, value in flags.items()])
    items, _ = find_items(chosen)
    write_pictures(tmp_path / "plan.json", items)
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert len(rows) == len(items) == 2 * 2 + 2  # `a` at both resolutions, `b` fills the lower only, each with its mirror image
    assert rows[0] == {
        "file": str(folder / "a.png"),
        "size": [96, 64],
        "bucket": [40, 24],
        "resized": [40, 27],
        "crop": [0, 1, 40, 25],
        "mirrored": False,
        "colours": 0,
        "regularises": False,
        "repeats": 3,
    }
    write_pictures(tmp_path / "plan.json", [items[0], items[0]])
    assert [row["repeats"] for row in json.loads((tmp_path / "plan.json").read_text())] == [6]


def test_random_crops_are_items_of_their_own(tmp_path: Path) -> None:
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    flags = {"data.folder": tmp_path, "missing_caption": "empty", "resolution": 32, "bucket_step": 8, "crop": "random"}
    items, _ = find_items(configs.load([], [(name, str(value)) for name, value in flags.items()]))
    assert len(items) == 4 and len({item.placed.crop for item in items}) > 1
    again, _ = find_items(configs.load([], [(name, str(value)) for name, value in (flags | {"seed": 9}).items()]))
    assert items == again


def test_what_is_too_small_for_any_bucket_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (96, 7)).save(tmp_path / "thin.png")
    flags = {"data.folder": tmp_path, "missing_caption": "empty", "resolution": 32, "bucket_step": 8, "upscale": "false"}
    with pytest.raises(DataError, match=r"thin\.png.*96x7"):
        find_items(configs.load([], [(name, str(value)) for name, value in flags.items()]))


def test_alphas_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from sdlora.lora.change import Change, Factors

    path = tmp_path / "a.safetensors"
    factors = {f"unet.a.{n}": Change(Factors(torch.ones(2, 3), torch.ones(4, 2), 8.0)) for n in range(3)}
    formats.save(path, factors, 8.0, {formats.LEARNED_ALPHAS: json.dumps({f"lora_unet_a_{n}": 8.0 + n for n in range(3)})})
    assert main(["alphas", str(path)]) == 0
    told = capsys.readouterr().out
    assert "3 layers: alpha 8 to 10, median 9" in told
    assert told.index("10  unet.a.2") < told.index("Changed least")
    formats.save(path, factors, 8.0, {})
    assert main(["alphas", str(path)]) == 0
    assert "not learned" in capsys.readouterr().out
