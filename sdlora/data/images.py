"""Any picture file to upright 8-bit sRGB, in this one place, and on to the tensor the VAE takes."""

import io
import logging
import math
import random
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageColor, ImageFile, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile

from sdlora.data import saved
from sdlora.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif"})
# Pillow judges by content, not by name: without this list a .png that is PostScript inside would start Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
# Part of the key of cached latents: raise it when decode(), crop_to() or vary_colour() comes to give other pixels for the same file.
PIXELS_VERSION = 2
MAX_PIXELS = 200_000_000  # what the largest phone cameras make; 600 MB as RGB
Image.MAX_IMAGE_PIXELS = None  # `max_pixels` takes the place of Pillow's limit, which would refuse what the option allows
WHITE = (255, 255, 255)
# A draft keeps twice the size asked for: libjpeg shrinks by what is nearly a mean over blocks, and Lanczos has the last halving.
DRAFT_MARGIN = 2
# How far vary_colour() goes to either side: as a photograph under other light, and no orange turns green.
HUE_TURN = 16.0  # degrees
GAMMA = 1.15
# What Pillow's decoders raise on damaged files, found by feeding them some.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, ArithmeticError, IndexError, struct.error)

logger = logging.getLogger(__name__)


def colour(name: str) -> tuple[int, int, int]:
    """ "#rrggbb" or a name that Pillow knows -> red, green, blue in 0 .. 255. Raises ValueError."""
    return ImageColor.getrgb(name)[:3]


