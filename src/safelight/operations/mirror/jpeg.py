"""C3: JPEGs mirrored in the DCT domain, losslessly, where the mirrored edge is a whole number of MCUs.

The source's headers are read once (`Scan`), from marker to marker; they decide everything: which axis to flip (EXIF
orientation), whether that edge allows it, and which kind of JPEG to write. Where it does not, or no libjpeg-turbo is
installed, the picture is decoded and encoded again with its own quantisation tables, subsampling and kind of scan.
Markers: ITU-T T.81, annex B.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import JpegImagePlugin

from safelight import formats
from safelight.errors import ImageError
from safelight.operations import Result
from safelight.operations.mirror import exif, pixels, turbojpeg
from safelight.operations.mirror.exif import Axis

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

__all__ = ["Component", "Scan", "mirror", "scan"]

MAX_SEGMENTS = 2_000
"""libjpeg keeps segments in a list that it walks for each new one: 2,000 take 3 ms, 32,000 almost 1 s."""

MAX_SCANS = 500
"""Each scan of a progressive picture is a pass over all of it; real ones have about 10."""

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
# Fill bytes may precede a marker; within entropy-coded data FF is followed by 0 or is a restart marker (D0 to D7).
_MARKER = re.compile(rb"\xff[^\0\xd0-\xd7\xff]")
_FRAMES = {0xC0: 0, 0xC1: 0, 0xC2: turbojpeg.PROGRESSIVE, 0xC9: turbojpeg.ARITHMETIC}
_FRAMES[0xCA] = turbojpeg.PROGRESSIVE | turbojpeg.ARITHMETIC
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF)  # lossless and hierarchical ones
_ALONE = (0x01, 0xD8)  # markers without a body
_DHT, _END, _SOS, _APP0, _APP1, _APP2, _APP14, _COM = 0xC4, 0xD9, 0xDA, 0xE0, 0xE1, 0xE2, 0xEE, 0xFE

# The code lengths of the two AC tables of T.81, annex K.3, which libjpeg uses when it does not make its own.
_STANDARD_LENGTHS = {
    bytes.fromhex("0002010303020403050504040000017d"),
    bytes.fromhex("00020102040403040705040400010277"),
}


@dataclass(frozen=True, slots=True)
class Component:
    """One colour component: its id, sampling factors and quantisation table."""

    id: int
    across: int
    down: int
    table: int


@dataclass(slots=True)
class Scan:
    """What a JPEG's headers say. Ranges are (start, end) in the file, markers included."""

    width: int = 0
    height: int = 0
    components: tuple[Component, ...] = ()
    kind: int = 0  # turbojpeg.PROGRESSIVE | ARITHMETIC | OPTIMISED
    exif: exif.Exif = field(default_factory=exif.Exif)
    exif_at: tuple[int, int] | None = None
    adobe_transform: int | None = None
    jfif: bool = False
    metadata: list[tuple[int, int, int]] = field(default_factory=list)  # (marker, start, end) of APPn and comments
    dropped: list[tuple[int, int]] = field(default_factory=list)  # previews and indices that would contradict it
    several: bool = False  # pictures, by the index of a multi-picture file
    has_pixels: bool = False
    end: int | None = None  # behind the EOI marker; None if there is none

    def is_aligned(self, axis: Axis) -> bool:
        """Whether the edge that is moved is a whole number of MCUs (of a picture in grey: of blocks)."""
        single = len(self.components) == 1
        if axis is Axis.HORIZONTAL:
            return self.width % (8 if single else 8 * max(part.across for part in self.components)) == 0
        return self.height % (8 if single else 8 * max(part.down for part in self.components)) == 0


