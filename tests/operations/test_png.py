"""PNGs, checked by a reader and a writer of our own: Pillow's would share the mistakes, and cuts 16 bits to 8."""

from __future__ import annotations

import io
import random
import struct
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, ImageSequence

from safelight.errors import ImageError, TooManyFramesError, TooManyPixelsError
from safelight.operations.mirror import png

TEST_IMAGE = Path(__file__).parents[2] / "test_image.jpg"
SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
KINDS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8)]
KINDS += [(4, 8), (4, 16), (6, 8), (6, 16)]
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
Rows = list[list[tuple[int, ...]]]  # of pixels, of samples


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        found.append((kind, data[at + 8 : at + 8 + length]))
        assert zlib.crc32(kind + found[-1][1]) == int.from_bytes(data[at + 8 + length : at + 12 + length], "big")
        at += 12 + length
    return found


def paeth(left: int, up: int, corner: int) -> int:
    guess = left + up - corner
    return min((left, up, corner), key=lambda value: abs(guess - value))


def predicted(kind: int, row: bytearray, above: bytes, at: int, step: int) -> int:
    left, corner = (row[at - step], above[at - step]) if at >= step else (0, 0)
    return (0, left, above[at], (left + above[at]) // 2, paeth(left, above[at], corner))[kind]


def packed(row: list[tuple[int, ...]], depth: int) -> bytes:
    bits = "".join(f"{sample:0{depth}b}" for pixel in row for sample in pixel)
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def filtered(rows: Rows, depth: int, dice: random.Random) -> bytes:
    step = max(1, len(rows[0][0]) * depth // 8)
    out, above = bytearray(), bytes(len(packed(rows[0], depth)))
    for row in rows:
        plain, kind = bytearray(packed(row, depth)), dice.randrange(5)
        out.append(kind)
        out += bytes((plain[at] - predicted(kind, plain, above, at, step)) & 255 for at in range(len(plain)))
        above = plain
    return bytes(out)


def written(rows: Rows, colour: int, depth: int, interlaced: bool = False, extra: bytes = b"") -> bytes:
    """A PNG with a random filter for each row, its stream in two chunks."""
    dice = random.Random(len(rows))
    passes = [rows]
    if interlaced:
        passes = [[row[x::dx] for row in rows[y::dy] if row[x::dx]] for x, y, dx, dy in ADAM7]
    stream = zlib.compress(b"".join(filtered(part, depth, dice) for part in passes if part))
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), depth, colour, 0, 0, int(interlaced))
    palette = chunk(b"PLTE", bytes(3 << depth)) if colour == 3 else b""
    middle = len(stream) // 2
    pixels = chunk(b"IDAT", stream[:middle]) + chunk(b"IDAT", stream[middle:])
    return SIGNATURE + chunk(b"IHDR", header) + palette + extra + pixels + chunk(b"IEND", b"")


def read(data: bytes) -> Rows:
    """The pixels of a PNG that is not interlaced."""
    found = chunks(data)
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", found[0][1])
    assert not interlaced
    raw = zlib.decompress(b"".join(body for kind, body in found if kind == b"IDAT"))
    bits = CHANNELS[colour] * depth
    row_bytes, step = (width * bits + 7) // 8, max(1, bits // 8)
    assert len(raw) == height * (1 + row_bytes)
    rows, above = [], bytes(row_bytes)
    for start in range(0, len(raw), 1 + row_bytes):
        row = bytearray(raw[start + 1 : start + 1 + row_bytes])
        for at in range(row_bytes):
            row[at] = (row[at] + predicted(raw[start], row, above, at, step)) & 255
        above = row
        number, unused = int.from_bytes(row, "big"), row_bytes * 8 - width * bits
        samples = [number >> (unused + depth * at) & (1 << depth) - 1 for at in range(width * CHANNELS[colour])][::-1]
        rows.append(list(zip(*[iter(samples)] * CHANNELS[colour], strict=True)))
    return rows


@st.composite
def pictures(draw: st.DrawFn) -> tuple[int, int, Rows, bool]:
    colour, depth = draw(st.sampled_from(KINDS))
    width, height = draw(st.integers(1, 19)), draw(st.integers(1, 80))
    dice = random.Random(draw(st.integers(0, 1000)))
    most = dice.choice([(1 << depth) - 1, 1])  # noise, or something that compresses
    rows = [
        [tuple(dice.randint(0, most) for _ in range(CHANNELS[colour])) for _ in range(width)] for _ in range(height)
    ]
    return colour, depth, rows, draw(st.booleans())


@settings(max_examples=120, deadline=None)
@given(pictures())
def test_every_pixel_of_every_kind_is_mirrored_exactly(picture: tuple[int, int, Rows, bool]) -> None:
    colour, depth, rows, interlaced = picture
    once = png.mirror(written(rows, colour, depth, interlaced))
    assert once.notes == {"mirror": "lossless"}
    assert read(once.image) == [row[::-1] for row in rows]
    assert read(png.mirror(once.image).image) == rows


