"""Odd pictures, made on the fly, against the pixels they stand for."""

import colorsys
import contextlib
import io
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms

from sdlora.data.images import (
    _hue_rotation,
    colour,
    crop_to,
    decode,
    decode_mask,
    examine,
    mask_to_tensor,
    read_size,
    to_tensor,
    vary_colour,
)
from sdlora.errors import DataError

Pixels = NDArray[np.uint8]


def pixels_of(picture: Image.Image) -> NDArray[np.int64]:
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(np.int64)


def gradient(width: int = 40, height: int = 24) -> Pixels:
    """Smooth, so that lossy formats keep it, and different in all four corners, so that every turn shows."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return (255 * np.stack([x, y, 0.5 * x * y], axis=-1)).round().astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff"])
def test_lossless_formats_come_out_as_they_went_in(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(gradient()).save(path)
    assert np.array_equal(pixels_of(decode(path)), gradient())


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp", "avif"])
def test_lossy_formats_come_out_close(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(gradient()).save(path, quality=95)
    assert np.abs(pixels_of(decode(path)) - gradient()).mean() < 3


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257, 1000, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    # Nearest integer to value / 257: 128 / 257 = 0.498, 129 / 257 = 0.502, 65406 / 257 = 254.498, 65407 / 257 = 254.502
    expected = [0, 0, 1, 1, 4, 128, 254, 255, 255]
    assert pixels_of(decode(tmp_path / f"a.{suffix}")).tolist() == [[[level] * 3 for level in expected]]


def test_16_bit_grey_with_a_transparent_value(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1000, 65535]], dtype=np.uint16)).save(tmp_path / "a.png", transparency=1000)
    assert pixels_of(decode(tmp_path / "a.png", (10, 20, 30))).tolist() == [[[0, 0, 0], [10, 20, 30], [255, 255, 255]]]


def test_floating_point_grey_runs_from_0_to_1(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.25, 0.5, 1.0]], dtype=np.float32)).save(tmp_path / "a.tif")
    assert pixels_of(decode(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 64, 128, 255]


@pytest.mark.parametrize("value", [255.0, -0.1, float("nan")])
def test_floating_point_values_without_a_known_white_are_refused(tmp_path: Path, value: float) -> None:
    Image.fromarray(np.array([[0.0, value]], dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif .*unclear what is white"):
        decode(tmp_path / "a.tif")


def test_palette_with_one_transparent_colour(tmp_path: Path) -> None:
    picture = Image.new("P", (3, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.putdata([0, 1, 2])
    for suffix in ("png", "gif"):
        path = tmp_path / f"a.{suffix}"
        picture.save(path, transparency=1)
        assert pixels_of(decode(path)).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
        assert pixels_of(decode(path, (9, 8, 7))).tolist() == [[[255, 0, 0], [9, 8, 7], [0, 0, 255]]]


def test_palette_with_graded_transparency(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 0])
    picture.putdata([0, 1])
    picture.save(tmp_path / "a.png", transparency=bytes([51, 255]))  # 51 / 255 = 0.2
    assert pixels_of(decode(tmp_path / "a.png", (0, 100, 0))).tolist() == [[[51, 80, 0], [0, 0, 0]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_hidden_colours_stay_hidden(tmp_path: Path, mode: str) -> None:
    bands = [Image.fromarray(np.array([[200, 200, 200]], dtype=np.uint8)) for _ in mode[:-1]]
    opacity = Image.fromarray(np.array([[0, 102, 255]], dtype=np.uint8))  # 102 / 255 = 0.4
    Image.merge(mode, [*bands, opacity]).save(tmp_path / "a.png")
    assert pixels_of(decode(tmp_path / "a.png", (100, 50, 0))).tolist() == [[[100, 50, 0], [140, 110, 80], [200, 200, 200]]]


def test_one_bit_and_grey(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert pixels_of(decode(tmp_path / "bits.png")).tolist() == [[[255] * 3, [0] * 3]]
    Image.fromarray(np.array([[7, 250]], dtype=np.uint8)).save(tmp_path / "grey.png")
    assert pixels_of(decode(tmp_path / "grey.png")).tolist() == [[[7] * 3, [250] * 3]]


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_is_not_inverted(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    picture = Image.new("CMYK", (32, 16), (255, 0, 0, 0))  # cyan ink
    picture.paste((0, 0, 0, 255), (16, 0, 32, 16))  # black ink
    picture.save(path)
    found = pixels_of(decode(path))
    assert np.abs(found[:, :16] - [0, 255, 255]).max() <= 3
    assert np.abs(found[:, 16:]).max() <= 3


TURNS = {  # upright to stored, after EXIF's own words: at 6 the stored row 0 is the right side and column 0 the top
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = gradient()
    Image.fromarray(np.ascontiguousarray(TURNS[orientation](upright))).save(path, exif=exif, quality=95)
    assert read_size(path) == examine(path) == (40, 24)
    assert np.abs(pixels_of(decode(path)) - upright).mean() < 3


def test_only_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for suffix in ("gif", "webp", "png"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
        assert np.array_equal(pixels_of(decode(tmp_path / f"a.{suffix}")), np.full((8, 8, 3), [255, 0, 0]))


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert np.array_equal(pixels_of(decode(tmp_path / "a.jpg")), gradient())
    Image.fromarray(gradient()).save(tmp_path / "b.eps")
    (tmp_path / "b.eps").rename(tmp_path / "b.png")  # would start Ghostscript
    with pytest.raises(DataError, match=r"b\.png .*no picture in a known format"):
        decode(tmp_path / "b.png")


# ---------------------------------------------------------------- colour profiles


def matrix_profile(gamma: float, swap: bool = False) -> bytes:
    """An ICC profile like sRGB's but with a plain power curve, and red and green swapped if asked; made from sRGB's own tags."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(data[128:132], "big")
    tags = {bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    curve = b"para" + bytes(4) + b"\0\0\0\0" + round(gamma * 65536).to_bytes(4, "big")  # type 0: y = x ** gamma
    for name in (b"rTRC", b"gTRC", b"bTRC"):
        data[tags[name] + 4 : tags[name] + 12] = len(data).to_bytes(4, "big") + len(curve).to_bytes(4, "big")
    data += curve
    if swap:
        red, green = tags[b"rXYZ"] + 4, tags[b"gXYZ"] + 4
        data[red : red + 8], data[green : green + 8] = data[green : green + 8], data[red : red + 8]
    data[0:4] = len(data).to_bytes(4, "big")
    return bytes(data)


def grey_profile(gamma: float) -> bytes:
    """The least that ICC.1 asks of a grey monitor profile: a header, the white point, and a power curve."""
    white = b"XYZ " + bytes(4) + bytes.fromhex("0000f6d6 00010000 0000d32d")  # D50
    curve = b"curv" + bytes(4) + (1).to_bytes(4, "big") + round(gamma * 256).to_bytes(2, "big") + bytes(2)
    start = 128 + 4 + 2 * 12
    table = (2).to_bytes(4, "big")
    for name, at, size in ((b"wtpt", start, len(white)), (b"kTRC", start + len(white), len(curve))):
        table += name + at.to_bytes(4, "big") + size.to_bytes(4, "big")
    body = table + white + curve
    header = (128 + len(body)).to_bytes(4, "big") + bytes(4) + bytes.fromhex("02400000") + b"mntrGRAYXYZ " + bytes(12) + b"acsp"
    return header.ljust(68, b"\0") + bytes.fromhex("0000f6d6 00010000 0000d32d") + bytes(48) + body


def srgb_of(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """IEC 61966-2-1."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_an_embedded_profile_leads_to_srgb(tmp_path: Path) -> None:
    Image.fromarray(gradient()).save(tmp_path / "a.png", icc_profile=matrix_profile(1.8, swap=True))
    expected = 255 * srgb_of((gradient() / 255.0) ** 1.8)[..., [1, 0, 2]]
    difference = np.abs(pixels_of(decode(tmp_path / "a.png")) - expected)
    assert difference.max() <= 2
    assert np.abs(gradient() - expected).max() > 50  # the profile matters


def test_a_grey_profile_applies_to_grey_pictures(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint8)[None]
    Image.fromarray(levels).save(tmp_path / "a.png", icc_profile=grey_profile(1.8))
    expected = 255 * srgb_of((levels / 255.0) ** 1.8)
    difference = np.abs(pixels_of(decode(tmp_path / "a.png")) - expected[..., None])
    assert difference.max() <= 2
    assert np.abs(levels - expected).max() > 10  # the profile matters


def test_transparent_pictures_with_a_profile_are_composited_in_srgb(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (1, 2), (128, 128, 128, 255))
    picture.putpixel((0, 1), (128, 128, 128, 0))
    picture.save(tmp_path / "a.png", icc_profile=matrix_profile(1.0))
    # Linear 128 / 255 = 0.502 is 1.055 * 0.502 ** (1 / 2.4) - 0.055 = 0.7367 in sRGB, 188 of 255
    assert pixels_of(decode(tmp_path / "a.png", (10, 20, 30)))[:, 0].tolist() == [[188, 188, 188], [10, 20, 30]]


def test_an_srgb_profile_changes_nothing(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(gradient()).save(tmp_path / "a.png", icc_profile=profile)
    assert np.abs(pixels_of(decode(tmp_path / "a.png")) - gradient()).max() <= 1


@pytest.mark.parametrize(("mode", "profile"), [("RGB", b"damaged"), ("L", None)])
def test_a_profile_that_does_not_apply_is_ignored_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str, profile: bytes | None
) -> None:
    picture = Image.fromarray(gradient()).convert(mode)
    picture.save(tmp_path / "a.jpg", icc_profile=profile or matrix_profile(1.0), quality=100)
    with caplog.at_level(logging.WARNING):
        found = pixels_of(decode(tmp_path / "a.jpg"))
    assert np.abs(found - pixels_of(picture.convert("RGB"))).mean() < 2
    assert "a.jpg" in caplog.text and "profile" in caplog.text


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif", "avif"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.995])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, suffix: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(buffer.getvalue()[: int(share * len(buffer.getvalue()))])
    with pytest.raises(DataError, match=rf"a\.{suffix} cannot be read: .*; repair or remove it\.$"):
        decode(path)
    assert isinstance(examine(path), str)


@pytest.mark.filterwarnings("ignore")  # Pillow's about broken metadata
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif", "avif"])
def test_damage_anywhere_is_a_data_error_or_harmless(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(gradient()).save(path)
    whole = path.read_bytes()
    step = max(1, len(whole) // 150)
    refused = 0
    for position in range(0, len(whole), step):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        size = examine(path, 100_000)  # any other error would leave it; a broken size shall not cost memory here
        refused += isinstance(size, str)
    assert refused > 0


def test_a_png_is_held_to_its_checksums(tmp_path: Path) -> None:
    path, plain = tmp_path / "a.png", np.full((64, 64, 3), 7, dtype=np.uint8)
    Image.fromarray(plain).save(path)
    whole, silent = path.read_bytes(), 0
    for position in range(whole.index(b"IDAT") + 4, len(whole) - 16):
        for bit in (1, 16, 128):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
            assert isinstance(examine(path), str)
            with contextlib.suppress(DataError):
                silent += not np.array_equal(pixels_of(decode(path)), plain)
    assert silent > 30  # decoding alone would have let these through, with other pixels


def test_reasons_are_said(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.jpg").write_text("<!doctype html><title>403 Forbidden</title>")
    assert examine(tmp_path / "empty.png") == "the file is empty (0 bytes)"
    assert "no picture in a known format" in str(examine(tmp_path / "page.jpg"))
    assert examine(tmp_path / "gone.jpg") == "no such file or directory"
    for name in ("empty.png", "page.jpg", "gone.jpg"):
        with pytest.raises(DataError, match=name):
            decode(tmp_path / name)
        with pytest.raises(DataError, match=name):
            read_size(tmp_path / name)


def test_the_size_is_read_without_the_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    assert read_size(path) == (200, 300)


def test_the_cap_is_read_from_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])  # to decode would be to find that the rest is missing
    assert "200x300 pixels, above data.max_pixels = 59999" in str(examine(path, 59_999))
    assert "truncated" in str(examine(path, 60_000))
    with pytest.raises(DataError, match=r"a\.jpg cannot be read: it has 200x300 pixels"):
        decode(path, max_pixels=59_999)


def test_the_cap_may_lie_above_pillow_s_own(tmp_path: Path) -> None:
    Image.new("1", (20_000, 9_500)).save(tmp_path / "a.png")  # 190 million; Pillow's own refuses 179
    assert read_size(tmp_path / "a.png") == (20_000, 9_500)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    assert examine(tmp_path / "folder.png") == "it is not a regular file"
    with pytest.raises(DataError, match=r"folder\.png cannot be read: it is not a regular file"):
        decode(tmp_path / "folder.png")


def test_only_heic_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
    Image.fromarray(gradient()).save(tmp_path / "a.avif")  # which begins as HEIC does
    assert examine(tmp_path / "a.avif") == (40, 24)


def test_colours_by_name_and_number() -> None:
    assert colour("#0a14ff") == (10, 20, 255) and colour("white") == (255, 255, 255)
    with pytest.raises(ValueError):
        colour("no colour")


# ---------------------------------------------------------------- colour variants


def test_variants_turn_hues_and_keep_grey(tmp_path: Path) -> None:
    colours = np.array([[[200, 60, 60], [60, 200, 60], [60, 60, 200], [0, 0, 0], [255, 255, 255], [90, 90, 90]]], dtype=np.uint8)
    picture = Image.fromarray(colours)
    turns, levels = set(), set()
    for seed in range(200):
        varied = pixels_of(vary_colour(picture, str(seed)))[0]
        assert np.array_equal(varied, pixels_of(vary_colour(picture, str(seed)))[0])
        assert varied[3].tolist() == [0] * 3 and varied[4].tolist() == [255] * 3
        assert np.ptp(varied[5]) <= 1
        hues = [360 * colorsys.rgb_to_hsv(*(pixel / 255))[0] for pixel in varied[:3]]
        turns.add(round((hues[0] + 180) % 360 - 180))
        levels.add(int(varied[5].mean()))
        assert abs(hues[1] - 120) < 30 and abs(hues[2] - 240) < 30
    assert min(turns) < -10 and max(turns) > 10
    # 255 * (90 / 255) ** 1.15 = 77 and ** (1 / 1.15) = 103
    assert 77 <= min(levels) <= 79 and 101 <= max(levels) <= 103


def test_a_turn_of_nothing_changes_nothing_and_one_of_90_degrees_by_hand() -> None:
    assert np.allclose(np.reshape(_hue_rotation(0.0), (3, 4)), np.eye(3, 4))
    # Red: its luminance 0.213 in each channel, and the first column of the sine's matrix.
    assert np.reshape(_hue_rotation(math.pi / 2), (3, 4))[:, 0] == pytest.approx([0.0, 0.356, -0.574])
    assert np.array([0.213, 0.715, 0.072]) @ np.reshape(_hue_rotation(0.2), (3, 4))[:, :3] == pytest.approx([0.213, 0.715, 0.072], abs=1e-3)


# ---------------------------------------------------------------- drafts


def natural(width: int, height: int) -> Pixels:
    """A picture with as much detail at every scale (spectrum 1 / f, as photographs have), and hard edges."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height))) + 1 / width
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) / frequency).real
    levels = 128 + 50 * noise / noise.std()
    levels[height // 3 : height // 2, width // 4 : width // 2] = 255
    return np.stack([levels, levels[:, ::-1], 255 - levels], axis=-1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("target", [(120, 80), (150, 100)])
def test_a_draft_ends_in_the_pixels_of_the_whole(tmp_path: Path, orientation: int, progressive: bool, target: tuple[int, int]) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(TURNS[orientation](natural(1200, 800)))).save(path, quality=95, exif=exif, progressive=progressive)
    whole, draft = decode(path), decode(path, at_least=target)
    assert draft.size == (300, 200)  # a quarter: an eighth would be below twice the target
    reference = pixels_of(crop_to(whole, target, (0, 0, *target)))
    difference = np.abs(pixels_of(crop_to(draft, target, (0, 0, *target))) - reference)
    # As near as Pillow's own short cut, a mean over blocks down to twice the target and then Lanczos: 1.1 levels, 8 at hard edges.
    short_cut = np.abs(pixels_of(whole.resize(target, Image.Resampling.LANCZOS, reducing_gap=2.0)) - reference)
    assert 0.5 < short_cut.mean() < 1.5
    assert difference.mean() <= 1.25 * short_cut.mean() and difference.max() <= 12
    shifted = np.abs(np.roll(reference, 1, axis=1) - reference)
    assert shifted.mean() > 10 * difference.mean()  # the bound would not let a shift of a tenth of a pixel pass
    assert examine(path) == read_size(path) == (1200, 800)


def test_no_draft_where_it_would_fall_short_or_stretch(tmp_path: Path) -> None:
    Image.fromarray(natural(400, 300)).save(tmp_path / "a.jpg")
    assert decode(tmp_path / "a.jpg", at_least=(101, 75)).size == (400, 300)
    assert decode(tmp_path / "a.jpg", at_least=(100, 75)).size == (200, 150)
    assert decode(tmp_path / "a.jpg", at_least=(900, 900)).size == (400, 300)
    Image.fromarray(natural(401, 300)).save(tmp_path / "odd.jpg")
    assert decode(tmp_path / "odd.jpg", at_least=(10, 10)).size == (401, 300)
    Image.fromarray(natural(400, 300)).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png", at_least=(10, 10)).size == (400, 300)


# ---------------------------------------------------------------- to the VAE


def test_a_picture_that_fits_is_cut_not_resampled() -> None:
    picture = Image.fromarray(gradient())
    assert np.array_equal(np.asarray(crop_to(picture, (40, 24), (3, 2, 19, 18))), gradient()[2:18, 3:19])


def test_resizing_averages_what_it_shrinks() -> None:
    checks = np.indices((64, 64)).sum(axis=0) % 2 * 255  # plain subsampling would give all black or all white
    picture = Image.fromarray(np.stack([checks] * 3, axis=-1).astype(np.uint8))
    small = pixels_of(crop_to(picture, (16, 16), (4, 4, 12, 12)))
    assert small.shape == (8, 8, 3)
    assert np.abs(small - 127.5).max() <= 2


def test_tensors_run_from_minus_one_to_one_in_channels_rows_columns() -> None:
    pixels = np.zeros((2, 3, 3), dtype=np.uint8)
    pixels[0, 2] = [255, 51, 0]  # 51 / 127.5 = 0.4
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 2, 3) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor[:, 0, 2].tolist() == pytest.approx([1.0, -0.6, -1.0])
    assert tensor.sum().item() == pytest.approx(-18 + 2.4)
    assert tensor.min() == -1 and tensor.max() == 1


def test_masks_from_brightness_and_from_opacity(tmp_path: Path) -> None:
    Image.new("L", (4, 2), 255).save(tmp_path / "mask.png")
    assert set(decode_mask(tmp_path / "mask.png", alpha=False).getextrema()) == {255}
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 2, 2))
    clear.save(tmp_path / "clear.png")
    small = mask_to_tensor(decode_mask(tmp_path / "clear.png", alpha=True), (1, 4))
    assert small.tolist() == [[[0, 0, 1, 1]]]
    assert mask_to_tensor(decode_mask(tmp_path / "clear.png", alpha=True), (1, 1)).tolist() == [[[pytest.approx(0.5, abs=0.01)]]]
    Image.new("RGB", (4, 2)).save(tmp_path / "opaque.png")
    assert decode_mask(tmp_path / "opaque.png", alpha=True).getextrema() == (255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    clear.save(tmp_path / "turned.png", exif=exif)
    turned = mask_to_tensor(decode_mask(tmp_path / "turned.png", alpha=True), (4, 2))
    assert turned[0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.png"):
        decode_mask(tmp_path / "broken.png", alpha=True)
