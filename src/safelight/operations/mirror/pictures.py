"""C3: several pictures in one JPEG file: found, and found again by their indices once each of them is mirrored.

Further pictures follow the first one: a gain map (Ultra HDR), another view (MPO), a preview. Two indices may point at
them: the multi-picture format's, with offsets and sizes, and an XMP directory, with lengths. Both are rewritten in
place; what lies between the pictures and behind them (a film, a maker's records) is copied.
CIPA DC-007 (MPF); https://developer.android.com/media/platform/hdr-image-format; ISO 21496-1.
"""

from __future__ import annotations

import itertools
import re
import struct
from typing import TYPE_CHECKING, NamedTuple

from safelight.errors import ImageError
from safelight.operations.mirror.exif import BYTE_ORDERS
from safelight.operations.mirror.scan import APP1, APP2, MAX_BODY, SOI, scan, segment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safelight.operations.mirror.scan import Scan, Segment

__all__ = ["Part", "joined", "split"]

_MPF, _XMP = b"MPF\0", b"http://ns.adobe.com/xap/1.0/\0"
_MAX_PICTURES = 100
_ENTRIES, _ENTRY_BYTES = 0xB002, 16
_KIND = 0x00FFFFFF  # of a picture's attributes: 0 is "undefined", what a gain map is
_PADDING = re.compile(rb"[\0\xff]*?(?=\xff\xd8\xff)")
_ITEM = re.compile(rb"<Container:Item\b")
_LENGTH = re.compile(rb"""Item:(Length|Padding)(?:\s*=\s*["']|>)(\d{1,10})""")


class Part(NamedTuple):
    """A stretch of the file: a picture, with what its headers say, or what lies behind one (None).

    `follows_first` says that it is stored as the first picture is, whatever orientation it tells: a gain map.
    `must_fit` that it has to keep its length, since records behind it may count on that.
    """

    start: int
    end: int
    found: Scan | None
    follows_first: bool = False
    must_fit: bool = False


class _Entry(NamedTuple):
    """A picture in the MPF index: the byte order, its place in the index, and the stretch of the file it names."""

    order: str
    at: int
    kind: int
    start: int
    end: int


class _Length(NamedTuple):
    """A number in the XMP directory: where it stands in the packet, and the stretch of the file that it means."""

    at: int
    digits: int
    start: int
    end: int


def split(image: bytes, first: Scan) -> list[Part]:
    """The file in its parts, in order, without gaps: the first picture, and what follows it."""
    parts = [Part(0, len(image) if first.end is None else first.end, first)]
    if parts[0].end == len(image):
        return parts
    kinds = {entry.start: entry.kind for entry in _index(image, first)}
    listed = kinds.keys() | {length.start for length in _lengths(image, first)}
    while (position := parts[-1].end) < len(image):
        start = _next_picture(image, position, kinds) if len(parts) < _MAX_PICTURES else None
        whole = None if start is None else _whole_picture(image, start)
        if start is None or whole is None:
            parts.append(Part(position, len(image), None))
            break
        found, end = whole
        if start > position:
            parts.append(Part(position, start, None))
        must_fit = start not in listed and bool(image[end:].strip(b"\0\xff"))
        parts.append(Part(start, end, found, follows_first=not kinds.get(start), must_fit=must_fit))
    return parts


def joined(image: bytes, first: Scan, parts: list[Part], written: list[bytes]) -> bytes:
    """The file of the written parts, its indices true again."""
    has_index = _named(image, first, APP2, _MPF) is not None
    if len(parts) == 1 and not has_index:
        return written[0]  # almost every file: nothing points at anything
    lengths = _lengths(image, first)
    out = [_with_lengths(lengths, parts, written), *written[1:]]
    is_listed = has_index or bool(lengths)
    if len(parts) == 2 and (out[1].startswith(b"\0") or (parts[1].found and not is_listed)):
        # What follows may be pointed at by its place in the file: the padding before it gives way.
        records = out[1].lstrip(b"\0")
        padding = len(out[1]) - len(records) - (len(out[0]) - parts[0].end)
        out[1] = bytes(max(padding, 0)) + records
    out[0] = _with_index(image, first, parts, out)
    return b"".join(out)


def _next_picture(image: bytes, position: int, kinds: dict[int, int]) -> int | None:
    """Where the next picture begins: behind nothing but padding, or where the index says so."""
    if (padding := _PADDING.match(image, position)) is not None:
        return padding.end()
    return min((start for start in kinds if start >= position and image.startswith(SOI, start)), default=None)


