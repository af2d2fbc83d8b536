"""C3: the predictors of TIFF, taken away before the pixels are flipped and put back behind.

Predictor 2 stores each sample as its difference from the same sample of the pixel to the left, modulo 2 to the power
of its bits; predictor 3 does so with the bytes of floating-point numbers, after it has sorted the bytes of each row:
all highest ones first. Sums and differences are done for many rows at once, byte by byte with a carry, by Pillow's
arithmetic on images that hold one byte of each sample; the sums along a row take as many steps as its width has bits.

TIFF 6.0, section 14: https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf
Predictor 3: https://web.archive.org/web/20220119170528/http://chriscox.org/TIFFTN3d1.pdf
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from PIL import Image, ImageChops

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FLOATING", "HORIZONTAL", "NONE", "Predictor", "done", "undone"]

NONE, HORIZONTAL, FLOATING = 1, 2, 3

_BAND_BYTES = 1_000_000  # what is handled at a time: images that stay in the processor's cache
_IS_POSITIVE = [0] + [1] * 255

_Planes: TypeAlias = list[Image.Image]  # images of one byte of each sample, the lowest first


class Predictor(NamedTuple):
    """Its number, and the samples that it works on: how many in a pixel, of how many bits, and their byte order."""

    kind: int
    samples: int
    bits: int
    order: str


def undone(raw: bytes, row_bytes: int, predictor: Predictor) -> bytes:
    """Rows as they were before the predictor; samples of predictor 3 come with their highest byte first."""
    return _in_bands(raw, row_bytes, predictor, _undone)


def done(raw: bytes, row_bytes: int, predictor: Predictor) -> bytes:
    """The opposite of `undone`."""
    return _in_bands(raw, row_bytes, predictor, _done)


def _in_bands(raw: bytes, row_bytes: int, predictor: Predictor, act: Callable[[bytes, int, Predictor], bytes]) -> bytes:
    step = max(1, _BAND_BYTES // row_bytes) * row_bytes
    return b"".join(act(raw[start : start + step], row_bytes, predictor) for start in range(0, len(raw), step))


def _undone(raw: bytes, row_bytes: int, predictor: Predictor) -> bytes:
    planes = _split(raw, row_bytes, predictor)
    shift, width = predictor.samples, planes[0].width
    while shift < width:
        planes = _combined(planes, _shifted(planes, shift), ImageChops.add_modulo)
        shift *= 2
    rows = _joined(planes, predictor)
    return _regrouped(rows, row_bytes, predictor, sort=False) if predictor.kind == FLOATING else rows


def _done(raw: bytes, row_bytes: int, predictor: Predictor) -> bytes:
    rows = _regrouped(raw, row_bytes, predictor, sort=True) if predictor.kind == FLOATING else raw
    planes = _split(rows, row_bytes, predictor)
    return _joined(_combined(planes, _shifted(planes, predictor.samples), ImageChops.subtract_modulo), predictor)


def _split(raw: bytes, row_bytes: int, predictor: Predictor) -> _Planes:
    size = _sample_bytes(predictor)
    shape = (row_bytes // size, len(raw) // row_bytes)
    return [Image.frombytes("L", shape, raw[at::size]) for at in _significance(predictor)]


def _joined(planes: _Planes, predictor: Predictor) -> bytes:
    size = len(planes)
    out = bytearray(size * planes[0].width * planes[0].height)
    for at, plane in zip(_significance(predictor), planes, strict=True):
        out[at::size] = plane.tobytes()
    return bytes(out)


def _significance(predictor: Predictor) -> range:
    """The places of a sample's bytes in the file, the lowest first."""
    size = _sample_bytes(predictor)
    return range(size) if predictor.order == "<" else range(size - 1, -1, -1)


def _sample_bytes(predictor: Predictor) -> int:
    return 1 if predictor.kind == FLOATING else predictor.bits // 8


def _shifted(planes: _Planes, shift: int) -> _Planes:
    """Each sample where the one `shift` places to its right is, with zeros at the left edge."""
    moved = []
    for plane in planes:
        moved.append(Image.new("L", plane.size))
        if shift < plane.width:
            moved[-1].paste(plane.crop((0, 0, plane.width - shift, plane.height)), (shift, 0))
    return moved


def _combined(first: _Planes, second: _Planes, operation: Callable[[Image.Image, Image.Image], Image.Image]) -> _Planes:
    """The sums (or differences) of two numbers for each sample, with the carry (or borrow) from byte to byte.

    A sum carries if it is below what was added; a difference borrows if what it was taken from is.
    """
    adds = operation is ImageChops.add_modulo
    results: _Planes = []
    carry: Image.Image | None = None
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        result = operation(one, other)
        is_last = number == len(first) - 1
        over = None if is_last else _is_below(result if adds else one, other)
        if carry is not None:
            before, result = result, operation(result, carry)
            if over is not None:
                over = ImageChops.lighter(over, _is_below(result if adds else before, carry))
        results.append(result)
        carry = over
    return results


def _is_below(one: Image.Image, other: Image.Image) -> Image.Image:
    """1 where a byte is smaller than another, else 0."""
    return ImageChops.subtract(other, one).point(_IS_POSITIVE)


def _regrouped(raw: bytes, row_bytes: int, predictor: Predictor, *, sort: bool) -> bytes:
    """Rows of whole numbers to rows of all their first bytes, then all their second ones (`sort`), or back."""
    size, height = predictor.bits // 8, len(raw) // row_bytes
    width = row_bytes // size
    rows = Image.frombytes("L", (row_bytes, height), raw)
    out = bytearray(len(raw))
    if not sort:
        for at in range(size):
            out[at::size] = rows.crop((at * width, 0, (at + 1) * width, height)).tobytes()
        return bytes(out)
    for at in range(size):
        rows.paste(Image.frombytes("L", (width, height), raw[at::size]), (at * width, 0))
    return rows.tobytes()