def read_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels of the upright picture, without decoding (but a PNG may hold its EXIF behind the pixels)."""
    try:
        with _opened(path) as picture:
            return picture.size[::-1] if _lies(picture) else picture.size
    except UNREADABLE as error:
        raise _unreadable(path, _reason(path, error)) from error


def decode(
    path: Path,
    background: tuple[int, int, int] = WHITE,
    *,
    at_least: tuple[int, int] | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """The upright RGB picture, transparent parts over `background`, of an animation the first frame; raises DataError.

    With `at_least` (width, height) a far larger JPEG comes out smaller, though not below twice that size, in a fraction of the time.
    """
    try:
        with _opened(path, max_pixels) as picture:
            _load(picture, path, at_least)
            return _finish(picture, path, background)
    except UNREADABLE as error:
        raise _unreadable(path, _reason(path, error)) from error


def examine(path: Path, max_pixels: int | None = MAX_PIXELS) -> tuple[int, int] | str:
    """Width and height of a picture that decodes to its last row, otherwise the reason why it does not."""
    try:
        with _opened(path, max_pixels) as picture:
            if picture.format == "PNG":
                picture.verify()  # its checksums, which decoding passes over; this closes it
        with _opened(path) as picture:
            size = _load(picture, path, (1, 1))
            _finish(picture, path, WHITE)
            return size
    except UNREADABLE as error:
        return _reason(path, error)


def crop_to(picture: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """Resize to `size` (width, height) unless it has it already, then cut out `box` (left, top, right, bottom)."""
    resized = picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
    return resized.crop(box)


def vary_colour(picture: Image.Image, seed: str) -> Image.Image:
    """RGB with its hues turned and its brightness bent, both by amounts that follow from the seed; black, white and grey stay grey."""
    rng = random.Random(f"colour/{seed}")  # random() keeps its sequence between versions of Python
    turn, gamma = (most * (2 * rng.random() - 1) for most in (HUE_TURN, math.log(GAMMA)))
    bent = [round(255 * (level / 255) ** math.exp(gamma)) for level in range(256)]
    return picture.convert("RGB", _hue_rotation(math.radians(turn))).point(bent * 3)


def _hue_rotation(angle: float) -> tuple[float, ...]:
    """Rows of a matrix that turns hues and leaves luminance as it is (W3C, Filter Effects Module 1, feColorMatrix hueRotate); the fourth
    column is what is added."""
    luminance = np.array([[0.213, 0.715, 0.072]] * 3)
    across = np.array([[-0.213, -0.715, 0.928], [0.143, 0.140, -0.283], [-0.787, 0.715, 0.072]])
    matrix = luminance + math.cos(angle) * (np.eye(3) - luminance) + math.sin(angle) * across
    return tuple(np.pad(matrix, ((0, 0), (0, 1))).ravel().tolist())


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """RGB picture -> float32 (3, H, W) in -1 .. 1, the range of the VAE."""
    pixels = torch.from_numpy(np.array(picture))  # (H, W, 3) uint8
    return (pixels.permute(2, 0, 1).float() / 127.5 - 1).contiguous()


def decode_mask(path: Path, alpha: bool) -> Image.Image:
    """A mask as one upright 8-bit channel, white for what counts: the picture's brightness, or its opacity (all white where it has
    none). Raises DataError."""
    if not alpha:
        return decode(path).convert("L")
    try:
        with _opened(path) as picture:
            _load(picture, path)
            return _split(picture)[1] or Image.new("L", picture.size, 255)
    except UNREADABLE as error:
        raise _unreadable(path, _reason(path, error)) from error


def mask_to_tensor(mask: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """One channel of 8 bits -> float32 (1, h, w) in 0 .. 1, each the mean of the pixels that it stands for; size is (h, w)."""
    small = mask.resize((size[1], size[0]), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).float()[None] / 255


def open_file(path: Path) -> io.BufferedReader | io.BytesIO:
    """The bytes of a picture, whether a file or a row of a saved dataset. Raises OSError, or ValueError."""
    if saved.is_row(path):
        return saved.open_row(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")  # to open a fifo waits for its writer
    return path.open("rb")


@contextmanager
def _opened(path: Path, max_pixels: int | None = None) -> Iterator[ImageFile.ImageFile]:
    """The picture with its header read and nothing decoded."""
    with open_file(path) as file, Image.open(file, formats=_formats(file)) as picture:
        width, height = picture.size
        if max_pixels is not None and width * height > max_pixels:
            raise ValueError(f"it has {width}x{height} pixels, above data.max_pixels = {max_pixels} (raise that if you have the memory)")
        yield picture


def _formats(file: io.BufferedReader | io.BytesIO) -> tuple[str, ...]:
    """The formats that the file may be in; HEIC is looked for only where the file says that it is."""
    start = file.read(32)  # ISO 14496-12: the size of the first box, "ftyp", the brand, a version, the brands it is compatible with
    file.seek(0)
    brands = {start[at : at + 4] for at in (8, *range(16, 32, 4))}
    if start[4:8] != b"ftyp" or brands & {b"avif", b"avis"} or not brands & {b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1"}:
        return FORMATS
    try:
        import pillow_heif
    except ImportError:
        raise ValueError("it is HEIC, which needs one more package: pip install 'sdlora[heif]'") from None
    pillow_heif.register_heif_opener()
    return (*FORMATS, "HEIF")


def _load(picture: ImageFile.ImageFile, path: Path, at_least: tuple[int, int] | None = None) -> tuple[int, int]:
    """Decode and set upright, in place; returns the upright size of the whole picture, which a draft of it falls short of."""
    size = picture.size
    if at_least is not None and isinstance(picture, JpegImageFile):
        _shrink(picture, at_least[::-1] if _lies(picture) else at_least)
    if picture.format == "PNG":
        _scale_key(picture)
    announced = picture.size
    picture.load()
    if picture.size != announced:  # HEIC says it twice, and a cap on the first must not let a larger second through
        raise ValueError("its header says {}x{} pixels, and it has {}x{}".format(*announced, *picture.size))
    if getattr(picture, "is_animated", False) and picture.format != "MPO":  # the second picture of a camera's file is a preview or a depth
        logger.warning("%s: it has several frames, of which the first is used", path)
    lies = _lies(picture)
    ImageOps.exif_transpose(picture, in_place=True)
    return size[::-1] if lies else size


def _shrink(picture: JpegImageFile, at_least: tuple[int, int]) -> None:
    """Have libjpeg decode to a half, a quarter or an eighth. A side that does not divide is padded, and would come out stretched."""
    width, height = picture.size
    for scale in (8, 4, 2):
        small = (width // scale, height // scale)
        if (
            small[0] * scale == width
            and small[1] * scale == height
            and all(side >= DRAFT_MARGIN * least for side, least in zip(small, at_least, strict=True))
        ):
            picture.draft(None, small)
            return


def _lies(picture: Image.Image) -> bool:
    """Whether EXIF says that width and height are to change places; of a TIFF Pillow has turned the size already."""
    return picture.format != "TIFF" and 5 <= picture.getexif().get(ExifTags.Base.Orientation, 1) <= 8


def _scale_key(picture: ImageFile.ImageFile) -> None:
    """A PNG's one transparent colour is written in the depth of the file, and Pillow looks for that number among its 8-bit pixels."""
    key, stored = picture.info.get("transparency"), picture.tile[0].args if picture.tile else None
    if isinstance(key, tuple) and stored == "RGB;16B":
        picture.info["transparency"] = tuple(value >> 8 for value in key)  # as Pillow brings 16 bits to 8
    elif isinstance(key, int) and stored in ("L;2", "L;4"):
        picture.info["transparency"] = key * {"L;2": 85, "L;4": 17}[stored]  # 255 / 3, 255 / 15


