"""C3: the run-length codes of BMPs, mirrored line by line without being unpacked.

A code is two bytes, of which the first is a number of equal pixels and the second their value (two values for them
in turn, if they have 4 bits). After a 0 the second one means the end of the line (0) or of the picture (1), a step to
the right and to the next lines (2), or a number of pixels that follow as they are, filled up to an even number of
bytes. In OS/2's codes for 24 bits, a value is three bytes. Each line is read into pieces and written from the last
piece to the first, a gap of skipped pixels as a step.
https://learn.microsoft.com/windows/win32/gdi/bitmap-compression
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from safelight.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MAX_PIECES", "mirrored"]

MAX_PIECES = 1_000_000
"""Of a stream, 5 us each. Up to 4,096 runs in succession are one: only a photo of 10 megapixels could have so many."""

_END_OF_LINE, _END_OF_PICTURE, _STEP = 0, 1, 2
# Bits of a pixel -> successive runs of a line. A repetition without a bound would take 100 bytes for each run.
_RUNS = {bits: re.compile(rb"(?s:[^\0].{%d}){1,4096}" % max(1, bits // 8)) for bits in (4, 8, 24)}
_SWAPPED = bytes(value >> 4 | value << 4 & 0xF0 for value in range(256))


class _Piece(NamedTuple):
    """Pixels of one line: where they begin, how many they are, and their codes, already mirrored."""

    x: int
    length: int
    codes: bytes


def mirrored(image: bytes, start: int, width: int, height: int, bits: int) -> tuple[bytes, int]:
    """The stream that begins at `start`, mirrored, and where the source's ends.

    Raises `ImageError` if it is cut short, leaves the picture, or has more than `MAX_PIECES`.
    """
    reader = _Reader(image, start, width, height, bits)
    out = []
    x = y = 0
    for line, pieces in reader.lines():
        for piece in reversed(pieces):
            left = width - piece.x - piece.length
            if (x, y) != (left, line):
                out.append(_way(x, y, left, line))
            out.append(piece.codes)
            x, y = left + piece.length, line
    if reader.y > y:
        out.append(bytes([0, _END_OF_LINE]))
    return b"".join([*out, bytes([0, _END_OF_PICTURE])]), reader.at


def _way(x: int, y: int, to_x: int, to_y: int) -> bytes:
    """The codes that lead from one place to another one, to the right or in a line below."""
    out = b""
    if to_y > y:
        out, x, y = bytes([0, _END_OF_LINE]), 0, y + 1
    while (x, y) != (to_x, to_y):
        across, down = min(to_x - x, 255), min(to_y - y, 255)
        out += bytes([0, _STEP, across, down])
        x, y = x + across, y + down
    return out


class _Reader:
    """A stream, and how far it has been read: the place in the file and in the picture."""

    def __init__(self, image: bytes, start: int, width: int, height: int, bits: int) -> None:
        self.at, self.x, self.y = start, 0, 0
        self._image, self._width, self._height, self._bits = image, width, height, bits
        self._unit = 1 + max(1, bits // 8)  # bytes of a run
        self._line: list[_Piece] = []

    def lines(self) -> Iterator[tuple[int, list[_Piece]]]:
        """Each line that has pixels, by its number in the stream's order."""
        for _ in range(MAX_PIECES):
            first, second = self._code()
            if first:
                self._read_runs()
                continue
            if second > _STEP:
                self._read_pixels(second)
                continue
            line = self.y
            self._read_escape(second)
            if self._line and (self.y > line or second == _END_OF_PICTURE):
                yield line, self._line
                self._line = []
            if second == _END_OF_PICTURE:
                return
        raise ImageError(f"The BMP's runs are in more than {MAX_PIECES:,} pieces.")

    def _code(self) -> tuple[int, int]:
        code = self._image[self.at : self.at + 2]
        if len(code) == 2:
            return code[0], code[1]
        if (self.y, self.x) < (self._height - 1, self._width):
            raise ImageError("The BMP is cut short.")
        return 0, _END_OF_PICTURE  # which some files lack

    def _read_escape(self, code: int) -> None:
        self.at = min(self.at + 2, len(self._image))
        if code == _END_OF_LINE:
            self.x, self.y = 0, self.y + 1
        elif code == _STEP:
            step = self._image[self.at : self.at + 2]
            self.at += 2
            if len(step) < 2:
                raise ImageError("The BMP is cut short.")
            self.x, self.y = self.x + step[0], self.y + step[1]
            if self.x > self._width or self.y > self._height:
                raise ImageError("The BMP is damaged: its runs leave the picture.")

    def _read_runs(self) -> None:
        found = _RUNS[self._bits].match(self._image, self.at)
        if found is None:
            raise ImageError("The BMP is cut short.")
        self.at = found.end()
        codes, room = found.group(), self._width - self.x
        length = sum(codes[:: self._unit])
        if length > room:  # encoders for 4 bits like to end a line of odd length with an even run
            codes, length = _cut(codes, self._unit, room), room
        if self._bits == 4:
            turned = bytearray(codes)
            values = zip(codes[::2], codes[1::2], strict=True)
            turned[1::2] = bytes(value if count % 2 else _SWAPPED[value] for count, value in values)
            codes = bytes(turned)
        self._add(length, _reversed(codes, self._unit))

    def _read_pixels(self, count: int) -> None:
        size = (count * self._bits + 7) // 8
        data = self._image[self.at + 2 : self.at + 2 + size]
        if len(data) < size:
            raise ImageError("The BMP is cut short.")
        self.at = min(self.at + 2 + size + size % 2, len(self._image))
        length = min(count, self._width - self.x)
        if self._bits == 4:
            digits = data.hex()[:length][::-1]
            data = bytes.fromhex(digits + "0" * (length % 2))
        else:
            data = _reversed(data[: length * self._bits // 8], self._bits // 8)
        self._add(length, self._as_pixels(length, data))

    def _as_pixels(self, count: int, data: bytes) -> bytes:
        if count > _STEP:
            return bytes([0, count]) + data + bytes(len(data) % 2)
        if self._bits == 4:  # what is too short to be given as pixels, as runs of one
            return bytes([count, data[0]]) if count else b""
        step = self._unit - 1
        return b"".join(b"\1" + data[at : at + step] for at in range(0, len(data), step))

    def _add(self, length: int, codes: bytes) -> None:
        if self.y >= self._height:
            raise ImageError("The BMP is damaged: its runs leave the picture.")
        if length:
            self._line.append(_Piece(self.x, length, codes))
            self.x += length


def _cut(codes: bytes, unit: int, room: int) -> bytes:
    """As many runs as there is room for, the last one shortened."""
    out = []
    for at in range(0, len(codes), unit):
        if not room:
            break
        count = min(codes[at], room)
        out.append(bytes([count]) + codes[at + 1 : at + unit])
        room -= count
    return b"".join(out)


def _reversed(data: bytes, step: int) -> bytes:
    """Units of `step` bytes, the last one first."""
    if step == 1:
        return data[::-1]
    out = bytearray(len(data))
    for at in range(step):
        out[at::step] = data[at::step][::-1]
    return bytes(out)
