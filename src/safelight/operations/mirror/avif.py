"""C3: AVIFs, mirrored by their container: not a byte of coded data changes, so every depth and kind stays exactly.

Two properties turn a picture in every reader that conforms: `irot` (by quarters, anticlockwise) and then `imir`
(`axis` 1 exchanges left and right, 0 top and bottom). They are essential: a reader that does not know them must not
show the picture. A mirror on top of what they say is again one of their combinations. An EXIF orientation beside them
only informs, and stays. https://aomediacodec.github.io/av1-avif/; ISO/IEC 23008-12, 6.5.10 and 6.5.12.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from safelight import formats
from safelight.errors import ImageError
from safelight.operations import Result
from safelight.operations.mirror import exif, isobmff, pixels
from safelight.operations.mirror.isobmff import Box, Edits, boxes, find, full

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["mirror"]

_NO_PICTURE = "The AVIF has no picture: it is damaged or cut short."
_CUT_SHORT = "The AVIF is damaged or cut short."
_ESSENTIAL_8, _ESSENTIAL_16 = 0x80, 0x8000
_MAX_PROPERTIES = 0x7FFF
_SAMPLE_ENTRY_BYTES = 78  # of a visual sample entry before the boxes in it


class _Turn(NamedTuple):
    """How a picture is turned for display: quarters anticlockwise, then mirrored (None: not)."""

    quarters: int = 0
    axis: int | None = None

    def mirrored(self) -> _Turn:
        """The same, and then left and right exchanged."""
        if self.axis is None:
            return _Turn(self.quarters, 1)
        return _Turn(self.quarters if self.axis == 1 else (self.quarters + 2) % 4)

    def properties(self) -> list[bytes]:
        """The boxes that say so."""
        found = [_box(b"irot", bytes([self.quarters]))] if self.quarters else []
        return found if self.axis is None else [*found, _box(b"imir", bytes([self.axis]))]


class _Association(NamedTuple):
    """An item's properties in an `ipma` box: (index from 1, essential)."""

    item: int
    properties: list[tuple[int, bool]]


def mirror(image: bytes) -> Result:
    """An AVIF, still or a sequence, flipped left-right as displayed; always losslessly."""
    try:
        edits = _edits(image)
    except (struct.error, IndexError, OverflowError) as error:
        raise ImageError(_CUT_SHORT) from error
    mirrored = edits.apply(image)
    _check(mirrored)
    return Result(mirrored, notes={"mirror": "lossless"})


def _edits(image: bytes) -> Edits:
    kinds = {box.kind for box in boxes(image)}
    if b"mini" in kinds or b"moof" in kinds:
        raise ImageError("AVIFs with a reduced header, or in fragments, cannot be processed.")
    edits = Edits()
    meta, moov = find(image, (), b"meta"), find(image, (), b"moov")
    if meta is None and moov is None:
        raise ImageError(_NO_PICTURE)
    extents: list[isobmff.Extent] = []
    if meta is not None and (moov is None or _primary(image, meta) is not None):
        iloc = find(image, (meta,), b"iloc")
        extents = [] if iloc is None else isobmff.extents(image, iloc)
        _check_extents(image, extents)
        _turn_items(image, meta, edits)
        _drop_thumbnail(image, meta, extents, edits)
    tracks = [] if moov is None else [box for box in boxes(image, (moov,)) if box.kind == b"trak"]
    tables = [find(image, (box.parents[0], box), b"mdia", b"minf", b"stbl") for box in tracks]
    for table in tables:
        if table is not None:
            _turn_track(image, table, edits)
    for track in tracks:  # its own metadata, the EXIF of a sequence among them
        own = find(image, (*track.parents, track), b"meta", b"iloc")
        extents += [] if own is None else isobmff.extents(image, own)
    isobmff.shift_extents(edits, extents)
    for table in tables:
        for box in boxes(image, (*table.parents, table)) if table is not None else ():
            if box.kind in (b"stco", b"co64"):
                isobmff.shift_chunks(image, edits, box)
    return edits


def _check_extents(image: bytes, extents: list[isobmff.Extent]) -> None:
    for extent in extents:
        if extent.method == 0 and extent.base + extent.offset + extent.length > len(image):
            raise ImageError(_CUT_SHORT)


