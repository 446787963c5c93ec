"""Every odd kind of file that people have: what it decodes to, pixel by pixel, or why it is refused; and the same files damaged."""

from __future__ import annotations

import io
import logging
import random
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from sdlora.data.dataset import find_examples
from sdlora.data.images import decode, examine
from sdlora.errors import DataError

pillow_heif.register_heif_opener()  # to write them; `decode` sees to itself
BACKGROUND = (10, 200, 60)
W, H = 20, 12


def gradient() -> NDArray[np.uint8]:
    """Smooth, so that lossy formats keep it, and different in all four corners."""
    x, y = np.meshgrid(np.linspace(0, 1, W), np.linspace(0, 1, H))
    return (255 * np.stack([x, y, 0.5 * x * y], axis=-1)).round().astype(np.uint8)


RGB = gradient()
GREY = RGB[..., 0]
DEEP = np.random.default_rng(0).integers(0, 65536, (H, W, 3), dtype=np.uint16)  # 16 bits a channel
ALPHA = np.tile(np.linspace(0, 255, H).round().astype(np.uint8)[:, None], (1, W))


def over(pixels: NDArray[Any], opacity: NDArray[Any]) -> NDArray[Any]:
    share = opacity[..., None] / 255
    return share * pixels + (1 - share) * np.array(BACKGROUND)


def grey(levels: NDArray[Any]) -> NDArray[Any]:
    return np.stack([levels] * 3, axis=-1)


# ---------------------------------------------------------------- writers


def pillow(pixels: NDArray[Any] | Image.Image, format: str, mode: str = "", **options: Any) -> bytes:
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(samples: NDArray[Any], depth: int, kind: int, *before: bytes, interlaced: bool = False) -> bytes:
    """A PNG of any depth, by the specification (ISO 15948): `samples` (H, W, channels), `kind` 0 grey, 2 RGB, 3 palette, 4 grey and
    alpha, 6 RGB and alpha; `before` are chunks that precede the pixels."""
    adam7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = b""
    for left, top, right_step, down_step in adam7 if interlaced else [(0, 0, 1, 1)]:
        for row in samples[top::down_step, left::right_step]:
            if row.size and depth == 16:
                rows += b"\0" + row.astype(">u2").tobytes()
            elif row.size:
                bits = np.unpackbits(row.astype(np.uint8).reshape(-1, 1), axis=1)[:, 8 - depth :]
                rows += b"\0" + np.packbits(bits).tobytes()
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, kind, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(before) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(samples: NDArray[Any], bits: int, photometric: int, order: str = "<", extra: int | None = None) -> bytes:
    """An uncompressed TIFF 6.0 of one strip; samples (H, W, channels)."""
    height, width, channels = samples.shape
    data = samples.astype({8: np.uint8, 16: np.dtype(f"{order}u2")}[bits]).tobytes()
    tags = {256: width, 257: height, 259: 1, 262: photometric, 277: channels, 278: height, 279: len(data), 284: 1}
    count = len(tags) + 2 + (extra is not None)
    depths = struct.pack(f"{order}{channels}H", *[bits] * channels)
    body = 8 + 2 + 12 * count + 4
    entries = [(tag, struct.pack(f"{order}HHII", tag, 4, 1, value)) for tag, value in tags.items()]
    if channels == 1:
        entries.append((258, struct.pack(f"{order}HHIHH", 258, 3, 1, bits, 0)))
    elif channels == 2:
        entries.append((258, struct.pack(f"{order}HHIHH", 258, 3, 2, bits, bits)))
    else:
        entries.append((258, struct.pack(f"{order}HHII", 258, 3, channels, body)))
    entries.append((273, struct.pack(f"{order}HHII", 273, 4, 1, body + len(depths))))
    if extra is not None:
        entries.append((338, struct.pack(f"{order}HHIHH", 338, 3, 1, extra, 0)))
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(f"{order}HIH", 42, 8, count) + b"".join(entry for _, entry in sorted(entries))
    return head + struct.pack(f"{order}I", 0) + depths + data


