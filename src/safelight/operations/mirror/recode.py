"""C3: a JPEG whose edge is not aligned, encoded again as nearly as JPEG allows.

No colour is converted and no chroma is scaled up and down again: each component is decoded to its own samples,
flipped, and encoded alone, as a grey JPEG with its own quantisation table. Put together, these are one JPEG of the
source's sampling with a scan for each component, which libjpeg-turbo rewrites, losslessly, as the source's kind of
scan. Rounding each coefficient to the nearest is the least error that the source's tables allow.
"""

from __future__ import annotations

import contextlib
import io
import struct
from typing import TYPE_CHECKING

from PIL import Image, ImageChops, JpegImagePlugin

from safelight.errors import ImageError
from safelight.operations.mirror import pixels, turbojpeg
from safelight.operations.mirror.exif import Axis
from safelight.operations.mirror.scan import DHT, DQT, EOI, SOF0, SOF1, SOI, SOS, adobe, header, segment

if TYPE_CHECKING:
    from safelight.operations.mirror.scan import Component, Scan

__all__ = ["recode"]


def recode(bare: bytes, found: Scan, axis: Axis) -> bytes:
    """The picture `bare` (a JPEG without metadata) flipped.

    Raises `turbojpeg.DamageError`, and `ImageError` for what Pillow cannot read.
    """
    sizes = [_size(found, part) for part in found.components]
    try:
        planes = _planes(bare, found, sizes)
        tables = [found.tables[part.table] for part in found.components]
        flipped = (_flipped(*both, found, axis) for both in zip(planes, found.components, strict=True))
        scans = [_encoded(*both) for both in zip(flipped, tables, strict=True)]
    except pixels.DECODER_ERRORS as error:
        raise ImageError from error
    joined = _joined(found, scans)
    library = turbojpeg.find(found.kind)
    try:
        return joined if library is None else library.rewritten(joined, found.kind)
    except turbojpeg.UnsupportedError:
        return joined


def _size(found: Scan, part: Component) -> tuple[int, int]:
    """A component's own width and height in samples (T.81, A.1.1)."""
    if len(found.components) == 1:
        return found.width, found.height
    across, down = found.largest
    return -(-found.width * part.across // across), -(-found.height * part.down // down)


def _planes(bare: bytes, found: Scan, sizes: list[tuple[int, int]]) -> list[Image.Image]:
    library = turbojpeg.find(found.kind)
    if library is not None:
        across, down = found.largest
        # The library pads a component to whole groups of samples; its rows may be longer than the component's.
        padded = [
            (-(-found.width // across) * part.across, -(-found.height // down) * part.down) for part in found.components
        ]
        if len(found.components) == 1:
            padded = sizes
        try:
            planes = library.planes(bare, padded)
        except turbojpeg.UnsupportedError:
            _check(bare)  # Pillow would fill what is missing with grey
        else:
            return [
                Image.frombytes("L", room, plane).crop((0, 0, *size))
                for plane, room, size in zip(planes, padded, sizes, strict=True)
            ]
    return _planes_by_pillow(bare, found, sizes)


def _check(bare: bytes) -> None:
    newest = turbojpeg.find(turbojpeg.OPTIMISED)
    with contextlib.suppress(turbojpeg.UnsupportedError):
        if newest is not None:
            newest.check(bare)


def _planes_by_pillow(bare: bytes, found: Scan, sizes: list[tuple[int, int]]) -> list[Image.Image]:
    """The same where no library can: scaled up by Pillow, and scaled down again."""
    if len(found.components) not in (1, 3, 4):
        raise ImageError(f"JPEGs of {len(found.components)} components cannot be processed.")
    if len(found.components) > 1:
        bare = SOI + adobe(0) + bare[len(SOI) :]
    with pixels.open_picture(bare, "JPEG") as picture:
        planes = list(picture.split())
    if len(planes) == 4:  # Pillow reads Adobe's CMYK as inverted
        planes = [ImageChops.invert(plane) for plane in planes]
    return [
        plane if plane.size == size else plane.resize(size, Image.Resampling.BOX)
        for plane, size in zip(planes, sizes, strict=True)
    ]


def _flipped(plane: Image.Image, part: Component, found: Scan, axis: Axis) -> Image.Image:
    """A component flipped; where its last sample reaches over the picture's edge, moved by the part that does."""
    flipped = plane.transpose(pixels.TRANSPOSE[axis])
    across, down = found.largest
    if len(found.components) == 1:
        return flipped
    if axis is Axis.HORIZONTAL:
        return _moved(flipped, flipped.width - found.width * part.across / across)
    turned = flipped.transpose(Image.Transpose.TRANSPOSE)
    return _moved(turned, turned.width - found.height * part.down / down).transpose(Image.Transpose.TRANSPOSE)


def _moved(plane: Image.Image, by: float) -> Image.Image:
    """A plane moved to the left by a part of a sample; at its right edge the last one is there again."""
    if not by:
        return plane
    width, height = plane.size
    wide = Image.new("L", (width + 1, height))
    wide.paste(plane, (0, 0))
    wide.paste(plane.crop((width - 1, 0, width, height)), (width, 0))
    return wide.resize((width, height), Image.Resampling.BICUBIC, (by, 0, by + width, height))


def _encoded(plane: Image.Image, table: bytes) -> list[bytes]:
    """A component as a grey JPEG: its Huffman tables' segments, and last its entropy-coded data."""
    values = struct.unpack(f">64{'H' if len(table) == 128 else 'B'}", table)
    out = io.BytesIO()
    plane.save(out, "JPEG", qtables=[[values[at] for at in JpegImagePlugin.zigzag_index]])
    jpeg = out.getvalue()
    parts = []
    for marker, start, end in header(jpeg):
        if marker == DHT:
            parts.append(segment(DHT, jpeg[start:end]))
        elif marker == SOS:
            parts.append(jpeg[end : -len(EOI)])
    return parts


def _joined(found: Scan, scans: list[list[bytes]]) -> bytes:
    """One JPEG, each component in a scan of its own."""
    numbers = sorted({part.table for part in found.components})
    deep = any(len(found.tables[number]) == 128 for number in numbers)
    out = [SOI]
    for number in numbers:
        table = found.tables[number]
        out.append(segment(DQT, bytes([number | (len(table) == 128) << 4]) + table))
    ids = [part.id for part in found.components]
    if len(set(ids)) < len(ids):  # only a scan of all components can tell them apart by their order
        ids = list(range(1, len(ids) + 1))
    parts = b"".join(
        bytes([number, part.across << 4 | part.down, part.table])
        for number, part in zip(ids, found.components, strict=True)
    )
    frame = struct.pack(">BHHB", 8, found.height, found.width, len(found.components)) + parts
    out.append(segment(SOF1 if deep else SOF0, frame))
    for number, (*tables, data) in zip(ids, scans, strict=True):
        out += [*tables, segment(SOS, bytes([1, number, 0, 0, 63, 0])), data]
    return b"".join([*out, EOI])
