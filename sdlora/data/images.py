"""Any picture file to upright 8-bit sRGB, in this one place, and on to the tensor the VAE takes."""

import io
import logging
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from sdlora.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
# Pillow judges by content, not by name: without this list a .png that is PostScript inside would start Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
# Part of the key of cached latents: raise it when decode() or crop_to() comes to give other pixels for the same file.
PIXELS_VERSION = 1
# What Pillow's decoders raise on damaged files, found by feeding them some.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, Image.DecompressionBombError)

logger = logging.getLogger(__name__)


def read_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels of the upright picture, without decoding (but a PNG may hold its EXIF behind the pixels)."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
            orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
            if 5 <= orientation <= 8 and picture.format != "TIFF":  # for TIFF Pillow has turned the size already
                return height, width
            return width, height
    except UNREADABLE as error:
        raise _unreadable(path, _reason(path, error)) from error


def decode(path: Path, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """The upright RGB picture, transparent parts over `background`, of an animation the first frame; raises DataError."""
    try:
        return _decode(path, background)
    except UNREADABLE as error:
        raise _unreadable(path, _reason(path, error)) from error


def examine(path: Path) -> tuple[int, int] | str:
    """Width and height of a picture that decodes to its last row, otherwise the reason why it does not."""
    try:
        return _decode(path, (255, 255, 255)).size
    except UNREADABLE as error:
        return _reason(path, error)


def crop_to(picture: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """Resize to `size` (width, height) unless it has it already, then cut out `box` (left, top, right, bottom)."""
    resized = picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
    return resized.crop(box)


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
        with Image.open(path, formats=FORMATS) as picture:
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            return _split(picture)[1] or Image.new("L", picture.size, 255)
    except UNREADABLE as error:
        raise _unreadable(path, _reason(path, error)) from error


def mask_to_tensor(mask: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """One channel of 8 bits -> float32 (1, h, w) in 0 .. 1, each the mean of the pixels that it stands for; size is (h, w)."""
    small = mask.resize((size[1], size[0]), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).float()[None] / 255


def _decode(path: Path, background: tuple[int, int, int]) -> Image.Image:
    with Image.open(path, formats=FORMATS) as picture:
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
        colour, opacity = _split(picture)
        rgb = _to_srgb(colour, picture.info.get("icc_profile"), path)
    return rgb if opacity is None else Image.composite(rgb, Image.new("RGB", rgb.size, background), opacity)


def _split(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colour (L, RGB or CMYK, 8 bits) and opacity (L), which is None where the file has no transparency."""
    if picture.mode.startswith("I;16"):  # convert() would clip: everything above 255 turns white
        values = np.asarray(picture).astype(np.uint32)
        colour = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257
        clear = picture.info.get("transparency")
        return colour, None if clear is None else Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
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


def _to_srgb(colour: Image.Image, icc_profile: bytes | None, path: Path) -> Image.Image:
    if icc_profile:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
            if profile.profile.xcolor_space.strip() == {"L": "GRAY"}.get(colour.mode, colour.mode):
                converted = ImageCms.profileToProfile(colour, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
                assert converted is not None  # None is for inPlace
                return converted
            logger.warning("%s: its colour profile is for another kind of picture and is ignored", path)
        except (ImageCms.PyCMSError, OSError) as error:
            logger.warning("%s: its colour profile is damaged and is ignored (%s)", path, error)
    return colour.convert("RGB")


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:  # from the operating system: no such file, permission denied
        return error.strerror.lower()
    if path.stat().st_size == 0:
        return "the file is empty (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        return f"it is no picture in a known format ({', '.join(FORMATS)})"
    return str(error).rstrip(".") or type(error).__name__


def _unreadable(path: Path, reason: str) -> DataError:
    return DataError(f"{path} cannot be read: {reason}; repair or remove it.")
