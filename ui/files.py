"""The page's routes for pictures and results: what lies below the roots, is not hidden, and is of a kind that is shown or downloaded."""

from __future__ import annotations

import io
import os
from pathlib import Path

from PIL import Image, ImageOps
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from sdlora.errors import ConfigError

from .paths import Places

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
RESULTS = frozenset({".safetensors"})
SHOWABLE = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # by content; without this list Pillow might start Ghostscript
THUMBNAIL = 320  # px, of the longer side
KEEP = {"cache-control": "private, max-age=31536000, immutable"}  # an address changes with its file


def routes(places: Places) -> list[Route]:
    def asked_for(request: Request, kinds: frozenset[str]) -> Path | None:
        try:
            path = places.resolve(request.query_params.get("path", ""), "path")
        except ConfigError:
            return None
        return path if path.suffix.lower() in kinds and os.path.isfile(path) else None

    def file(request: Request) -> Response:
        path = asked_for(request, PICTURES | RESULTS)
        if path is None:
            return PlainTextResponse("There is no such file.", 404)
        is_result = path.suffix.lower() in RESULTS
        return FileResponse(path, filename=path.name if is_result else None, headers=KEEP)

    def thumbnail(request: Request) -> Response:
        path = asked_for(request, PICTURES)
        if path is None:
            return PlainTextResponse("There is no such picture.", 404)
        try:
            return Response(small(path), media_type="image/webp", headers=KEEP)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return PlainTextResponse("It cannot be read.", 415)

    return [Route("/file", file), Route("/thumbnail", thumbnail)]


def small(path: Path) -> bytes:
    """A WebP of at most THUMBNAIL px; pictures that are smaller stay as large as they are."""
    with Image.open(path, formats=SHOWABLE) as picture:
        picture.draft("RGB", (THUMBNAIL, THUMBNAIL))
        upright = ImageOps.exif_transpose(picture)  # as training and browsers turn it
        shown = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    shown.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    shown.save(out, "WEBP", quality=80)
    return out.getvalue()
