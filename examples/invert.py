"""An operation in one file: `safelight up --import invert` in this folder, then `POST /query?operations=invert`."""

import io

from PIL import Image, ImageOps


def invert(image: bytes) -> bytes:
    """The picture's negative, as PNG."""
    with Image.open(io.BytesIO(image), formats=["JPEG", "PNG", "WEBP"]) as picture:
        negative = ImageOps.invert(picture.convert("RGB"))
    out = io.BytesIO()
    negative.save(out, "PNG", compress_level=1)
    return out.getvalue()
