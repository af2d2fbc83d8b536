"""C3: PNGs, animated ones too: their pixels are mirrored, every other chunk is copied byte for byte.

A frame's zlib stream is unfiltered and unpacked by Pillow's own codec into an image that is used as a box of samples:
palette indices stay indices and low depths stay low, so that nothing about colour has to be understood. A frame of
an animation keeps its delay, disposal and blending, and moves to the other side of the canvas.
https://www.w3.org/TR/png-3/
"""

from __future__ import annotations

import itertools
import struct
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageChops

from safelight import formats
from safelight.errors import ImageError
from safelight.operations import Result
from safelight.operations.mirror import exif
from safelight.operations.mirror.exif import Axis
from safelight.operations.mirror.pixels import TRANSPOSE

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["mirror"]

MAX_CHUNKS = 100_000
"""A file of 20 MB in pieces of 200 bytes; encoders write 8 KB and more."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHECKED = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT")
# A chunk that a program must not copy once it has changed the pixels (fourth letter in upper case) is copied only if
# it is known to hold nothing about places: Apple's iDOT, for one, holds offsets into the old stream. A pair of
# pictures for two eyes (sTER) stays one, for a mirror exchanges the eyes too.
_COLOURS = (b"cHRM", b"cICP", b"cLLI", b"gAMA", b"iCCP", b"mDCV", b"sBIT", b"sRGB", b"bKGD", b"hIST", b"tRNS", b"sPLT")
_STAYS_TRUE = (*_COLOURS, b"pCAL", b"sCAL", b"sTER")

# (colour type, bit depth) -> the mode of the box, and how the stream is unpacked into it. With two ways the box has
# only one byte for two: the stream is unpacked twice, for the upper and for the lower bytes.
_BOXES = {
    (0, 1): ("1", "1"),
    (0, 2): ("P", "P;2"),
    (0, 4): ("P", "P;4"),
    (0, 8): ("L", "L"),
    (0, 16): ("I;16", "I;16B"),
    (2, 8): ("RGB", "RGB"),
    (2, 16): ("RGB", "RGB;16B", "RGB;16L"),
    (3, 1): ("1", "1"),
    (3, 2): ("P", "P;2"),
    (3, 4): ("P", "P;4"),
    (3, 8): ("P", "P"),  # for which Pillow's encoder tries no filters, rightly: neighbouring indices mean nothing
    (4, 8): ("LA", "LA"),
    (4, 16): ("RGBA", "RGBA"),
    (6, 8): ("RGBA", "RGBA"),
    (6, 16): ("RGBA", "RGBA;16B", "RGBA;16L"),
}
_RAW_EXIF = b"Raw profile type exif\0\0"
_MAX_RAW_EXIF = 1_000_000  # bytes of its text
_BAND_ROWS = 64  # of a deep picture, filtered at a time
# zlib's level by the number of pixels: a grainy photo takes 300 ns a pixel at 6, 110 at 3, 70 at 1 (and 20 % more
# bytes), and a large one has to fit in a worker's 10 s too.
_LEVELS = ((5_000_000, 6), (30_000_000, 3), (formats.MAX_TOTAL_PIXELS, 1))


class _Chunk(NamedTuple):
    kind: bytes
    data: bytes


@dataclass
class _Frame:
    """A picture in the file: the frame control that announced it (None: not part of the animation), its pieces."""

    control: bytes | None
    width: int
    height: int
    pieces: list[bytes] = field(default_factory=list)


def mirror(image: bytes) -> Result:
    """A PNG flipped left-right as displayed, pixel for pixel."""
    chunks = list(_chunks(image))
    if [chunk.kind for chunk in chunks].count(b"IHDR") != 1 or chunks[0].kind != b"IHDR" or len(chunks[0].data) != 13:
        raise ImageError("The PNG does not begin with its header, or has several.")
    width, height, depth, colour, compression, filters, interlaced = struct.unpack(">IIBBBBB", chunks[0].data)
    formats.check_dimensions(width, height)
    if (colour, depth) not in _BOXES or compression or filters or interlaced > 1:
        raise ImageError("The PNG's header names a colour type, bit depth or method that does not exist.")
    frames = _frames(chunks, width, height)
    pixels = sum(frame.width * frame.height for frame in frames)
    formats.check_frames(len(frames), pixels)
    level = next(level for most, level in _LEVELS if pixels <= most)
    axis = next((exif.read(data).axis for kind, data in chunks if kind == b"eXIf"), Axis.HORIZONTAL)
    try:
        return Result(_written(chunks, frames, axis, level), notes={"mirror": "lossless"})
    except (ValueError, OSError) as error:
        raise ImageError("The PNG's pixels are damaged or cut short.") from error


def _chunks(image: bytes) -> Iterator[_Chunk]:
    position = len(_SIGNATURE)
    for count in itertools.count():
        if position == len(image):
            return  # without IEND, but nothing is missing that was begun
        length, kind = struct.unpack_from(">I4s", image, position) if position + 8 <= len(image) else (1 << 32, b"")
        data = image[position + 8 : position + 8 + length]
        position += 12 + length
        if position > len(image) or count > MAX_CHUNKS:
            raise ImageError("The PNG is cut short, or in too many pieces.")
        if kind in _CHECKED and zlib.crc32(kind + data).to_bytes(4, "big") != image[position - 4 : position]:
            raise ImageError(f"The PNG is damaged: the checksum of a chunk {kind.decode()} is wrong.")
        if kind[0] & 0x20 == 0 and kind not in _CHECKED:
            raise ImageError("The PNG has a critical chunk that the standard does not know.")
        if kind == b"IEND":
            return
        yield _Chunk(kind, data)


def _frames(chunks: list[_Chunk], width: int, height: int) -> list[_Frame]:
    """The pictures in the order of their data; the one in IDAT comes first, whether it is animated or not."""
    frames: list[_Frame] = []
    control: bytes | None = None
    announced = next((int.from_bytes(data[:4], "big") for kind, data in chunks if kind == b"acTL"), 0)
    announced = 0 if announced >> 31 else announced  # nonsense, as is 0: then viewers show the still picture
    for kind, data in chunks:
        if kind == b"IDAT":
            if not frames:
                frames.append(_Frame(control, width, height))
            frames[0].pieces.append(data)
        elif kind == b"fcTL" and announced:
            control = data.ljust(26)
            if frames:
                frames.append(_Frame(control, *struct.unpack_from(">II", control, 4)))
        elif kind == b"fdAT" and len(frames) > 1:
            frames[-1].pieces.append(data[4:])
    _check_complete(frames, announced, width, height)
    return frames


def _check_complete(frames: list[_Frame], announced: int, width: int, height: int) -> None:
    if not frames or not all(frame.pieces for frame in frames):
        raise ImageError("The PNG is cut short: it has no pixels, or too few.")
    if sum(frame.control is not None for frame in frames) < announced:
        raise ImageError("The PNG is cut short: frames of its animation are missing.")
    for frame in frames:
        x, y = struct.unpack_from(">II", frame.control, 12) if frame.control else (0, 0)
        if not (0 < frame.width <= width - x and 0 < frame.height <= height - y):
            raise ImageError("The PNG's animation is damaged: a frame lies outside the picture.")


def _written(chunks: list[_Chunk], frames: list[_Frame], axis: Axis, level: int) -> bytes:
    """The file again. An interlaced picture becomes a plain one: the same pixels, in the other order."""
    header = chunks[0].data
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    out = [_SIGNATURE, _chunk(b"IHDR", header[:12] + b"\0")]
    sequence = itertools.count()
    waiting = iter(frames)
    for kind, data in chunks[1:]:
        if kind == b"IDAT" and (first := next(waiting, None)) is frames[0]:
            for frame in itertools.chain([first], waiting):  # an animation's frames follow IDAT, in their order
                stream = _mirrored(frame, _BOXES[colour, depth], axis, interlaced, level)
                if frame.control is not None:
                    out.append(_chunk(b"fcTL", next(sequence).to_bytes(4, "big") + _moved(frame, width, height, axis)))
                out.append(
                    _chunk(b"IDAT", stream)
                    if frame is first
                    else _chunk(b"fdAT", next(sequence).to_bytes(4, "big") + stream)
                )
        elif kind == b"eXIf":
            out.append(_chunk(kind, exif.without_thumbnail(data)))
        elif kind == b"zTXt" and data.startswith(_RAW_EXIF):
            out.append(_chunk(kind, _raw_without_thumbnail(data)))
        elif kind in (b"PLTE", b"acTL", *_STAYS_TRUE) or (kind[3] & 0x20 and kind not in _CHECKED):
            out.append(_chunk(kind, data))
    return b"".join([*out, _chunk(b"IEND", b"")])


def _raw_without_thumbnail(text: bytes) -> bytes:
    """EXIF as it was written before there was a chunk for it: in hexadecimal, behind its name and its length."""
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(text[len(_RAW_EXIF) :], _MAX_RAW_EXIF)
        name, length, digits = profile.strip().split(maxsplit=2)
        data = bytes.fromhex(digits.decode("ascii"))
    except (ValueError, zlib.error):
        return text
    changed = exif.without_thumbnail(data)
    if changed == data or inflate.unconsumed_tail:
        return text
    lines = [changed.hex()[at : at + 72] for at in range(0, 2 * len(changed), 72)]
    head = b"\n%s\n%s\n" % (name, length.rjust(8))
    return _RAW_EXIF + zlib.compress(head + "\n".join([*lines, ""]).encode())


def _chunk(kind: bytes, data: bytes) -> bytes:
    return b"".join([struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))])


def _moved(frame: _Frame, width: int, height: int, axis: Axis) -> bytes:
    """A frame control (without its sequence number) whose frame lies on the other side."""
    control = frame.control or b""
    x, y = struct.unpack_from(">II", control, 12)
    if axis is Axis.HORIZONTAL:
        x = width - x - frame.width
    else:
        y = height - y - frame.height
    return control[4:12] + struct.pack(">II", x, y) + control[20:]


def _mirrored(frame: _Frame, box: tuple[str, ...], axis: Axis, interlaced: int, level: int) -> bytes:
    """A frame's zlib stream, mirrored."""
    mode, *ways = box
    flip = TRANSPOSE[axis]
    size, stream = (frame.width, frame.height), b"".join(frame.pieces)
    if len(ways) == 1:
        picture = Image.frombytes(mode, size, stream, "zip", ways[0], interlaced)
        return picture.transpose(flip).tobytes("zip", ways[0], False, level, -1, b"")
    sample_bytes = 2 * len(mode)
    raw = bytearray(frame.width * frame.height * sample_bytes)
    for at, way in enumerate(ways):
        picture = Image.frombytes(mode, size, stream, "zip", way, interlaced)
        raw[at::2] = picture.transpose(flip).tobytes()
    return _deflated(raw, frame.width * sample_bytes, sample_bytes, level)


