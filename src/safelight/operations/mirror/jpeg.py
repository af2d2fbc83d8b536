"""C3: JPEGs mirrored in the DCT domain, losslessly, where the mirrored edge is a whole number of MCUs.

The source's headers (`scan`) decide everything: which axis to flip (EXIF orientation), whether that edge allows it,
and which kind of JPEG to write. Where it does not, or no libjpeg-turbo is installed, the picture is encoded again
(`recode`). Either way the metadata are the source's, byte for byte but for the previews in them (`thumbnails`), and
the file's other pictures are mirrored each for itself (`pictures`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from safelight.errors import ImageError
from safelight.operations import Result
from safelight.operations.mirror import pictures, recode, thumbnails, turbojpeg
from safelight.operations.mirror.scan import (
    ADOBE,
    APP0,
    EOI,
    SOF0,
    SOF1,
    SOI,
    Scan,
    Segment,
    header,
    is_metadata,
    scan,
    segment,
    without,
)

if TYPE_CHECKING:
    from safelight.operations.mirror.exif import Axis

__all__ = ["mirror"]


class _Flipped(NamedTuple):
    jpeg: bytes
    way: str  # "lossless", "reencoded", or "" for what was copied


def mirror(image: bytes) -> Result:
    """A JPEG flipped left-right as displayed, with every further picture in it.

    The note `mirror` tells how the first picture was, `mirror-pictures` how each was if there are several, and
    `mirror-kept` of bytes that are no picture and were copied from behind one.
    """
    first = scan(image)
    parts = pictures.split(image, first)
    flipped = [_flip(image[: parts[0].end], first, first.exif.axis)]
    flipped += [_flip_part(image[part.start : part.end], part, first) for part in parts[1:]]
    ways = [done.way for done in flipped if done.way]
    notes = {"mirror": ways[0]}
    if len(ways) > 1:
        notes["mirror-pictures"] = ", ".join(ways)
    if any(not done.way and done.jpeg.strip(b"\0\xff") for done in flipped):
        notes["mirror-kept"] = "data behind the picture"
    return Result(pictures.joined(image, first, parts, [done.jpeg for done in flipped]), notes=notes)


def _flip_part(source: bytes, part: pictures.Part, first: Scan) -> _Flipped:
    """Another picture of the file, flipped like the first unless it tells its own orientation.

    What is no picture, or a damaged one, stays as it is.
    """
    copied = _Flipped(source, "")
    found = part.found
    if found is None:
        return copied
    try:
        has_own_axis = found.exif.orientation and not part.follows_first
        axis = (found if has_own_axis else first).exif.axis
        flipped = _flip(source, found, axis)
        if part.must_fit and len(flipped.jpeg) > len(source):
            found.kind |= turbojpeg.OPTIMISED  # Huffman tables of its own make it shorter
            flipped = _flip(source, found, axis)
    except ImageError:
        return copied
    if not part.must_fit:
        return flipped
    return copied if len(flipped.jpeg) > len(source) else flipped._replace(jpeg=flipped.jpeg.ljust(len(source), b"\0"))


def _flip(source: bytes, found: Scan, axis: Axis) -> _Flipped:
    """One picture, with its metadata."""
    metadata = []
    for marker, start, end in found.metadata:
        body = thumbnails.flipped(marker, source[start:end], lambda preview: _flip_preview(preview, axis))
        if body is not None:
            metadata.append(segment(marker, body))
    jpeg, way = _flip_bare(source, found, axis)
    return _Flipped(b"".join([SOI, *metadata, *_body(jpeg, found.is_extended)]), way)


def _flip_preview(preview: bytes, axis: Axis) -> bytes | None:
    """A JPEG inside metadata; whatever metadata it has itself is left out."""
    if not preview.startswith(SOI):
        return None
    try:
        return _flip_bare(preview, scan(preview), axis).jpeg
    except ImageError:
        return None


def _flip_bare(source: bytes, found: Scan, axis: Axis) -> _Flipped:
    """A picture without its metadata; with JFIF and Adobe segments as the library writes them."""
    library = turbojpeg.find(found.kind)
    if library is None and found.end is None:
        raise ImageError("The JPEG is cut short.")  # Pillow alone could not tell how much is missing
    try:
        if library is not None and found.is_aligned(axis):
            bare = _without(source, found, [part for part in found.metadata if not _tells_colours(source, part)])
            if (jpeg := _flip_losslessly(bare, found, axis, library)) is not None:
                return _Flipped(jpeg, "lossless")
        return _Flipped(recode.recode(_without(source, found, found.metadata), found, axis), "reencoded")
    except turbojpeg.UnsupportedError as error:
        raise ImageError("JPEGs with such sampling factors cannot be processed.") from error
    except turbojpeg.DamageError as error:
        raise ImageError(f"The JPEG is damaged or cut short ({error}).") from error


def _flip_losslessly(bare: bytes, found: Scan, axis: Axis, library: turbojpeg.Library) -> bytes | None:
    """None if no library that is installed takes such sampling factors."""
    for candidate in (library, turbojpeg.find(turbojpeg.OPTIMISED)):
        try:
            return candidate.flip(bare, axis, found.kind) if candidate is not None else None
        except turbojpeg.UnsupportedError:
            continue
    return None


def _tells_colours(source: bytes, segment: Segment) -> bool:
    return segment.marker == ADOBE or (segment.marker == APP0 and source.startswith(b"JFIF\0", segment.start))


def _without(source: bytes, found: Scan, segments: list[Segment]) -> bytes:
    """The picture without these segments and without what follows it; a missing end marker is added.

    That alone may be missing; of whatever else is, the library warns.
    """
    bare = without(source[: found.end], segments)
    return bare if found.end is not None else bare + EOI


def _body(jpeg: bytes, is_extended: bool) -> list[bytes | memoryview]:
    """What follows the metadata, without a copy; libjpeg calls every sequential picture baseline that may be so."""
    whole, behind = memoryview(jpeg), len(SOI)
    for marker, start, end in header(jpeg):
        if is_metadata(marker):
            behind = end
        elif not is_extended:
            break
        elif marker == SOF0:
            return [whole[behind : start - 3], bytes([SOF1]), whole[start - 2 :]]
    return [whole[behind:]]
