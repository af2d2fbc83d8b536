"""Two operations: `grayscale` returns an image and a note, `dimensions` returns facts."""

from __future__ import annotations

import io
from contextlib import contextmanager
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from safelight.errors import ImageError
from safelight.operations import Result

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["dimensions", "grayscale"]

FORMATS = ("JPEG", "PNG", "GIF", "WEBP")
GREY = {"1", "L", "LA", "I;16"}


def grayscale(image: bytes) -> Result:
    """The picture in grey, in its format; the note `grayscale` says "converted", or "unchanged" if it was grey."""
    with opened(image) as picture:
        if getattr(picture, "n_frames", 1) > 1:
            raise ImageError("Animations cannot be made grey; send a single picture.")
        if picture.mode in GREY:
            return Result(notes={"grayscale": "unchanged"})  # no image: the next operation gets the one we got
        kind = picture.format
        upright = ImageOps.exif_transpose(picture)  # the metadata, and with it the orientation, is not written again
        out = io.BytesIO()
        upright.convert("LA" if upright.has_transparency_data else "L").save(out, kind)
    return Result(image=out.getvalue(), notes={"grayscale": "converted"})


def dimensions(image: bytes) -> dict[str, int]:
    """Width and height as stored."""
    with opened(image) as picture:
        return {"width": picture.width, "height": picture.height}


@contextmanager
def opened(image: bytes) -> Iterator[Image.Image]:
    """A picture of an allowed format; what Pillow raises on damage becomes the client's 422."""
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as picture:
            yield picture
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as exc:
        raise ImageError from exc