@pytest.mark.parametrize(("colour", "depth"), KINDS)
@pytest.mark.parametrize("interlaced", [False, True])
def test_each_kind(colour: int, depth: int, interlaced: bool) -> None:
    dice = random.Random(depth)
    rows = [[tuple(dice.randrange(1 << depth) for _ in range(CHANNELS[colour])) for _ in range(11)] for _ in range(9)]
    mirrored = png.mirror(written(rows, colour, depth, interlaced)).image
    assert read(mirrored) == [row[::-1] for row in rows]
    assert chunks(mirrored)[0][1][8:10] == bytes([depth, colour])


def test_a_16_bit_photo_stays_small() -> None:
    with Image.open(TEST_IMAGE) as scene:
        small = scene.resize((256, 172)).convert("RGB").tobytes()
    samples = [value * 257 for value in small]
    rows = [list(zip(*[iter(samples[at : at + 768])] * 3, strict=True)) for at in range(0, len(samples), 768)]
    source = written(rows, 2, 16)
    mirrored = png.mirror(source).image
    assert read(mirrored) == [row[::-1] for row in rows]
    assert len(mirrored) < 0.9 * len(source)  # the source has a filter at random for each row


COLOUR = [
    (b"gAMA", struct.pack(">I", 45455)),
    (b"cHRM", bytes(range(32))),
    (b"iCCP", b"profile\0\0" + zlib.compress(b"profile" * 90)),
    (b"sBIT", b"\5\6\5"),
    (b"bKGD", b"\0\1\0\2\0\3"),
    (b"tRNS", b"\0\1\0\2\0\3"),
    (b"sPLT", b"palette\0\x08\1\2\3\4\0\5"),
    (b"pCAL", b"unit\0" + bytes(8) + b"\0\2m\0" + b"0\0" + b"1"),
    (b"sCAL", b"\1" + b"1.5\0" + b"2"),
    (b"sTER", b"\0"),
    (b"pHYs", struct.pack(">IIB", 3000, 2000, 1)),
    (b"tEXt", b"Title\0a title"),
    (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x/>"),
    (b"zZZz", b"an unknown one that may be copied"),
]


def test_every_other_chunk_is_kept_byte_for_byte_and_in_order() -> None:
    extra = b"".join(chunk(kind, body) for kind, body in COLOUR)
    places = chunk(b"iDOT", b"offsets into the old stream") + chunk(b"zZZZ", b"an unknown one that must not be copied")
    source = written([[(1, 2, 3), (4, 5, 6)]], 2, 8, extra=extra + places)
    source = source[:-12] + chunk(b"tIME", bytes(7)) + chunk(b"tEXt", b"After\0the pixels") + source[-12:]
    kept = [part for part in chunks(png.mirror(source).image) if part[0] not in (b"IHDR", b"IDAT", b"IEND")]
    assert kept == [*COLOUR, (b"tEXt", b"After\0the pixels")]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_mirrored_means_as_displayed(orientation: int) -> None:
    turned = Image.Exif()
    turned[0x0112] = orientation
    out = io.BytesIO()
    with Image.open(TEST_IMAGE) as scene:
        scene.resize((61, 43)).save(out, "PNG", exif=turned)
    with Image.open(out) as before, Image.open(io.BytesIO(png.mirror(out.getvalue()).image)) as after:
        assert after.getexif()[0x0112] == orientation
        expected = ImageOps.mirror(ImageOps.exif_transpose(before))
        assert ImageOps.exif_transpose(after).tobytes() == expected.tobytes()


def animation(orientation: int = 1, count: int = 5, **options: object) -> bytes:
    turned = Image.Exif()
    turned[0x0112] = orientation
    with Image.open(TEST_IMAGE) as scene:
        first = scene.resize((64, 43)).convert("RGBA")
    frames = [first]
    for number in range(1, count):
        frames.append(frames[-1].copy())
        frames[-1].paste((number * 40 % 256, 200, 0, 128), (number * 3 % 50, number % 30, number * 3 % 50 + 8, 40))
    out = io.BytesIO()
    durations = [100 + 10 * number for number in range(count)]
    exif = {} if orientation == 1 else {"exif": turned}
    frames[0].save(out, "PNG", save_all=True, append_images=frames[1:], duration=durations, loop=3, **exif, **options)
    return out.getvalue()


def frames_of(data: bytes) -> list[tuple[bytes, float | None]]:
    with Image.open(io.BytesIO(data)) as image:
        return [(f.convert("RGBA").tobytes(), f.info.get("duration")) for f in ImageSequence.Iterator(image)]


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("options", [{}, {"blend": 1}, {"disposal": 1}, {"disposal": 2}, {"default_image": True}])
def test_an_animation_is_mirrored_frame_by_frame(orientation: int, options: dict[str, object]) -> None:
    source = animation(orientation, **options)
    mirrored = png.mirror(source).image
    controls = [body for kind, body in chunks(mirrored) if kind in (b"fcTL", b"fdAT")]
    assert [int.from_bytes(body[:4], "big") for body in controls] == list(range(len(controls)))
    flip = Image.Transpose.FLIP_LEFT_RIGHT if orientation == 1 else Image.Transpose.FLIP_TOP_BOTTOM
    before, after = frames_of(source), frames_of(mirrored)
    assert len(before) == 5
    assert [duration for _, duration in after] == [duration for _, duration in before]
    for (old, _), (new, _) in zip(before, after, strict=True):
        assert Image.frombytes("RGBA", (64, 43), old).transpose(flip).tobytes() == new
    assert [body for kind, body in chunks(mirrored) if kind == b"acTL"] == [
        body for kind, body in chunks(source) if kind == b"acTL"
    ]


@pytest.mark.parametrize("count", [0, 1 << 31])
def test_an_animation_of_no_frames_is_a_still_picture(count: int) -> None:
    extra = chunk(b"acTL", struct.pack(">II", count, 0)) + chunk(b"fcTL", bytes(26))
    rows = [[(1, 2, 3), (4, 5, 6)]]
    mirrored = png.mirror(written(rows, 2, 8, extra=extra)).image
    assert read(mirrored) == [rows[0][::-1]]
    assert b"fcTL" not in mirrored


def test_what_is_cut_short_is_refused() -> None:
    for source in (written([[(1, 2, 3)] * 30] * 9, 2, 8), animation()):
        for at in range(8, len(source) - 12):
            with pytest.raises(ImageError):
                png.mirror(source[:at])
        assert png.mirror(source[:-12]).image == png.mirror(source).image  # only IEND is missing


def test_what_is_damaged_is_refused() -> None:
    source = written([[(1, 2, 3)] * 30] * 9, 2, 8)
    damaged = bytearray(source)
    damaged[source.index(b"IDAT") + 9] ^= 1
    with pytest.raises(ImageError, match="checksum of a chunk IDAT"):
        png.mirror(bytes(damaged))
    for extra, sentence in ((chunk(b"CgBI", bytes(4)), "critical chunk"), (b"", "colour type")):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 7, 2, 0, 0, 0))
        with pytest.raises(ImageError, match=sentence):
            png.mirror(SIGNATURE + header + extra + chunk(b"IDAT", zlib.compress(b"\0" * 9)))


