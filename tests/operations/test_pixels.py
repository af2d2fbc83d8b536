"""Rows of samples, flipped bit for bit; checked by arithmetic on strings of digits."""

from __future__ import annotations

import random

import pytest
from PIL import Image

from safelight.operations.mirror.exif import Axis
from safelight.operations.mirror.pixels import flip_rows


def rows_of(pixels: list[list[str]]) -> bytes:
    out = b""
    for row in pixels:
        digits = "".join(row)
        digits += "0" * (-len(digits) % 8)
        out += bytes(int(digits[at : at + 8], 2) for at in range(0, len(digits), 8))
    return out


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 16, 20, 24, 32, 36, 40, 48, 64, 96, 128])
@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 31])
def test_pixels_stay_bit_for_bit(bits: int, width: int) -> None:
    dice = random.Random(bits * width)
    pixels = [[f"{dice.getrandbits(bits):0{bits}b}" for _ in range(width)] for _ in range(5)]
    raw = rows_of(pixels)
    assert flip_rows(raw, width, 5, bits, Axis.HORIZONTAL) == rows_of([row[::-1] for row in pixels])
    assert flip_rows(raw, width, 5, bits, Axis.VERTICAL) == rows_of(pixels[::-1])


@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("bits", [1, 8, 12, 48])
def test_too_few_bytes_or_too_many_are_refused(axis: Axis, bits: int) -> None:
    raw = bytes((9 * bits + 7) // 8 * 3)
    for wrong in (raw[:-1], raw + b"\0"):
        with pytest.raises(ValueError, match="rows of"):
            flip_rows(wrong, 9, 3, bits, axis)


def test_what_pillow_says_of_a_photo() -> None:
    noise = Image.effect_noise((33, 21), 60)
    flipped = noise.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    assert flip_rows(noise.tobytes(), 33, 21, 8, Axis.HORIZONTAL) == flipped
