"""C3: the two things in EXIF metadata that matter to a mirror: the orientation, and the thumbnail.

EXIF is a TIFF file of its own: a byte order, the offset of a first directory (IFD0, with the orientation) and behind
that directory the offset of a second one (IFD1, which describes the thumbnail). Nothing is written anew: the
thumbnail is dropped by setting that second offset to 0, which moves no other byte.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

__all__ = ["Axis", "Exif", "read", "without_thumbnail"]

_PREFIX = b"Exif\0\0"  # begins it in a JPEG always, in WebP and PNG sometimes
_ORIENTATION = 0x0112
_SHORT = 3


class Axis(enum.Enum):
    """How the picture as stored must be flipped so that the picture as displayed is flipped left-right."""

    HORIZONTAL = "horizontal"
    VERTICAL = "vertical"


class Exif(NamedTuple):
    """The orientation (1 to 8), and where the offset of the thumbnail's directory stands, if there is one."""

    orientation: int = 1
    thumbnail_at: int | None = None

    @property
    def axis(self) -> Axis:
        """Orientations 5 to 8 swap the axes when the picture is displayed; the tag stays true either way."""
        return Axis.VERTICAL if self.orientation >= 5 else Axis.HORIZONTAL


def read(exif: bytes) -> Exif:
    """What a segment or chunk says; damaged metadata says nothing, as in every viewer."""
    start = len(_PREFIX) if exif.startswith(_PREFIX) else 0
    order = {b"II": "<", b"MM": ">"}.get(exif[start : start + 2])
    if order is None:
        return Exif()
    try:
        (offset,) = struct.unpack_from(f"{order}I", exif, start + 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, start + offset)
        first = start + offset + 2
        orientation = 1
        for tag, kind, value in struct.iter_unpack(f"{order}HH4xH2x", exif[first : first + 12 * entries]):
            if tag == _ORIENTATION and kind == _SHORT and 1 <= value <= 8:
                orientation = value
                break
        next_at = first + 12 * entries
        (next_directory,) = struct.unpack_from(f"{order}I", exif, next_at)
    except struct.error:
        return Exif()
    return Exif(orientation, next_at if next_directory else None)


def without_thumbnail(exif: bytes) -> bytes:
    """The same metadata, which no longer points at a thumbnail that contradicts the mirrored picture."""
    at = read(exif).thumbnail_at
    return exif if at is None else exif[:at] + bytes(4) + exif[at + 4 :]
