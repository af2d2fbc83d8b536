"""The codec alone, in a bare loop: python benchmarks/codec.py FILE SECONDS [operation].

What the operation `mirror` calls for this image and nothing around it: for a JPEG libjpeg-turbo's transform where the
edge is a whole number of MCUs, else Pillow with the source's own tables; for a PNG Pillow's zlib codec; for a WebP
Pillow's libwebp. With "operation" the operation itself, of which the codec is a part. malloc is told to keep what is
freed, as in the worker's child.
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from loops import ready, told
from PIL import Image, ImageChops, ImageStat, JpegImagePlugin

from safelight.operations.mirror import jpeg, mirror, png, turbojpeg, webp
from safelight.operations.mirror.exif import Axis
from safelight.process import keep_freed_memory

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["codec", "is_mirrored"]

FLIP = Image.Transpose.FLIP_LEFT_RIGHT
PNG_LEVEL = 6  # of zlib, as the operation has it for pictures of this size
FEWEST_CALLS = 5
MOST_DIFFERENCE = 3.0  # levels, in the mean over all pixels, that encoding again makes


def codec(image: bytes) -> Callable[[], bytes]:
    """The call for this image. For a PNG it gives the pixels' stream, without the file around it."""
    if image.startswith(b"\x89PNG"):
        return _png(image)
    if image.startswith(b"RIFF"):
        quality = webp.vp8_quality(next(data for kind, data in webp._chunks(image[12:]) if kind == b"VP8 "))
        return lambda: _encoded_again(image, "WEBP", quality=quality, alpha_quality=100)
    found, library = jpeg.scan(image), turbojpeg.find()
    if library is not None and found.is_aligned(Axis.HORIZONTAL):
        return lambda: library.flip(image, Axis.HORIZONTAL, found.kind)
    return lambda: _jpeg_encoded_again(image)


def _png(image: bytes) -> Callable[[], bytes]:
    with Image.open(io.BytesIO(image), formats=["PNG"]) as picture:
        mode, size = picture.mode, picture.size
    stream = b"".join(data for kind, data in png._chunks(image) if kind == b"IDAT")

    def call() -> bytes:
        picture = Image.frombytes(mode, size, stream, "zip", mode, 0)
        return picture.transpose(FLIP).tobytes("zip", mode, False, PNG_LEVEL, -1, b"")

    return call


def _encoded_again(image: bytes, name: str, **options: object) -> bytes:
    with Image.open(io.BytesIO(image), formats=[name]) as picture:
        out = io.BytesIO()
        picture.transpose(FLIP).save(out, name, **options)
        return out.getvalue()


def _jpeg_encoded_again(image: bytes) -> bytes:
    with Image.open(io.BytesIO(image), formats=["JPEG"]) as picture:
        picture.draft("YCbCr", picture.size)
        tables, sampling = picture.quantization, JpegImagePlugin.get_sampling(picture)
        out = io.BytesIO()
        picture.transpose(FLIP).save(out, "JPEG", qtables=tables, subsampling=sampling)
        return out.getvalue()


def is_mirrored(image: bytes, result: bytes) -> bool:
    """Whether `result` looks like the mirror of `image`, whoever encoded it."""
    with Image.open(io.BytesIO(image)) as before, Image.open(io.BytesIO(result)) as after:
        if before.size != after.size:
            return False
        difference = ImageChops.difference(before.convert("RGB").transpose(FLIP), after.convert("RGB"))
        return max(ImageStat.Stat(difference).mean) <= MOST_DIFFERENCE


def main(path: str, seconds: float, what: str = "codec") -> None:
    keep_freed_memory()
    image = Path(path).read_bytes()
    call = codec(image) if what == "codec" else lambda: mirror(image)
    call()
    ready()
    spent: list[int] = []
    cpu_begun = time.process_time_ns()
    begun = before = time.perf_counter_ns()
    while before - begun < seconds * 1e9 or len(spent) < FEWEST_CALLS:
        call()
        now = time.perf_counter_ns()
        spent.append(now - before)
        before = now
    told(spent, begun, cpu_begun)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), *sys.argv[3:])
