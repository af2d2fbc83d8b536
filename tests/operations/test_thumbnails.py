"""Previews inside a JPEG's metadata are flipped with their picture, or dropped."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageChops, ImageStat

from safelight.operations.mirror import exif, jpeg, thumbnails

TEST_IMAGE = Path(__file__).parents[2] / "test_image.jpg"


def picture(size: tuple[int, int], **options: object) -> bytes:
    out = io.BytesIO()
    with Image.open(TEST_IMAGE) as scene:
        scene.resize((512, 344)).crop((90, 50, 90 + size[0], 50 + size[1])).save(out, "JPEG", **options)
    return out.getvalue()


THUMBNAIL = picture((160, 112), subsampling="4:2:0")
UNALIGNED = picture((151, 113))


def opened(data: bytes | None) -> Image.Image:
    image = Image.open(io.BytesIO(data or b""))
    image.load()
    return image


def is_mirror(data: bytes, of: bytes, flip: Image.Transpose = Image.Transpose.FLIP_LEFT_RIGHT) -> bool:
    before, after = opened(of), opened(data)
    return (
        before.size == after.size and max(ImageStat.Stat(ImageChops.difference(before.transpose(flip), after)).mean) < 6
    )


def with_exif(thumbnail: bytes, order: str = ">", orientation: int = 1, behind: bytes = b"", code: str = "I") -> bytes:
    """IFD0 with an orientation, IFD1 with a JPEG thumbnail."""
    mark = b"MM\0*" if order == ">" else b"II*\0"
    ifd0 = struct.pack(f"{order}HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 26)
    length = struct.pack(order + code, len(thumbnail)).ljust(4, b"\0")
    kind = {"I": 4, "H": 3}[code]
    ifd1 = struct.pack(f"{order}HHHIIHHI4sI", 2, 0x0201, 4, 1, 56, 0x0202, kind, 1, length, 0)
    return b"Exif\0\0" + mark + struct.pack(f"{order}I", 8) + ifd0 + ifd1 + thumbnail + behind


def exif_thumbnail(data: bytes | None) -> bytes | None:
    """As Pillow finds it."""
    found = opened(data).getexif().get_ifd(ExifTags.IFD.IFD1)
    if not found:
        return None
    raw = opened(data).info["exif"]
    return bytes(raw[6 + found[0x0201] : 6 + found[0x0201] + found[0x0202]])


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("code", "IH")
@pytest.mark.parametrize("thumbnail", [THUMBNAIL, UNALIGNED])
@pytest.mark.parametrize("size", [(192, 128), (193, 121)])
def test_an_exif_thumbnail_is_mirrored(order: str, code: str, thumbnail: bytes, size: tuple[int, int]) -> None:
    source = picture(size, exif=with_exif(thumbnail, order, 3, code=code))
    result = jpeg.mirror(source)
    assert exif_thumbnail(source) == thumbnail
    kept = exif_thumbnail(result.image)
    assert kept is not None
    assert is_mirror(kept, thumbnail)
    assert opened(result.image).getexif()[0x0112] == 3


def test_it_is_flipped_along_the_axis_of_its_picture() -> None:
    kept = exif_thumbnail(jpeg.mirror(picture((192, 128), exif=with_exif(THUMBNAIL, orientation=6))).image)
    assert kept is not None
    assert is_mirror(kept, THUMBNAIL, Image.Transpose.FLIP_TOP_BOTTOM)


@pytest.mark.parametrize(
    "data",
    [
        with_exif(b"no JPEG"),
        with_exif(THUMBNAIL[:900]),
        with_exif(THUMBNAIL)[:500],
        with_exif(THUMBNAIL[:-2] + b"\xff\xfe\0\3!\xff\xd9"),
    ],
    ids=["no JPEG", "half a JPEG", "beyond the end", "a comment in it"],
)
def test_what_cannot_be_flipped_is_dropped_or_shorter(data: bytes) -> None:
    kept = exif_thumbnail(jpeg.mirror(picture((192, 128), exif=data)).image)
    assert kept is None or is_mirror(kept, THUMBNAIL)


def test_nothing_that_stands_behind_a_thumbnail_is_moved() -> None:
    longer, shorter = (lambda data: data + b"\0"), (lambda data: data[:-1])
    data = with_exif(THUMBNAIL, behind=b"a maker's note")
    assert exif.with_thumbnail(data, longer, 65_533) == exif.without_thumbnail(data) != data
    assert exif.with_thumbnail(data, shorter, 65_533).endswith(b"\xff\0a maker's note")
    padded = with_exif(THUMBNAIL, behind=bytes(7))
    assert exif.with_thumbnail(padded, longer, 65_533)[56 + 6 :] == THUMBNAIL + b"\0"
    assert exif.with_thumbnail(padded, longer, len(THUMBNAIL)) == exif.without_thumbnail(padded)


def resource(number: int, data: bytes, name: bytes = b"") -> bytes:
    label = bytes([len(name)]) + name
    label += bytes(len(label) % 2)
    return b"8BIM" + struct.pack(">H", number) + label + struct.pack(">I", len(data)) + data + bytes(len(data) % 2)


def photoshop_thumbnail(data: bytes) -> bytes:
    return struct.pack(">IIIIIIHH", 1, 160, 112, 480, 480 * 112, len(data), 24, 1) + data


RESOLUTION = resource(1005, b"\0\x48\0\0\0\1\0\1\0\x48\0\0\0\1\0\1", b"dpi")
CAPTION = resource(1028, b"\x1c\2\x78\0\5hello")


def with_photoshop(data: bytes, *resources: bytes) -> bytes:
    body = b"Photoshop 3.0\0" + b"".join(resources)
    return data[:2] + b"\xff\xed" + struct.pack(">H", len(body) + 2) + body + data[2:]


@pytest.mark.parametrize("number", [1033, 1036])
def test_a_photoshop_thumbnail_is_mirrored(number: int) -> None:
    preview = resource(number, photoshop_thumbnail(THUMBNAIL))
    source = with_photoshop(picture((192, 128)), RESOLUTION, preview, CAPTION)
    before, after = opened(source).info["photoshop"], opened(jpeg.mirror(source).image).info["photoshop"]
    assert {key: value for key, value in after.items() if key != number} == {
        key: value for key, value in before.items() if key != number
    }
    head, kept = after[number][:28], after[number][28:]
    assert is_mirror(kept, THUMBNAIL)
    assert head == photoshop_thumbnail(kept)[:28]


def test_a_photoshop_thumbnail_that_cannot_be_flipped_is_dropped() -> None:
    source = with_photoshop(picture((192, 128)), RESOLUTION, resource(1036, photoshop_thumbnail(b"raw")), CAPTION)
    assert jpeg.mirror(source).image == jpeg.mirror(with_photoshop(picture((192, 128)), RESOLUTION, CAPTION)).image


def test_a_thumbnail_for_which_the_segment_is_too_small_is_dropped() -> None:
    body = b"Photoshop 3.0\0" + resource(1036, photoshop_thumbnail(THUMBNAIL)) + CAPTION
    flipped = thumbnails.flipped(0xED, body, lambda preview: preview + bytes(65_000))
    assert flipped == b"Photoshop 3.0\0" + CAPTION


def test_a_jfif_preview_is_dropped() -> None:
    data = picture((192, 128))
    body = b"JFXX\0\x10" + THUMBNAIL
    source = data[:20] + b"\xff\xe0" + struct.pack(">H", len(body) + 2) + body + data[20:]
    assert jpeg.mirror(source).image == jpeg.mirror(data).image


@given(
    st.binary(max_size=80),
    st.sampled_from([b"Photoshop 3.0\0", b"Photoshop 3.0\x008BIM\4\x0c\0\0", b"Exif\0\0MM\0*\0\0\0\x08"]),
)
def test_damaged_metadata_is_never_an_exception(data: bytes, prefix: bytes) -> None:
    for marker in (0xE1, 0xED):
        assert thumbnails.flipped(marker, prefix + data, lambda _: None) is not None