def mirror(image: bytes) -> Result:
    """A JPEG flipped left-right as displayed; its other pictures (of a multi-picture file) are dropped, with a note."""
    found = scan(image)
    notes = {}
    if found.several:
        notes["mirror-dropped"] = "extra pictures"
    elif found.end is not None and image[found.end : found.end + 4096].strip(b"\0\r\n\xff"):
        notes["mirror-dropped"] = "data after the picture"
    source, axis, library = _primary(image, found), found.exif.axis, turbojpeg.find()
    if found.end is None and library is not None:
        source += _EOI  # that alone may be missing; whatever else is, the library warns of (but Pillow does not)
    try:
        if library is not None and found.is_aligned(axis):
            return Result(library.flip(source, axis, found.kind), notes={"mirror": "lossless", **notes})
        if library is not None:
            library.check(source)  # Pillow would fill what is missing with grey
    except turbojpeg.DamageError as error:
        raise ImageError(f"The JPEG is damaged or cut short ({error}).") from error
    return Result(_reencoded(source, axis), notes={"mirror": "reencoded", **notes})


def scan(image: bytes) -> Scan:
    """Read the headers up to the end of the first picture. Raises `ImageError` for what no decoder would take."""
    found = Scan()
    scans = 0
    try:
        for segments, (marker, start, end) in enumerate(_segments(image)):
            if marker == _SOS:
                scans += 1
                found.has_pixels = True
            elif marker == _END:
                found.end = end
            elif not found.has_pixels or marker == _DHT:
                _read_segment(found, marker, image[start:end], start, end)
            if segments > MAX_SEGMENTS or scans > MAX_SCANS:
                raise ImageError(f"The JPEG has more than {MAX_SEGMENTS:,} segments or {MAX_SCANS} scans.")
    except IndexError:
        raise ImageError from None
    if not (found.has_pixels and found.components):
        raise ImageError("The JPEG has no picture: it is damaged or cut short.")
    formats.check_dimensions(found.width, found.height)
    return found


def _segments(image: bytes) -> Iterator[tuple[int, int, int]]:
    """Every segment up to the end of the picture: its marker, where its body begins and ends."""
    position = 2
    while (match := _MARKER.search(image, position)) is not None:
        position = match.end()
        marker = image[position - 1]
        if marker == _END:
            yield marker, position, position
            return
        if marker not in _ALONE:
            start, position = position + 2, position + (image[position] << 8 | image[position + 1])
            yield marker, start, position


def _read_segment(found: Scan, marker: int, body: bytes, start: int, end: int) -> None:
    if marker == _DHT:
        if not found.kind & turbojpeg.OPTIMISED and _is_optimised(body):
            found.kind |= turbojpeg.OPTIMISED
    elif marker in _FRAMES and not found.components:
        if body[0] != 8:
            raise ImageError(f"JPEGs of {body[0]} bits a sample cannot be processed, only those of 8.")
        found.kind |= _FRAMES[marker]
        found.height, found.width = body[1] << 8 | body[2], body[3] << 8 | body[4]
        found.components = tuple(
            Component(body[at], body[at + 1] >> 4 or 1, body[at + 1] & 15 or 1, body[at + 2])
            for at in range(6, 6 + 3 * body[5], 3)
        )
    elif marker in _OTHER_FRAMES:
        raise ImageError("Lossless and hierarchical JPEGs cannot be processed.")
    elif marker == _COM or marker & 0xF0 == _APP0:
        _read_metadata(found, marker, body, start, end)


def _read_metadata(found: Scan, marker: int, body: bytes, start: int, end: int) -> None:
    found.metadata.append((marker, start - 4, end))
    if marker == _APP0 and body.startswith(b"JFIF\0"):
        found.jfif = True
    elif marker == _APP1 and found.exif_at is None and body.startswith(b"Exif\0\0"):
        found.exif, found.exif_at = exif.read(body), (start, end)
    elif marker == _APP14 and body.startswith(b"Adobe") and len(body) >= 12:
        found.adobe_transform = body[11]
    elif (marker == _APP2 and body.startswith(b"MPF\0")) or (marker == _APP0 and body.startswith(b"JFXX\0")):
        found.several = found.several or marker == _APP2
        found.dropped.append((start - 4, end))
        found.metadata.pop()


