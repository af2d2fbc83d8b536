"""Several pictures in one JPEG file: each mirrored, and both kinds of index true again."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from safelight.operations.mirror import jpeg, scan

TEST_IMAGE = Path(__file__).parents[2] / "test_image.jpg"
TURNED_LEFT = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, 8, 0, 0)
ACROSS, DOWN = Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM
XMP = b"http://ns.adobe.com/xap/1.0/\0"
GAIN_MAP, VIEW = 0, 0x020002


def picture(size: tuple[int, int], mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    with Image.open(TEST_IMAGE) as scene:
        scene.resize((512, 344)).crop((50, 30, 50 + size[0], 30 + size[1])).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


FIRST = picture((192, 128))
SECOND = picture((96, 64), "L")


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def directory(*items: tuple[str, int]) -> bytes:
    """An XMP directory of an Ultra HDR file: each item's meaning and length."""
    listed = "".join(
        f'<rdf:li rdf:parseType="Resource"><Container:Item Item:Semantic="{meaning}" Item:Mime="image/jpeg"'
        + (f' Item:Length="{length}"' if length else "")
        + "/></rdf:li>"
        for meaning, length in items
    )
    return f"<x:xmpmeta><Container:Directory><rdf:Seq>{listed}</rdf:Seq></Container:Directory></x:xmpmeta>".encode()


def joined(
    first: bytes, *others: bytes, kinds: tuple[int, ...] = (), order: str = "<", gap: bytes = b"", xmp: bytes = b""
) -> bytes:
    """A multi-picture file, by the standard and not by the operation."""
    count = 1 + len(others)
    entries_at = 8 + 2 + 3 * 12 + 4
    length = 4 + entries_at + 16 * count
    head = first[:2] + (segment(0xE1, XMP + xmp) if xmp else b"")
    base = len(head) + 4 + 4
    size = len(head) + 4 + length + len(first) - 2
    places, position = [(0, size)], size
    for other in others:
        position += len(gap)
        places.append((position - base, len(other)))
        position += len(other)
    entries = b"".join(
        struct.pack(f"{order}IIIHH", kind, length, start, 0, 0)
        for kind, (start, length) in zip((0x030000, *kinds), places, strict=True)
    )
    index = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, 3)
    index += struct.pack(f"{order}HHI4s", 0xB000, 7, 4, b"0100") + struct.pack(f"{order}HHII", 0xB001, 4, 1, count)
    index += struct.pack(f"{order}HHIII", 0xB002, 7, len(entries), entries_at, 0) + entries
    return head + segment(0xE2, b"MPF\0" + index) + first[2:] + b"".join(gap + other for other in others)


def pictures(data: bytes) -> list[Image.Image]:
    """Every picture that Pillow finds by the index."""
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO"
        found = []
        for number in range(image.n_frames):
            image.seek(number)
            found.append(image.copy())
        return found


def is_mirror(one: Image.Image, other: Image.Image, flip: Image.Transpose = ACROSS) -> bool:
    away = ImageChops.difference(one.transpose(flip), other)
    return one.size == other.size and max(ImageStat.Stat(away).mean) < 5


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("gap", [b"", b"\0", bytes(37), b"\xff" * 9])
def test_each_picture_is_mirrored_and_found_again(order: str, gap: bytes) -> None:
    source = joined(FIRST, SECOND, FIRST, kinds=(GAIN_MAP, VIEW), order=order, gap=gap)
    result = jpeg.mirror(source)
    assert result.notes == {"mirror": "lossless", "mirror-pictures": "lossless, lossless, lossless"}
    before, after = pictures(source), pictures(result.image or b"")
    assert len(before) == len(after) == 3
    assert all(is_mirror(*both) for both in zip(before, after, strict=True))
    twice = jpeg.mirror(result.image or b"").image or b""
    assert [image.tobytes() for image in pictures(twice)] == [image.tobytes() for image in before]


def entries(data: bytes) -> list[tuple[int, int]]:
    """Start and size of each picture, as a little-endian index tells them."""
    base = data.index(b"MPF\0") + 4
    listed = struct.iter_unpack("<IIIHH", data[base + 50 : base + 50 + 32])
    return [(base + start if start else 0, size) for _, size, start, _, _ in listed]


def test_offsets_and_sizes_are_true() -> None:
    result = jpeg.mirror(joined(FIRST, SECOND, kinds=(GAIN_MAP,))).image or b""
    (zero, size), (start, length) = entries(result)
    assert zero == 0
    assert start == size == scan.scan(result).end
    assert start + length == len(result)
    assert scan.scan(result[start:]).end == length


def test_a_size_that_counts_padding_counts_it_still() -> None:
    source = bytearray(joined(FIRST, SECOND, kinds=(GAIN_MAP,), gap=bytes(40)))
    base = source.index(b"MPF\0") + 4
    struct.pack_into("<I", source, base + 50 + 4, entries(bytes(source))[1][0])
    (_, size), (start, _) = entries(jpeg.mirror(bytes(source)).image or b"")
    assert start == size


@pytest.mark.parametrize("film", [b"", b"\0\0\0\x18ftypmp42 a film"])
def test_lengths_of_the_xmp_directory_are_true(film: bytes) -> None:
    listed = [("Primary", 0), ("GainMap", len(SECOND))] + ([("MotionPhoto", len(film))] if film else [])
    source = joined(FIRST, SECOND, kinds=(GAIN_MAP,), xmp=directory(*listed)) + film
    result = jpeg.mirror(source)
    data = result.image or b""
    second = data[scan.scan(data).end : len(data) - len(film)]
    assert second.startswith(b"\xff\xd8")
    assert second.endswith(b"\xff\xd9")
    listed[1] = ("GainMap", len(second))
    assert directory(*listed) in data
    assert data.endswith(film)
    assert result.notes.get("mirror-kept") == ("data behind the picture" if film else None)


