"""The pictures: seeded, so that a run can be repeated; their bytes depend on Pillow's version."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageFilter

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PICTURES", "growing"]

TEST_IMAGE = Path(__file__).parent.parent / "test_image.jpg"
PATCH = 40  # pixels of a side: the rough shapes
GRAIN = 0.18
GROWING_WIDTHS = (144, 272, 480, 832, 1520, 2640, 4304, 6080)


def photo(width: int, height: int, grain: float = GRAIN) -> Image.Image:
    """Soft shapes under a film's grain: as hard to pack as a photograph."""
    dice = random.Random(width * height)
    patches = (-(-width // PATCH), -(-height // PATCH))
    rough = Image.frombytes("RGB", patches, dice.randbytes(patches[0] * patches[1] * 3))
    noise = Image.frombytes("RGB", (width, height), dice.randbytes(width * height * 3))
    soft = rough.resize((width, height), Image.Resampling.BICUBIC)
    return Image.blend(soft, noise.filter(ImageFilter.GaussianBlur(1)), grain)


def encoded(picture: Image.Image, name: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, name, **options)
    return out.getvalue()


def jpeg(width: int, height: int) -> bytes:
    return encoded(photo(width, height), "JPEG", quality=85, subsampling="4:2:0")


def growing() -> list[bytes]:
    """JPEGs of one texture from about 10 KB to 16 MB, each about three times the one before."""
    pictures = (photo(width, width * 3 // 4 // 16 * 16, 0.9) for width in GROWING_WIDTHS)
    return [encoded(picture, "JPEG", quality=95, subsampling="4:2:0") for picture in pictures]


# Sides of a JPEG in 4:2:0 that are whole numbers of 16 pixels are mirrored losslessly: all but the second.
PICTURES: dict[str, Callable[[], bytes]] = {
    "1024x688": TEST_IMAGE.read_bytes,
    "unaligned": lambda: jpeg(1000, 667),
    "small": lambda: jpeg(480, 360),
    "12-megapixel": lambda: jpeg(4000, 3000),
    "png": lambda: encoded(photo(640, 480), "PNG"),
    "webp": lambda: encoded(photo(1024, 688), "WEBP", quality=80),
}
