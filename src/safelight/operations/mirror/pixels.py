"""C3: what the ways share: Pillow opened for one format alone, and rows of samples flipped, whatever they mean."""

from __future__ import annotations

import io
import struct

from PIL import Image, ImageFile

from safelight import formats
from safelight.operations.mirror.exif import Axis

__all__ = ["DECODER_ERRORS", "TRANSPOSE", "flip_rows", "open_picture"]

DECODER_ERRORS = (OSError, ValueError, EOFError, SyntaxError, KeyError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for a picture that is damaged."""

TRANSPOSE = {Axis.HORIZONTAL: Image.Transpose.FLIP_LEFT_RIGHT, Axis.VERTICAL: Image.Transpose.FLIP_TOP_BOTTOM}

# Bits of a pixel -> the mode of an image that can hold it, and how its rows are packed.
_BOXES = {1: ("1", "1"), 2: ("P", "P;2"), 4: ("P", "P;4"), 8: ("L", "L"), 16: ("I;16", "I;16"), 24: ("RGB", "RGB")}
_BOXES[32] = ("RGBA", "RGBA")


def open_picture(data: bytes, name: str) -> ImageFile.ImageFile:
    """Pillow's picture, by the one decoder named; it knows of no limit but ours, which the caller has checked."""
    Image.MAX_IMAGE_PIXELS = formats.MAX_PIXELS
    return Image.open(io.BytesIO(data), formats=[name])


def flip_rows(raw: bytes, width: int, height: int, bits: int, axis: Axis) -> bytes:
    """Rows of `width` pixels of `bits` bits, each padded to whole bytes, flipped; the pixels stay bit for bit.

    Raises `ValueError` if `raw` is not exactly as long as such rows are.
    """
    row_bytes = (width * bits + 7) // 8
    if len(raw) != row_bytes * height:
        raise ValueError(f"{len(raw)} bytes for {height} rows of {row_bytes}")
    if axis is Axis.VERTICAL:
        return b"".join(raw[at : at + row_bytes] for at in range(len(raw) - row_bytes, -1, -row_bytes))
    if bits in _BOXES:
        mode, packing = _BOXES[bits]
        picture = Image.frombytes(mode, (width, height), raw, "raw", packing)
        return picture.transpose(TRANSPOSE[axis]).tobytes("raw", packing)
    if bits % 8 == 0:  # byte by byte of a pixel
        out, step = bytearray(len(raw)), bits // 8
        for at in range(step):
            plane = Image.frombytes("L", (width, height), raw[at::step])
            out[at::step] = plane.transpose(TRANSPOSE[axis]).tobytes()
        return bytes(out)
    return b"".join(_flipped_bits(raw[at : at + row_bytes], width, bits) for at in range(0, len(raw), row_bytes))


def _flipped_bits(row: bytes, width: int, bits: int) -> bytes:
    """A row of pixels that no mode holds (12 bits, or three times 4), as a string of zeros and ones."""
    digits = f"{int.from_bytes(row, 'big'):0{8 * len(row)}b}"
    flipped = "".join(digits[at : at + bits] for at in range((width - 1) * bits, -1, -bits))
    return int(flipped.ljust(8 * len(row), "0"), 2).to_bytes(len(row), "big")