def test_a_directory_alone_is_enough() -> None:
    first = FIRST[:2] + segment(0xE1, XMP + directory(("Primary", 0), ("GainMap", len(SECOND)))) + FIRST[2:]
    result = jpeg.mirror(first + SECOND)
    data = result.image or b""
    second = data[scan.scan(data).end :]
    assert directory(("Primary", 0), ("GainMap", len(second))) in data
    assert result.notes["mirror-pictures"] == "lossless, lossless"


def test_a_gain_map_turns_with_its_picture_and_a_view_by_its_own_tag() -> None:
    first = picture((192, 128), exif=TURNED_LEFT)
    gain_map, view = picture((96, 64), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"), picture((96, 64))
    turned = picture((96, 64), exif=TURNED_LEFT.replace(b"\0\x08\0\0\0\0\0\0", b"\0\1\0\0\0\0\0\0"))
    source = joined(first, gain_map, view, turned, kinds=(GAIN_MAP, VIEW, VIEW))
    before, after = pictures(source), pictures(jpeg.mirror(source).image or b"")
    ways = [DOWN, DOWN, DOWN, ACROSS]
    assert all(is_mirror(*both) for both in zip(before, after, ways, strict=True))


def test_each_picture_goes_the_way_that_its_edge_allows() -> None:
    source = joined(FIRST, picture((93, 61)), kinds=(GAIN_MAP,))
    result = jpeg.mirror(source)
    assert result.notes == {"mirror": "lossless", "mirror-pictures": "lossless, reencoded"}
    assert all(is_mirror(*both) for both in zip(pictures(source), pictures(result.image or b""), strict=True))


def test_a_damaged_further_picture_stays_as_it_is() -> None:
    damaged = SECOND[: len(SECOND) // 2]
    result = jpeg.mirror(joined(FIRST, damaged, kinds=(GAIN_MAP,)))
    assert result.notes == {"mirror": "lossless", "mirror-kept": "data behind the picture"}
    assert (result.image or b"").endswith(damaged)


@pytest.mark.parametrize("at", range(0, 79, 3))
def test_a_damaged_index_does_no_harm(at: int) -> None:
    source = bytearray(joined(FIRST, SECOND, kinds=(GAIN_MAP,)))
    place = source.index(b"MPF\0") + 4 + at
    source[place : place + 3] = b"\xfe\xfd\xfc"
    result = jpeg.mirror(bytes(source))
    assert result.notes["mirror-pictures"] == "lossless, lossless"
    data = result.image or b""
    index = next(part for part in scan.scan(data).metadata if part.marker == scan.APP2)
    bare = data[: index.start - 4] + data[index.end : scan.scan(data).end]
    with Image.open(io.BytesIO(FIRST)) as before, Image.open(io.BytesIO(bare)) as after:
        assert is_mirror(before, after)


def test_an_index_of_one_picture_is_true_as_well() -> None:
    source = joined(FIRST)
    result = jpeg.mirror(source).image or b""
    assert len(result) != len(source)
    base = result.index(b"MPF\0") + 4
    assert struct.unpack_from("<I", result, base + 54) == (len(result),)


@pytest.mark.parametrize("behind", [b"a maker's records", b"\0\0ftyp a film", bytes(5_000) + b"records" + bytes(9)])
def test_what_is_no_picture_is_kept(behind: bytes) -> None:
    result = jpeg.mirror(FIRST + behind)
    assert result.notes == {"mirror": "lossless", "mirror-kept": "data behind the picture"}
    assert (result.image or b"").endswith(behind.lstrip(b"\0"))


def test_records_behind_padding_stay_in_their_place() -> None:
    source = FIRST + bytes(500) + b"a preview that a maker's note points at"
    result = jpeg.mirror(source).image or b""
    assert len(result) == len(source)
    assert result[-39:] == source[-39:]


def test_a_preview_that_no_index_lists_stays_in_its_place_if_it_can() -> None:
    longer = FIRST.replace(b"\xff\xdb", b"\xff" * 40 + b"\xff\xdb", 1)  # fill bytes, which no library writes again
    result = jpeg.mirror(longer + SECOND).image or b""
    assert result.startswith(b"\xff\xd8\xff", len(longer))


def test_a_picture_with_records_behind_it_keeps_its_length() -> None:
    source = FIRST + SECOND + b"the picture before has %d bytes" % len(SECOND)
    result = jpeg.mirror(source)
    data = result.image or b""
    start = scan.scan(data).end or 0
    behind = data[start:]
    assert len(behind) == len(source) - len(FIRST)
    with Image.open(io.BytesIO(SECOND)) as before, Image.open(io.BytesIO(behind)) as after:
        assert is_mirror(before, after) == (result.notes.get("mirror-pictures") == "lossless, lossless")


def test_padding_alone_is_no_data() -> None:
    result = jpeg.mirror(FIRST + bytes(9))
    assert result.notes == {"mirror": "lossless"}


def test_a_flood_of_pictures_is_bounded() -> None:
    tiny = picture((8, 8), "L")
    result = jpeg.mirror(tiny * 300)
    assert result.notes["mirror-pictures"].count("lossless") == 100
    assert result.notes["mirror-kept"]
