"""C3: the lossless compressions of TIFF, each a pair: pieces (strips or tiles) to rows of bytes, and back.

Deflate and LZMA are the standard library's. LZW, PackBits, ZSTD and the three of CCITT are libtiff's, which Pillow
brings along: to decode, a TIFF is made up around the pieces whose pixels are plain bytes (of CCITT: bits), so that
Pillow gives them back as they are; to encode, Pillow writes such a TIFF, and its strips are taken out. All pieces of
a call are strips of one such file, because a file for each would take 0.5 ms. A piece that decodes to too few bytes
is damaged; what is behind the last row is ignored, as in libtiff.

Sections 7 to 11, 13 and 14 of TIFF 6.0: https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf
Deflate and LZMA: https://libtiff.gitlab.io/libtiff/specification/technote2.html
"""

from __future__ import annotations

import io
import itertools
import lzma
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image

from safelight import formats
from safelight.errors import ImageError
from safelight.operations.mirror import pixels, tiff_predictor
from safelight.operations.mirror.tiff_file import TiffFile

__all__ = ["DAMAGED", "NAMES", "PREDICTED", "Layout", "decoded", "encoded"]

DAMAGED = "The TIFF's pixels are damaged or cut short."

NAMES = {
    6: "old-style JPEG",
    32766: "NeXT RLE",
    32767: "Sony ARW",
    32769: "packed raw",
    32771: "CCITT RLE by words",
    32809: "ThunderScan",
    32908: "PixarFilm",
    32909: "PixarLog",
    32947: "DCS",
    33003: "JPEG 2000",
    33005: "JPEG 2000",
    33007: "JPEG-LS",
    34661: "JBIG",
    34676: "SGI LogLuv",
    34677: "SGI LogLuv",
    34712: "JPEG 2000",
    34713: "Nikon NEF",
    34715: "JBIG2",
    34719: "JPEG 2000",
    34887: "LERC",
    34892: "lossy DNG",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
"""Compressions that are known, but are not processed."""

_RLE, _GROUP_3, _GROUP_4, _LZW, _LZMA, _PACKBITS, _ZSTD = 2, 3, 4, 5, 34925, 32773, 50000
_DEFLATE = (8, 32946)
_CCITT = {_RLE: "tiff_ccitt", _GROUP_3: "group3", _GROUP_4: "group4"}
_LIBTIFF = {_LZW: "tiff_lzw", _PACKBITS: "packbits", _ZSTD: "zstd", **_CCITT}  # as Pillow calls them
PREDICTED = (_LZW, *_DEFLATE, _LZMA, _ZSTD)
"""For all others libtiff ignores the tag."""
_UNCOMPRESSED_MODE = 2  # an extension of both CCITT groups that libtiff cannot read
_T4_OPTIONS, _T6_OPTIONS, _ROWS_PER_STRIP, _STRIP_OFFSETS, _STRIP_BYTES = 292, 293, 278, 273, 279

_GROUP_BITS = 64_000_000  # pieces handled in one call
# zlib takes 30 ns a byte of a photo at level 6, 8 at level 1; LZMA 900 at 6, 300 at 0; a job has 10 s.
_DEFLATE_LEVELS = ((40_000_000, 6), (400_000_000, 1))
_LZMA_PRESETS = ((4_000_000, 6), (20_000_000, 0))
_LZMA_MEMORY = 300_000_000
# What is put behind CCITT data: no codes; and lines of short runs, in Group 3 each behind the code that begins a line.
# (In Group 4 that code ends the picture.)
_RUNS = "011110" * 20
_NO_CODES, _LINES = bytes(50), int(("0000000000011" + _RUNS) * 3 + "0", 2).to_bytes(50, "big")
_ENDS = {_GROUP_3: (_NO_CODES, _LINES)}
_ENDS[_GROUP_4] = _ENDS[_RLE] = (_NO_CODES, int(_RUNS * 3, 2).to_bytes(45, "big"))
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True)
class Layout:
    """What a codec has to know of a plane of a picture: `rows` of `row_bytes` in a piece (the last may have less)."""

    compression: int
    predictor: tiff_predictor.Predictor
    row_bits: int
    rows: int
    total_bytes: int  # of the whole file, which decide how much time may be taken for each
    bits_reversed: bool = False  # FillOrder 2: in each byte as stored, the first bit is the lowest
    options: int = 0  # T4Options or T6Options

    @property
    def row_bytes(self) -> int:
        """Rows begin at whole bytes."""
        return (self.row_bits + 7) // 8