def _turn_items(image: bytes, meta: Box, edits: Edits) -> None:
    iprp = find(image, (meta,), b"iprp")
    ipco = None if iprp is None else find(image, (meta, iprp), b"ipco")
    primary = _primary(image, meta)
    if iprp is None or ipco is None or primary is None:
        raise ImageError(_NO_PICTURE)
    properties = list(boxes(image, (meta, iprp, ipco)))
    added: list[bytes] = []
    turned = _turned_together(image, meta, primary)
    tables = [box for box in boxes(image, (meta, iprp)) if box.kind == b"ipma"]
    associations = [_associations(image, box) for box in tables]
    of_primary = [item for table in associations for item in table if item.item == primary]
    if not of_primary:
        raise ImageError("The AVIF's picture has no properties.")
    _check_size(image, _boxes_of(properties, of_primary[0]))
    is_placed = _is_placed(properties, of_primary[0])
    for table, items in zip(tables, associations, strict=True):
        for item in items:
            # An alpha plane that says nothing beside a picture that says something is cut and turned with it.
            if item.item in turned and (item.item == primary or not is_placed or _is_placed(properties, item)):
                turn = _turn_of(image, _boxes_of(properties, item)).mirrored()
                _turn_item(properties, added, item, turn)
        edits.replace(image, table, _written_associations(image, table, items))
    edits.replace(image, ipco, _box(b"ipco", image[ipco.body : ipco.end] + b"".join(added)))


def _boxes_of(properties: list[Box], item: _Association) -> list[Box]:
    """An item's own properties; an index of 0, or one too large, means none."""
    return [properties[index - 1] for index, _ in item.properties if 0 < index <= len(properties)]


def _is_placed(properties: list[Box], item: _Association) -> bool:
    return any(box.kind in (b"clap", b"irot", b"imir") for box in _boxes_of(properties, item))


def _turn_item(properties: list[Box], added: list[bytes], item: _Association, turn: _Turn) -> None:
    kept = [
        (index, essential)
        for index, essential in item.properties
        if not 0 < index <= len(properties) or properties[index - 1].kind not in (b"irot", b"imir")
    ]
    for box in turn.properties():
        if box not in added:
            added.append(box)
        kept.append((len(properties) + added.index(box) + 1, True))
    item.properties[:] = kept


def _turn_of(image: bytes, own: list[Box]) -> _Turn:
    quarters, axis = 0, None
    for box in own:
        if box.kind == b"irot":
            quarters = image[box.body] & 3
        elif box.kind == b"imir":
            axis = image[box.body] & 1
    return _Turn(quarters, axis)


def _check_size(image: bytes, own: list[Box]) -> None:
    for box in own:
        if box.kind == b"ispe":
            formats.check_dimensions(*struct.unpack_from(">II", image, box.body + 4))


def _primary(image: bytes, meta: Box) -> int | None:
    box = find(image, (meta,), b"pitm")
    if box is None:
        return None
    version, _, at = full(image, box)
    return int(struct.unpack_from(">I" if version else ">H", image, at)[0])


def _turned_together(image: bytes, meta: Box, primary: int) -> set[int]:
    """The items that are shown with the primary one, or in its stead: alpha, depth, thumbnail, gain map."""
    references = list(_references(image, meta))
    turned = {primary}
    for kind, item, inputs in references:  # a tone-mapped picture is made of the primary one and a gain map
        if kind == b"dimg" and primary in inputs and item != primary:
            turned |= set(inputs)
    turned |= {item for kind, item, others in references if kind in (b"auxl", b"thmb") and turned & set(others)}
    return turned


def _references(image: bytes, meta: Box) -> Iterator[tuple[bytes, int, tuple[int, ...]]]:
    iref = find(image, (meta,), b"iref")
    if iref is None:
        return
    version, _, _ = full(image, iref)
    code = "I" if version else "H"
    for box in boxes(image, (meta, iref), skip=4):
        item, count = struct.unpack_from(f">{code}H", image, box.body)
        yield box.kind, item, struct.unpack_from(f">{count}{code}", image, box.body + struct.calcsize(f">{code}H"))


