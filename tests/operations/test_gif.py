"""GIFs: shown by Pillow before and after, and their blocks compared."""

from __future__ import annotations

import io
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, ImageSequence

from safelight.errors import ImageError, TooManyFramesError, TooManyPixelsError
from safelight.operations.mirror import gif

TEST_IMAGE = Path(__file__).parents[2] / "test_image.jpg"


def scene(size: tuple[int, int] = (60, 41)) -> Image.Image:
    with Image.open(TEST_IMAGE) as image:
        return image.resize(size).convert("P", palette=Image.Palette.ADAPTIVE, colors=64)


def animation(**options: object) -> bytes:
    frames = [scene()]
    for number in range(1, 6):
        frames.append(frames[-1].copy())
        frames[-1].paste(number * 9, (number * 7, number, number * 7 + 9, 40))
    out = io.BytesIO()
    durations = [20, 30, 40, 50, 60, 70]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=3, **options)
    return out.getvalue()


def block(left: int, top: int, size: tuple[int, int], indices: bytes, *, bits: int = 2, flags: int = 0) -> bytes:
    """An image block, its pixels written by Pillow's LZW encoder."""
    pixels = Image.frombytes("L", size, indices).tobytes("gif", "L", bits, int(bool(flags & 0x40)))
    return struct.pack("<BHHHHBB", 0x2C, left, top, *size, flags, bits) + pixels + b"\0"


def screen(width: int, height: int, *blocks: bytes) -> bytes:
    palette = bytes([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x81, 0, 0) + palette + b"".join(blocks) + b";"


def shown(data: bytes) -> list[tuple[bytes, object, object, tuple[int, int]]]:
    with Image.open(io.BytesIO(data)) as image:
        return [
            (frame.convert("RGBA").tobytes(), frame.info.get("duration"), frame.info.get("loop"), frame.size)
            for frame in ImageSequence.Iterator(image)
        ]


@pytest.mark.parametrize(
    "options",
    [{}, {"disposal": 1}, {"disposal": 2}, {"disposal": 3}, {"transparency": 9, "disposal": 2}, {"comment": b"hi"}],
)
def test_an_animation_is_shown_mirrored(options: dict[str, object]) -> None:
    source = animation(**options)
    result = gif.mirror(source)
    assert result.notes == {"mirror": "lossless"}
    before, after = shown(source), shown(result.image)
    assert len(before) == 6
    for old, new in zip(before, after, strict=True):
        assert ImageOps.mirror(Image.frombytes("RGBA", old[3], old[0])).tobytes() == new[0]
        assert old[1:] == new[1:]


def test_all_but_places_and_pixels_is_kept_byte_for_byte() -> None:
    control, comment = b"\x21\xf9\4\x0d\x0a\0\2\0", b"\x21\xfe\5hello\0"
    xmp = b"\x21\xff\x0bXMP DataXMP\4<x/>\0"
    local = bytes(range(12))
    indices = bytes([0, 1, 2, 3, 3, 1])
    first = block(0, 0, (3, 2), indices)
    second = block(1, 1, (2, 1), b"\1\2", flags=0x81)
    second = second[:10] + local + second[10:]
    mirrored = gif.mirror(screen(5, 2, xmp, control, first, comment, control, second)).image
    expected = block(0, 1, (2, 1), b"\2\1", flags=0x81)
    expected = struct.pack("<BHHHHB", 0x2C, 2, 1, 2, 1, 0x81) + local + expected[10:]
    swapped = block(2, 0, (3, 2), bytes([2, 1, 0, 1, 3, 3]))
    assert mirrored == screen(5, 2, xmp, control, swapped, comment, control, expected)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 8), st.booleans(), st.randoms(use_true_random=False))
