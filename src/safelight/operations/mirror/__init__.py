"""C3: the operation `mirror`: a left-right flip of the picture as a person sees it.

One file per format: `jpeg` in the DCT domain (by `turbojpeg`), `png`, `gif`, `tiff` and `bmp` sample by sample inside
a container that is otherwise copied, `avif` by its container alone, `webp` encoded again. What is not an allowed
format never reaches a decoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight import formats
from safelight.errors import UnsupportedFormatError
from safelight.operations.mirror import avif, bmp, gif, jpeg, png, tiff, webp

if TYPE_CHECKING:
    from safelight.operations import Result

__all__ = ["mirror"]

_WAYS = {
    formats.JPEG: jpeg.mirror,
    formats.PNG: png.mirror,
    formats.GIF: gif.mirror,
    formats.WEBP: webp.mirror,
    formats.TIFF: tiff.mirror,
    formats.BMP: bmp.mirror,
    formats.AVIF: avif.mirror,
}


def mirror(image: bytes) -> Result:
    """The image flipped left-right; the note `mirror` says "lossless" or "reencoded".

    "Lossless" means the source's own quantised coefficients for a JPEG, the source's own pixels for the others.
    Raises `UnsupportedFormatError`, and `ImageError` for an image that is damaged, cut short or too large.
    """
    found = formats.sniff(image)
    if found not in _WAYS:
        raise UnsupportedFormatError
    return _WAYS[found](image)
