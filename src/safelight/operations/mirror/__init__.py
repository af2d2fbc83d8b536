"""C3: the operation `mirror`."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from safelight import formats
from safelight.errors import ImageError, UnsupportedFormatError
from safelight.operations import Result

__all__ = ["mirror"]


def mirror(image: bytes) -> Result:
    """The picture flipped left-right as a person sees it."""
    found = formats.sniff(image)
    if found is None or not found.accepted:
        raise UnsupportedFormatError
    try:
        with Image.open(io.BytesIO(image), formats=[found.name.upper()]) as picture:
            out = io.BytesIO()
            ImageOps.mirror(picture).save(out, found.name.upper())
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError from error
    return Result(out.getvalue(), notes={"mirror": "reencoded"})