def _associations(image: bytes, ipma: Box) -> list[_Association]:
    version, flags, at = full(image, ipma)
    (count,) = struct.unpack_from(">I", image, at)
    at += 4
    found = []
    for _ in range(count):
        item, many = struct.unpack_from(">IB" if version else ">HB", image, at)
        at += 5 if version else 3
        values = struct.unpack_from(f">{many}{'H' if flags & 1 else 'B'}", image, at)
        at += many * (2 if flags & 1 else 1)
        if at > ipma.end:
            raise ImageError(_CUT_SHORT)
        essential = _ESSENTIAL_16 if flags & 1 else _ESSENTIAL_8
        found.append(_Association(item, [(value & ~essential, bool(value & essential)) for value in values]))
    return found


def _written_associations(image: bytes, ipma: Box, items: list[_Association]) -> bytes:
    version, flags, _ = full(image, ipma)
    highest = max((index for item in items for index, _ in item.properties), default=0)
    if highest > _MAX_PROPERTIES or any(len(item.properties) > 255 for item in items):
        raise ImageError("The AVIF has too many properties.")
    wide = bool(flags & 1) or highest >= _ESSENTIAL_8
    essential, code = (_ESSENTIAL_16, "H") if wide else (_ESSENTIAL_8, "B")
    out = [struct.pack(">II", version << 24 | flags | wide, len(items))]
    for item, properties in items:
        out.append(struct.pack(">IB" if version else ">HB", item, len(properties)))
        values = [index | essential if needed else index for index, needed in properties]
        out.append(struct.pack(f">{len(values)}{code}", *values))
    return _box(b"ipma", b"".join(out))


def _turn_track(image: bytes, table: Box, edits: Edits) -> None:
    """Turn a sequence: its properties stand in the description of its samples."""
    sizes = find(image, (*table.parents, table), b"stsz")
    entry = find(image, (*table.parents, table), b"stsd", b"av01")
    if entry is None:
        return  # sound, or text
    if sizes is not None:
        width, height = struct.unpack_from(">HH", image, entry.body + 24)
        (frames,) = struct.unpack_from(">I", image, sizes.body + 8)
        formats.check_dimensions(width, height)
        formats.check_frames(frames, frames * width * height)
    inside = list(boxes(image, (*entry.parents, entry), skip=_SAMPLE_ENTRY_BYTES))
    kept = [image[box.start : box.end] for box in inside if box.kind not in (b"irot", b"imir")]
    head = image[entry.body : entry.body + _SAMPLE_ENTRY_BYTES]
    edits.replace(
        image, entry, _box(b"av01", b"".join([head, *kept, *_turn_of(image, inside).mirrored().properties()]))
    )


def _drop_thumbnail(image: bytes, meta: Box, extents: list[isobmff.Extent], edits: Edits) -> None:
    """Let EXIF no longer point at a thumbnail that contradicts the mirrored picture."""
    iinf = find(image, (meta,), b"iinf")
    if iinf is None:
        return
    version, _, _ = full(image, iinf)
    for box in boxes(image, (meta, iinf), skip=8 if version else 6):
        entry_version, _, at = full(image, box)
        if box.kind != b"infe" or entry_version < 2:
            continue
        item, _, kind = struct.unpack_from(">IH4s" if entry_version == 3 else ">HH4s", image, at)
        own = [extent for extent in extents if extent.item == item]
        if kind == b"Exif" and len(own) == 1 and own[0].method == 0:
            start = own[0].base + own[0].offset
            (skipped,) = struct.unpack_from(">I", image, start)
            begin, end = start + 4 + skipped, start + own[0].length
            changed = exif.without_thumbnail(image[begin:end])
            if changed != image[begin:end]:
                edits.changes.append((begin, end, changed))


def _check(image: bytes) -> None:
    """Decode the first picture: what no viewer could show is no success."""
    try:
        with pixels.open_picture(image, "AVIF") as picture:
            picture.load()
    except (RuntimeError, MemoryError) as error:  # libavif's reason
        if str(error).endswith("Not implemented"):
            return  # a clean aperture beside alpha, for one: others show it
        raise ImageError(f"The AVIF cannot be decoded ({error or 'it is too large'}).") from error
    except (ZeroDivisionError, *pixels.DECODER_ERRORS) as error:  # a clock of no ticks divides by 0 in Pillow
        raise ImageError("The AVIF is damaged, or of a kind that libavif does not read.") from error


def _box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body
