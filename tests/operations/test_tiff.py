"""TIFFs: made by `tiff_files` byte by byte, or by libtiff's `tiffcp`, and read back by these; flipped bit by bit."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageOps, ImageStat
from tiff_files import (
    BASES,
    base,
    directories,
    flipped,
    noise,
    numbers,
    page_of,
    scene,
    stable,
    strips,
    tiffcp,
    tiles,
    written,
)

from safelight.errors import ImageError
from safelight.operations.mirror import tiff, tiff_file, turbojpeg


def plain(data: bytes) -> list[bytes]:
    """The rows of each page (plane after plane) as libtiff decodes them, little-endian."""
    return [b"".join(pieces) for _, pieces, _ in directories(tiffcp(data, "-c", "none", "-s", "-L", "-f", "msb2lsb"))]


@st.composite
def pictures(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A file without compression, and what it should become."""
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 30))
    one = draw(st.sampled_from([1, 2, 4, 8, 12, 16, 24, 32, 64, 128]))
    bits = draw(st.sampled_from([(one,), (one,) * 2, (one,) * 3, (one,) * 4, (5, 6, 5)]))
    planar, order, big = draw(st.booleans()), draw(st.sampled_from("<>")), draw(st.booleans())
    orientation = draw(st.integers(1, 8))
    planes = list(bits) if planar else [sum(bits)]
    tile = draw(st.sampled_from([None, (16, 16), (32, 16)]))
    rows_per_strip = draw(st.integers(1, height))
    before: list[bytes] = []
    after: list[bytes] = []
    for number, depth in enumerate(planes):
        rows = noise(width, height, depth, number)
        for pieces, pixels in ((before, rows), (after, flipped(rows, width, depth, orientation))):
            cut = tiles(pixels, width, depth, tile) if tile else strips(pixels, -(-width * depth // 8), rows_per_strip)
            pieces.extend(cut)
    files = []
    for pieces in (before, after):
        page = page_of(pieces, (width, height), bits, orientation=orientation, planar=2 if planar else 1)
        page.private = {50_000 + len(bits): bytes(range(50))}
        page.tiles = tile is not None
        page.tags |= {322: (3, [tile[0]]), 323: (3, [tile[1]])} if tile else {278: (3, [rows_per_strip])}
        files.append(written([page], order, big=big))
    return files[0], files[1]


@settings(max_examples=150, deadline=None)
@given(pictures())
def test_every_depth_and_layout_is_mirrored_bit_for_bit_and_nothing_else_changes(files: tuple[bytes, bytes]) -> None:
    source, expected = files
    once = tiff.mirror(source)
    assert once.image == expected
    assert once.notes == {"mirror": "lossless"}
    assert tiff.mirror(expected).image == source


LOSSLESS = [
    ("bw", "-c none"),
    ("bw", "-c g3:1d"),
    ("bw", "-c g3:2d"),
    ("bw", "-c g3:2d:fill"),
    ("bw", "-c g3:1d -f lsb2msb"),
    ("bw", "-c g4"),
    ("bw", "-c g4 -f lsb2msb"),
    ("bw", "-c lzw"),
    ("bw", "-c packbits -f lsb2msb"),
    ("grey", "-c packbits"),
    ("grey", "-c lzw:2 -t -w 32 -l 16"),
    ("rgb", "-c lzw"),
    ("rgb", "-c lzw:2 -B"),
    ("rgb", "-c lzw -f lsb2msb"),
    ("rgb", "-c zip:2 -8"),
    ("rgb", "-c zip -p separate"),
    ("rgb", "-c zip:2 -p separate -t -w 16 -l 32"),
    ("rgb", "-c lzma"),
    ("rgb", "-c lzma:2"),
    ("rgb", "-c zstd"),
    ("rgb", "-c zstd:2"),
    ("rgba", "-c packbits -p separate"),
    ("rgba", "-c lzw:2 -t -w 48 -l 16"),
    ("grey16", "-c zip:2 -B"),
    ("rgb16", "-c lzw:2 -L"),
    ("planes16", "-c lzw:2 -B"),
    ("planes16", "-c zip"),
    ("rgb32", "-c zip:2 -B"),
    ("rgb32", "-c zip:2 -t -w 16 -l 16"),
    ("grey64", "-c zip:2"),
    ("rgb32", "-c zip:3 -B"),
    ("rgb32", "-c lzw:3 -t -w 16 -l 16"),
    ("grey64", "-c zstd:3"),
    ("grey16", "-c zip:3"),
]


@pytest.mark.parametrize(("name", "options"), LOSSLESS, ids=lambda value: value.replace(" ", "_"))
@pytest.mark.parametrize("orientation", [1, 6])
def test_every_lossless_compression_and_predictor_is_kept_exactly(name: str, options: str, orientation: int) -> None:
    layout = [] if "-t" in options else ["-s", "-r", "20"]
    source = tiffcp(base(name, is_float=":3" in options, orientation=orientation), *layout, *options.split())
    result = tiff.mirror(source)
    assert result.notes == {"mirror": "lossless"}
    size, bits = BASES[name]
    separate = "separate" in options or name == "planes16"
    rows = plain(source)[0]
    planes = list(bits) if separate else [sum(bits)]
    step = len(rows) // len(planes)
    expected = [flipped(rows[n * step :][:step], size[0], depth, orientation) for n, depth in enumerate(planes)]
    assert plain(result.image)[0] == b"".join(expected)
    assert stable(result.image) == stable(source)


def test_a_tiff_by_libtiff_stays_about_as_large() -> None:
    source = tiffcp(base("rgb"), "-c", "lzw:2", "-s", "-r", "8")
    assert abs(len(tiff.mirror(source).image) - len(source)) < 0.02 * len(source)


@pytest.mark.parametrize("order", ["-L", "-B"])
@pytest.mark.parametrize("version", ["-8", "-s"])
def test_directories_behind_the_last_strip_make_room(order: str, version: str) -> None:
    """As in files by libtiff: a single strip, whose mirror takes more bytes, then values and the directory."""
    first = tiffcp(base("rgb"), "-c", "lzw:2", "-r", "50", order, version)
    source = min(first, tiff.mirror(first).image, key=lambda data: len(directories(data)[0][1][0]))
    mirrored = tiff.mirror(source).image
    longer = len(directories(mirrored)[0][1][0]) - len(directories(source)[0][1][0])
    assert 0 < longer <= len(mirrored) - len(source) <= longer + 1
    assert stable(mirrored) == stable(source)
    assert plain(mirrored)[0] == flipped(plain(source)[0], 75, 24)


def test_strips_that_become_longer_go_behind_data_that_may_not_move() -> None:
    rows = scene((90, 60), "L").tobytes()
    page = page_of([zlib.compress(piece, 9) for piece in strips(rows, 90, 20)], (90, 60), compression=8, rows=20)
    page.private = {50_001: b"a private tag"}
    behind = b"what only a private tag points at" * 9
    source = max((written([page]), tiff.mirror(written([page])).image), key=lambda data: -len(data)) + behind
    for data in (source, tiff.mirror(source).image):
        mirrored = tiff.mirror(data).image
        assert mirrored[len(source) - len(behind) : len(source)] == behind
        assert plain(mirrored)[0] == flipped(plain(data)[0], 90, 8)


def test_numbers_that_become_too_large_for_16_bits_are_written_behind_the_end() -> None:
    file = tiff_file.TiffFile(written([page_of([b"ab", b"cd"], (2, 2), rows=1)], short=True))
    out = bytearray(file.image)
    entry = file.directories[0].entries[273]
    file.patched(out, entry, [70_000, 3])
    again = tiff_file.TiffFile(bytes(out))
    assert again.values(again.directories[0].entries[273]) == (70_000, 3)
    assert again.directories[0].entries[279] == file.directories[0].entries[279]


def test_pieces_that_share_their_bytes_share_them_mirrored() -> None:
    page = page_of([zlib.compress(noise(16, 16, 8))] * 2, (32, 16), compression=8)
    page.tiles, page.tags[322], page.tags[323] = True, (3, [16]), (3, [16])
    source = written([page])
    first, second = numbers(directories(source)[0][0], 324, "<")
    source = source.replace(struct.pack("<2I", first, second), struct.pack("<2I", first, first))[:second]
    mirrored = tiff.mirror(source).image
    assert len(set(numbers(directories(mirrored)[0][0], 324, "<"))) == 1
    expected = flipped(noise(16, 16, 8), 16, 8)
    assert [zlib.decompress(piece) for piece in directories(mirrored)[0][1]] == [expected] * 2


def test_bytes_that_an_uncompressed_strip_has_too_many_stay() -> None:
    source = written([page_of([b"abcdefgh" + b"more"], (4, 2), rows=2)])
    assert directories(tiff.mirror(source).image)[0][1] == [b"dcbahgfe" + b"more"]


@pytest.mark.parametrize("lengths", [b"\0\0\0\0", b"\5\0\0\0"])
def test_a_single_uncompressed_strip_needs_no_length(lengths: bytes) -> None:
    source = bytearray(written([page_of([b"abcdefgh"], (4, 2), rows=2)]))
    entry = tiff_file.TiffFile(bytes(source)).directories[0].entries[279]
    source[entry.values_at : entry.values_at + 4] = lengths
    assert tiff.mirror(bytes(source)).image.endswith(b"dcbahgfe")


def test_each_page_goes_by_its_own_orientation() -> None:
    pages = [page_of([b"abcdef"], (3, 2), orientation=number) for number in range(1, 9)]
    pieces = [pieces for _, pieces, _ in directories(tiff.mirror(written(pages)).image)]
    assert pieces == [[b"cbafed"]] * 4 + [[b"defabc"]] * 4


def test_sub_directories_are_mirrored_too() -> None:
    page, small = page_of([b"abcdef"], (3, 2)), page_of([b"xy"], (2, 1))
    source = bytearray(written([page, small]))
    at = len(written([page])) + len(written([page])) % 2
    page.tags[330] = (13, [at + 12])
    source = bytearray(written([page, small]))
    entry = tiff_file.TiffFile(bytes(source)).directories[0]
    source[entry.end : entry.end + 4] = bytes(4)  # it is no page
    assert [pieces for _, pieces, _ in directories(bytes(source))] == [[b"abcdef"], [b"xy"]]
    assert [pieces for _, pieces, _ in directories(tiff.mirror(bytes(source)).image)] == [[b"cbafed"], [b"yx"]]


def test_a_loop_of_directories_ends() -> None:
    source = bytearray(written([page_of([b"ab"], (2, 1)), page_of([b"cd"], (2, 1))]))
    last = tiff_file.TiffFile(bytes(source)).directories[-1]
    source[last.end : last.end + 4] = struct.pack("<I", 8)
    mirrored = tiff.mirror(bytes(source)).image
    assert mirrored == bytes(source).replace(b"ab", b"ba").replace(b"cd", b"dc")


def test_photoshop_layers_are_dropped_with_a_note() -> None:
    page = page_of([b"abcdef"], (3, 2))
    page.private = {34_377: b"8BIM resources", 37_724: b"Adobe Photoshop Document Data Block\0", 50_001: b"private"}
    source = written([page])
    result = tiff.mirror(source)
    assert result.notes == {"mirror": "lossless", "mirror-dropped": "layers"}
    assert directories(result.image)[0][1] == [b"cbafed"]
    expected = stable(source)[0]
    del expected[37_724]
    assert stable(result.image) == [expected]


def test_a_cloud_optimised_geotiff_no_longer_promises_its_order() -> None:
    ghost = b"GDAL_STRUCTURAL_METADATA_SIZE=000031 bytes\nKNOWN_INCOMPATIBLE_EDITION=NO\n "
    source = written([page_of([b"ab"], (2, 1))])
    source = source[:4] + struct.pack("<I", 8 + len(ghost)) + ghost + source[8:]
    file = tiff_file.TiffFile(source)
    entry = file.directories[0].entries[273]
    source = source[: entry.values_at] + struct.pack("<I", len(source) - 2) + source[entry.values_at + 4 :]
    assert b"KNOWN_INCOMPATIBLE_EDITION=YES\n" in tiff.mirror(source).image


def subsampled(planes: tuple[bytes, bytes, bytes], size: tuple[int, int], unit: tuple[int, int]) -> bytes:
    """Data units of TIFF 6.0, section 21: a block of brightness, then its two colours."""
    across = size[0] // unit[0]
    out = bytearray()
    for y in range(size[1] // unit[1]):
        for x in range(across):
            for row in range(unit[1]):
                start = (y * unit[1] + row) * size[0] + x * unit[0]
                out += planes[0][start : start + unit[0]]
            out += bytes([planes[1][y * across + x], planes[2][y * across + x]])
    return bytes(out)


@pytest.mark.parametrize("unit", [(2, 2), (2, 1), (4, 2), (1, 2)])
@pytest.mark.parametrize("orientation", [1, 5])
def test_subsampled_colours_are_mirrored_with_their_brightness(unit: tuple[int, int], orientation: int) -> None:
    size = (16, 8)
    small = (size[0] // unit[0], size[1] // unit[1])
    planes = noise(*size, 8), noise(*small, 8, 1), noise(*small, 8, 2)
    widths = (size[0], small[0], small[0])
    turned = tuple(flipped(plane, width, 8, orientation) for plane, width in zip(planes, widths, strict=True))
    page = page_of([subsampled(planes, size, unit)], size, (8, 8, 8), photometric=6, orientation=orientation)
    page.tags[530] = (3, list(unit))
    assert directories(tiff.mirror(written([page])).image)[0][1] == [subsampled(turned, size, unit)]


JPEGS = {
    "strips": ["-c", "jpeg:r:85", "-s", "-r", "16"],
    "tiles": ["-c", "jpeg:r:85", "-t", "-w", "32", "-l", "32"],
    "grey": ["-c", "jpeg:85", "-s", "-r", "16"],
    "subsampled": ["-c", "jpeg:85", "-s", "-r", "16"],
    "planar": ["-c", "jpeg:r:85", "-p", "separate", "-s", "-r", "16"],
}


def with_jpegs(kind: str, size: tuple[int, int] = (96, 64), orientation: int = 1) -> bytes:
    picture = scene(size, "L" if kind == "grey" else "RGB")
    bits = (8,) if kind == "grey" else (8, 8, 8)
    page = page_of([picture.tobytes()], size, bits, rows=size[1], orientation=orientation)
    return tiffcp(written([page]), *JPEGS[kind])


def shown(data: bytes) -> Image.Image:
    """What libtiff decodes the first page to, as stored."""
    found, pieces, order = directories(tiffcp(data, "-c", "none", "-s"))[0]
    size = numbers(found, 256, order)[0], numbers(found, 257, order)[0]
    pixels = b"".join(pieces)
    if numbers(found, 284, order) == [2]:
        return Image.merge("RGB", [Image.frombytes("L", size, plane) for plane in strips(pixels, *size)])
    return Image.frombytes({1: "L", 3: "RGB"}[numbers(found, 277, order)[0]], size, pixels)


def distance(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of two pictures' samples."""
    return max(ImageStat.Stat(ImageChops.difference(one, other)).mean)


def needs_turbojpeg() -> None:
    if turbojpeg.find() is None:
        pytest.skip("there is no libjpeg-turbo")


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("orientation", [1, 8])
def test_jpegs_whose_edge_allows_it_keep_their_coefficients(kind: str, orientation: int) -> None:
    needs_turbojpeg()
    source = with_jpegs(kind, orientation=orientation)
    once = tiff.mirror(source)
    assert once.notes == {"mirror": "lossless"}
    turn = ImageOps.flip if orientation >= 5 else ImageOps.mirror
    assert distance(turn(shown(source)), shown(once.image)) < 0.5
    assert shown(tiff.mirror(once.image).image).tobytes() == shown(source).tobytes()
    assert stable(once.image) == stable(source)
    assert abs(len(once.image) - len(source)) < 0.05 * len(source)


@pytest.mark.parametrize("kind", JPEGS)
def test_jpegs_whose_edge_does_not_allow_it_are_encoded_again_like_they_were(kind: str) -> None:
    source = with_jpegs(kind, (93, 61))
    once = tiff.mirror(source)
    assert once.notes == {"mirror": "reencoded"}
    assert distance(ImageOps.mirror(shown(source)), shown(once.image)) < 3
    assert stable(once.image) == stable(source)
    assert abs(len(once.image) - len(source)) < 0.1 * len(source)


def test_without_libjpeg_turbo_jpegs_are_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turbojpeg, "find", lambda: None)
    source = with_jpegs("strips")
    once = tiff.mirror(source)
    assert once.notes == {"mirror": "reencoded"}
    assert distance(ImageOps.mirror(shown(source)), shown(once.image)) < 3


@pytest.mark.parametrize("size", [(96, 64), (93, 61)])
def test_the_jpegs_inside_have_neither_markers_nor_tables_that_they_had_not(size: tuple[int, int]) -> None:
    source = with_jpegs("subsampled", size)
    for before, after in zip(directories(source)[0][1], directories(tiff.mirror(source).image)[0][1], strict=True):
        assert before[2:4] == after[2:4] == b"\xff\xc0"


def test_a_damaged_jpeg_inside_is_refused() -> None:
    needs_turbojpeg()
    source = bytearray(with_jpegs("strips"))
    (start, *_) = numbers(directories(bytes(source))[0][0], 273, "<")
    piece = directories(bytes(source))[0][1][0]
    source[start + len(piece) // 2 : start + len(piece)] = b"\0" * (len(piece) - len(piece) // 2)
    with pytest.raises(ImageError, match="JPEG data that are damaged"):
        tiff.mirror(bytes(source))
