"""The allow-list of formats: magic bytes -> name, media type, extension; dimensions and the limits on them.

Gateway and worker share this table, and the gateway starts without an image library: what is needed to refuse a
picture is read from its first 64 KB, by `imagesize` on bytes in memory (never a file or a URL).
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import imagesize

from safelight.errors import ImageError, TooManyFramesError, TooManyPixelsError

__all__ = [
    "FORMATS",
    "HEAD_BYTES",
    "MAX_FRAMES",
    "MAX_PIXELS",
    "MAX_TOTAL_PIXELS",
    "Format",
    "check_dimensions",
    "check_frames",
    "dimensions",
    "predicted_seconds",
    "sniff",
]

HEAD_BYTES = 64 * 1024
"""What `sniff` and `dimensions` want to see of an upload."""

MAX_PIXELS = 100_000_000
"""Of one picture: decoded, and once more mirrored, it takes up to 800 MB (4 bytes a pixel)."""

MAX_FRAMES = 2_000
"""Of one animation: over a minute at 30 frames a second."""

MAX_TOTAL_PIXELS = 200_000_000
"""Over all frames: 1,000 of 500 x 400. A GIF takes 25 ns a pixel, so 5 s: half of what a worker has for a job."""

_MAX_READS = 2_000
"""Of `imagesize` in one head: real JPEGs need under 200; 16,000 tiny segments would hold up the gateway for 20 ms."""


@dataclass(frozen=True)
class Format:
    """A format's name, media type and file extension; about how many nanoseconds mirroring takes for each pixel."""

    name: str
    media_type: str
    extension: str
    cost: int  # measured in `docs/why.md`


JPEG = Format("JPEG", "image/jpeg", "jpg", 12)
PNG = Format("PNG", "image/png", "png", 120)
GIF = Format("GIF", "image/gif", "gif", 20)
WEBP = Format("WebP", "image/webp", "webp", 120)
TIFF = Format("TIFF", "image/tiff", "tiff", 80)
BMP = Format("BMP", "image/bmp", "bmp", 30)
AVIF = Format("AVIF", "image/avif", "avif", 20)

FORMATS = (JPEG, PNG, GIF, WEBP, TIFF, BMP, AVIF)

_MAGIC = (
    (b"\xff\xd8\xff", JPEG),
    (b"\x89PNG\r\n\x1a\n", PNG),
    (b"GIF87a", GIF),
    (b"GIF89a", GIF),
    (b"II*\0", TIFF),
    (b"MM\0*", TIFF),
    (b"II+\0", TIFF),  # BigTIFF
    (b"MM\0+", TIFF),
)
# The sizes of its known headers, for "BM" alone also begins texts; OS/2's second one may end after any of its fields.
_BMP_HEADER_BYTES = (12, *range(16, 65, 4), 42, 46, 108, 124)


def sniff(head: bytes) -> Format | None:
    """The format that the first bytes are in, or None; a file's name is never asked."""
    for magic, fmt in _MAGIC:
        if head.startswith(magic):
            return fmt
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return WEBP
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADER_BYTES:
        return BMP
    if head[4:8] == b"ftyp":
        brands = head[8 : min(int.from_bytes(head[:4], "big"), 256)]
        if any(brands[at : at + 4] in (b"avif", b"avis") for at in range(0, len(brands), 4)):
            return AVIF
    return None


class _Head(io.BytesIO):
    """Bytes in memory that stop answering a reader who asks for ever."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > _MAX_READS:
            raise ImageError
        return super().read(size)


def dimensions(head: bytes, fmt: Format) -> tuple[int, int] | None:
    """Width and height as stored, or None if the head does not hold them (a JPEG whose metadata fills 64 KB).

    A JPEG takes about 20 us (half of it the type checks of `imagesize`), the worst head that was found 3 ms.
    """
    width, height = imagesize.get(_Head(head[:HEAD_BYTES]), exif_rotation=False)  # (-1, -1) on any error
    if fmt is GIF:  # imagesize 2.0.1 reads its two unsigned numbers as signed
        width, height = width & 0xFFFF, height & 0xFFFF
    elif fmt is WEBP and head[12:16] == b"VP8 ":  # and the two upper bits as part of the number; RFC 6386, 9.1
        width, height = width & 0x3FFF, height & 0x3FFF
    return (width, height) if width > 0 and height > 0 else None


def predicted_seconds(image: bytes, pixels: int) -> float:
    """About how long a child works on an image of which the header tells so many `pixels` (0: it does not tell).

    It has at least a pixel for each byte: a header tells of one frame, and an animation has many.
    """
    found = sniff(image)
    return max(pixels, len(image)) * found.cost / 1e9 if found else 0.0


def check_dimensions(width: int, height: int) -> None:
    """Raise `TooManyPixelsError` for a picture over `MAX_PIXELS`, `ImageError` for one without pixels."""
    if width < 1 or height < 1:
        raise ImageError("The picture has no pixels: its width or height is 0.")
    if width * height > MAX_PIXELS:
        raise TooManyPixelsError(
            f"The picture has {width:,} x {height:,} pixels; at most {MAX_PIXELS:,} pixels are allowed."
        )


def check_frames(frames: int, total_pixels: int) -> None:
    """Raise `TooManyFramesError` for an animation over `MAX_FRAMES` or `MAX_TOTAL_PIXELS`."""
    if frames > MAX_FRAMES:
        raise TooManyFramesError(f"The animation has {frames:,} frames; at most {MAX_FRAMES:,} are allowed.")
    if frames > 1 and total_pixels > MAX_TOTAL_PIXELS:
        raise TooManyFramesError(
            f"The animation's {frames:,} frames have {total_pixels:,} pixels in all; "
            f"at most {MAX_TOTAL_PIXELS:,} are allowed."
        )
