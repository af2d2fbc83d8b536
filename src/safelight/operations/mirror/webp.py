"""C3: WebP, decoded and encoded again.

The container is written here, so that metadata, the number of frames, their durations and the loop count stay what
they were (libwebp's own animation encoder merges equal frames); Pillow decodes, and encodes each frame as a still
picture. A lossless source stays lossless and exact; a lossy one is encoded at the quality that its quantisers tell.
https://developers.google.com/speed/webp/docs/riff_container
"""

from __future__ import annotations

import io
import itertools
import operator
import struct
from typing import TYPE_CHECKING, NamedTuple

from PIL import ImageChops

from safelight import formats
from safelight.errors import ImageError
from safelight.operations import Result
from safelight.operations.mirror import exif
from safelight.operations.mirror.exif import Axis
from safelight.operations.mirror.pixels import DECODER_ERRORS, TRANSPOSE, open_picture

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from PIL import Image, ImageFile

__all__ = ["mirror", "vp8_quality"]

_MAX_CHUNKS = 20_000
_LARGE_PIXELS = 5_000_000  # 12 million take 5 s and more with the usual effort, 2.5 s and 1 % more bytes with the lower
_USED, _FAR = 0.02, 24  # of a segment: the least share of the picture, and of the quantisers the most between two
_PICTURE = (b"ALPH", b"VP8 ", b"VP8L")
_DO_NOT_BLEND = 2  # and do not dispose: each frame overwrites what has changed since the one before


class _Chunk(NamedTuple):
    kind: bytes
    data: bytes


def mirror(image: bytes) -> Result:
    """A WebP flipped left-right as displayed: pixel for pixel if it is lossless, else at its own quality."""
    length = 8 + int.from_bytes(image[4:8], "little")
    if length > len(image):
        raise ImageError("The WebP is cut short.")
    chunks = list(_chunks(image[12:length]))
    frames = [data for kind, data in chunks if kind == b"ANMF"]
    parts = [part for data in frames for part in _chunks(data[16:])] if frames else chunks
    size = formats.dimensions(image[: formats.HEAD_BYTES], formats.WEBP)
    if size is None or not any(kind in _PICTURE for kind, _ in parts):
        raise ImageError("The WebP has no picture: it is damaged or cut short.")
    formats.check_dimensions(*size)
    formats.check_frames(len(frames), len(frames) * size[0] * size[1])
    axis = next((exif.read(data).axis for kind, data in chunks if kind == b"EXIF"), Axis.HORIZONTAL)
    qualities = [_quality(_chunks(data[16:])) for data in frames] or [_quality(chunks)]
    try:
        with open_picture(image[:length], "WEBP") as picture:
            flipped = _flipped(picture, len(frames) or 1, axis)
            encoded = _animated(frames, flipped, qualities) if frames else _encoded(next(flipped), qualities[0])
            body = _replaced(chunks, encoded)
    except DECODER_ERRORS as error:
        raise ImageError("The WebP is damaged or cut short.") from error
    riff = b"".join([b"WEBP", *itertools.starmap(_written, body)])
    return Result(_written(b"RIFF", riff), notes={"mirror": "reencoded" if any(qualities) else "lossless"})


def _quality(parts: Iterable[_Chunk]) -> float | None:
    """That of a picture, None if it is lossless."""
    return next((max(vp8_quality(data), 0.1) for kind, data in parts if kind == b"VP8 "), None)


def _chunks(data: bytes) -> Iterator[_Chunk]:
    position = 0
    for count in itertools.count():
        if position + 8 > len(data):
            return
        kind, length = struct.unpack_from("<4sI", data, position)
        if position + 8 + length > len(data) or count > _MAX_CHUNKS:
            raise ImageError("The WebP is damaged: its chunks do not fit into it, or are too many.")
        yield _Chunk(kind, data[position + 8 : position + 8 + length])
        position += 8 + length + length % 2


def _written(kind: bytes, data: bytes) -> bytes:
    return b"".join([kind, len(data).to_bytes(4, "little"), data, bytes(len(data) % 2)])


def _flipped(picture: ImageFile.ImageFile, frames: int, axis: Axis) -> Iterator[Image.Image]:
    """Each frame as displayed: the whole canvas."""
    for number in range(frames):
        picture.seek(number)
        yield picture.transpose(TRANSPOSE[axis])


def _encoded(picture: Image.Image, quality: float | None) -> list[_Chunk]:
    """The chunks of a still picture; a quality of None is lossless, colours under transparency included."""
    out = io.BytesIO()
    if quality is None:
        effort, method = (50, 4) if picture.width * picture.height <= _LARGE_PIXELS else (20, 1)
        picture.save(out, "WEBP", lossless=True, exact=True, quality=effort, method=method)
    else:
        picture.save(out, "WEBP", quality=quality, alpha_quality=100)
    return [chunk for chunk in _chunks(out.getvalue()[12:]) if chunk.kind in _PICTURE]