def _is_optimised(tables: bytes) -> bool:
    """Whether a DHT segment holds an AC table (class 1) other than the two standard ones."""
    at = 0
    while at + 17 <= len(tables):
        lengths = tables[at + 1 : at + 17]
        if tables[at] & 0x10 and lengths not in _STANDARD_LENGTHS:
            return True
        at += 17 + sum(lengths)
    return False


def _primary(image: bytes, found: Scan) -> bytes:
    """The first picture alone, without a preview that would contradict it mirrored."""
    if found.exif.thumbnail_at is not None and found.exif_at is not None:
        start, end = found.exif_at
        image = image[:start] + exif.without_thumbnail(image[start:end]) + image[end:]
    if found.end is not None and found.end != len(image):
        image = image[: found.end]
    for start, end in reversed(found.dropped):
        image = image[:start] + image[end:]
    return image


def _reencoded(source: bytes, axis: Axis) -> bytes:
    """Decoded, flipped, encoded like the source, its metadata put back byte for byte."""
    found = scan(source)
    kept = [(marker, source[start:end]) for marker, start, end in found.metadata]
    bare = source
    for marker, start, end in reversed(found.metadata):
        if marker not in (_APP0, _APP14):
            bare = bare[:start] + bare[end:]
    out = io.BytesIO()
    try:
        with pixels.open_picture(bare, "JPEG") as picture:
            rgb = len(found.components) == 3 and _is_rgb(found)
            if len(found.components) == 3 and not rgb:
                picture.draft("YCbCr", picture.size)  # no rounding through RGB and back
            sampling = JpegImagePlugin.get_sampling(picture) if picture.mode == "YCbCr" else 0
            picture.transpose(pixels.TRANSPOSE[axis]).save(
                out,
                "JPEG",
                qtables=_tables(picture, found),
                subsampling=max(sampling, 0),  # of those that Pillow cannot write (4:1:1, 4:4:0), 4:4:4 keeps most
                progressive=bool(found.kind & turbojpeg.PROGRESSIVE),
                optimize=bool(found.kind & turbojpeg.OPTIMISED),
                keep_rgb=rgb,
            )
    except pixels.DECODER_ERRORS as error:
        raise ImageError from error
    return _with_metadata(out.getvalue(), kept)


def _is_rgb(found: Scan) -> bool:
    """What libjpeg's `default_decompress_parms` takes three components for."""
    if found.jfif:
        return False
    if found.adobe_transform is not None:
        return found.adobe_transform == 0
    return bytes(part.id for part in found.components) == b"RGB"


def _tables(picture: Image.Image, found: Scan) -> list[list[int]]:
    """The quantisation tables in the order of the components, as few as will do (Pillow repeats the last)."""
    tables: dict[int, list[int]] = picture.quantization  # type: ignore[attr-defined]
    # Of four components (CMYK, or YCCK which Pillow writes as CMYK) all are brightness: the first one's table.
    numbers = [part.table for part in found.components][: 1 if len(found.components) == 4 else 3]
    while len(numbers) > 1 and numbers[-1] == numbers[-2]:
        numbers.pop()
    return [tables[number] for number in numbers]


def _with_metadata(encoded: bytes, kept: list[tuple[int, bytes]]) -> bytes:
    """The source's APPn and comments instead of the encoder's, but for an Adobe segment that says what it wrote."""
    written = scan(encoded)
    body_at = max((end for _, _, end in written.metadata), default=2)
    adobe = [encoded[start:end] for marker, start, end in written.metadata if marker == _APP14]
    jfif = [segment for marker, segment in kept if marker == _APP0]
    others = [segment for marker, segment in kept if marker != _APP0 and not (adobe and marker == _APP14)]
    return b"".join([_SOI, *jfif, *adobe, *others, encoded[body_at:]])