def _whole_picture(image: bytes, start: int) -> tuple[Scan, int] | None:
    """The headers of the picture that begins there, and where it ends; None if it is damaged or cut short."""
    try:
        found = scan(image[start:])
    except ImageError:
        return None
    return None if found.end is None else (found, start + found.end)


def _moved(start: int, end: int, parts: list[Part], written: list[bytes]) -> tuple[int, int] | None:
    """Where a part and its size have gone; None if they mean no part.

    A size may count the padding behind a picture; one that reaches into another picture never was true.
    """
    position = 0
    for number, (part, data) in enumerate(zip(parts, written, strict=True)):
        if part.start == start:
            behind = parts[number + 1 : number + 2]
            may_end = behind[0].end if behind and behind[0].found is None else part.end
            padding = end - part.end if part.end < end <= may_end else 0
            return position, position + len(data) + padding
        position += len(data)
    return None


def _named(image: bytes, found: Scan, marker: int, name: bytes) -> Segment | None:
    """The first segment of that marker whose body begins with that name."""
    return next((part for part in found.metadata if part.marker == marker and image.startswith(name, part.start)), None)


def _index(image: bytes, found: Scan) -> Iterator[_Entry]:
    """The entries of the MPF index; damaged, it has none. Its own offsets count from behind its name."""
    place = _named(image, found, APP2, _MPF)
    if place is None:
        return
    base = place.start + len(_MPF)
    index = image[base : place.end]
    order = BYTE_ORDERS.get(index[:2])
    if order is None:
        return
    try:
        (directory,) = struct.unpack_from(f"{order}I", index, 4)
        (count,) = struct.unpack_from(f"{order}H", index, directory)
        for at in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, _, length, offset = struct.unpack_from(f"{order}HHII", index, at)
            for number in range(min(length // _ENTRY_BYTES, _MAX_PICTURES) if tag == _ENTRIES else 0):
                at_entry = offset + _ENTRY_BYTES * number
                attributes, size, start = struct.unpack_from(f"{order}III", index, at_entry)
                start = base + start if start else 0
                yield _Entry(order, at_entry, attributes & _KIND, start, start + size)
    except struct.error:
        return


def _with_index(image: bytes, first: Scan, parts: list[Part], written: list[bytes]) -> bytes:
    """The first picture as written, with the offsets and sizes in its MPF index as they are now."""
    place = _named(written[0], scan(written[0]), APP2, _MPF)
    if place is None:
        return written[0]
    out, base = bytearray(written[0]), place.start + len(_MPF)
    for entry in _index(image, first):
        if (moved := _moved(entry.start, entry.end, parts, written)) is not None:
            offset = moved[0] - base if entry.start else 0
            struct.pack_into(f"{entry.order}II", out, base + entry.at + 4, moved[1] - moved[0], offset)
    return bytes(out)


def _lengths(image: bytes, found: Scan) -> list[_Length]:
    """The lengths in the XMP directory. Its items follow the first picture in their order, and end with the file."""
    place = _named(image, found, APP1, _XMP)
    if place is None or found.end is None:
        return []
    xmp = image[place.start : place.end]
    items = [match.start() for match in _ITEM.finditer(xmp)]
    stretches = [
        match
        for begin, end in itertools.pairwise([*items, len(xmp)])
        for match in sorted(_LENGTH.finditer(xmp, begin, end), key=lambda match: match[1])  # the padding comes last
    ]
    total = sum(int(match[2]) for match in stretches)
    position = max(len(image) - total, found.end)
    lengths = []
    for match in stretches:
        end = position + int(match[2])
        if match[1] == b"Length":
            lengths.append(_Length(match.start(2), len(match[2]), position, end))
        position = end
    return lengths


def _with_lengths(lengths: list[_Length], parts: list[Part], written: list[bytes]) -> bytes:
    """The first picture as written, with the lengths of the others in its XMP directory as they are now."""
    place = _named(written[0], scan(written[0]), APP1, _XMP)
    if place is None:
        return written[0]
    xmp = written[0][place.start : place.end]
    for length in reversed(lengths):
        if (moved := _moved(length.start, length.end, parts, written)) is not None:
            xmp = xmp[: length.at] + b"%d" % (moved[1] - moved[0]) + xmp[length.at + length.digits :]
    if len(xmp) > MAX_BODY:
        return written[0]
    return written[0][: place.start - 4] + segment(APP1, xmp) + written[0][place.end :]
