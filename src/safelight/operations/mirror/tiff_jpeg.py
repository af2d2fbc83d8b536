"""C3: the JPEGs inside a TIFF (compression 7): each piece is one, most without the tables that all of them share.

Where every piece moves whole (its flipped edge is a number of MCUs, and no tile has padding) its coefficients are
flipped, losslessly. Otherwise the pieces are decoded, the picture is flipped, and the new pieces are encoded with the
old ones' quantisation tables and subsampling. Both go by the components as they are, whatever colours they stand for:
in a TIFF a tag tells that, so that markers which also do (JFIF, Adobe) are taken away for the decoder, and none are
written that the source did not have. Tables that the shared ones hold already are left out again.

https://www.awaresystems.be/imaging/tiff/specification/TIFFTechNote2.txt
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, JpegImagePlugin

from safelight.errors import ImageError
from safelight.operations.mirror import pixels, scan, turbojpeg
from safelight.operations.mirror.exif import Axis
from safelight.operations.mirror.tiff_grid import Codec, Flip, Grid

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["flipped"]

_DAMAGED = "The TIFF has JPEG data that are damaged or cut short"
_MODES = {(1, False): "L", (1, True): "L", (3, False): "RGB", (3, True): "YCbCr", (4, False): "CMYK"}


class _Piece(NamedTuple):
    """A JPEG with all its tables but without metadata, its headers, and the metadata that it had."""

    stream: bytes
    headers: scan.Scan
    metadata: bytes


def flipped(
    pieces: Sequence[bytes], grid: Grid, axis: Axis, flip: Flip, *, tables: bytes, is_ycbcr: bool
) -> tuple[list[bytes], bool]:
    """The pieces of the flipped picture, and whether they have the coefficients of the old ones.

    Raises `ImageError` for damaged ones and those of a kind that is not processed.
    """
    read = [_read(piece, tables) for piece in pieces]
    mode = _MODES.get((len(read[0].headers.components), is_ycbcr))
    if mode is None or len(read[0].headers.components) * 8 != grid.bits:
        raise ImageError("The TIFF has JPEG data with a number of components that cannot be processed.")
    known = set(_tables(tables))
    library = turbojpeg.find()
    try:
        if library is not None and _moves_whole(read, grid, axis):
            turned = [_trimmed(library.flip(one.stream, axis, one.headers.kind), known, one.metadata) for one in read]
            return _reordered(turned, grid, axis), True
        if library is not None:
            for one in read:
                library.check(one.stream)  # Pillow would fill what is missing with grey
        codec = _codec(read, grid, mode, known)
        numbers = [number.to_bytes(4, "big") for number in range(len(read))]
        return grid.flipped(numbers, codec, flip, whole=axis is Axis.VERTICAL), False
    except turbojpeg.DamageError as error:
        raise ImageError(f"{_DAMAGED} ({error}).") from error
    except pixels.DECODER_ERRORS as error:
        raise ImageError(f"{_DAMAGED}.") from error


def _read(piece: bytes, tables: bytes) -> _Piece:
    if not piece.startswith(scan.SOI):
        raise ImageError(f"{_DAMAGED}.")
    shared = tables[2:].removesuffix(scan.EOI) if tables.startswith(scan.SOI) else b""
    whole = b"".join([scan.SOI, shared, piece[2:]])
    metadata = [segment for segment in scan.header(whole) if scan.is_metadata(segment.marker)]
    stream = scan.without(whole, metadata)
    headers = scan.scan(stream)
    if headers.end is None:
        stream += scan.EOI  # that alone may be missing; whatever else is, the library warns of
    own = b"".join(
        piece[segment.start - 4 : segment.end] for segment in scan.header(piece) if scan.is_metadata(segment.marker)
    )
    return _Piece(stream, headers, own)


def _moves_whole(pieces: list[_Piece], grid: Grid, axis: Axis) -> bool:
    """Whether flipped pieces in the opposite order are the flipped picture."""
    if not all(one.headers.is_aligned(axis) and one.headers.width == grid.piece_width for one in pieces):
        return False
    if axis is Axis.HORIZONTAL:
        return grid.width % grid.piece_width == 0
    rows = [grid.stacked(number * grid.across, 1) for number in range(grid.down)]
    return (
        len(set(rows)) == 1
        and all(one.headers.height == rows[0] for one in pieces)
        and (grid.height % grid.piece_height == 0 or not grid.tiled)
    )


def _reordered(pieces: list[bytes], grid: Grid, axis: Axis) -> list[bytes]:
    rows = [pieces[start : start + grid.across] for start in range(0, len(pieces), grid.across)]
    rows = [row[::-1] for row in rows] if axis is Axis.HORIZONTAL else rows[::-1]
    return [piece for row in rows for piece in row]


def _codec(pieces: list[_Piece], grid: Grid, mode: str, known: set[bytes]) -> Codec:
    """Of pixels; the pieces to decode are named by their numbers."""
    like = pieces[0]
    with pixels.open_picture(like.stream, "JPEG") as picture:
        sampling = JpegImagePlugin.get_sampling(picture) if mode == "YCbCr" else 0
        quantisers = _quantisers(picture, like.headers)

    def decode(numbers: Sequence[bytes], rows: int) -> bytes:
        group = [pieces[int.from_bytes(number, "big")] for number in numbers]
        heights = [min(grid.piece_height, rows - at * grid.piece_height) for at in range(len(group))]
        return b"".join(_decoded(one, grid, mode, height) for one, height in zip(group, heights, strict=True))

    def encode(raw: bytes) -> list[bytes]:
        step = grid.piece_row_bytes * grid.piece_height
        return [_encoded(raw[start : start + step]) for start in range(0, len(raw), step)]

    def _encoded(part: bytes) -> bytes:
        out = io.BytesIO()
        Image.frombytes(mode, (grid.piece_width, len(part) // grid.piece_row_bytes), part).save(
            out,
            "JPEG",
            qtables=quantisers,
            subsampling=max(sampling, 0),  # of those that Pillow cannot write (4:1:1, 4:4:0), 4:4:4 keeps most
            optimize=bool(like.headers.kind & turbojpeg.OPTIMISED),
            keep_rgb=mode == "RGB",
        )
        return _trimmed(out.getvalue(), known, like.metadata)

    return Codec(decode, encode, repeats=True)


def _decoded(piece: _Piece, grid: Grid, mode: str, rows: int) -> bytes:
    """A piece's components, unconverted: an Adobe marker says that they are what they are to be decoded as."""
    adobe = scan.adobe(1 if mode == "YCbCr" else 0)
    with pixels.open_picture(scan.SOI + adobe + piece.stream[2:], "JPEG") as picture:
        if mode == "YCbCr":
            picture.draft(mode, picture.size)
        if (picture.mode, picture.width) != (mode, grid.piece_width) or picture.height < rows:
            raise ImageError(f"{_DAMAGED}: a piece has the wrong size or kind.")
        return picture.crop((0, 0, grid.piece_width, rows)).tobytes()


