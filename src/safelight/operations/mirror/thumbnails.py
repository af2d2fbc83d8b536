"""C3: the previews inside a JPEG's metadata, flipped with their picture, or dropped: never left to contradict it.

EXIF has one in its second directory, Photoshop one in its "image resources" (APP13), JFIF one in an extension.
https://www.adobe.com/devnet-apps/photoshop/fileformatashtml/#50577409_pgfId-1037504
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from safelight.operations.mirror import exif
from safelight.operations.mirror.scan import APP0, APP1, APP13, MAX_BODY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["flipped"]

_PHOTOSHOP, _RESOURCE = b"Photoshop 3.0\0", b"8BIM"
_THUMBNAILS = (1033, 1036)
_THUMBNAIL_HEADER = 28  # bytes before the JPEG; two of them repeat its length


def flipped(marker: int, body: bytes, flip: Callable[[bytes], bytes | None]) -> bytes | None:
    """A metadata segment's body with its preview flipped by `flip` (or dropped, if that says None).

    None for a segment that is nothing but a preview that cannot be flipped.
    """
    if marker == APP1 and body.startswith(b"Exif\0\0"):
        return exif.with_thumbnail(body, flip, MAX_BODY)
    if marker == APP13 and body.startswith(_PHOTOSHOP):
        return _with_resources_flipped(body, flip)
    if marker == APP0 and body.startswith(b"JFXX\0"):
        return None
    return body


def _with_resources_flipped(body: bytes, flip: Callable[[bytes], bytes | None]) -> bytes:
    out = [_PHOTOSHOP]
    position = len(_PHOTOSHOP)
    for number, start, data_at, end in _resources(body):
        resource = body[start:end]
        if number in _THUMBNAILS:
            jpeg = flip(body[data_at + _THUMBNAIL_HEADER : end])
            header = body[data_at : data_at + _THUMBNAIL_HEADER]
            resource = b"" if jpeg is None else _resource(body[start : data_at - 4], header, jpeg)
        out.append(resource)
        position = end
    changed = b"".join([*out, body[position:]])
    return changed if len(changed) <= MAX_BODY else _with_resources_flipped(body, lambda _: None)


def _resources(body: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Each resource's number, and where it begins, its data begins and it ends; none after what is no resource."""
    position = len(_PHOTOSHOP)
    while body.startswith(_RESOURCE, position) and position + 7 <= len(body):
        name_bytes = body[position + 6] + 1
        data_at = position + 6 + name_bytes + name_bytes % 2 + 4
        if data_at > len(body):
            return
        (length,) = struct.unpack_from(">I", body, data_at - 4)
        end = data_at + length + length % 2
        if data_at + length > len(body):
            return
        yield int.from_bytes(body[position + 4 : position + 6], "big"), position, data_at, min(end, len(body))
        position = end


def _resource(name: bytes, header: bytes, jpeg: bytes) -> bytes:
    head = header[:20] + struct.pack(">I", len(jpeg)) + header[24:]
    length = len(head) + len(jpeg)
    return name + struct.pack(">I", length) + head + jpeg + bytes(length % 2)
