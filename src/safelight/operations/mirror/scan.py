"""C3: a JPEG's segments, read from marker to marker: the headers, which decide how it is mirrored. T.81, annex B."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from safelight import formats
from safelight.errors import ImageError
from safelight.operations.mirror import exif, turbojpeg
from safelight.operations.mirror.exif import Axis

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "ADOBE",
    "APP0",
    "APP1",
    "APP2",
    "APP13",
    "COMMENT",
    "DHT",
    "DQT",
    "EOI",
    "MAX_BODY",
    "SOF0",
    "SOF1",
    "SOI",
    "SOS",
    "Component",
    "Scan",
    "Segment",
    "adobe",
    "header",
    "is_metadata",
    "scan",
    "segment",
    "without",
]

MAX_SEGMENTS = 2_000
"""libjpeg keeps segments in a list that it walks for each new one: 2,000 take 3 ms, 32,000 almost 1 s."""

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
MAX_BODY = 65_533
"""Bytes in a segment behind its length."""

SOF0, SOF1, DHT, SOS, DQT = 0xC0, 0xC1, 0xC4, 0xDA, 0xDB
APP0, APP1, APP2, APP13, ADOBE, COMMENT = 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE

# Fill bytes may precede a marker; within entropy-coded data FF is followed by 0 or is a restart marker (D0 to D7).
_MARKER = re.compile(rb"\xff[^\0\xd0-\xd7\xff]")
_FRAMES = {SOF0: 0, SOF1: 0, 0xC2: turbojpeg.PROGRESSIVE, 0xC9: turbojpeg.ARITHMETIC}
_FRAMES[0xCA] = turbojpeg.PROGRESSIVE | turbojpeg.ARITHMETIC
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF)  # lossless and hierarchical ones
_ALONE = (0x01, 0xD8)  # markers without a body
_END = 0xD9

# The code lengths of the two AC tables of T.81, annex K.3, which libjpeg uses when it does not make its own.
_STANDARD_LENGTHS = {
    bytes.fromhex("0002010303020403050504040000017d"),
    bytes.fromhex("00020102040403040705040400010277"),
}


class Component(NamedTuple):
    """One colour component: its id, sampling factors and quantisation table."""

    id: int
    across: int
    down: int
    table: int


class Segment(NamedTuple):
    """A segment: its marker, and where its body lies in the file (the marker and the length are the 4 bytes before)."""

    marker: int
    start: int
    end: int


@dataclass(slots=True)
class Scan:
    """What a JPEG's headers say."""

    width: int = 0
    height: int = 0
    components: tuple[Component, ...] = ()
    kind: int = 0  # turbojpeg.PROGRESSIVE | ARITHMETIC | OPTIMISED
    is_extended: bool = False  # sequential, but not called baseline
    tables: dict[int, bytes] = field(default_factory=dict)  # quantisation: 64 values in zigzag order, of 1 or 2 bytes
    exif: exif.Exif = field(default_factory=exif.Exif)
    metadata: list[Segment] = field(default_factory=list)
    has_pixels: bool = False
    end: int | None = None  # behind the EOI marker; None if there is none

    @property
    def largest(self) -> tuple[int, int]:
        """The largest sampling factors, across and down; those of a single component mean nothing (A.2.2)."""
        if len(self.components) == 1:
            return 1, 1
        return max(part.across for part in self.components), max(part.down for part in self.components)

    def is_aligned(self, axis: Axis) -> bool:
        """Whether the edge that is moved is a whole number of MCUs (of a picture in grey: of blocks)."""
        across, down = self.largest
        return (self.width % (8 * across) if axis is Axis.HORIZONTAL else self.height % (8 * down)) == 0


