"""C3: the operation `mirror`: a left-right flip of the picture as a person sees it.

One file per way: `jpeg` in the DCT domain (by `turbojpeg`), `png` and `gif` frame by frame inside a container that is
otherwise copied, `pixels` for what must be encoded again. What is not an allowed format never reaches a decoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight import formats
from safelight.errors import UnsupportedFormatError
from safelight.operations.mirror import gif, jpeg, png, webp

if TYPE_CHECKING:
    from safelight.operations import Result

__all__ = ["mirror"]

_WAYS = {formats.JPEG: jpeg.mirror, formats.PNG: png.mirror, formats.GIF: gif.mirror, formats.WEBP: webp.mirror}


def mirror(image: bytes) -> Result:
    """The image flipped left-right; the note `mirror` says "lossless" or "reencoded".

    "Lossless" means the source's own quantised coefficients for a JPEG, the source's own pixels for the others.
    Raises `UnsupportedFormatError`, and `ImageError` for an image that is damaged, cut short or too large.
    """
    found = formats.sniff(image[: formats.HEAD_BYTES])
    if found not in _WAYS:
        raise UnsupportedFormatError
    return _WAYS[found](image)