def bmp_from_the_top(pixels: NDArray[np.uint8]) -> bytes:
    """A 24-bit BMP whose height is negative: its first row is the upper one."""
    rows = b"".join(row[:, ::-1].tobytes().ljust((W * 3 + 3) // 4 * 4, b"\0") for row in pixels)
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54 + len(rows), 0, 0, 54, 40, W, -H, 1, 24, 0, len(rows), 0, 0, 0, 0) + rows


def heic(pixels: NDArray[Any], lossless: bool = True, **options: Any) -> bytes:
    """By libheif; without loss where the samples are stored as they are, not as brightness and colour (matrix 0 of ISO 23091-2)."""
    kept = {"quality": -1, "matrix_coefficients": 0} if lossless else {"quality": 95}
    if pixels.dtype == np.uint8:
        return pillow(pixels, "heif", chroma=444, **kept, **options)
    buffer = io.BytesIO()
    written = pillow_heif.from_bytes({3: "RGB;16", 4: "RGBA;16"}[pixels.shape[2]], pixels.shape[1::-1], pixels.tobytes())
    written.save(buffer, chroma=444, **kept, **options)  # in 10 bits
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def palette(transparency: bytes | int | None = None) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Four colours in stripes, and its pixels."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [40, 50, 60]], dtype=np.uint8)
    numbers = np.tile(np.arange(W, dtype=np.uint8) // 5, (H, 1))
    picture = Image.fromarray(numbers).convert("P")
    picture.putdata(numbers.ravel().tolist())
    picture.putpalette(colours.ravel().tolist())
    return picture, colours[numbers]


def stripes_without(number: int) -> NDArray[Any]:
    return over(palette()[1], np.tile(np.where(np.arange(W) // 5 == number, 0, 255), (H, 1)))


def frames(format: str, **options: Any) -> bytes:
    others = [Image.new("RGB", (W, H), colour) for colour in ("red", "blue")]
    return pillow(RGB, format, save_all=True, append_images=others, duration=100, **options)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LEVELS = {bits: np.tile(np.arange(W) % 2**bits, (H, 1)) for bits in (1, 2, 4)}
STRIPES, STRIPE_PIXELS = palette()
PLTE = chunk(b"PLTE", bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 40, 50, 60]))
NUMBERS = np.tile(np.arange(W) // 5, (H, 1))[..., None]
CMYK = np.stack([RGB[..., 0], RGB[..., 1], RGB[..., 2], 0 * GREY], axis=-1)


def scaled(levels: NDArray[Any]) -> NDArray[Any]:
    """16 bits to 8."""
    return levels.astype(np.float64) / 257


def keyed(bits: int, key: int) -> NDArray[Any]:
    """Levels of so many bits as pixels, those equal to `key` transparent."""
    return over(grey(LEVELS[bits] * 255 / (2**bits - 1)), np.where(LEVELS[bits] == key, 0, 255))


@dataclass(frozen=True)
class Kind:
    content: bytes
    pixels: NDArray[Any]  # (H, W, 3)
    within: float = 0.0  # largest difference that a right decoder may show; 1 where levels are rounded, 16 where the format is lossy


def lossless(content: bytes, pixels: NDArray[Any], within: float = 0.0) -> Kind:
    return Kind(content, pixels, within)


def lossy(content: bytes, pixels: NDArray[Any] = RGB, within: float = 16.0) -> Kind:
    return Kind(content, pixels, within)


DEEP_ALPHA = np.concatenate([DEEP, ALPHA[..., None].astype(np.uint16) * 257], axis=-1)
KINDS: dict[str, Kind] = {
    "PNG, RGB": lossless(png(RGB, 8, 2), RGB),
    "PNG, RGB, interlaced": lossless(png(RGB, 8, 2, interlaced=True), RGB),
    "PNG, RGB, 16 bits": lossless(png(DEEP, 16, 2), scaled(DEEP), 1),
    "PNG, RGBA, 16 bits": lossless(png(DEEP_ALPHA, 16, 6), over(scaled(DEEP), ALPHA), 2),
    "PNG, RGBA": lossless(pillow(np.dstack([RGB, ALPHA]), "png"), over(RGB, ALPHA), 1),
    "PNG, RGB, one colour transparent": lossless(
        png(STRIPE_PIXELS, 8, 2, chunk(b"tRNS", struct.pack(">3H", 0, 255, 0))), stripes_without(1)
    ),
    "PNG, RGB, 16 bits, one colour transparent": lossless(
        png(STRIPE_PIXELS.astype(np.uint16) * 256, 16, 2, chunk(b"tRNS", struct.pack(">3H", 0, 65280, 0))), stripes_without(1), 1
    ),
    "PNG, 1 bit": lossless(png(LEVELS[1][..., None], 1, 0), grey(LEVELS[1] * 255)),
    "PNG, 1 bit, black transparent": lossless(png(LEVELS[1][..., None], 1, 0, chunk(b"tRNS", b"\0\0")), keyed(1, 0)),
    "PNG, grey, 2 bits": lossless(png(LEVELS[2][..., None], 2, 0), grey(LEVELS[2] * 85)),
    "PNG, grey, 2 bits, one level transparent": lossless(png(LEVELS[2][..., None], 2, 0, chunk(b"tRNS", b"\0\2")), keyed(2, 2)),
    "PNG, grey, 4 bits, one level transparent": lossless(png(LEVELS[4][..., None], 4, 0, chunk(b"tRNS", b"\0\5")), keyed(4, 5)),
    "PNG, grey": lossless(png(GREY[..., None], 8, 0), grey(GREY)),
    "PNG, grey, 16 bits": lossless(png(DEEP[..., :1], 16, 0), grey(scaled(DEEP[..., 0])), 0.5),
    "PNG, grey, 16 bits, one level transparent": lossless(
        png(LEVELS[2][..., None] * 1000, 16, 0, chunk(b"tRNS", struct.pack(">H", 2000))),
        over(grey(scaled(LEVELS[2] * 1000)), np.where(LEVELS[2] == 2, 0, 255)),
        0.5,
    ),
    "PNG, grey and alpha": lossless(png(np.dstack([GREY, ALPHA]), 8, 4), over(grey(GREY), ALPHA), 1),
    "PNG, grey and alpha, 16 bits": lossless(
        png(np.dstack([DEEP[..., 0], ALPHA.astype(np.uint16) * 257]), 16, 4), over(grey(scaled(DEEP[..., 0])), ALPHA), 2
    ),
    "PNG, palette": lossless(pillow(STRIPES, "png"), STRIPE_PIXELS),
    "PNG, palette of 2 bits": lossless(png(NUMBERS, 2, 3, PLTE), STRIPE_PIXELS),
    "PNG, palette, one colour transparent": lossless(pillow(STRIPES, "png", transparency=2), stripes_without(2)),
    "PNG, palette, grades of transparency": lossless(
        png(NUMBERS, 8, 3, PLTE, chunk(b"tRNS", bytes([0, 51, 255]))),
        over(STRIPE_PIXELS, np.array([0, 51, 255, 255])[NUMBERS[..., 0]]),
        1,
    ),
    "PNG, turned": lossless(pillow(np.ascontiguousarray(np.rot90(RGB)), "png", exif=exif(6)), RGB),
    "PNG, sRGB profile": lossless(pillow(RGB, "png", icc_profile=SRGB), RGB, 1),
    "PNG, animated": lossless(frames("png"), RGB),
    "JPEG": lossy(pillow(RGB, "jpeg", quality=95)),
    "JPEG, colour at half size": lossy(pillow(RGB, "jpeg", quality=95, subsampling="4:2:0")),
    "JPEG, progressive": lossy(pillow(RGB, "jpeg", quality=95, progressive=True)),
    "JPEG, grey": lossy(pillow(GREY, "jpeg", quality=95), grey(GREY)),
    "JPEG, CMYK": lossy(pillow(Image.fromarray(CMYK, "CMYK"), "jpeg", quality=95), 255 - RGB.astype(int)),
    "JPEG, stored as RGB": lossy(pillow(RGB, "jpeg", quality=95, keep_rgb=True)),
    "JPEG, turned": lossy(pillow(np.ascontiguousarray(np.rot90(RGB)), "jpeg", quality=95, exif=exif(6))),
    "JPEG, mirrored": lossy(pillow(np.ascontiguousarray(RGB[:, ::-1]), "jpeg", quality=95, exif=exif(2))),
    "JPEG, two in one": lossy(frames("mpo", quality=95)),
    "JPEG, something behind it": lossy(pillow(RGB, "jpeg", quality=95) + b"a film of two seconds" * 100),
    "JPEG, restart markers": lossy(pillow(RGB, "jpeg", quality=95, restart_marker_blocks=1)),
    "WebP": lossy(pillow(RGB, "webp", quality=95)),
    "WebP, lossless": lossless(pillow(RGB, "webp", lossless=True), RGB),
    "WebP, lossless, alpha": lossless(pillow(np.dstack([RGB, ALPHA]), "webp", lossless=True, exact=True), over(RGB, ALPHA), 1),
    "WebP, alpha": lossy(pillow(np.dstack([RGB, ALPHA]), "webp", quality=95), over(RGB, ALPHA)),
    "WebP, animated": lossless(frames("webp", lossless=True), RGB),
    "WebP, turned": lossless(pillow(np.ascontiguousarray(np.rot90(RGB)), "webp", lossless=True, exif=exif(6)), RGB),
    "GIF": lossless(pillow(STRIPES, "gif"), STRIPE_PIXELS),
    "GIF, not interlaced": lossless(pillow(STRIPES, "gif", interlace=False), STRIPE_PIXELS),
    "GIF, transparent": lossless(pillow(STRIPES, "gif", transparency=3), stripes_without(3)),
    "GIF, animated": lossless(pillow(STRIPES, "gif", save_all=True, append_images=[Image.new("P", (W, H))], duration=100), STRIPE_PIXELS),
    "GIF, grey": lossless(pillow(GREY, "gif"), grey(GREY)),
    "BMP": lossless(pillow(RGB, "bmp"), RGB),
    "BMP, first row on top": lossless(bmp_from_the_top(RGB), RGB),
    "BMP, palette": lossless(pillow(STRIPES, "bmp"), STRIPE_PIXELS),
    "BMP, grey": lossless(pillow(GREY, "bmp"), grey(GREY)),
    "BMP, 1 bit": lossless(pillow(Image.fromarray(LEVELS[1].astype(bool)), "bmp"), grey(LEVELS[1] * 255)),
    **{
        f"TIFF, RGB, {name}": lossless(pillow(RGB, "tiff", compression=name), RGB)
        for name in ("raw", "tiff_lzw", "tiff_deflate", "packbits")
    },
    "TIFF, JPEG inside": lossy(pillow(RGB, "tiff", compression="jpeg", quality=95)),
    "TIFF, big-endian": lossless(tiff(RGB, 8, 2, ">"), RGB),
    "TIFF, of 64 bits": lossless(pillow(RGB, "tiff", big_tiff=True), RGB),
    "TIFF, RGB, 16 bits": lossless(tiff(DEEP, 16, 2), scaled(DEEP), 1),
    "TIFF, RGB, 16 bits, big-endian": lossless(tiff(DEEP, 16, 2, ">"), scaled(DEEP), 1),
    "TIFF, RGBA, 16 bits": lossless(tiff(DEEP_ALPHA, 16, 2, extra=2), over(scaled(DEEP), ALPHA), 2),
    "TIFF, grey, 16 bits": lossless(tiff(DEEP[..., :1], 16, 1), grey(scaled(DEEP[..., 0])), 0.5),
    "TIFF, grey, 16 bits, big-endian": lossless(tiff(DEEP[..., :1], 16, 1, ">"), grey(scaled(DEEP[..., 0])), 0.5),
    "TIFF, grey, 16 bits, white is zero": lossless(tiff(DEEP[..., :1], 16, 0), grey(255 - scaled(DEEP[..., 0])), 0.5),
    "TIFF, grey, white is zero": lossless(tiff(GREY[..., None], 8, 0), grey(255 - GREY)),
    "TIFF, grey and alpha": lossless(tiff(np.dstack([GREY, ALPHA]), 8, 1, extra=2), over(grey(GREY), ALPHA), 1),
    "TIFF, 1 bit, fax": lossless(pillow(Image.fromarray(LEVELS[1].astype(bool)), "tiff", compression="group4"), grey(LEVELS[1] * 255)),
    "TIFF, floating point": lossless(pillow((GREY / 255).astype(np.float32), "tiff"), grey(GREY)),
    "TIFF, palette": lossless(pillow(STRIPES, "tiff"), STRIPE_PIXELS),
    "TIFF, CMYK": lossless(pillow(Image.fromarray(CMYK, "CMYK"), "tiff"), 255 - RGB.astype(int)),
    "TIFF, YCbCr": lossy(pillow(RGB, "tiff", mode="YCbCr", compression="tiff_lzw"), within=3),
    "TIFF, turned": lossless(pillow(np.ascontiguousarray(np.rot90(RGB)), "tiff", exif=exif(6)), RGB),
    "TIFF, pages": lossless(frames("tiff"), RGB),
    "AVIF": lossy(pillow(RGB, "avif", quality=95)),
    "AVIF, alpha": lossy(pillow(np.dstack([RGB, ALPHA]), "avif", quality=95), over(RGB, ALPHA)),
    "AVIF, animated": lossy(frames("avif", quality=95)),
    "AVIF, turned": lossy(pillow(np.ascontiguousarray(np.rot90(RGB)), "avif", quality=95, exif=exif(6))),
    "HEIC": lossless(heic(RGB), RGB),
    "HEIC, lossy": lossy(heic(RGB, lossless=False)),
    "HEIC, colour at half size": lossy(pillow(RGB, "heif", quality=95, chroma=420)),
    "HEIC, alpha": lossless(heic(np.dstack([RGB, ALPHA])), over(RGB, ALPHA), 1),
    "HEIC, 10 bits": lossless(heic(DEEP), scaled(DEEP), 1),
    "HEIC, 10 bits, alpha": lossless(heic(DEEP_ALPHA), over(scaled(DEEP), ALPHA), 2),
    "HEIC, grey": lossless(pillow(GREY, "heif", quality=-1), grey(GREY)),
    "HEIC, turned": lossless(heic(np.ascontiguousarray(np.rot90(RGB)), exif=exif(6).tobytes()), RGB),
    "HEIC, mirrored": lossless(heic(np.ascontiguousarray(RGB[:, ::-1]), exif=exif(2).tobytes()), RGB),
    "HEIC, sRGB profile": lossless(heic(RGB, icc_profile=SRGB), RGB, 1),
    "HEIC, several pictures, as if animated": lossy(frames("heif", quality=95)),
}
ANIMATED = {name for name in KINDS if "animated" in name or "pages" in name}
JPEG = KINDS["JPEG"].content
REFUSED: dict[str, tuple[bytes, str]] = {
    "zero bytes": (b"", r"empty \(0 bytes\)"),
    "one byte": (b"\x89", "no picture in a known format"),
    "a page instead of a picture": (b"<!doctype html><title>403 Forbidden</title>", "no picture in a known format"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no picture in a known format"),
    "PostScript": (pillow(RGB, "eps"), "no picture in a known format"),
    "JPEG 2000": (pillow(RGB, "jpeg2000"), "no picture in a known format"),
    "icons": (pillow(RGB, "ico", sizes=[(8, 8)]), "no picture in a known format"),
    "zeros of the right length": (bytes(len(JPEG)), "no picture in a known format"),
    "HEIC without the package": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", r"HEIC.*pip install 'sdlora\[heif\]'"),
    "TIFF of 32-bit integers": (pillow(GREY.astype(np.int32), "tiff"), "no white is agreed"),
    "TIFF of floats above 1": (pillow(GREY.astype(np.float32), "tiff"), "unclear what is white"),
}


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_its_pixels(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    path = tmp_path / "a.png"  # what the file is called says nothing
    path.write_bytes(KINDS[name].content)
    with caplog.at_level(logging.WARNING):
        found = np.asarray(decode(path, BACKGROUND)).astype(np.float64)
    assert examine(path) == (W, H)
    assert found.shape == (H, W, 3)
    worst = float(np.abs(found - KINDS[name].pixels).max())
    assert worst <= KINDS[name].within
    assert ("several frames" in caplog.text) == (name in ANIMATED)
    assert name in ANIMATED or not caplog.text


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_for_us_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
    content, reason = REFUSED[name]
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.png cannot be read: .*{reason}"):
        decode(path)
    assert isinstance(examine(path), str)


def test_a_heic_of_two_sizes_is_refused(tmp_path: Path) -> None:
    content = bytearray(KINDS["HEIC"].content)
    width = content.index(b"clap") + 4  # ISO 14496-12: what is kept of the coded 64x64, as the numerator of a fraction
    assert content[width : width + 4] == struct.pack(">I", W)
    content[width : width + 4] = struct.pack(">I", 1000)
    (tmp_path / "a.heic").write_bytes(content)
    assert examine(tmp_path / "a.heic") == "its header says 1000x12 pixels, and it has 64x12"


@pytest.mark.parametrize("name", ["GIF, animated", "AVIF, animated"])
@pytest.mark.filterwarnings("ignore")
def test_damage_behind_the_first_frame_is_no_crash(tmp_path: Path, name: str) -> None:
    content = KINDS[name].content
    for end in range(20, len(content)):
        (tmp_path / "a.gif").write_bytes(content[:end] + b"\xff\0")
        assert isinstance(examine(tmp_path / "a.gif", 100_000), str | tuple)


def test_the_table_is_as_long_as_promised() -> None:
    assert len(KINDS) + len(REFUSED) >= 40


# ---------------------------------------------------------------- damage


def mutants(count: int) -> Iterable[tuple[str, str, bytes]]:
    """(kind, what was done to it, content): flipped bytes, a missing end, or the end of another file of the same format."""
    rng = random.Random(0)
    families: dict[str, list[str]] = {}
    for name in KINDS:
        families.setdefault(name.split(",")[0], []).append(name)
    for number in range(count):
        name = rng.choice(families[list(families)[number % len(families)]])
        content, damage = KINDS[name].content, ("flip", "cut", "splice")[number // len(families) % 3]
        at = rng.randrange(1, len(content))
        if damage == "flip":
            flipped = bytearray(content)
            for position in [at, *(rng.randrange(len(content)) for _ in range(rng.choice([0, 0, 1, 7])))]:
                flipped[position] ^= rng.randrange(1, 256)
            content = bytes(flipped)
        elif damage == "cut":
            content = content[:at]
        else:
            other = KINDS[rng.choice(families[name.split(",")[0]])].content
            content = content[:at] + other[rng.randrange(len(other)) :]
        yield name, damage, content


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What the call returns or raises; decoders in C hear no signal, so the limit is kept from another thread."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"not done after {seconds} s"
    return outcome[0]


@pytest.mark.filterwarnings("ignore")  # Pillow's, about broken metadata
def test_500_damaged_files_are_refused_by_name_or_decode(tmp_path: Path) -> None:
    wrong: list[tuple[str, str, float]] = []
    refused, began = 0, time.monotonic()
    for number, (name, damage, content) in enumerate(mutants(500)):
        path = tmp_path / f"{number}.png"
        path.write_bytes(content)
        size = within(5, lambda path=path: examine(path, 100_000))
        picture = within(5, lambda path=path: decode(path, BACKGROUND, max_pixels=100_000))
        if isinstance(picture, DataError):
            assert path.name in str(picture) and isinstance(size, str)
            refused += 1
        elif isinstance(size, str):  # checksums are looked at once, when the folder is read
            assert name.startswith("PNG")
            refused += 1
        else:
            assert isinstance(picture, Image.Image), (name, damage, picture)
            assert picture.mode == "RGB" and picture.size == size
            difference = np.abs(np.asarray(picture).astype(np.float64) - KINDS[name].pixels).max() if size == (W, H) else np.inf
            # No flipped bit of a PNG passes its checksums; other formats show what they read, unless the end is missing.
            if (damage == "cut" or (damage, name[:3]) == ("flip", "PNG")) and difference > KINDS[name].within:
                wrong.append((name, damage, difference))
    assert not wrong
    assert 250 < refused < 500
    found = find_examples(tmp_path, missing_caption="empty", trigger="", on_bad_image="skip", max_pixels=100_000)
    assert len(found.skipped) == refused and len(found.examples) == 500 - refused
    assert time.monotonic() - began < 60