def _finish(picture: ImageFile.ImageFile, path: Path, background: tuple[int, int, int]) -> Image.Image:
    shades, opacity = _split(picture)
    rgb = _to_srgb(shades, picture.info.get("icc_profile"), path)
    return rgb if opacity is None else Image.composite(rgb, Image.new("RGB", rgb.size, background), opacity)


def _split(picture: ImageFile.ImageFile) -> tuple[Image.Image, Image.Image | None]:
    """Colour (L, RGB or CMYK, 8 bits) and opacity (L), which is None where the file has no transparency."""
    if picture.mode.startswith("I;16"):  # convert() would clip: everything above 255 turns white
        values = np.asarray(picture).astype(np.uint32)
        if isinstance(picture, TiffImageFile) and picture.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:
            values = 65535 - values  # white is zero: Pillow turns it round at 8 bits, but not at 16
        shades = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257
        clear = picture.info.get("transparency")
        return shades, None if clear is None else Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    if picture.mode == "F":
        levels = np.asarray(picture)
        if not (levels.min() >= 0 and levels.max() <= 1):  # written so that NaN fails too
            raise ValueError("its floating-point values leave 0 .. 1, so it is unclear what is white")
        return Image.fromarray((levels * 255 + 0.5).astype(np.uint8)), None
    if picture.mode == "I":
        raise ValueError("it has 32-bit integer values, for which no white is agreed")
    mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(picture.mode, "RGB")
    if not picture.has_transparency_data:
        return picture.convert(mode), None
    rgba = picture.convert("RGBA")
    return rgba.convert(mode), rgba.getchannel("A")


def _to_srgb(shades: Image.Image, icc_profile: bytes | None, path: Path) -> Image.Image:
    if icc_profile:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
            if profile.profile.xcolor_space.strip() == {"L": "GRAY"}.get(shades.mode, shades.mode):
                converted = ImageCms.profileToProfile(shades, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
                assert converted is not None  # None is for inPlace
                return converted
            logger.warning("%s: its colour profile is for another kind of picture and is ignored", path)
        except (ImageCms.PyCMSError, OSError) as error:
            logger.warning("%s: its colour profile is damaged and is ignored (%s)", path, error)
    return shades.convert("RGB")


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:  # from the operating system: no such file, permission denied
        return error.strerror.lower()
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        return f"it is damaged, or no picture in a known format ({', '.join(FORMATS)}, HEIC)"
    return str(error).rstrip(".") or type(error).__name__


def _unreadable(path: Path, reason: str) -> DataError:
    return DataError(f"{path} cannot be read: {reason}; repair or remove it.")