def _deflated(raw: bytearray, row_bytes: int, sample_bytes: int, level: int) -> bytes:
    """A zlib stream of rows that Pillow's encoder cannot pack, each band with the best of the three simple filters."""
    compressor = zlib.compressobj(level)
    out = []
    above = bytes(row_bytes)
    for start in range(0, len(raw), row_bytes * _BAND_ROWS):
        rows = bytes(raw[start : start + row_bytes * _BAND_ROWS])
        size = (row_bytes, len(rows) // row_bytes)
        band = Image.frombytes("L", size, rows)
        left = Image.new("L", size)
        left.paste(band.crop((0, 0, row_bytes - sample_bytes, size[1])), (sample_bytes, 0))
        up = Image.frombytes("L", size, above + rows[:-row_bytes])
        filtered = [band, ImageChops.subtract_modulo(band, left), ImageChops.subtract_modulo(band, up)]
        best = min(range(3), key=lambda kind: _cost(filtered[kind]))
        labelled = Image.new("L", (row_bytes + 1, size[1]), best)
        labelled.paste(filtered[best], (1, 0))
        out.append(compressor.compress(labelled.tobytes()))
        above = rows[-row_bytes:]
    return b"".join([*out, compressor.flush()])


def _cost(filtered: Image.Image) -> int:
    """The sum of the bytes taken as small signed numbers: what libpng goes by too."""
    return sum(min(value, 256 - value) * count for value, count in enumerate(filtered.histogram()))
