from __future__ import annotations

import io
import struct
import time
import zlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from safelight import formats
from safelight.errors import ImageError, TooManyFramesError, TooManyPixelsError

NAMES = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WebP": "webp", "TIFF": "tiff", "BMP": "bmp", "AVIF": "avif"}


def saved(name: str, size: tuple[int, int] = (37, 21), **options: object) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (200, 30, 20)).save(out, name.upper(), **options)
    return out.getvalue()


@pytest.mark.parametrize("fmt", formats.FORMATS, ids=lambda fmt: fmt.name)
def test_each_format_is_recognised_and_measured(fmt: formats.Format) -> None:
    data = saved(fmt.name)
    assert formats.sniff(data[:64]) is fmt
    assert formats.dimensions(data, fmt) == (37, 21)
    assert fmt.extension == NAMES[fmt.name]
    assert fmt.media_type == f"image/{fmt.name.lower()}"


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\xff\xd8",
        b"\x89PNG\r\n",
        b"GIF88a",
        b"RIFF\0\0\0\0WAVE",
        b"BMW is a maker of cars and motorcycles",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        b"P6 9 9 255",
    ],
)
def test_what_is_no_allowed_format(head: bytes) -> None:
    assert formats.sniff(head) is None


@pytest.mark.parametrize("size", [(40_000, 3), (3, 65_535)])
def test_a_gif_may_be_wider_than_a_signed_number(size: tuple[int, int]) -> None:
    assert formats.dimensions(saved("GIF", size), formats.GIF) == size


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}], ids=["VP8", "VP8L", "VP8X"])
def test_every_kind_of_webp_is_measured(options: dict[str, object]) -> None:
    assert formats.dimensions(saved("WebP", (16_383, 2), **options), formats.WEBP) == (16_383, 2)


def test_the_scale_in_a_vp8_header_is_no_dimension() -> None:
    data = bytearray(saved("WebP"))
    data[27] |= 0x40
    assert formats.dimensions(bytes(data), formats.WEBP) == (37, 21)


def test_an_orientation_does_not_swap_the_stored_dimensions() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    assert formats.dimensions(saved("JPEG", exif=turned), formats.JPEG) == (37, 21)


def test_a_jpeg_whose_metadata_fills_the_head_has_no_known_dimensions() -> None:
    data = saved("JPEG")
    segment = b"\xff\xe2" + (60_000).to_bytes(2, "big") + bytes(59_998)
    assert formats.dimensions(data[:2] + segment + data[2:], formats.JPEG) == (37, 21)
    assert formats.dimensions(data[:2] + 2 * segment + data[2:], formats.JPEG) is None


@pytest.mark.parametrize(
    "head",
    [b"\xff\xd8" + b"\xff\xfe\0\2" * 16_384, b"\xff\xd8" + b"\xff" * 65_536, b"\xff\xd8\xff\xfe\0\2" + b"1" * 65_536],
    ids=["segments", "fill", "garbage"],
)
def test_a_hostile_head_costs_little(head: bytes) -> None:
    began = time.process_time()
    assert formats.dimensions(head, formats.JPEG) is None
    assert time.process_time() - began < 0.1  # it takes 1 to 5 ms


@given(st.sampled_from(formats.FORMATS), st.binary(max_size=300), st.integers(0, 200))
@example(formats.TIFF, b"\xff" * 100, 4)
def test_damage_is_never_an_exception(fmt: formats.Format, damage: bytes, at: int) -> None:
    data = saved(fmt.name)
    size = formats.dimensions(data[:at] + damage, fmt)
    assert size is None or min(size) > 0


def test_a_picture_of_too_many_pixels_is_refused_by_its_header() -> None:
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))
    size = formats.dimensions(head, formats.PNG)
    assert size == (60_000, 60_000)
    with pytest.raises(TooManyPixelsError, match=r"60,000 x 60,000 pixels; at most 100,000,000"):
        formats.check_dimensions(*size)


def test_limits_are_inclusive() -> None:
    formats.check_dimensions(10_000, 10_000)
    with pytest.raises(TooManyPixelsError):
        formats.check_dimensions(10_000, 10_001)
    with pytest.raises(ImageError, match="no pixels"):
        formats.check_dimensions(0, 5)
    formats.check_frames(formats.MAX_FRAMES, formats.MAX_TOTAL_PIXELS)
    with pytest.raises(TooManyFramesError, match="2,001 frames"):
        formats.check_frames(formats.MAX_FRAMES + 1, 1)
    with pytest.raises(TooManyFramesError, match="200,000,001 pixels"):
        formats.check_frames(2, formats.MAX_TOTAL_PIXELS + 1)