@pytest.mark.parametrize("header", [b"", struct.pack(">IIBBBBB", 2, 1, 8, 2, 0, 0, 0)])
def test_a_second_header_is_refused(header: bytes) -> None:
    with pytest.raises(ImageError, match="header, or has several"):
        png.mirror(written([[(1, 2, 3), (4, 5, 6)]], 2, 8, extra=chunk(b"IHDR", header)))


@pytest.mark.parametrize("methods", [(1, 0, 0), (0, 1, 0), (0, 0, 2)])
def test_methods_that_do_not_exist(methods: tuple[int, int, int]) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, *methods))
    with pytest.raises(ImageError, match="method that does not exist"):
        png.mirror(SIGNATURE + header + chunk(b"IDAT", zlib.compress(b"\0\0")))


def test_too_many_pixels_or_frames_are_refused_without_decoding() -> None:
    bomb = zlib.compress(bytes(40_000_000))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    began = time.process_time()
    with pytest.raises(TooManyPixelsError, match="60,000 x 60,000"):
        png.mirror(SIGNATURE + header + chunk(b"IDAT", bomb) + chunk(b"IEND", b""))
    control = struct.pack(">IIIIIHHBB", 0, 1, 1, 0, 0, 1, 10, 0, 0)
    one = chunk(b"fcTL", control) + chunk(b"fdAT", b"\0\0\0\0" + zlib.compress(b"\0\0"))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)) + chunk(b"acTL", struct.pack(">II", 3000, 0))
    pixels = chunk(b"fcTL", control) + chunk(b"IDAT", zlib.compress(b"\0\0"))
    with pytest.raises(TooManyFramesError, match="3,000 frames"):
        png.mirror(SIGNATURE + header + pixels + one * 2_999)
    assert time.process_time() - began < 1


def test_a_thumbnail_in_a_raw_profile_is_dropped() -> None:
    ifd0 = struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, 1, 0, 26)
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + ifd0 + struct.pack(">HHHIII", 1, 0x0201, 4, 1, 44, 0) + bytes(200)
    text = b"\nexif\n%8d\n%s\n" % (len(exif), exif.hex().encode())
    profile = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))
    source = written([[(1,), (2,)]], 0, 8, extra=profile)
    (kept,) = [data for kind, data in chunks(png.mirror(source).image or b"") if kind == b"zTXt"]
    name, length, *digits = zlib.decompress(kept[23:]).split()
    assert (name, int(length)) == (b"exif", len(exif))
    assert bytes.fromhex(b"".join(digits).decode()) == exif.replace(ifd0, ifd0[:-4] + bytes(4))
    for damaged in (text[:-3] + b"x\n", b"\nexif\n", text.replace(b"4578", b"0000")):
        other = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(damaged))
        assert other in (png.mirror(written([[(1,), (2,)]], 0, 8, extra=other)).image or b"")