def _quantisers(picture: Image.Image, headers: scan.Scan) -> list[list[int]]:
    """The quantisation tables in the order of the components, as few as will do (Pillow repeats the last)."""
    tables: dict[int, list[int]] = picture.quantization  # type: ignore[attr-defined]
    # Pillow writes four components with one table.
    numbers = [part.table for part in headers.components][: 1 if len(headers.components) == 4 else 3]
    while len(numbers) > 1 and numbers[-1] == numbers[-2]:
        numbers.pop()
    return [tables[number] for number in numbers]


def _trimmed(jpeg: bytes, known: set[bytes], metadata: bytes) -> bytes:
    """A JPEG without tables that are known, with that metadata instead of its own."""
    superfluous = [
        segment
        for segment in scan.header(jpeg)
        if scan.is_metadata(segment.marker)
        or (segment.marker in (scan.DQT, scan.DHT) and known.issuperset(_split(jpeg[segment.start - 4 : segment.end])))
    ]
    return scan.SOI + metadata + scan.without(jpeg, superfluous)[2:]


def _tables(jpeg: bytes) -> Iterator[bytes]:
    for segment in scan.header(jpeg):
        if segment.marker in (scan.DQT, scan.DHT):
            yield from _split(jpeg[segment.start - 4 : segment.end])


def _split(segment: bytes) -> Iterator[bytes]:
    """The tables in a DQT or DHT segment, each with the marker before it to tell them apart."""
    marker, at = segment[1:2], 4
    while at < len(segment):
        size = 65 + 64 * (segment[at] >> 4) if marker[0] == scan.DQT else 17 + sum(segment[at + 1 : at + 17])
        yield marker + segment[at : at + size]
        at += size
