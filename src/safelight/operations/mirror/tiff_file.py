"""C3: TIFF as a container: directories of tagged values, which are read, changed where they stand, and moved.

A TIFF is a header, chained directories of tagged values, and data anywhere that these point at. Private tags point at
data whose length nobody else knows, or hold offsets themselves: nothing moves unless all of it is known.

TIFF 6.0, section 2: https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf
BigTIFF (8-byte offsets): https://libtiff.gitlab.io/libtiff/specification/bigtiff.html
"""

from __future__ import annotations

import collections
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from safelight import formats
from safelight.errors import ImageError
from safelight.operations.mirror import exif

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["ALIGNMENT", "CUT_SHORT", "MAX_VALUES", "Directory", "Entry", "Place", "TiffFile"]

MAX_VALUES = 1_000_000
"""Of one tag that is read: strips of one row each, ten times as many as a picture of 10,000 x 10,000 has."""

ALIGNMENT = 2
"""Of what is appended: the standard wants word boundaries."""

CUT_SHORT = "The TIFF is damaged or cut short: it points at data outside the file."

_MAX_ENTRIES = 65_535  # of a directory; what the classic format can count
_SUB_DIRECTORIES = 330
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
_LONG = 4
# Those of TIFF 6.0 but for the ones about free space and old-style JPEG; XMP, copyright, IPTC, Photoshop, ICC, GeoTIFF.
_WITHOUT_OFFSETS = {*range(254, 512), *range(522, 533), 700, 33432, 33723, 34377, 34675} - {288, 289, 400}
_WITHOUT_OFFSETS |= {32995, 32996, 32997, 32998, 33550, 33922, 34264, 34735, 34736, 34737, 42112, 42113}


class Entry(NamedTuple):
    """A tag of a directory: where it stands, and where its values do."""

    at: int
    kind: int
    amount: int
    values_at: int


class Place(NamedTuple):
    """Bytes `start` to `end` of the file."""

    start: int
    end: int


@dataclass
class Directory:
    """A directory's tags by number; of a tag that is there twice the first counts, as in libtiff."""

    start: int
    end: int  # behind the entries, where the next directory's offset stands
    entries: dict[int, Entry] = field(default_factory=dict)


