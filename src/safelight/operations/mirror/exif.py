"""C3: the two things in EXIF metadata that matter to a mirror: the orientation, and the thumbnail.

EXIF is a TIFF file of its own: a byte order, the offset of a first directory (IFD0, with the orientation) and behind
that directory the offset of a second one (IFD1, which describes the thumbnail). Nothing else is moved: a thumbnail is
flipped where it stands, or dropped by setting that second offset to 0. Exif 3.0, section 4.6 (CIPA DC-008).
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["BYTE_ORDERS", "Axis", "Exif", "read", "with_thumbnail", "without_thumbnail"]

BYTE_ORDERS = {b"II": "<", b"MM": ">"}
"""How a TIFF begins, and whatever is built like one -> the order of bytes in its numbers, as `struct` has it."""

_PREFIX = b"Exif\0\0"  # begins it in a JPEG always, in WebP and PNG sometimes
_ORIENTATION, _THUMBNAIL, _THUMBNAIL_BYTES = 0x0112, 0x0201, 0x0202
_SHORT, _LONG = 3, 4


class Axis(enum.Enum):
    """How the picture as stored must be flipped so that the picture as displayed is flipped left-right."""

    HORIZONTAL = "horizontal"
    VERTICAL = "vertical"

    @classmethod
    def of(cls, orientation: int) -> Axis:
        """Orientations 5 to 8 swap the axes when the picture is displayed; the tag stays true either way."""
        return cls.VERTICAL if 5 <= orientation <= 8 else cls.HORIZONTAL


class Exif(NamedTuple):
    """The orientation (1 to 8; 0 if there is none), and where the offset of the thumbnail's directory stands."""

    orientation: int = 0
    thumbnail_at: int | None = None

    @property
    def axis(self) -> Axis:
        """Along which the picture is to be flipped."""
        return Axis.of(self.orientation)


class _Entry(NamedTuple):
    tag: int
    value: int
    at: int  # where the value stands
    code: str  # how it is packed


def read(exif: bytes) -> Exif:
    """What a segment or chunk says; damaged metadata says nothing, as in every viewer."""
    order, start = _order(exif)
    if not order:
        return Exif()
    try:
        entries = list(_directory(exif, order, start, start + 4))
        orientation = next((entry.value for entry in entries if (entry.tag, entry.code) == (_ORIENTATION, "H")), 0)
        next_at: int | None = _behind(exif, order, start, start + 4)
    except struct.error:
        return Exif()
    try:  # a directory that counts wrongly has something else there
        if not next_at or not next_at < _behind(exif, order, start, next_at) <= len(exif):
            next_at = None
    except struct.error:
        next_at = None
    return Exif(orientation if orientation <= 8 else 0, next_at)


def without_thumbnail(exif: bytes) -> bytes:
    """The same metadata, which no longer points at a thumbnail that contradicts the mirrored picture."""
    at = read(exif).thumbnail_at
    return exif if at is None else exif[:at] + bytes(4) + exif[at + 4 :]


def with_thumbnail(exif: bytes, flip: Callable[[bytes], bytes | None], limit: int) -> bytes:
    """The same metadata, its thumbnail flipped by `flip`; dropped where that says None or nothing has room.

    A flipped JPEG may be some bytes longer; then there is room if nothing but zeros stands behind it, up to `limit`
    bytes in all.
    """
    order, start = _order(exif)
    at = read(exif).thumbnail_at
    if at is None:
        return exif
    try:
        entries = {entry.tag: entry for entry in _directory(exif, order, start, at)}
    except struct.error:
        entries = {}
    if not {_THUMBNAIL, _THUMBNAIL_BYTES} <= entries.keys():
        return without_thumbnail(exif)
    length = entries[_THUMBNAIL_BYTES]
    first = start + entries[_THUMBNAIL].value
    last = first + length.value
    flipped = flip(exif[first:last]) if last <= len(exif) else None
    behind = exif[last:] if flipped is None or len(flipped) <= length.value else exif[last:].lstrip(b"\0")
    if flipped is None or (len(flipped) > length.value and behind) or first + len(flipped) > limit:
        return without_thumbnail(exif)
    size = struct.pack(order + length.code, len(flipped))
    head = exif[: length.at] + size + exif[length.at + len(size) : first]
    return head + flipped.ljust(length.value, b"\0") + behind


def _order(exif: bytes) -> tuple[str, int]:
    """The byte order ("" if this is no EXIF), and where offsets count from."""
    start = len(_PREFIX) if exif.startswith(_PREFIX) else 0
    return BYTE_ORDERS.get(exif[start : start + 2], ""), start


def _directory(exif: bytes, order: str, start: int, offset_at: int) -> Iterator[_Entry]:
    """The numbers in the directory whose offset stands at `offset_at`; one that is cut short gives what it has."""
    (offset,) = struct.unpack_from(f"{order}I", exif, offset_at)
    (count,) = struct.unpack_from(f"{order}H", exif, start + offset)
    for at in range(start + offset + 2, min(start + offset + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, values = struct.unpack_from(f"{order}HHI", exif, at)
        if values == 1 and kind in (_SHORT, _LONG):
            code = "H" if kind == _SHORT else "I"
            (value,) = struct.unpack_from(order + code, exif, at + 8)
            yield _Entry(tag, value, at + 8, code)


def _behind(exif: bytes, order: str, start: int, offset_at: int) -> int:
    (offset,) = struct.unpack_from(f"{order}I", exif, offset_at)
    (count,) = struct.unpack_from(f"{order}H", exif, start + offset)
    return int(start + offset + 2 + 12 * count)
