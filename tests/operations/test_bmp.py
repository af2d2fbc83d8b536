"""BMPs, made by a writer and read by a reader of our own; then netpbm and Pillow see the same."""

from __future__ import annotations

import io
import random
import struct
import subprocess

import pytest
from conftest import needed
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from safelight import formats
from safelight.errors import ImageError, TooManyPixelsError
from safelight.operations.mirror import bmp, bmp_runs

BITS = (1, 2, 4, 8, 16, 24, 32, 64)
HEADERS = (12, 16, 24, 36, 40, 52, 56, 64, 108, 124)
RLE = {8: 1, 4: 2, 24: 4}  # bits -> compression
Rows = list[list[int | None]]  # in the file's order; None is a pixel that was skipped


def written(
    size: tuple[int, int],
    bits: int,
    data: bytes,
    *,
    header: int = 40,
    compression: int = 0,
    palette: bytes = b"",
    colours: int = 0,
    offset: int | None = None,
    fields: dict[int, bytes] | None = None,
) -> bytes:
    """A BMP of these pixels (`data`); `fields` replaces bytes at places in the file."""
    width, height = size
    if header == 12:
        numbers = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        numbers = struct.pack(
            "<IiiHHIIiiII", header, width, height, 1, bits, compression, len(data), 99, 98, colours, 0
        )
        numbers = numbers[:header].ljust(header, b"\0")
    start = 14 + len(numbers) + len(palette)
    head = b"BM" + struct.pack("<IHHI", start + len(data), 5, 6, start if offset is None else offset)
    out = bytearray(head + numbers + palette + data)
    for at, value in (fields or {}).items():
        out[at : at + len(value)] = value
    return bytes(out)


