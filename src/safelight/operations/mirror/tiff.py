"""C3: TIFFs: the pixels of each page are flipped inside their strips or tiles, everything else stays byte for byte.

All pictures of the file are: its pages, and what their SubIFDs tag lists (reduced copies, masks). They keep their
compression and layout, and each is flipped along the axis that its own orientation asks for. `tiff_file` reads the
container, `tiff_page` a page's tags, `tiff_grid` joins and cuts its pieces, `tiff_codecs` and `tiff_predictor` do the
lossless compressions, `tiff_jpeg` those pieces that are JPEGs, and `tiff_room` puts the new pieces into the file. The
layers that Photoshop adds in a private tag would contradict the mirrored picture: they are dropped, with a note.

TIFF 6.0: https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf
"""

from __future__ import annotations

import functools

from safelight import formats
from safelight.errors import ImageError
from safelight.operations import Result
from safelight.operations.mirror import pixels, tiff_codecs, tiff_jpeg, tiff_predictor
from safelight.operations.mirror.exif import Axis
from safelight.operations.mirror.tiff_file import TiffFile
from safelight.operations.mirror.tiff_grid import Codec, Flip, Grid
from safelight.operations.mirror.tiff_page import (
    JPEG,
    STRIPS,
    TILES,
    UNCOMPRESSED,
    WIDTH,
    YCBCR,
    Page,
    Plan,
    Unit,
    planned,
)
from safelight.operations.mirror.tiff_room import Replacement, rewritten

__all__ = ["MAX_BYTES", "MAX_PIECES", "mirror"]

MAX_BYTES = 300_000_000
"""Of all pages' pixels, decoded: the largest picture that is allowed, with 3 bytes a pixel; LZW takes 20 ns a byte."""

MAX_PIECES = 100_000
"""Strips and tiles in a file: tiles of 32 x 32 in the largest picture. A JPEG takes 80 us, others up to 25."""

_FILL_ORDER, _OPTIONS, _PREDICTOR, _JPEG_TABLES, _PHOTOSHOP_LAYERS = 266, (292, 293), 317, 347, 37724
_GROUP_3, _FAX = 3, (2, 3, 4)
_PREDICTED_BITS = {tiff_predictor.HORIZONTAL: (8, 16, 32, 64), tiff_predictor.FLOATING: (16, 24, 32, 64)}


def mirror(image: bytes) -> Result:
    """A TIFF or BigTIFF flipped left-right as displayed, all pages of it: pixel for pixel unless it holds JPEGs.

    JPEGs are flipped losslessly where their size allows it. Raises `ImageError` for a file that is damaged or cut
    short, too large, or of a kind that is not processed: the sentence says which.
    """
    file, notes = TiffFile(image), {}
    if any(_PHOTOSHOP_LAYERS in directory.entries for directory in file.directories):
        file, notes = file.without(_PHOTOSHOP_LAYERS), {"mirror-dropped": "layers"}
    with_pictures = (n for n, one in enumerate(file.directories) if one.entries.keys() & {WIDTH, *STRIPS, *TILES})
    plans = [planned(Page(file, number)) for number in with_pictures]
    if not plans:
        raise ImageError("The TIFF has no picture: it is damaged or cut short.")
    total = _checked(plans)
    replacements, all_exact = [], True
    for plan in plans:
        pieces, exact = _flipped(plan, total)
        lengths = plan.tags[1] if plan.tags[1] in plan.page.directory.entries else None
        replacements.append(Replacement(plan.places, pieces, plan.page.index, plan.tags[0], lengths))
        all_exact = all_exact and exact
    return Result(rewritten(file, replacements), notes={"mirror": "lossless" if all_exact else "reencoded", **notes})


def _checked(plans: list[Plan]) -> int:
    """How many bytes of pixels there are. Raises `ImageError` if they take more memory or time than a job has."""
    formats.check_frames(len(plans), sum(plan.page.size[0] * plan.page.size[1] for plan in plans))
    total = sum(grid.stack_bytes for plan in plans for grid in plan.grids)
    if total > MAX_BYTES:
        raise ImageError(f"The TIFF has {total:,} bytes of pixels; at most {MAX_BYTES:,} are allowed.")
    if sum(len(plan.places) for plan in plans) > MAX_PIECES:
        raise ImageError(f"The TIFF has more than {MAX_PIECES:,} strips or tiles.")
    return total


