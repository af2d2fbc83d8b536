"""What every baseline does with an image: Pillow mirrors it in its source's own quality, a new file takes the result.

The baselines import this by its bare name, for each is started with this folder as its application's.
"""

import io
import os
import uuid
from pathlib import Path

from PIL import Image, JpegImagePlugin

__all__ = ["answer", "mirrored", "save"]


def mirrored(image: bytes) -> bytes:
    """The JPEG's horizontal mirror, with its source's tables: `quality="keep"` is refused after a change."""
    with Image.open(io.BytesIO(image), formats=["JPEG"]) as picture:
        tables, sampling = picture.quantization, JpegImagePlugin.get_sampling(picture)
        out = io.BytesIO()
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(out, "JPEG", qtables=tables, subsampling=sampling)
        return out.getvalue()


def save(image: bytes) -> None:
    """A new file of a unique name in the folder STORE."""
    Path(os.environ["STORE"], f"{uuid.uuid4()}.jpg").write_bytes(image)


def answer(image: bytes) -> dict[str, str]:
    """The service's answer for this upload: its size in KB of 1,024 bytes, rounded half up, at least 1."""
    return {"status": "SUCCESS", "size": f"{max(1, (len(image) + 512) // 1024)}kb"}
