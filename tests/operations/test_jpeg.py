"""JPEGs that are re-encoded, and what happens to metadata and further pictures."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageOps, ImageStat

from safelight.errors import ImageError, TooManyPixelsError
from safelight.operations.mirror import exif, jpeg, scan, turbojpeg

TEST_IMAGE = Path(__file__).parents[2] / "test_image.jpg"


def picture(mode: str = "RGB", size: tuple[int, int] = (193, 121), **options: object) -> bytes:
    out = io.BytesIO()
    with Image.open(TEST_IMAGE) as scene:
        scene.crop((180, 100, 180 + size[0], 100 + size[1])).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


TURNED_LEFT = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, 8, 0, 0)


def opened(data: bytes | None) -> Image.Image:
    assert data is not None
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def difference(one: Image.Image, other: Image.Image) -> float:
    """The mean difference, over all bands, in levels."""
    return max(ImageStat.Stat(ImageChops.difference(one, other)).mean)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"subsampling": "4:2:2", "quality": 90}),
        ("RGB", {"subsampling": "4:4:4", "optimize": True}),
        ("RGB", {"progressive": True}),
        ("RGB", {"keep_rgb": True, "quality": 95}),
        ("RGB", {"qtables": [[7] * 64]}),
        ("RGB", {"qtables": [[7] * 64, [9] * 64, [11] * 64]}),
        ("L", {}),
        ("L", {"progressive": True}),
        ("CMYK", {}),
    ],
)
def test_an_unaligned_picture_is_encoded_like_its_source(mode: str, options: dict[str, object]) -> None:
    source = picture(mode, **options)
    result = jpeg.mirror(source)
    assert result.notes == {"mirror": "reencoded"}
    before, after = opened(source), opened(result.image)
    assert after.mode == before.mode
    assert after.quantization == before.quantization
    assert after.layer == before.layer
    assert after.info == before.info
    assert scan.scan(result.image).kind == scan.scan(source).kind
    assert len(result.image) < 1.06 * len(source)
    assert difference(after, ImageOps.mirror(before)) < 2


def test_without_a_library_everything_is_reencoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turbojpeg, "find", lambda _=0: None)
    source = TEST_IMAGE.read_bytes()
    result = jpeg.mirror(source)
    assert result.notes == {"mirror": "reencoded"}
    assert difference(opened(result.image), ImageOps.mirror(opened(source))) < 1
    with pytest.raises(ImageError):
        jpeg.mirror(source[: len(source) // 2])


def test_metadata_of_a_reencoded_picture_is_kept_byte_for_byte() -> None:
    options = {"icc_profile": bytes(range(256)) * 600, "comment": b"a comment", "xmp": b"<x/>", "dpi": (300, 200)}
    source = picture(exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0", **options)
    result = jpeg.mirror(source)
    segments = [source[start:end] for _, start, end in scan.scan(source).metadata]
    assert len(segments) == 7
    assert [result.image[start:end] for _, start, end in scan.scan(result.image).metadata] == segments
    assert opened(result.image).info == opened(source).info


def test_an_adobe_segment_stays_if_the_encoder_writes_none() -> None:
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\1"
    source = picture()
    source = source[:2] + adobe + source[2 + 18 :]  # in the place of JFIF
    after = opened(jpeg.mirror(source).image)
    assert (after.info["adobe_transform"], "jfif" in after.info) == (1, False)
    assert difference(after, ImageOps.mirror(opened(source))) < 2


@pytest.mark.parametrize(
    "data", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", b"XX*\0\x08\0\0\0"]
)
def test_damaged_exif_says_nothing(data: bytes) -> None:
    assert exif.read(data) == exif.Exif()
    assert exif.without_thumbnail(data) == data


def test_exif_that_is_cut_short_says_what_it_has() -> None:
    data = b"MM\0*\0\0\0\x08\0\x09" + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    assert exif.read(data) == exif.Exif(6)
    assert exif.read(data[:-1]) == exif.Exif()


def test_a_directory_that_counts_wrongly_has_no_thumbnail() -> None:
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(">HHII", 0x011A, 5, 1, 40)
    data = b"MM\0*\0\0\0\x08\0\1" + entries + bytes(4) + struct.pack(">II", 72, 1)
    assert exif.read(data) == exif.Exif(6)
    assert exif.without_thumbnail(data) == data


@given(st.binary(max_size=60))
def test_exif_is_never_an_exception(data: bytes) -> None:
    found = exif.read(b"MM\0*\0\0\0\x08" + data)
    assert 0 <= found.orientation <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(192, 128), (192, 121), (193, 128), (193, 121)])
def test_mirrored_means_as_displayed(orientation: int, size: tuple[int, int]) -> None:
    turned = Image.Exif()
    turned[0x0112] = orientation
    source = picture(size=size, exif=turned, subsampling="4:4:4", quality=95)
    result = jpeg.mirror(source)
    edge = size[0] if orientation < 5 else size[1]
    assert result.notes["mirror"] == ("lossless" if edge % 8 == 0 else "reencoded")
    before, after = opened(source), opened(result.image)
    assert after.getexif()[0x0112] == orientation
    expected = ImageOps.mirror(ImageOps.exif_transpose(before))
    shown = ImageOps.exif_transpose(after)
    assert difference(shown, expected) < 1
    assert difference(shown, ImageOps.mirror(expected)) > 5


def test_an_extended_picture_stays_extended() -> None:
    baseline = picture(size=(192, 128))
    extended = baseline.replace(b"\xff\xc0\0\x11", b"\xff\xc1\0\x11")
    mirrored = jpeg.mirror(baseline).image
    assert mirrored is not None
    assert jpeg.mirror(extended).image == mirrored.replace(b"\xff\xc0\0\x11", b"\xff\xc1\0\x11")


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_metadata_is_kept_byte_for_byte_and_none_is_added(options: dict[str, object]) -> None:
    source = picture(size=(192, 128), icc_profile=bytes(range(256)) * 600, xmp=b"<x/>", exif=TURNED_LEFT, **options)
    found = scan.scan(source)
    jfif = found.metadata[0]
    without = source[: jfif.start - 4] + source[jfif.end :]
    at = without.index(b"\xff\xda")
    late = without[:at] + b"\xff\xfe\0\x06late" + without[at:]
    for data in (source, without, late):
        before, after = data, jpeg.mirror(data).image or b""
        assert [after[part.start : part.end] for part in scan.scan(after).metadata] == [
            before[part.start : part.end] for part in scan.scan(before).metadata
        ]


def test_exif_need_not_come_first() -> None:
    source = picture(size=(192, 128), exif=TURNED_LEFT, comment=b"a comment")
    found = scan.scan(source)
    segment = next(part for part in found.metadata if source.startswith(b"Exif", part.start))
    exif_segment = source[segment.start - 4 : segment.end]
    bare = source[: segment.start - 4] + source[segment.end :]
    frame = bare.index(b"\xff\xc0")
    later = bare[:frame] + exif_segment + bare[frame:]
    assert opened(jpeg.mirror(later).image).tobytes() == opened(jpeg.mirror(source).image).tobytes()
    assert opened(jpeg.mirror(later).image).tobytes() != opened(jpeg.mirror(bare).image).tobytes()


@pytest.mark.parametrize(
    ("marker", "precision", "sentence"),
    [(0xC3, 8, "Lossless and hierarchical"), (0xC5, 8, "Lossless and hierarchical"), (0xC1, 12, "12 bits a sample")],
)
def test_kinds_that_no_decoder_here_takes(marker: int, precision: int, sentence: str) -> None:
    data = picture().replace(b"\xff\xc0\0\x11\x08", bytes([0xFF, marker, 0, 0x11, precision]))
    with pytest.raises(ImageError, match=sentence):
        jpeg.mirror(data)


def test_too_many_pixels_are_refused_by_the_header() -> None:
    source = picture()
    at = source.index(b"\xff\xc0") + 5
    with pytest.raises(TooManyPixelsError):
        jpeg.mirror(source[:at] + struct.pack(">HH", 60_000, 60_000) + source[at + 4 :])


def test_fill_bytes_before_markers() -> None:
    source = picture(size=(192, 128))
    at = source.index(b"\xff\xdb")
    assert jpeg.mirror(source[:at] + b"\xff" * 9 + source[at:]).image == jpeg.mirror(source).image


SMALL = {"aligned": picture(size=(32, 16)), "unaligned": picture(size=(33, 17))}


@pytest.mark.parametrize("name", SMALL)
def test_a_cut_picture_never_passes(name: str) -> None:
    source = SMALL[name]
    for at in range(3, len(source) - 2):
        with pytest.raises(ImageError):
            jpeg.mirror(source[:at])


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.binary(min_size=48, max_size=48), st.booleans())
def test_mirrored_twice_is_the_source(across: int, down: int, pixels: bytes, progressive: bool) -> None:
    noise = Image.frombytes("RGB", (4, 4), pixels).resize((16 * across, 16 * down), Image.Resampling.NEAREST)
    out = io.BytesIO()
    noise.save(out, "JPEG", progressive=progressive)
    once = jpeg.mirror(out.getvalue())
    twice = jpeg.mirror(once.image)
    assert once.notes["mirror"] == twice.notes["mirror"] == "lossless"
    # Equal coefficients decode to equal pixels, and single pixels show a swapped or shifted block.
    assert opened(twice.image).tobytes() == opened(out.getvalue()).tobytes()
