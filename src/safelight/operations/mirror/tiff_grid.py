"""C3: how a TIFF cuts a plane of its picture into pieces: strips, or tiles that are as large at the edges as elsewhere.

Codecs see pieces stacked one upon the other. A strip is as wide as the picture, so that its rows are the picture's;
tiles are joined to rows, and cut again after the flip, because the padding of the right or lower edge has to change
sides. It is of zeros, but in a JPEG, where it would bleed into the picture, the last pixel and row again.
A flip left-right goes a few rows of pieces at a time, so that a large picture does not have to be in memory whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from safelight.errors import ImageError

__all__ = ["Codec", "Flip", "Grid"]

_GROUP_BYTES = 16_000_000

Flip: TypeAlias = Callable[[bytes, int], bytes]
"""Flips rows, given how many there are."""


class Codec(NamedTuple):
    """Two functions: consecutive pieces, and the number of rows in their stack, to rows; and rows to pieces.

    `repeats` says that the padding of tiles is to be like what is next to it.
    """

    decode: Callable[[Sequence[bytes], int], bytes]
    encode: Callable[[bytes], list[bytes]]
    repeats: bool = False


class Grid(NamedTuple):
    """A plane and its pieces, in pixels of `bits` bits."""

    width: int
    height: int
    piece_width: int
    piece_height: int
    bits: int
    tiled: bool

    @property
    def across(self) -> int:
        """Pieces in a row."""
        return -(-self.width // self.piece_width)

    @property
    def down(self) -> int:
        """Rows of pieces."""
        return -(-self.height // self.piece_height)

    @property
    def row_bytes(self) -> int:
        """Of the plane: its rows begin at whole bytes."""
        return (self.width * self.bits + 7) // 8

    @property
    def piece_row_bytes(self) -> int:
        """Of one piece."""
        return (self.piece_width * self.bits + 7) // 8

    @property
    def stack_bytes(self) -> int:
        """Of all pieces, decoded."""
        return self.piece_row_bytes * self.stacked(0, self.across * self.down)

    def stacked(self, first: int, count: int) -> int:
        """How many rows `count` pieces from number `first` on have: the last strip may have fewer than the others."""
        rows = count * self.piece_height
        return rows if self.tiled else min(rows, self.height - first * self.piece_height)

    def flipped(self, pieces: Sequence[bytes], codec: Codec, flip: Flip, *, whole: bool) -> list[bytes]:
        """The pieces of the flipped plane; `whole` if a row does not stay where it is."""
        if self.across > 1 and self.piece_width * self.bits % 8:
            raise ImageError("The TIFF has tiles whose rows do not end at whole bytes.")
        band_bytes = self.piece_row_bytes * self.piece_height * self.across
        bands = self.down if whole else min(self.down, max(1, _GROUP_BYTES // band_bytes))
        out = []
        for band in range(0, self.down, bands):
            start = band * self.across
            group = pieces[start : start + bands * self.across]
            height = min(bands * self.piece_height, self.height - band * self.piece_height)
            stack = codec.decode(group, self.stacked(start, len(group)))
            rows = flip(self._joined(stack, height) if self.tiled else stack, height)
            out += codec.encode(self._cut(rows, height, codec.repeats) if self.tiled else rows)
        return out

    def _joined(self, stack: bytes, height: int) -> bytes:
        """Rows of the plane from stacked tiles."""
        view, size = memoryview(stack), self.piece_row_bytes
        rows = []
        for y in range(height):
            band, row = divmod(y, self.piece_height)
            first = (band * self.across * self.piece_height + row) * size
            step = self.piece_height * size
            parts = [view[at : at + size] for at in range(first, first + self.across * step, step)]
            rows.append(b"".join(parts)[: self.row_bytes])
        return b"".join(rows)

    def _cut(self, rows: bytes, height: int, repeats: bool) -> bytes:
        """Stacked tiles from rows of the plane."""
        size, full = self.piece_row_bytes, self.piece_row_bytes * self.across
        pixel = self.bits // 8
        padded = []
        for start in range(0, height * self.row_bytes, self.row_bytes):
            row = rows[start : start + self.row_bytes]
            missing = full - len(row)
            padded.append(row + row[-pixel:] * (missing // pixel) if repeats else row.ljust(full, b"\0"))
        padded += [padded[-1] if repeats else bytes(full)] * (-height % self.piece_height)
        return b"".join(
            row[left : left + size]
            for top in range(0, len(padded), self.piece_height)
            for left in range(0, full, size)
            for row in padded[top : top + self.piece_height]
        )