def test_mirrored_twice_is_the_source(width: int, height: int, bits: int, interlaced: bool, dice: object) -> None:
    indices = bytes(dice.randrange(1 << bits) for _ in range(width * height))
    source = screen(
        width + 3, height, block(1, 0, (width, height), indices, bits=bits, flags=0x40 if interlaced else 0)
    )
    once = gif.mirror(source).image
    assert gif.mirror(once).image == source
    pixels = Image.frombytes("L", (width, height), indices)
    assert once == screen(
        width + 3,
        height,
        block(2, 0, (width, height), ImageOps.mirror(pixels).tobytes(), bits=bits, flags=0x40 if interlaced else 0),
    )


def test_frames_that_reach_over_the_screen() -> None:
    row = bytes([0, 1, 2, 3])
    larger = gif.mirror(screen(2, 1, block(0, 0, (4, 1), row))).image
    assert larger == screen(4, 1, block(0, 0, (4, 1), row[::-1]))  # the first one enlarges it
    small = block(0, 0, (3, 1), bytes(3))
    clipped = gif.mirror(screen(3, 1, small, block(1, 0, (4, 1), row))).image
    assert clipped == screen(3, 1, small, block(0, 0, (2, 1), bytes([1, 0])))  # later ones are cut
    outside = gif.mirror(screen(3, 1, small, block(5, 0, (4, 1), row))).image
    assert outside == screen(3, 1, small, block(5, 0, (4, 1), row))


def test_what_is_cut_short_is_refused() -> None:
    source = screen(60, 41, block(0, 0, (60, 41), scene().tobytes(), bits=6))
    for at in range(6, len(source) - 1):
        with pytest.raises(ImageError):
            gif.mirror(source[:at])
    assert gif.mirror(source[:-1]).image == gif.mirror(source).image  # only the trailer is missing
    assert gif.mirror(source + b"more").image == gif.mirror(source).image


@pytest.mark.parametrize("bits", [0, 12, 255])
def test_code_sizes_that_do_not_exist(bits: int) -> None:
    source = bytearray(screen(3, 1, block(0, 0, (3, 1), b"\0\1\2")))
    source[13 + 12 + 10] = bits
    with pytest.raises(ImageError, match="code size"):
        gif.mirror(bytes(source))


@pytest.mark.parametrize(("read", "written"), [(1, 2), (9, 8), (11, 8)])
def test_odd_code_sizes_are_read_but_not_written(read: int, written: int) -> None:
    """One clear code, one pixel of index 0, one end code, packed by hand."""
    codes = (1 << read) | 0 << (read + 1) | ((1 << read) + 1) << 2 * (read + 1)
    packed = codes.to_bytes((3 * (read + 1) + 7) // 8, "little")
    odd = struct.pack("<BHHHHBB", 0x2C, 0, 0, 1, 1, 0, read) + bytes([len(packed)]) + packed + b"\0"
    assert gif.mirror(screen(2, 1, odd)).image == screen(2, 1, block(1, 0, (1, 1), b"\0", bits=written))


def test_stray_bytes_between_blocks_are_skipped_and_kept() -> None:
    one, other = block(0, 0, (2, 1), b"\1\2"), block(0, 0, (2, 1), b"\2\1")
    assert gif.mirror(screen(2, 1, one, b"\0\0G", one)).image == screen(2, 1, other, b"\0\0G", other)


def test_too_many_frames_or_pixels_are_refused_without_decoding() -> None:
    one = block(0, 0, (500, 500), bytes(250_000))
    began = time.process_time()
    with pytest.raises(TooManyFramesError, match="10,000 frames"):
        gif.mirror(screen(500, 500, one * 10_000))
    with pytest.raises(TooManyFramesError, match="250,000,000 pixels"):
        gif.mirror(screen(500, 500, one * 1_000))
    with pytest.raises(TooManyPixelsError):
        gif.mirror(screen(60_000, 60_000, one))
    with pytest.raises(TooManyPixelsError):
        gif.mirror(screen(3, 3, struct.pack("<BHHHHBB", 0x2C, 0, 0, 60_000, 60_000, 0, 2) + b"\1\x44\0"))
    assert time.process_time() - began < 1
