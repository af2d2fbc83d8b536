"""TIFFs that are damaged, too large, or of a kind that is not processed: each ends in an error that says so."""

from __future__ import annotations

import lzma
import random
import struct
import zlib

import pytest
from tiff_files import base, noise, page_of, strips, tiffcp, written

from safelight import formats
from safelight.errors import ImageError, SafelightError, TooManyFramesError, TooManyPixelsError
from safelight.operations.mirror import tiff, tiff_file


def refused(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        tiff.mirror(data)
    return caught.value.detail


@pytest.mark.parametrize(
    ("compression", "name"), [(6, "old-style JPEG"), (50_001, "WebP"), (34_887, "LERC"), (33_003, "JPEG 2000")]
)
def test_compressions_that_are_not_processed_are_named(compression: int, name: str) -> None:
    assert name in refused(written([page_of([b"ab"], (2, 1), compression=compression)]))


def test_an_unknown_compression_is_refused_by_its_number() -> None:
    assert "12345" in refused(written([page_of([b"ab"], (2, 1), compression=12_345)]))


@pytest.mark.parametrize("photometric", [32_803, 34_892])
def test_raw_pictures_of_cameras_are_refused(photometric: int) -> None:
    assert "raw picture" in refused(written([page_of([b"ab"], (2, 1), photometric=photometric)]))


def test_a_predictor_for_samples_that_have_none_is_refused() -> None:
    assert "predictor" in refused(written([page_of([zlib.compress(b"ab")], (2, 2), (4,), compression=8, predictor=2)]))


def test_a_fax_with_grey_is_refused() -> None:
    assert "fax" in refused(written([page_of([b"ab"], (2, 1), compression=4)]))


def test_subsampled_colours_that_cannot_move_are_refused() -> None:
    page = page_of([bytes(36)], (3, 4), (8, 8, 8), photometric=6)
    assert "no multiple of the subsampling" in refused(written([page]))


def test_strips_that_are_left_out_are_refused() -> None:
    assert "leaves out" in refused(written([page_of([b"ab", b""], (2, 2), rows=1)]))


def test_too_few_strips_are_refused() -> None:
    assert "too few strips" in refused(written([page_of([b"ab"], (2, 2), rows=1)]))


def test_a_file_without_a_picture_is_refused() -> None:
    assert "no picture" in refused(b"II*\0\x08\0\0\0" + b"\1\0" + struct.pack("<HHII", 305, 2, 2, 65) + bytes(4))


@pytest.mark.parametrize("compression", [1, 5, 8, 32_773, 34_925, 50_000])
def test_pixels_that_decode_short_are_refused(compression: int) -> None:
    option = {1: "none", 5: "lzw", 8: "zip", 32_773: "packbits", 34_925: "lzma", 50_000: "zstd"}[compression]
    source = bytearray(tiffcp(base("grey"), "-c", option, "-s", "-r", "50"))
    entry = tiff_file.TiffFile(bytes(source)).directories[0].entries
    source[entry[257].values_at] += 1  # rows
    source[entry[278].values_at] += 1
    if compression == 1:
        source = bytearray(source[: entry[279].at])
    assert "cut short" in refused(bytes(source))


@pytest.mark.parametrize("options", ["g3:1d", "g3:2d", "g4"])
def test_a_fax_that_ends_too_early_is_refused(options: str) -> None:
    source = bytearray(tiffcp(base("bw"), "-c", options, "-s", "-r", "50"))
    entry = tiff_file.TiffFile(bytes(source)).directories[0].entries[279]
    (length,) = struct.unpack_from("<I", source, entry.values_at)
    source[entry.values_at : entry.values_at + 4] = struct.pack("<I", length - 40)
    assert "cut short" in refused(bytes(source))


@pytest.mark.parametrize("compression", [1, 8])
def test_a_file_cut_short_anywhere_is_refused_or_right(compression: int) -> None:
    rows = noise(5, 4, 8)
    pieces = strips(rows, 5, 2)
    pieces = [zlib.compress(piece) for piece in pieces] if compression == 8 else pieces
    page = page_of(pieces, (5, 4), rows=2, compression=compression)
    source = written([page, page])
    complete, refusals = tiff.mirror(source).image, 0
    for length in range(len(source)):
        try:
            mirrored = tiff.mirror(source[:length]).image
        except ImageError:
            refusals += 1
        else:
            assert mirrored == complete[:length]
    assert refusals > 0.9 * len(source)


@pytest.mark.parametrize("seed", range(12))
def test_damage_at_random_ends_in_an_error_of_ours_or_in_a_picture_that_can_be_read(seed: int) -> None:
    dice = random.Random(seed)
    source = tiffcp(base("rgb"), "-c", ("lzw:2", "zip", "packbits", "zstd")[seed % 4], "-s", "-r", "10")
    directory = tiff_file.TiffFile(source).directories[0]
    for _ in range(60):
        damaged = bytearray(source)
        for _ in range(3):
            damaged[dice.randrange(directory.start, len(source))] = dice.randrange(256)
        try:
            once = tiff.mirror(bytes(damaged))
        except SafelightError:
            continue
        assert tiff.mirror(once.image).notes == once.notes


def test_too_many_pages_are_refused() -> None:
    with pytest.raises(TooManyFramesError):
        tiff.mirror(written([page_of([b"a"], (1, 1))] * (formats.MAX_FRAMES + 1)))


def test_too_many_pixels_are_refused() -> None:
    with pytest.raises(TooManyPixelsError):
        tiff.mirror(written([page_of([b"a"], (20_000, 20_000), compression=8)]))


def test_tiles_that_would_take_too_much_memory_are_refused() -> None:
    page = page_of([b"a"], (10, 10), compression=8)
    page.tiles, page.tags[322], page.tags[323] = True, (4, [1 << 31]), (4, [1 << 31])
    assert "bytes of pixels" in refused(written([page]))


def test_more_strips_than_there_is_time_for_are_refused() -> None:
    page = page_of([b"a"] * (tiff.MAX_PIECES + 1), (1, tiff.MAX_PIECES + 1), rows=1)
    assert "strips or tiles" in refused(written([page]))


def test_more_lzma_than_there_is_time_for_is_refused() -> None:
    page = page_of([lzma.compress(b"a")], (5000, 5000), compression=34_925)
    assert "LZMA" in refused(written([page]))


def test_offsets_beyond_anything_are_refused() -> None:
    source = bytearray(written([page_of([b"ab"], (2, 1))], big=True))
    source[8:16] = b"\xff" * 8
    assert "outside the file" in refused(bytes(source))