def scan(image: bytes) -> Scan:
    """Read the headers up to the end of the first picture. Raises `ImageError` for what no decoder would take."""
    found = Scan()
    scans = 0
    has_exif = False
    try:
        for segments, (marker, start, end) in enumerate(_segments(image)):
            if marker == SOS:
                scans += 1
                found.has_pixels = True
            elif marker == _END:
                found.end = end
            elif is_metadata(marker):
                found.metadata.append(Segment(marker, start, end))
                if marker == APP1 and not has_exif and image.startswith(b"Exif\0\0", start):
                    found.exif, has_exif = exif.read(image[start:end]), True
            else:
                _read_header(found, marker, image[start:end])
            if segments > MAX_SEGMENTS or scans > turbojpeg.MAX_SCANS:
                raise ImageError(f"The JPEG has more than {MAX_SEGMENTS:,} segments or {turbojpeg.MAX_SCANS} scans.")
    except IndexError:
        raise ImageError("The JPEG is damaged or cut short: a header says too little.") from None
    if not (found.has_pixels and found.components):
        raise ImageError("The JPEG has no picture: it is damaged or cut short.")
    formats.check_dimensions(found.width, found.height)
    return found


def header(jpeg: bytes) -> Iterator[Segment]:
    """The segments of a JPEG up to its first scan's, while each follows on the one before without fill bytes."""
    position = len(SOI)
    while position + 4 <= len(jpeg) and jpeg[position] == 0xFF:
        marker, end = jpeg[position + 1], position + 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
        yield Segment(marker, position + 4, end)
        if marker == SOS:
            return
        position = end


def is_metadata(marker: int) -> bool:
    """Whether it is that of an APPn or a comment."""
    return marker == COMMENT or marker & 0xF0 == APP0


def without(jpeg: bytes, segments: Iterable[Segment]) -> bytes:
    """The JPEG without these segments, which are in their order."""
    out, position = [], 0
    for _, start, end in segments:
        out.append(jpeg[position : start - 4])
        position = end
    return b"".join([*out, jpeg[position:]])


def segment(marker: int, body: bytes) -> bytes:
    """A segment as it is written."""
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def adobe(transform: int) -> bytes:
    """Adobe's segment: 0 says that the components are the colours, 1 that they are YCbCr."""
    return segment(ADOBE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))


def _segments(image: bytes) -> Iterator[Segment]:
    """Every segment up to the end of the picture."""
    position = 2
    while (match := _MARKER.search(image, position)) is not None:
        position = match.end()
        marker = image[position - 1]
        if marker == _END:
            yield Segment(marker, position, position)
            return
        if marker not in _ALONE:
            start, position = position + 2, position + (image[position] << 8 | image[position + 1])
            yield Segment(marker, start, position)


def _read_header(found: Scan, marker: int, body: bytes) -> None:
    if marker == DHT:
        if not found.kind & turbojpeg.OPTIMISED and _is_optimised(body):
            found.kind |= turbojpeg.OPTIMISED
    elif marker == DQT:
        _read_tables(found, body)
    elif marker in _FRAMES and not found.components:
        if body[0] != 8:
            raise ImageError(f"JPEGs of {body[0]} bits a sample cannot be processed, only those of 8.")
        found.kind |= _FRAMES[marker]
        found.is_extended = marker == SOF1
        found.height, found.width = body[1] << 8 | body[2], body[3] << 8 | body[4]
        found.components = tuple(
            Component(body[at], body[at + 1] >> 4 or 1, body[at + 1] & 15 or 1, body[at + 2])
            for at in range(6, 6 + 3 * body[5], 3)
        )
    elif marker in _OTHER_FRAMES:
        raise ImageError("Lossless and hierarchical JPEGs cannot be processed.")


def _read_tables(found: Scan, body: bytes) -> None:
    at = 0
    while at < len(body):
        number, length = body[at] & 15, 128 if body[at] >> 4 else 64
        found.tables.setdefault(number, body[at + 1 : at + 1 + length])
        at += 1 + length


def _is_optimised(tables: bytes) -> bool:
    """Whether a DHT segment holds an AC table (class 1) other than the two standard ones."""
    at = 0
    while at + 17 <= len(tables):
        lengths = tables[at + 1 : at + 17]
        if tables[at] & 0x10 and lengths not in _STANDARD_LENGTHS:
            return True
        at += 17 + sum(lengths)
    return False
