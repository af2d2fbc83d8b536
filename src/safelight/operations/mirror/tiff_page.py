"""C3: a page of a TIFF: what its tags say of its size and samples, how they are laid out, and where the pieces are.

A page's pixels are groups of bits, whatever they mean: nothing about colour has to be understood, with one exception.
Subsampled colours (`YCbCr` that is no JPEG) are stored in units: a block of brightness, then one pair of colours for
all of it; here such a unit is the pixel. Tags that are missing have the values that the standard gives them, and a few
that are often wrong are read as libtiff reads them.

TIFF 6.0, sections 8, 15 and 21: https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from safelight import formats
from safelight.errors import ImageError
from safelight.operations.mirror import tiff_codecs
from safelight.operations.mirror.exif import Axis
from safelight.operations.mirror.tiff_file import CUT_SHORT, Place
from safelight.operations.mirror.tiff_grid import Grid

if TYPE_CHECKING:
    from safelight.operations.mirror.tiff_file import Directory, TiffFile

__all__ = ["JPEG", "STRIPS", "TILES", "UNCOMPRESSED", "WIDTH", "YCBCR", "Page", "Plan", "Unit", "planned"]

WIDTH, STRIPS, TILES = 256, (273, 279), (324, 325)
"""Tags that make a directory a picture; of its pieces the offsets, then the lengths."""

UNCOMPRESSED, JPEG, YCBCR = 1, 7, 6
"""Compressions and a colour space with ways of their own."""

_HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _SAMPLES = 257, 258, 259, 262, 274, 277
_ROWS_PER_STRIP, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _SUBSAMPLING = 278, 284, 322, 323, 530
_RAW = {32803: "a colour filter array", 34892: "linear raw data", 51177: "a depth map"}
_MAX_BITS = 128  # of a sample: a complex number of two doubles


class Unit(NamedTuple):
    """What is moved as one: a pixel, or with subsampled colours a block of brightness and one pair of colours."""

    across: int = 1
    down: int = 1


@dataclass(frozen=True)
class Page:
    """A directory that has a picture, and its tags as numbers."""

    file: TiffFile
    index: int

    @property
    def directory(self) -> Directory:
        """Its tags as they stand."""
        return self.file.directories[self.index]

    def numbers(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """A tag's values."""
        entry = self.directory.entries.get(tag)
        return default if entry is None else self.file.values(entry)

    def number(self, tag: int, default: int = 0) -> int:
        """A tag's first value."""
        return self.numbers(tag, (default,))[0]

    @property
    def compression(self) -> int:
        """By its number."""
        return self.number(_COMPRESSION, UNCOMPRESSED)

    @property
    def photometric(self) -> int:
        """What the samples mean, by its number."""
        return self.number(_PHOTOMETRIC)

    @property
    def axis(self) -> Axis:
        """Along which it is to be flipped."""
        return Axis.of(self.number(_ORIENTATION, 1))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.number(WIDTH), self.number(_HEIGHT)

    @property
    def bits(self) -> tuple[int, ...]:
        """Of each sample."""
        samples, bits = self.number(_SAMPLES, 1), self.numbers(_BITS, (1,))
        if len(bits) == 1 and 0 < samples <= 65_535:
            bits *= samples
        if not 0 < samples <= len(bits) or not all(0 < value <= _MAX_BITS for value in bits):
            raise ImageError("The TIFF is damaged: its samples have a number of bits that does not exist.")
        return bits[:samples]

    @property
    def is_planar(self) -> bool:
        """Whether each sample has a plane of its own; with a single one that is the same."""
        return self.number(_PLANAR, 1) == 2


class Plan(NamedTuple):
    """All that is needed to flip a page: the planes' layouts, and where the pieces are, one plane after the other."""

    page: Page
    unit: Unit
    grids: list[Grid]
    places: list[Place]
    tags: tuple[int, int]  # of the offsets and the lengths