def _animated(frames: list[bytes], pictures: Iterable[Image.Image], qualities: Iterable[float | None]) -> list[_Chunk]:
    """An ANMF chunk for each frame, which holds the rectangle that differs from the frame before."""
    chunks = []
    before: Image.Image | None = None
    for frame, picture, quality in zip(frames, pictures, qualities, strict=True):
        box = (0, 0, *picture.size)
        if before is not None:
            left, top, right, bottom = ImageChops.difference(before, picture).getbbox(alpha_only=False) or (0, 0, 1, 1)
            box = (left & ~1, top & ~1, right, bottom)  # places are stored halved
        part = picture.crop(box)
        numbers = (box[0] // 2, box[1] // 2, part.width - 1, part.height - 1)
        head = b"".join(number.to_bytes(3, "little") for number in numbers)
        body = b"".join(itertools.starmap(_written, _encoded(part, quality)))
        chunks.append(_Chunk(b"ANMF", head + frame[12:15] + bytes([_DO_NOT_BLEND]) + body))
        before = picture
    return chunks


def _replaced(chunks: list[_Chunk], encoded: list[_Chunk]) -> list[_Chunk]:
    """The source's chunks in their order, with the new picture or frames where the first of the old ones stood."""
    body = []
    for chunk in chunks:
        if chunk.kind in _PICTURE or chunk.kind == b"ANMF":
            body += encoded
            encoded = []
        else:
            body.append(_Chunk(b"EXIF", exif.without_thumbnail(chunk.data)) if chunk.kind == b"EXIF" else chunk)
    return body


def vp8_quality(frame: bytes) -> float:
    """The quality (0 to 100) at which libwebp makes quantisers like those of a VP8 key frame.

    The header (RFC 6386, 9.2 to 9.6 and 19.2) gives the quantisers, `QualityToCompression` of libwebp's
    `quant_enc.c`, turned round, the quality.
    """
    bits = _Bits(frame[10:])
    bits.read(2)  # colour space and clamping
    values, shares, absolute = [0] * 4, [1.0, 0, 0, 0], False
    if bits.read(1):
        new_map, new_data = bits.read(1), bits.read(1)
        if new_data:
            absolute = bool(bits.read(1))
            values = [bits.signed(7) for _ in range(4)]
            for _ in range(4):
                bits.signed(6)  # loop filter
        if new_map:  # by the tree's probabilities: how much of the picture is in each segment
            left, upper, lower = ((bits.read(8) if bits.read(1) else 255) / 255 for _ in range(3))
            shares = [left * upper, left * (1 - upper), (1 - left) * lower, (1 - left) * (1 - lower)]
    bits.read(10)  # the loop filter's type, level, sharpness
    if bits.read(1) and bits.read(1):
        for _ in range(8):
            bits.signed(6)
    bits.read(2)  # partitions
    mean = sum(map(operator.mul, values, shares))
    # libwebp's segments lie near each other; where others' do not, the fine ones must not become coarse.
    finest = min(value for value, share in zip(values, shares, strict=True) if share >= _USED)
    quantiser = (0 if absolute else bits.read(7)) + min(mean, finest + _FAR)
    compression = (1 - min(max(quantiser, 0), 127) / 127) ** 3
    quality: float = 100 * (compression * 1.5 if compression < 0.5 else (compression + 1) / 2)
    return round(quality, 1)


class _Bits:
    """RFC 6386, 7: the boolean decoder, where every bit is as likely 0 as 1."""

    def __init__(self, data: bytes) -> None:
        self._data = iter(data[2:])
        self._value = int.from_bytes(data[:2], "big")
        self._range, self._shifts = 255, 0

    def _bit(self) -> int:
        split = 1 + ((self._range - 1) >> 1)
        bit = int(self._value >= split << 8)
        if bit:
            self._range -= split
            self._value -= split << 8
        else:
            self._range = split
        while self._range < 128:
            self._value <<= 1
            self._range <<= 1
            self._shifts += 1
            if self._shifts == 8:
                self._shifts = 0
                self._value |= next(self._data, 0)
        return bit

    def read(self, count: int) -> int:
        value = 0
        for _ in range(count):
            value = value << 1 | self._bit()
        return value

    def signed(self, count: int) -> int:
        """A number that may be absent (0), then its sign."""
        if not self.read(1):
            return 0
        value = self.read(count)
        return -value if self.read(1) else value