class TiffFile:
    """A classic TIFF or BigTIFF of either byte order; `directories` are the chained ones and their sub-directories.

    Raises `ImageError` for one that is damaged or has too many directories.
    """

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.order = exif.BYTE_ORDERS.get(image[:2], "")
        magic = self._number("H", 2) if self.order else 0
        if magic not in (42, 43) or (magic == 43 and (self._number("H", 4), self._number("H", 6)) != (8, 0)):
            raise ImageError("The TIFF's header is damaged.")
        self.big = magic == 43
        self._offset_code, self._offset_bytes = ("Q", 8) if self.big else ("I", 4)
        self.directories: list[Directory] = []
        self._seen: set[int] = set()
        self._follow(self._number(self._offset_code, self._offset_bytes))

    def values(self, entry: Entry) -> tuple[int, ...]:
        """The integers of a tag. Raises `ImageError` if they are none, too many, or outside the file."""
        code = _INTEGERS.get(entry.kind)
        if code is None or not 0 < entry.amount <= MAX_VALUES:
            raise ImageError("The TIFF is damaged: a tag has values of the wrong type, or none, or too many.")
        if entry.values_at + entry.amount * _TYPE_BYTES[entry.kind] > len(self.image):
            raise ImageError(CUT_SHORT)
        return struct.unpack_from(f"{self.order}{entry.amount}{code}", self.image, entry.values_at)

    def without(self, tag: int) -> TiffFile:
        """The same file whose directories have lost a tag: the entries behind it move up, and nothing else does."""
        out = bytearray(self.image)
        code, width, size = ("Q", 8, 20) if self.big else ("H", 2, 12)
        for directory in self.directories:
            if (entry := directory.entries.get(tag)) is not None:
                count, end = (directory.end - directory.start - width) // size, directory.end + self._offset_bytes
                struct.pack_into(self.order + code, out, directory.start, count - 1)
                out[entry.at : end] = out[entry.at + size : end] + bytes(size)
        return TiffFile(bytes(out))

    def patched(self, out: bytearray, entry: Entry, values: Sequence[int]) -> None:
        """Write a tag's first values into `out`, a copy of the file.

        If they are too large for their type, all go behind its end, as numbers of 32 bits.
        """
        try:
            struct.pack_into(f"{self.order}{len(values)}{_INTEGERS[entry.kind]}", out, entry.values_at, *values)
        except struct.error:
            everything = [*values, *self.values(entry)[len(values) :]]
            packed = struct.pack(f"{self.order}{len(everything)}I", *everything)
            if len(packed) > self._offset_bytes:
                out += bytes(-len(out) % ALIGNMENT)
                place = struct.pack(self.order + self._offset_code, len(out))
                out += packed
            else:
                place = packed.ljust(self._offset_bytes, b"\0")
            struct.pack_into(f"{self.order}H", out, entry.at + 2, _LONG)
            out[entry.at + 4 + self._offset_bytes : entry.at + 4 + 2 * self._offset_bytes] = place

    def known(self) -> Iterator[Place]:
        """The header, the directories, and the values that stand outside of them."""
        yield Place(0, 16 if self.big else 8)
        for directory in self.directories:
            yield Place(directory.start, directory.end + self._offset_bytes)
            for entry in directory.entries.values():
                length = entry.amount * _TYPE_BYTES.get(entry.kind, 1)
                if length > self._offset_bytes and entry.values_at + length <= len(self.image):
                    yield Place(entry.values_at, entry.values_at + length)

    def may_move(self, start: int) -> bool:
        """Whether everything from `start` on is `known`, and nothing else in the file may point there."""
        if any(not _WITHOUT_OFFSETS.issuperset(directory.entries) for directory in self.directories):
            return False
        for place in sorted({*self.known(), Place(len(self.image), len(self.image))}):
            if place.end > start:
                if place.start < start or self.image[start : place.start].strip(b"\0"):
                    return False
                start = place.end
        return True

    def moved(self, start: int, by: int) -> TiffFile:
        """The same file with `by` zeros more before `start`, and whatever points behind them set right."""
        out = bytearray(self.image)
        for at, code, offset in self._references():
            if offset >= start:
                struct.pack_into(self.order + code, out, at, offset + by)
        return TiffFile(b"".join([out[:start], bytes(by), out[start:]]))

    def _references(self) -> Iterator[tuple[int, str, int]]:
        """Where each known offset stands, how it is packed, and what it is."""
        code, size = self._offset_code, self._offset_bytes
        yield size, code, self._number(code, size)
        for directory in self.directories:
            yield directory.end, code, self._number(code, directory.end)
            for tag, entry in directory.entries.items():
                if entry.amount * _TYPE_BYTES.get(entry.kind, 1) > size:
                    yield entry.at + 4 + size, code, entry.values_at
                if tag == _SUB_DIRECTORIES:
                    for number, offset in enumerate(self.values(entry)):
                        yield entry.values_at + number * _TYPE_BYTES[entry.kind], _INTEGERS[entry.kind], offset

    def _number(self, code: str, at: int) -> int:
        if at + struct.calcsize(code) > len(self.image):
            raise ImageError(CUT_SHORT)
        return int(struct.unpack_from(self.order + code, self.image, at)[0])

    def _follow(self, offset: int) -> None:
        """Read the chain that begins at `offset`, then the chains of sub-directories; a loop ends a chain."""
        waiting = collections.deque([offset])
        while waiting:
            offset = waiting.popleft()
            while offset and offset not in self._seen:
                self._seen.add(offset)
                directory = self._directory(offset)
                self.directories.append(directory)
                formats.check_frames(len(self.directories), 0)
                if (entry := directory.entries.get(_SUB_DIRECTORIES)) is not None:
                    formats.check_frames(entry.amount, 0)
                    waiting += self.values(entry)
                offset = self._number(self._offset_code, directory.end)

    def _directory(self, start: int) -> Directory:
        count = self._number("Q" if self.big else "H", start)
        first, size = start + (8 if self.big else 2), 20 if self.big else 12
        end = first + count * size
        if count > _MAX_ENTRIES or end > len(self.image):
            raise ImageError(CUT_SHORT)
        directory = Directory(start, end)
        pattern = f"{self.order}HH{self._offset_code}{self._offset_code}"
        for number, (tag, kind, values, offset) in enumerate(struct.iter_unpack(pattern, self.image[first:end])):
            at = first + number * size
            inline = values * _TYPE_BYTES.get(kind, 1) <= self._offset_bytes
            values_at = at + size - self._offset_bytes if inline else offset
            directory.entries.setdefault(tag, Entry(at, kind, values, values_at))
        return directory