def planned(page: Page) -> Plan:
    """Raises `ImageError` for what is damaged, or of a kind that is not processed."""
    formats.check_dimensions(*page.size)
    if page.photometric in _RAW:
        raise ImageError(f"The TIFF is a camera's raw picture ({_RAW[page.photometric]}), which cannot be processed.")
    if page.compression in tiff_codecs.NAMES:
        raise ImageError(f"TIFFs with compression by {tiff_codecs.NAMES[page.compression]} cannot be processed.")
    unit = _unit(page)
    grids = _grids(page, unit)
    # Some have tiles under the tags for strips; then those say where they are, as for libtiff.
    tags = next((tags for tags in (TILES, STRIPS) if tags[0] in page.directory.entries), None)
    if tags is None:
        raise ImageError("A page of the TIFF has no pixels: the file is damaged or cut short.")
    return Plan(page, unit, grids, _places(page, grids, tags), tags)


def _unit(page: Page) -> Unit:
    if page.photometric != YCBCR or page.compression == JPEG or len(page.bits) < 3:
        return Unit()
    across, down = (*page.numbers(_SUBSAMPLING, (2, 2)), 0)[:2]
    if (across, down) == (1, 1):
        return Unit()
    if across not in (1, 2, 4) or down not in (1, 2, 4) or page.bits != (8, 8, 8) or page.is_planar:
        raise ImageError("The TIFF has subsampled colours in an arrangement that cannot be processed.")
    width, height = page.size
    if (width % across if page.axis is Axis.HORIZONTAL else height % down) != 0:
        raise ImageError("The TIFF has subsampled colours, and a size that is no multiple of the subsampling.")
    return Unit(across, down)


def _grids(page: Page, unit: Unit) -> list[Grid]:
    """The layout of each plane (one if the samples of a pixel stand together), in units."""
    width, height = page.size
    tiled = _TILE_WIDTH in page.directory.entries
    if tiled:
        piece = page.number(_TILE_WIDTH), page.number(_TILE_HEIGHT)
    else:
        piece = width, min(page.number(_ROWS_PER_STRIP) or height, height)  # 0 is what some write for "all"
    if min(piece) < 1:
        raise ImageError("The TIFF is damaged: its strips or tiles have no size.")
    if (tiled and piece[0] % unit.across) or (piece[1] % unit.down and piece[1] < height):
        raise ImageError("The TIFF has subsampled colours that its strips or tiles cut through.")
    across, down = (-(-size // by) for size, by in zip((width, height), unit, strict=True))
    piece_across, piece_down = (-(-size // by) for size, by in zip(piece, unit, strict=True))
    if unit != Unit():
        planes = [8 * (unit.across * unit.down + 2)]
    else:
        planes = list(page.bits) if page.is_planar else [sum(page.bits)]
    return [Grid(across, down, piece_across, piece_down, bits, tiled) for bits in planes]


def _places(page: Page, grids: list[Grid], tags: tuple[int, int]) -> list[Place]:
    """Where the pieces are. Raises `ImageError` if one is missing or not wholly in the file."""
    count = sum(grid.across * grid.down for grid in grids)
    offsets, lengths = (page.numbers(tag)[:count] for tag in tags)
    if not lengths or (count == 1 and page.compression == UNCOMPRESSED) or (count == 1 and not lengths[0]):
        lengths = _estimated(page, grids, offsets, lengths)
    if not len(offsets) == len(lengths) == count:
        raise ImageError("The TIFF is damaged or cut short: it has too few strips or tiles.")
    if not all(offsets) or not all(lengths):
        raise ImageError("The TIFF leaves out strips or tiles, which cannot be processed.")
    places = [Place(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True)]
    if min(offsets) < 0 or min(lengths) < 0 or max(place.end for place in places) > len(page.file.image):
        raise ImageError(CUT_SHORT)
    return places


def _estimated(page: Page, grids: list[Grid], offsets: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[int, ...]:
    """The lengths of pieces that have none, or (of a single piece) a wrong one, as libtiff estimates them."""
    if page.compression == UNCOMPRESSED:
        sizes = [grid.piece_row_bytes * grid.stacked(n, 1) for grid in grids for n in range(grid.across * grid.down)]
        return tuple(sizes) if not lengths or lengths[0] < sizes[0] else lengths
    if not lengths:
        raise ImageError("The TIFF does not say how long its strips or tiles are.")
    behind = [place.start for place in page.file.known() if place.start > offsets[0]]
    return (min([*behind, len(page.file.image)]) - offsets[0],)
