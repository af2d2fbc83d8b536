"""C3: GIFs: each frame's palette indices are mirrored and its place on the screen; all else is copied byte for byte.

So palettes, delays, disposal, transparency, loop count and comments stay exactly what they were, and no frame is ever
composed. Pillow's LZW codec does the pixels. https://www.w3.org/Graphics/GIF/spec-gif89a.txt
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from PIL import Image

from safelight import formats
from safelight.errors import ImageError
from safelight.operations import Result

__all__ = ["mirror"]

_EXTENSION, _IMAGE, _TRAILER = 0x21, 0x2C, 0x3B
_HAS_TABLE, _TABLE_SIZE, _INTERLACED = 0x80, 0x07, 0x40
_CUT_SHORT = "The GIF is cut short."


class _Frame(NamedTuple):
    """An image block: its place on the screen, and where in the file it and its pixels lie."""

    start: int
    left: int
    top: int
    width: int
    height: int
    flags: int
    pixels_at: int  # the LZW code size, then sub-blocks
    end: int


def mirror(image: bytes) -> Result:
    """A GIF flipped left-right, pixel for pixel."""
    try:
        frames, start, end = _walk(image)
    except (IndexError, struct.error):
        raise ImageError(_CUT_SHORT) from None
    if not frames:
        raise ImageError("The GIF has no picture: it is damaged or cut short.")
    width, height = struct.unpack_from("<HH", image, 6)
    # A first frame that is larger than the screen enlarges it, as in browsers.
    width = max(width, frames[0].left + frames[0].width)
    height = max(height, frames[0].top + frames[0].height)
    formats.check_dimensions(width, height)
    for frame in frames:
        formats.check_dimensions(frame.width, frame.height)
    formats.check_frames(len(frames), sum(frame.width * frame.height for frame in frames))
    out = [image[:6], struct.pack("<HH", width, height), image[10:start]]
    for frame in frames:
        out += [image[start : frame.start], _mirrored(image, frame, width)]
        start = frame.end
    return Result(b"".join([*out, image[start:end], bytes([_TRAILER])]), notes={"mirror": "lossless"})


def _walk(image: bytes) -> tuple[list[_Frame], int, int]:
    """The frames, where the first block begins, and where the last one ends; cheap enough to refuse 100,000 frames."""
    frames = []
    start = position = 13 + _table_bytes(image[10])
    while position < len(image) and image[position] != _TRAILER:  # some files lack their last byte
        if image[position] == _EXTENSION:
            position = _behind_sub_blocks(image, position + 2)
        elif image[position] == _IMAGE:
            left, top, width, height, flags = struct.unpack_from("<HHHHB", image, position + 1)
            pixels_at = position + 10 + _table_bytes(flags)
            end = _behind_sub_blocks(image, pixels_at + 1)
            frames.append(_Frame(position, left, top, width, height, flags, pixels_at, end))
            position = end
        else:
            position += 1  # stray bytes between blocks, which viewers skip
    return frames, start, position


def _table_bytes(flags: int) -> int:
    return 3 * (2 << (flags & _TABLE_SIZE)) if flags & _HAS_TABLE else 0


def _behind_sub_blocks(image: bytes, position: int) -> int:
    while length := image[position]:
        position += 1 + length
    return position + 1


def _mirrored(image: bytes, frame: _Frame, screen_width: int) -> bytes:
    visible = min(frame.width, screen_width - frame.left)
    if visible <= 0:
        return image[frame.start : frame.end]  # outside the screen, and outside it stays
    bits, interlaced = image[frame.pixels_at], frame.flags & _INTERLACED
    if not 1 <= bits <= 11:
        raise ImageError("The GIF is damaged: its pixels have a code size that does not exist.")
    size = (frame.width, frame.height)
    try:
        picture = Image.frombytes("L", size, image[frame.pixels_at + 1 : frame.end], "gif", bits, int(interlaced > 0))
    except (ValueError, OSError) as error:
        raise ImageError("The GIF's pixels are damaged or cut short.") from error
    if visible < frame.width:
        picture = picture.crop((0, 0, visible, frame.height))
    bits = min(max(bits, 2), 8)  # what may be written; some files have 1, or more than 8
    pixels = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes("gif", "L", bits, int(interlaced > 0))
    left = screen_width - frame.left - visible
    place = struct.pack("<BHHHHB", _IMAGE, left, frame.top, visible, frame.height, frame.flags)
    return b"".join([place, image[frame.start + 10 : frame.pixels_at], bytes([bits]), pixels, b"\0"])