_Decode: TypeAlias = Callable[[Sequence[bytes], Layout, int], bytes]
_Encode: TypeAlias = Callable[[bytes, Layout], list[bytes]]


def decoded(pieces: Sequence[bytes], layout: Layout, rows: int) -> bytes:
    """The rows of consecutive pieces, `rows` in all.

    Raises `ImageError` if they are damaged, or their compression is not processed.
    """
    decode, _ = _codec(layout)
    if layout.bits_reversed:
        pieces = [piece.translate(_REVERSED) for piece in pieces]
    step = max(1, _GROUP_BITS // (layout.row_bits * layout.rows))
    out = []
    try:
        for start in range(0, len(pieces), step):
            group = pieces[start : start + step]
            out.append(decode(group, layout, min(len(group) * layout.rows, rows - start * layout.rows)))
    except (*pixels.DECODER_ERRORS, zlib.error, lzma.LZMAError, MemoryError) as error:
        raise ImageError(DAMAGED) from error
    raw = b"".join(out)
    if len(raw) != rows * layout.row_bytes:
        raise ImageError(DAMAGED)
    return tiff_predictor.undone(raw, layout.row_bytes, layout.predictor) if _is_predicted(layout) else raw


def encoded(raw: bytes, layout: Layout) -> list[bytes]:
    """The pieces of rows, compressed as `decoded` found them."""
    _, encode = _codec(layout)
    if _is_predicted(layout):
        raw = tiff_predictor.done(raw, layout.row_bytes, layout.predictor)
    step = max(1, _GROUP_BITS // (layout.row_bits * layout.rows)) * layout.row_bytes * layout.rows
    groups = (encode(raw[start : start + step], layout) for start in range(0, len(raw), step))
    pieces = list(itertools.chain.from_iterable(groups))
    return [piece.translate(_REVERSED) for piece in pieces] if layout.bits_reversed else pieces


def _is_predicted(layout: Layout) -> bool:
    return layout.predictor.kind != tiff_predictor.NONE


def _codec(layout: Layout) -> tuple[_Decode, _Encode]:
    compression = layout.compression
    if compression == 1:
        return _plain, _cut
    if compression in _DEFLATE:
        return _inflated, _deflated
    if compression == _LZMA:
        if layout.total_bytes > _LZMA_PRESETS[-1][0]:
            raise ImageError("The TIFF is too large to be compressed with LZMA again in the time allowed.")
        return _unpacked_lzma, _packed_lzma
    if compression not in _LIBTIFF:
        name = NAMES.get(compression, "an unknown kind")
        raise ImageError(f"TIFFs with compression {compression} ({name}) cannot be processed.")
    if (layout.row_bits if compression in _CCITT else layout.row_bytes) * layout.rows > formats.MAX_PIXELS:
        raise ImageError(f"The TIFF has a strip or tile of more than {formats.MAX_PIXELS:,} bytes.")  # Pillow's limit
    if compression in (_GROUP_3, _GROUP_4) and layout.options & _UNCOMPRESSED_MODE:
        raise ImageError("The TIFF uses the uncompressed mode of its fax compression, which cannot be processed.")
    return _by_libtiff, _to_libtiff


def _bounds(layout: Layout, pieces: int, rows: int) -> list[int]:
    """How many bytes of rows each of consecutive pieces has."""
    return [layout.row_bytes * min(layout.rows, rows - number * layout.rows) for number in range(pieces)]


def _cut(raw: bytes, layout: Layout) -> list[bytes]:
    step = layout.row_bytes * layout.rows
    return [raw[start : start + step] for start in range(0, len(raw), step)]


def _plain(pieces: Sequence[bytes], layout: Layout, rows: int) -> bytes:
    return b"".join(piece[:size] for piece, size in zip(pieces, _bounds(layout, len(pieces), rows), strict=True))


def _inflated(pieces: Sequence[bytes], layout: Layout, rows: int) -> bytes:
    bounds = _bounds(layout, len(pieces), rows)
    parts = [zlib.decompressobj().decompress(piece, size) for piece, size in zip(pieces, bounds, strict=True)]
    if list(map(len, parts)) != bounds:
        raise ImageError(DAMAGED)
    return b"".join(parts)


def _deflated(raw: bytes, layout: Layout) -> list[bytes]:
    level = next(level for most, level in _DEFLATE_LEVELS if layout.total_bytes <= most)
    return [zlib.compress(part, level) for part in _cut(raw, layout)]


def _unpacked_lzma(pieces: Sequence[bytes], layout: Layout, rows: int) -> bytes:
    parts = []
    for piece, size in zip(pieces, _bounds(layout, len(pieces), rows), strict=True):
        part = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY).decompress(piece, size)
        if len(part) != size:
            raise ImageError(DAMAGED)
        parts.append(part)
    return b"".join(parts)


def _packed_lzma(raw: bytes, layout: Layout) -> list[bytes]:
    """With the filters that libtiff uses: the differences of bytes that are a sample apart, then LZMA2."""
    preset = next(preset for most, preset in _LZMA_PRESETS if layout.total_bytes <= most)
    distance = layout.predictor.bits // 8 if layout.predictor.bits % 8 == 0 else 1
    filters = [{"id": lzma.FILTER_DELTA, "dist": distance}, {"id": lzma.FILTER_LZMA2, "preset": preset}]
    return [lzma.compress(part, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=filters) for part in _cut(raw, layout)]


def _by_libtiff(pieces: Sequence[bytes], layout: Layout, rows: int) -> bytes:
    """Decoded twice if CCITT, with other bits behind each piece: one that is cut short takes them for its own."""
    if layout.compression not in _CCITT:
        return _opened(_made_up(pieces, layout, rows))
    first, second = (
        _opened(_made_up([piece + end for piece in pieces], layout, rows)) for end in _ENDS[layout.compression]
    )
    if first != second:
        raise ImageError(DAMAGED)
    return first


def _opened(tiff: bytes) -> bytes:
    with pixels.open_picture(tiff, "TIFF") as picture:
        return picture.tobytes()


def _made_up(pieces: Sequence[bytes], layout: Layout, rows: int) -> bytes:
    """A TIFF of those strips, its pixels bits (CCITT) or whole bytes."""
    bits = 1 if layout.compression in _CCITT else 8
    tags = {
        256: layout.row_bits if bits == 1 else layout.row_bytes,
        257: rows,
        258: bits,
        259: layout.compression,
        262: 1,
        277: 1,
        _ROWS_PER_STRIP: layout.rows,
        _T4_OPTIONS if layout.compression == _GROUP_3 else _T6_OPTIONS: layout.options,
    }
    count = len(pieces)
    behind = 8 + 2 + 12 * (len(tags) + 2) + 4
    lengths = list(map(len, pieces))
    first = behind + 8 * count
    offsets = list(itertools.accumulate(lengths[:-1], initial=first))
    entries = [(tag, 4, 1, value) for tag, value in tags.items()]
    entries += [(_STRIP_OFFSETS, 4, count, offsets[0] if count == 1 else behind)]
    entries += [(_STRIP_BYTES, 4, count, lengths[0] if count == 1 else behind + 4 * count)]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    arrays = struct.pack(f"<{2 * count}I", *offsets, *lengths)
    return b"".join([b"II*\0\x08\0\0\0", struct.pack("<H", len(entries)), directory, bytes(4), arrays, *pieces])


def _to_libtiff(raw: bytes, layout: Layout) -> list[bytes]:
    fax = layout.compression in _CCITT
    size = (layout.row_bits if fax else layout.row_bytes, len(raw) // layout.row_bytes)
    tags = {_ROWS_PER_STRIP: min(layout.rows, size[1])}
    if layout.compression == _GROUP_3:
        tags[_T4_OPTIONS] = layout.options
    out = io.BytesIO()
    picture = Image.frombytes("1" if fax else "L", size, raw)
    picture.save(out, "TIFF", compression=_LIBTIFF[layout.compression], tiffinfo=tags)
    written = TiffFile(out.getvalue())
    entries = written.directories[0].entries
    starts, lengths = (written.values(entries[tag]) for tag in (_STRIP_OFFSETS, _STRIP_BYTES))
    return [written.image[start : start + length] for start, length in zip(starts, lengths, strict=True)]