def packed(rows: Rows, bits: int, padding: bytes = b"\0") -> bytes:
    out = bytearray()
    for row in rows:
        if bits < 8:
            digits = "".join(f"{value:0{bits}b}" for value in row)
            digits += "0" * (-len(digits) % 8)
            line = int(digits, 2).to_bytes(len(digits) // 8, "big")
        else:
            line = b"".join((value or 0).to_bytes(bits // 8, "little") for value in row)
        out += line + padding * (-len(line) % 4)
    return bytes(out)


def palette_of(bits: int, entry: int = 4) -> bytes:
    return random.Random(bits).randbytes(entry << bits) if bits <= 8 else b""


def picture(bits: int, width: int = 13, height: int = 5) -> Rows:
    dice = random.Random(width * bits)
    return [[dice.randrange(1 << bits) for _ in range(width)] for _ in range(height)]


def mirrored(rows: Rows) -> Rows:
    return [row[::-1] for row in rows]


def unpacked(stream: bytes, width: int, height: int, bits: int) -> Rows:
    """A run-length stream as pixels, in the simplest way; what lies beyond a line's end is not seen."""
    rows: Rows = [[None] * width for _ in range(height)]
    x = y = at = 0
    step = bits // 8

    def put(value: int) -> None:
        nonlocal x
        if x < width:
            rows[y][x] = value
        x += 1

    while at < len(stream):
        first, second = stream[at], stream[at + 1]
        at += 2
        if first:
            values = (
                [second >> 4, second & 15] if bits == 4 else [int.from_bytes(stream[at - 1 : at - 1 + step], "big")]
            )
            at += max(step - 1, 0)
            for number in range(first):
                put(values[number % len(values)])
        elif second == 0:
            x, y = 0, y + 1
        elif second == 1:
            break
        elif second == 2:
            x, y, at = x + stream[at], y + stream[at + 1], at + 2
        else:
            length = (second * bits + 7) // 8
            data = stream[at : at + length]
            at += length + length % 2
            digits = data.hex()
            for number in range(second):
                wide = 1 if bits == 4 else 2 * step
                put(int(digits[number * wide : (number + 1) * wide], 16))
    return rows


def seen_by(data: bytes, tool: str) -> Image.Image:
    if tool == "Pillow":
        with Image.open(io.BytesIO(data), formats=["BMP"]) as shown:
            return shown.convert("RGB")
    done = subprocess.run([needed(tool, "netpbm"), "-quiet"], input=data, capture_output=True, check=True)
    with Image.open(io.BytesIO(done.stdout)) as shown:
        return shown.convert("RGB")


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("bits", BITS)
def test_pixels_are_mirrored_and_all_else_is_kept(bits: int, header: int) -> None:
    rows = picture(bits)
    palette = palette_of(bits, 3 if header == 12 else 4)

    def of(pixels: Rows) -> bytes:
        return written((13, 5), bits, packed(pixels, bits), header=header, palette=palette) + b"behind"

    result = bmp.mirror(of(rows))
    assert result.notes == {"mirror": "lossless"}
    assert result.image == of(mirrored(rows))
    assert formats.sniff(of(rows)) is formats.BMP


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 70), st.integers(1, 9))
def test_mirrored_twice_is_the_file(bits: int, width: int, height: int) -> None:
    source = written((width, height), bits, packed(picture(bits, width, height), bits), palette=palette_of(bits))
    once = bmp.mirror(source).image
    assert once is not None
    assert bmp.mirror(once).image == source


def test_top_down_pictures_stay_so() -> None:
    rows = picture(24)
    source, expected = (written((13, -5), 24, packed(pixels, 24)) for pixels in (rows, mirrored(rows)))
    assert bmp.mirror(source).image == expected


def test_what_pads_a_row_stays_behind_it() -> None:
    rows = picture(8)
    source, expected = (
        written((13, 5), 8, packed(pixels, 8, padding=b"\xaa"), palette=palette_of(8))
        for pixels in (rows, mirrored(rows))
    )
    assert bmp.mirror(source).image == expected


@pytest.mark.parametrize(("compression", "masks"), [(3, (0xF800, 0x7E0, 0x1F)), (6, (0xF0, 0xF00, 0xF000, 0xF))])
def test_masks_of_any_kind_are_kept(compression: int, masks: tuple[int, ...]) -> None:
    rows, table = picture(16), struct.pack(f"<{len(masks)}I", *masks)
    source, expected = (
        written((13, 5), 16, packed(pixels, 16), compression=compression, palette=table)
        for pixels in (rows, mirrored(rows))
    )
    assert bmp.mirror(source).image == expected


def test_a_gap_before_the_pixels_and_sizes_that_lie_stay() -> None:
    rows, lies = picture(24), {2: b"\1\2\3\xff", 34: bytes(4)}
    source, expected = (
        written((13, 5), 24, packed(pixels, 24), palette=b"a gap", fields=lies) for pixels in (rows, mirrored(rows))
    )
    assert bmp.mirror(source).image == expected


@pytest.mark.parametrize("offset", [0, 54])
def test_an_offset_that_forgets_the_palette(offset: int) -> None:
    rows, palette = [[0, 1, 2, 2, 1, 0, 0]], bytes(range(12))
    source, expected = (
        written((7, 1), 8, packed(pixels, 8), palette=palette, colours=3, offset=offset)
        for pixels in (rows, mirrored(rows))
    )
    assert bmp.mirror(source).image == expected


def test_an_offset_of_0_behind_masks() -> None:
    rows = picture(16)
    source, expected = (
        written((13, 5), 16, packed(pixels, 16), compression=3, palette=b"\1\0\2\0\4\0\0\0\7\7\7\0", offset=0)
        for pixels in (rows, mirrored(rows))
    )
    assert bmp.mirror(source).image == expected


def test_an_offset_of_0_behind_colours_that_nobody_needs() -> None:
    rows = picture(24)
    source, expected = (
        written((13, 5), 24, packed(pixels, 24), palette=bytes(8), colours=2, offset=0)
        for pixels in (rows, mirrored(rows))
    )
    assert bmp.mirror(source).image == expected


def test_a_palette_shorter_than_it_could_be() -> None:
    rows = [[0, 1, 2, 2, 1, 0, 0]]
    source, expected = (
        written((7, 1), 8, packed(pixels, 8), palette=bytes(range(12)), colours=3) for pixels in (rows, mirrored(rows))
    )
    assert bmp.mirror(source).image == expected


@pytest.mark.parametrize("name", [b"DEBM", b"KNIL"])
@pytest.mark.parametrize("bits", [8, 24])
def test_a_profile_is_found_where_the_header_says(bits: int, name: bytes) -> None:
    rows, profile = [[1] * 9, [2, 3, 4, 3, 4, 3, 4, 3, 4]], b"a profile or its path"
    data = packed(rows, bits) if bits == 24 else b"\2\1\0\0" + b"\3\1\0\1"  # which needs two more steps mirrored
    place = 124 + len(palette_of(bits)) + len(data)
    fields = {70: name, 126: struct.pack("<II", place, len(profile))}
    source = written(
        (9, 2), bits, data + profile, header=124, compression=bits == 8, palette=palette_of(bits), fields=fields
    )
    source = source[:34] + struct.pack("<I", len(data)) + source[38:]
    result = bmp.mirror(source).image
    assert result is not None
    file_size, data_size, start, length = (struct.unpack_from("<I", result, at)[0] for at in (2, 34, 126, 130))
    assert result[14 + start : 14 + start + length] == profile
    assert file_size == len(result)
    assert data_size == len(result) - len(profile) - 14 - 124 - len(palette_of(bits))


def runs(bits: int, size: tuple[int, int], stream: bytes, **options: object) -> bytes:
    header = 64 if bits == 24 else 40
    return written(size, bits, stream, header=header, compression=RLE[bits], palette=palette_of(bits), **options)


def stream_of(data: bytes | None, bits: int) -> bytes:
    assert data is not None
    return data[14 + (64 if bits == 24 else 40) + len(palette_of(bits)) :]


@pytest.mark.parametrize(
    ("bits", "stream", "expected"),
    [
        (8, b"\4a\2b\0\0\0\3xyz\0\3c\0\0\0\1", b"\2b\4a\0\0\3c\0\3zyx\0\0\0\0\1"),
        (4, b"\3\x12\3\x34\0\0\0\5\x12\x34\x50\0\1\x60\0\1", b"\3\x34\3\x12\0\0\1\x60\0\5\x54\x32\x10\0\0\1"),
        (4, b"\6\x12\0\1", b"\6\x21\0\1"),
        (24, b"\4abc\2def\0\0\0\3ghijklmno\0\3pqr\0\1", b"\2def\4abc\0\0\3pqr\0\3mnojklghi\0\0\1"),
    ],
)
def test_runs_stay_runs_and_pixels_stay_pixels(bits: int, stream: bytes, expected: bytes) -> None:
    height = 1 + (stream.count(b"\0\0\0") > 0)
    assert bmp.mirror(runs(bits, (6, height), stream)).image == runs(bits, (6, height), expected)


def test_skipped_pixels_stay_skipped() -> None:
    stream = b"\2a\0\2\3\0\1b\0\0" + b"\0\2\1\2\1c\0\1"  # a line, a step of one to the right and two down, its end
    result = stream_of(bmp.mirror(runs(8, (7, 6), stream)).image, 8)
    assert unpacked(result, 7, 6, 8) == mirrored(unpacked(stream, 7, 6, 8))
    assert result == b"\0\2\1\0\1b\0\2\3\0\2a" + b"\0\0\0\2\5\2\1c\0\1"


def test_long_ways_take_several_steps() -> None:
    stream = b"\1a\0\0" + b"\0\2\0\xff" * 2 + b"\1b\0\1"
    result = stream_of(bmp.mirror(runs(8, (700, 600), stream)).image, 8)
    assert unpacked(result, 700, 600, 8) == mirrored(unpacked(stream, 700, 600, 8))


@st.composite
def streams(draw: st.DrawFn) -> tuple[int, int, int, bytes]:
    """Codes at random, of which some reach beyond a line's end."""
    bits, width, height = draw(st.sampled_from(list(RLE))), draw(st.integers(1, 30)), draw(st.integers(1, 6))
    dice = random.Random(draw(st.integers(0, 1 << 30)))
    out, x, y = bytearray(), 0, 0
    while y < height:
        kind = dice.randrange(6)
        if kind == 0 or x > width:
            out, x, y = out + b"\0\0", 0, y + 1
        elif kind == 1 and x < width:
            across, down = dice.randint(0, width - x), dice.randint(0, min(height - 1 - y, 2))
            out, x, y = out + bytes([0, 2, across, down]), x + across, y + down
        elif kind == 2:
            count = dice.randint(3, 9)
            data = dice.randbytes((count * bits + 7) // 8)
            out, x = out + bytes([0, count]) + data + bytes(len(data) % 2), x + count
        else:
            count = dice.randint(1, 12)
            out, x = out + bytes([count]) + dice.randbytes(max(1, bits // 8)), x + count
        x = min(x, width)
    return bits, width, height, bytes(out + b"\0\1")


@settings(max_examples=300, deadline=None)
@given(streams())
def test_any_stream_is_shown_mirrored(drawn: tuple[int, int, int, bytes]) -> None:
    bits, width, height, stream = drawn
    once = bmp.mirror(runs(bits, (width, height), stream)).image
    assert once is not None
    assert unpacked(stream_of(once, bits), width, height, bits) == mirrored(unpacked(stream, width, height, bits))
    twice = bmp.mirror(once).image
    assert unpacked(stream_of(twice, bits), width, height, bits) == unpacked(stream, width, height, bits)
    assert int.from_bytes(once[2:6], "little") == len(once)


def test_a_stream_without_an_end_is_given_one() -> None:
    stream = b"\4a\0\0\4b"
    assert stream_of(bmp.mirror(runs(8, (4, 2), stream)).image, 8) == b"\4a\0\0\4b\0\1"
    assert stream_of(bmp.mirror(runs(8, (4, 2), stream + b"\0\0")).image, 8) == b"\4a\0\0\4b\0\0\0\1"
    with pytest.raises(ImageError, match="cut short"):
        bmp.mirror(runs(8, (4, 3), stream))


def test_a_run_may_be_longer_than_its_line() -> None:
    assert stream_of(bmp.mirror(runs(4, (3, 1), b"\4\x12\0\1")).image, 4) == b"\3\x12\0\1"
    assert stream_of(bmp.mirror(runs(8, (3, 1), b"\2a\0\4wxyz\0\1")).image, 8) == b"\1w\2a\0\1"
    assert stream_of(bmp.mirror(runs(8, (3, 1), b"\3a\5b\0\5vwxyz\0\0\1")).image, 8) == b"\3a\0\1"


@pytest.mark.parametrize(
    "stream", [b"\0\2\5\0\1a\0\1", b"\0\2\0\3\1a\0\1", b"\0\0\0\0\1a\0\1", b"\0\2\0\2\0\4abcd\0\1"]
)
def test_runs_that_leave_the_picture_are_refused(stream: bytes) -> None:
    with pytest.raises(ImageError, match="leave the picture"):
        bmp.mirror(runs(8, (4, 2), stream))


def test_too_many_pieces_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = runs(8, (4, 2), b"\0\0" * 100 + b"\0\1")
    assert bmp.mirror(source).image is not None
    monkeypatch.setattr(bmp_runs, "MAX_PIECES", 100)
    with pytest.raises(ImageError, match="more than 100 pieces"):
        bmp.mirror(source)


@pytest.mark.parametrize("tool", ["bmptopnm", "Pillow"])
@pytest.mark.parametrize(
    ("bits", "header"), [(1, 40), (4, 12), (8, 40), (8, 124), (16, 40), (24, 12), (24, 40), (32, 40)]
)
def test_others_see_it_mirrored(bits: int, header: int, tool: str) -> None:
    source = written(
        (13, 5), bits, packed(picture(bits), bits), header=header, palette=palette_of(bits, 3 + (header > 12))
    )
    result = bmp.mirror(source).image
    assert result is not None
    assert seen_by(result, tool).tobytes() == ImageOps.mirror(seen_by(source, tool)).tobytes()


@pytest.mark.parametrize("tool", ["bmptopnm", "Pillow"])
@pytest.mark.parametrize(
    ("bits", "stream"),
    [
        (8, b"\5\1\0\3\2\3\4\0\0\0" + b"\0\5\1\2\3\4\5\0\3\7\0\0\0\1"),
        (4, b"\5\x12\0\3\x34\x50\0\0" + b"\0\5\x12\x34\x50\0\3\x77\0\0\0\1"),
    ],
)
def test_others_see_runs_mirrored(bits: int, stream: bytes, tool: str) -> None:
    source = runs(bits, (8, 2), stream)
    result = bmp.mirror(source).image
    assert result is not None
    assert seen_by(result, tool).tobytes() == ImageOps.mirror(seen_by(source, tool)).tobytes()


def test_what_is_cut_short_is_refused_but_for_the_last_padding() -> None:
    whole = written((13, 5), 8, packed(picture(8), 8), palette=palette_of(8))
    result = bmp.mirror(whole).image
    assert result is not None
    for at in range(14, len(whole) - 3):
        with pytest.raises(ImageError):
            bmp.mirror(whole[:at])
    for at in range(len(whole) - 3, len(whole)):
        assert bmp.mirror(whole[:at]).image == result[:at]


@pytest.mark.parametrize("bits", list(RLE))
def test_a_stream_that_is_cut_short_is_refused(bits: int) -> None:
    value = b"\x12" * max(1, bits // 8)
    stream = b"\5" + value + b"\0\3" + value * 3 + bytes(len(value * 3) % 2) + b"\0\0\0\2\1\0\7" + value
    whole = runs(bits, (8, 2), stream)
    assert bmp.mirror(whole).image is not None
    for at in range(14, len(whole)):
        with pytest.raises(ImageError):
            bmp.mirror(whole[:at])


@pytest.mark.parametrize(
    ("bits", "compression", "sentence"),
    [
        (24, 4, "a JPEG"),
        (0, 5, "a PNG"),
        (32, 11, "CMYK"),
        (1, 3, "Huffman"),
        (3, 0, "no compression 0 of 3 bits"),
        (8, 2, "no compression 2 of 8 bits"),
        (8, 3, "no compression 3 of 8 bits"),
        (24, 99, "no compression 99"),
    ],
)
def test_what_cannot_be_mirrored_is_named(bits: int, compression: int, sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence):
        bmp.mirror(written((13, 5), bits, bytes(500), header=40 if compression == 3 else 124, compression=compression))


def test_headers_that_contradict_themselves_are_refused() -> None:
    pixels = packed(picture(24), 24)
    with pytest.raises(ImageError, match="begin inside its header"):
        bmp.mirror(written((13, 5), 24, pixels, offset=50))
    with pytest.raises(ImageError, match="width is negative"):
        bmp.mirror(written((-13, 5), 24, pixels))
    with pytest.raises(ImageError, match="no pixels"):
        bmp.mirror(written((13, 0), 24, pixels))
    with pytest.raises(TooManyPixelsError):
        bmp.mirror(written((1 << 30, 5), 24, pixels))