def _flipped(plan: Plan, total: int) -> tuple[list[bytes], bool]:
    """A page's new pieces, and whether they have exactly the old ones' pixels."""
    old = [plan.page.file.image[place.start : place.end] for place in plan.places]
    pieces: list[bytes] = []
    all_exact = True
    for grid in plan.grids:
        group = old[len(pieces) : len(pieces) + grid.across * grid.down]
        flip = functools.partial(_flip, grid, plan.unit, plan.page.axis)
        if plan.page.compression == JPEG:
            new, exact = _flipped_jpegs(plan.page, grid, group, flip)
            all_exact = all_exact and exact
        else:
            new = _flipped_plane(plan, grid, group, flip, total)
        pieces += new
    if plan.page.compression == UNCOMPRESSED:  # some have more than their rows need, which is kept
        pieces = [piece + before[len(piece) :] for piece, before in zip(pieces, old, strict=True)]
    return pieces, all_exact


def _flip(grid: Grid, unit: Unit, axis: Axis, rows: bytes, height: int) -> bytes:
    """Rows flipped; inside a unit its brightness is flipped as well, the pair of colours behind it stays."""
    flipped = pixels.flip_rows(rows, grid.width, height, grid.bits, axis)
    if unit == Unit():
        return flipped
    size = grid.bits // 8
    out = bytearray(flipped)
    for at in range(unit.across * unit.down):
        down, across = divmod(at, unit.across)
        if axis is Axis.HORIZONTAL:
            across = unit.across - 1 - across
        else:
            down = unit.down - 1 - down
        out[at::size] = flipped[down * unit.across + across :: size]
    return bytes(out)


def _flipped_plane(plan: Plan, grid: Grid, pieces: list[bytes], flip: Flip, total: int) -> list[bytes]:
    page, compression = plan.page, plan.page.compression
    if compression in _FAX and grid.bits != 1:
        raise ImageError("The TIFF has fax compression for pixels that are not black or white.")
    layout = tiff_codecs.Layout(
        compression,
        _predictor(plan, grid),
        grid.piece_width * grid.bits,
        grid.piece_height,
        total,
        page.number(_FILL_ORDER, 1) == 2,
        page.number(_OPTIONS[compression != _GROUP_3]),
    )
    codec = Codec(
        lambda group, rows: tiff_codecs.decoded(group, layout, rows), lambda raw: tiff_codecs.encoded(raw, layout)
    )
    return grid.flipped(pieces, codec, flip, whole=page.axis is Axis.VERTICAL)


def _predictor(plan: Plan, grid: Grid) -> tiff_predictor.Predictor:
    """Checked only where the compression has one."""
    page = plan.page
    kind, samples = page.number(_PREDICTOR, 1), 1 if page.is_planar else len(page.bits)
    bits = grid.bits // samples
    predictor = tiff_predictor.Predictor(kind, samples, bits, page.file.order)
    if kind == tiff_predictor.NONE or page.compression not in tiff_codecs.PREDICTED:
        return predictor._replace(kind=tiff_predictor.NONE)
    if plan.unit != Unit() or bits not in _PREDICTED_BITS.get(kind, ()) or len(set(page.bits)) > 1:
        raise ImageError(f"The TIFF has a predictor ({kind}) that does not exist, or not for such pixels.")
    return predictor


def _flipped_jpegs(page: Page, grid: Grid, pieces: list[bytes], flip: Flip) -> tuple[list[bytes], bool]:
    is_ycbcr = page.photometric == YCBCR and not page.is_planar
    tables = bytes(page.numbers(_JPEG_TABLES))
    return tiff_jpeg.flipped(pieces, grid, page.axis, flip, tables=tables, is_ycbcr=is_ycbcr)
