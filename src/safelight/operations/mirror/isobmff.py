"""C3: the boxes of an AVIF file (ISO/IEC 14496-12 and 23008-12): read, and changed without moving what they point at.

A box that grows moves all that lies behind it, and its parents with it. So changes are collected as `Edits`, from
which every place that holds a file offset is made true before they are applied together.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from safelight.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Box", "Edits", "Extent", "boxes", "extents", "find", "full", "shift_chunks", "shift_extents"]

_TOP_LEVEL = (b"ftyp", b"meta", b"moov", b"mdat", b"moof", b"mini")
_MAX_BOXES = 10_000
_MAX_EXTENTS = 100_000
_DAMAGED = "The AVIF is damaged or cut short: a box says too much or too little."


class Box(NamedTuple):
    """A box: its type, where it begins, its body begins, and it ends; `parents` from the outermost to its own."""

    kind: bytes
    start: int
    body: int
    end: int
    parents: tuple[Box, ...] = ()


def boxes(data: bytes, parents: Sequence[Box] = (), skip: int = 0) -> Iterator[Box]:
    """The boxes inside the last of `parents` (or of the file), `skip` bytes into its body."""
    position, stop = (parents[-1].body + skip, parents[-1].end) if parents else (0, len(data))
    for _ in range(_MAX_BOXES):
        if position + 8 > stop:
            return
        size, kind = struct.unpack_from(">I4s", data, position)
        body = position + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, body)
            body += 8
        end = position + size if size else stop
        if not body <= end <= stop:
            if not parents and kind not in _TOP_LEVEL:
                return  # stray bytes behind the last box, which readers skip
            raise ImageError(_DAMAGED)
        yield Box(kind, position, body, end, tuple(parents))
        position = end
    raise ImageError(f"The AVIF has more than {_MAX_BOXES:,} boxes.")


def find(data: bytes, parents: Sequence[Box], *path: bytes) -> Box | None:
    """The first box along a path of types; the bodies of `meta` and `stsd` begin behind a header of their own."""
    for kind in path:
        skip = {b"meta": 4, b"stsd": 8}.get(parents[-1].kind, 0) if parents else 0
        found = next((box for box in boxes(data, parents, skip) if box.kind == kind), None)
        if found is None:
            return None
        parents = (*parents, found)
    return parents[-1]


def full(data: bytes, box: Box) -> tuple[int, int, int]:
    """A full box's version and flags, and where the rest of it begins."""
    (head,) = struct.unpack_from(">I", data, box.body)
    return head >> 24, head & 0xFFFFFF, box.body + 4


@dataclass
class Edits:
    """Changes to a file: stretches and what replaces them."""

    changes: list[tuple[int, int, bytes]] = field(default_factory=list)

    def replace(self, data: bytes, box: Box, new: bytes) -> None:
        """Put `new` in the place of a box, and make its parents fit."""
        grown = len(new) - (box.end - box.start)
        self.changes.append((box.start, box.end, new))
        for parent in box.parents:
            (size,) = struct.unpack_from(">I", data, parent.start)
            if size > 1:
                self._add(parent.start, 4, size, grown)
            elif size == 1:
                self._add(parent.start + 8, 8, parent.end - parent.start, grown)

    def _add(self, place: int, width: int, value: int, more: int) -> None:
        for number, (start, end, new) in enumerate(self.changes):
            if start == place:  # a parent that has grown already
                self.changes[number] = (start, end, (int.from_bytes(new, "big") + more).to_bytes(width, "big"))
                return
        self.changes.append((place, place + width, (value + more).to_bytes(width, "big")))

    def moved(self, place: int) -> int:
        """How far what stands at a place of the source has moved."""
        return sum(len(new) - (end - start) for start, end, new in self.changes if end <= place)

    def put(self, place: int, width: int, value: int) -> None:
        """A number of another value in its place."""
        self.changes.append((place, place + width, value.to_bytes(width, "big")))

    def apply(self, data: bytes) -> bytes:
        """The file with all changes made. Raises `ImageError` where two of them meet: then boxes share their places."""
        out, position = [], 0
        for start, end, new in sorted(self.changes):
            if start < position:
                raise ImageError(_DAMAGED)
            out += [data[position:start], new]
            position = end
        return b"".join([*out, data[position:]])


class Extent(NamedTuple):
    """A stretch of an item's data, and the fields that tell its offset: where they stand, how wide they are."""

    item: int
    method: int  # of construction: 0 counts from the file's beginning, 1 from the body of `idat`
    base: int
    offset: int
    length: int
    base_at: tuple[int, int]
    offset_at: tuple[int, int]


def extents(data: bytes, iloc: Box) -> list[Extent]:
    """All extents of all items (ISO/IEC 14496-12, 8.11.3)."""
    version, _, at = full(data, iloc)
    widths = data[at] >> 4, data[at] & 15, data[at + 1] >> 4, data[at + 1] & 15 if version else 0
    at += 2
    id_bytes = 4 if version == 2 else 2
    count, at = int.from_bytes(data[at : at + id_bytes], "big"), at + id_bytes
    found: list[Extent] = []
    for _ in range(count):
        item, at = int.from_bytes(data[at : at + id_bytes], "big"), at + id_bytes
        method = 0
        if version:
            method, at = int.from_bytes(data[at : at + 2], "big") & 15, at + 2
        at += 2
        base_at, at = (at, widths[2]), at + widths[2]
        pieces, at = int.from_bytes(data[at : at + 2], "big"), at + 2
        for _ in range(pieces):
            at += widths[3]
            offset_at, at = (at, widths[0]), at + widths[0]
            length, at = int.from_bytes(data[at : at + widths[1]], "big"), at + widths[1]
            base, offset = (int.from_bytes(data[place : place + width], "big") for place, width in (base_at, offset_at))
            found.append(Extent(item, method, base, offset, length, base_at, offset_at))
        if at > iloc.end or len(found) > _MAX_EXTENTS:
            raise ImageError(_DAMAGED)
    return found


def shift_extents(edits: Edits, found: list[Extent]) -> None:
    """Make the file offsets of items true: by an item's base where that moves as all its extents do, else by each."""
    for _, group in itertools.groupby(found, key=lambda extent: extent.base_at):
        own = [extent for extent in group if extent.method == 0]
        moves = {edits.moved(extent.base + extent.offset) for extent in own}
        if not any(moves):
            continue
        if len(moves) == 1 and own[0].base:
            edits.put(*own[0].base_at, own[0].base + moves.pop())
            continue
        for extent in own:
            edits.put(*extent.offset_at, extent.offset + edits.moved(extent.base + extent.offset))


def shift_chunks(data: bytes, edits: Edits, table: Box) -> None:
    """Make the file offsets of a track's chunks true (`stco`, `co64`)."""
    width = 8 if table.kind == b"co64" else 4
    (count,) = struct.unpack_from(">I", data, table.body + 4)
    for at in range(table.body + 8, table.body + 8 + width * count, width):
        place = int.from_bytes(data[at : at + width], "big")
        if at + width > table.end:
            raise ImageError(_DAMAGED)
        edits.put(at, width, place + edits.moved(place))
