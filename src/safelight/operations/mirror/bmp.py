"""C3: BMPs: their pixels are mirrored in place, every other byte of the file is copied.

Neither palette nor masks nor the header's many versions (Windows' and OS/2's) have to be understood, only how many
bits a pixel has and where the rows begin. A run-length stream is read code by code and written again in the same
codes, each line from its end: so pixels that the source skips, which viewers show each in their way, stay skipped.
https://learn.microsoft.com/windows/win32/gdi/bitmap-header-types
https://learn.microsoft.com/windows/win32/gdi/bitmap-compression
http://www.fileformat.info/format/os2bmp/egff.htm
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from PIL import Image

from safelight import formats
from safelight.errors import ImageError
from safelight.operations import Result
from safelight.operations.mirror import bmp_runs, pixels
from safelight.operations.mirror.exif import Axis

__all__ = ["mirror"]

_FILE_HEADER = 14
_CORE = 12  # the size of OS/2's first header, whose numbers are short
_WINDOWS = (40, 52, 56, 108, 124)  # the sizes of Windows' headers; what is left up to 64 is OS/2's second
_V5 = 124  # the only one with a profile, embedded or linked
_SIZE_AT, _PIXELS_AT, _DATA_SIZE_AT, _COLOUR_SPACE_AT, _PROFILE_AT = 2, 10, 34, 70, 126  # in the file
_PROFILES = (b"DEBM", b"KNIL")  # "MBED" and "LINK" as numbers
_BITS = (1, 2, 4, 8, 16, 24, 32, 64)
_PLAIN = (0, 3, 6)  # plain, and with masks for the colours, for alpha too
_MASK_BYTES = {3: 12, 6: 16}  # behind a header that has no fields for them
_RUNS = {(1, 8), (2, 4), (4, 24)}  # compression and bits; the last one is OS/2's
_NAMES = {4: "a JPEG", 5: "a PNG", 11: "CMYK colours", 12: "CMYK colours", 13: "CMYK colours"}


class _Header(NamedTuple):
    """What the pixels' place and form depend on."""

    size: int
    width: int
    height: int
    bits: int
    compression: int = 0
    colours: int = 0

    @property
    def row_bytes(self) -> int:
        return (self.width * self.bits + 7) // 8

    @property
    def stride(self) -> int:
        return (self.row_bytes + 3) // 4 * 4

    @property
    def is_os2(self) -> bool:
        """OS/2's second header can also have 40 bytes: then only what Windows does not know tells it."""
        unknown = (self.compression, self.bits) in ((3, 1), (4, 24))
        return self.size <= 64 and (self.size not in _WINDOWS or (self.size == 40 and unknown))


def mirror(image: bytes) -> Result:
    """A BMP flipped left-right, bit for bit; always lossless."""
    try:
        header = _read_header(image)
        (offset,) = struct.unpack_from("<I", image, _PIXELS_AT)
    except struct.error:
        raise ImageError("The BMP is cut short.") from None
    formats.check_dimensions(header.width, header.height)
    _check_form(header)
    start = _pixels_start(header, offset)
    if header.compression in _PLAIN:
        mirrored = _mirrored_rows(image, start, header)
    else:
        stream, end = bmp_runs.mirrored(image, start, header.width, header.height, header.bits)
        mirrored = _with_stream(image, start, end, stream, header)
    return Result(mirrored, notes={"mirror": "lossless"})


def _read_header(image: bytes) -> _Header:
    (size,) = struct.unpack_from("<I", image, _FILE_HEADER)
    if size == _CORE:
        width, height, _, bits = struct.unpack_from("<HHHH", image, _FILE_HEADER + 4)
        return _Header(size, width, height, bits)
    width, height, _, bits = struct.unpack_from("<iiHH", image, _FILE_HEADER + 4)
    rest = image[_FILE_HEADER + 16 : _FILE_HEADER + size].ljust(24, b"\0")  # OS/2's may end anywhere
    compression, _, _, _, colours = struct.unpack_from("<IIIII", rest)
    if len(image) < _FILE_HEADER + size:
        raise ImageError("The BMP is cut short.")
    if width < 0:
        raise ImageError("The BMP is damaged: its width is negative.")
    return _Header(size, width, abs(height), bits, compression, colours)  # a negative height is top-down


def _check_form(header: _Header) -> None:
    compression, bits = header.compression, header.bits
    if (compression, bits) in _RUNS and (compression < 4 or header.is_os2):
        return
    if bits in _BITS and (compression == 0 or (compression in _MASK_BYTES and bits >= 16)):
        return
    if name := "Huffman codes" if (compression, bits) == (3, 1) else _NAMES.get(compression):
        raise ImageError(f"The BMP holds {name}, which cannot be mirrored.")
    raise ImageError(f"The BMP's header is damaged: there is no compression {compression} of {bits} bits a pixel.")


def _pixels_start(header: _Header, offset: int) -> int:
    """Where the rows begin; some files say 0 or forget the palette, then they follow what must come before."""
    before = _FILE_HEADER + header.size
    if header.size == 40:
        before += _MASK_BYTES.get(header.compression, 0)
    if offset > before or (offset == before and header.bits > 8):
        return offset
    if offset not in (0, before):
        raise ImageError("The BMP is damaged: its pixels begin inside its header.")
    if header.bits <= 8:
        return before + (header.colours or 1 << header.bits) * (3 if header.size == _CORE else 4)
    return before + 4 * header.colours


def _mirrored_rows(image: bytes, start: int, header: _Header) -> bytes:
    """The file with each row mirrored; what pads a row stays behind it."""
    row_bytes, stride, height = header.row_bytes, header.stride, header.height
    end = start + stride * height
    if end - len(image) > stride - row_bytes:  # of the last row's padding, nobody misses a byte
        raise ImageError("The BMP is cut short.")
    # A box of bytes, which Pillow crops and fills faster than a loop could, if rows are many and short.
    padded = Image.frombytes("L", (stride, height), image[start:end].ljust(end - start, b"\0"))
    rows = padded.crop((0, 0, row_bytes, height)).tobytes()
    flipped = pixels.flip_rows(rows, header.width, height, header.bits, Axis.HORIZONTAL)
    padded.paste(Image.frombytes("L", (row_bytes, height), flipped), (0, 0))
    return b"".join([image[:start], padded.tobytes()[: len(image) - start], image[end:]])


def _with_stream(image: bytes, start: int, end: int, stream: bytes, header: _Header) -> bytes:
    """The file with another stream of runs; the numbers that lead behind the old one are moved with what they mean."""
    growth = len(stream) - (end - start)
    head = bytearray(image[:start])
    places = [(_SIZE_AT, 0)]
    if header.size >= 24:
        places.append((_DATA_SIZE_AT, start))
    if header.size == _V5 and image[_COLOUR_SPACE_AT : _COLOUR_SPACE_AT + 4] in _PROFILES:
        places.append((_PROFILE_AT, _FILE_HEADER))
    for at, counted_from in places:
        (number,) = struct.unpack_from("<I", head, at)
        if end <= counted_from + number <= len(image):  # else it is a lie (often 0, or the size of the headers)
            struct.pack_into("<I", head, at, number + growth)
    return b"".join([head, stream, image[end:]])
