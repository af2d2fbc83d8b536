"""WebP: exact where the source is lossless, at the source's own quality where it is not."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageOps, ImageSequence, ImageStat

from safelight.errors import ImageError, TooManyFramesError, TooManyPixelsError
from safelight.operations.mirror import webp

TEST_IMAGE = Path(__file__).parents[2] / "test_image.jpg"


def scene(size: tuple[int, int] = (161, 109), alpha: bool = False) -> Image.Image:
    with Image.open(TEST_IMAGE) as image:
        picture = image.resize(size)
    if alpha:
        picture.putalpha(Image.linear_gradient("L").resize(size))
    return picture


def saved(picture: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, "WEBP", **options)
    return out.getvalue()


def opened(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


@pytest.mark.parametrize("alpha", [False, True])
def test_lossless_is_exact_even_under_transparency(alpha: bool) -> None:
    source = saved(scene(alpha=alpha), lossless=True, exact=True)
    result = webp.mirror(source)
    assert result.notes == {"mirror": "lossless"}
    assert opened(result.image).tobytes() == ImageOps.mirror(scene(alpha=alpha)).tobytes()
    assert result.image[12:16] == b"VP8L"


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.binary(min_size=64, max_size=64))
def test_mirrored_twice_is_the_source(width: int, height: int, noise: bytes) -> None:
    picture = Image.frombytes("RGBA", (4, 4), noise).resize((width, height))
    source = saved(picture, lossless=True, exact=True)
    once = webp.mirror(source).image
    assert opened(once).convert("RGBA").tobytes() == ImageOps.mirror(picture).tobytes()
    assert opened(webp.mirror(once).image).convert("RGBA").tobytes() == picture.tobytes()


@pytest.mark.parametrize("quality", [20, 50, 75, 80, 90, 95])
@pytest.mark.parametrize("alpha", [False, True])
def test_lossy_is_encoded_at_its_own_quality(quality: int, alpha: bool) -> None:
    source = saved(scene((512, 344), alpha=alpha), quality=quality)
    result = webp.mirror(source)
    assert result.notes == {"mirror": "reencoded"}
    frame = source[source.index(b"VP8 ", 12) + 8 :]
    assert webp.vp8_quality(frame) == pytest.approx(quality, abs=3)
    assert 0.75 * len(source) < len(result.image) < 1.1 * len(source)
    before, after = opened(source), opened(result.image)
    assert before.mode == after.mode
    away = ImageChops.difference(after.convert("RGBA"), ImageOps.mirror(before.convert("RGBA")))
    assert max(ImageStat.Stat(away.convert("RGB")).mean) < 4
    assert away.getextrema()[3] == (0, 0)


def test_metadata_is_kept() -> None:
    exif = b"MM\0*\0\0\0\x08\0\0\0\0\0\0"
    options = {"icc_profile": b"a profile", "exif": exif, "xmp": b"<x:xmpmeta/>"}
    after = opened(webp.mirror(saved(scene(), **options)).image)
    assert {name: after.info[name] for name in options} == options


@pytest.mark.parametrize("orientation", range(1, 9))
def test_mirrored_means_as_displayed(orientation: int) -> None:
    turned = Image.Exif()
    turned[0x0112] = orientation
    source = saved(scene(), exif=turned, lossless=True)
    before, after = opened(source), opened(webp.mirror(source).image)
    assert after.getexif()[0x0112] == orientation
    assert ImageOps.exif_transpose(after).tobytes() == ImageOps.mirror(ImageOps.exif_transpose(before)).tobytes()


def animation(**options: object) -> bytes:
    frames = [scene((81, 55), alpha=True)]
    for number in range(1, 6):
        frames.append(frames[-1].copy())
        frames[-1].paste((number * 40, 200, 0, 99), (number * 7 + 1, number, number * 7 + 10, 40))
    frames[3].paste((1, 2, 3, 0), (30, 20, 50, 30))
    durations = [20, 30, 40, 50, 60, 70]
    return saved(frames[0], save_all=True, append_images=frames[1:], duration=durations, loop=3, **options)


def shown(data: bytes) -> list[tuple[Image.Image, int, int]]:
    with Image.open(io.BytesIO(data)) as picture:
        frames = []
        for frame in ImageSequence.Iterator(picture):
            shape = frame.convert("RGBA")
            frames.append((shape, frame.info["duration"], frame.info["loop"]))
        return frames


def test_a_lossless_animation_is_exact() -> None:
    source = animation(lossless=True, exact=True)
    result = webp.mirror(source)
    assert result.notes == {"mirror": "lossless"}
    before, after = shown(source), shown(result.image)
    assert len(before) == 6
    for old, new in zip(before, after, strict=True):
        assert ImageOps.mirror(old[0]).tobytes() == new[0].tobytes()
        assert old[1:] == new[1:]
    assert len(result.image) < 1.5 * len(source)


def test_equal_frames_of_an_animation_stay() -> None:
    source = animation(lossless=True)
    first = source.index(b"ANMF")
    length = 8 + int.from_bytes(source[first + 4 : first + 8], "little")
    doubled = source[: first + length] + source[first:]
    doubled = doubled[:4] + (len(doubled) - 8).to_bytes(4, "little") + doubled[8:]
    assert len(shown(webp.mirror(doubled).image)) == 7


def test_a_lossy_animation_keeps_its_frames() -> None:
    source = animation(quality=90)
    result = webp.mirror(source)
    assert result.notes == {"mirror": "reencoded"}
    for old, new in zip(shown(source), shown(result.image), strict=True):
        assert old[1:] == new[1:]
        away = ImageChops.difference(ImageOps.mirror(old[0]).convert("RGB"), new[0].convert("RGB"))
        assert max(ImageStat.Stat(away).mean) < 6


@pytest.mark.parametrize("options", [{"quality": 80}, {"lossless": True}, {"quality": 80, "exif": b"Exif\0\0x"}])
def test_what_is_cut_short_is_refused(options: dict[str, object]) -> None:
    source = saved(scene((40, 30)), **options)
    for at in range(12, len(source) - 1, 7):
        with pytest.raises(ImageError):
            webp.mirror(source[:at])
    assert webp.mirror(source + b"more").image == webp.mirror(source).image


def test_too_many_pixels_or_frames_are_refused_without_decoding() -> None:
    source = animation()
    first = source.index(b"ANMF")
    length = 8 + int.from_bytes(source[first + 4 : first + 8], "little")
    many = source[:first] + 3_000 * source[first : first + length]
    with pytest.raises(TooManyFramesError, match="3,000 frames"):
        webp.mirror(many[:4] + (len(many) - 8).to_bytes(4, "little") + many[8:])
    large = source[:24] + struct.pack("<I", 15_999)[:3] + struct.pack("<I", 15_999)[:3] + source[30:]
    with pytest.raises(TooManyPixelsError, match="16,000 x 16,000"):
        webp.mirror(large)


def header(quantisers: tuple[int, int, int, int], probabilities: tuple[int, int, int]) -> bytes:
    """A VP8 key frame's header with four segments (RFC 6386, 9.3), each bit as likely 0 as 1 (7.3)."""
    numbers = [(0, 2), (1, 1), (1, 1), (1, 1), (1, 1)]  # segments: their map and absolute numbers follow
    numbers += [number for value in quantisers for number in ((1, 1), (value, 7), (0, 1))]
    numbers += [(0, 4), *((256 + value, 9) for value in probabilities), (0, 10), (0, 1), (0, 2), (quantisers[0], 7)]
    bottom, span, shifts = 0, 255, 0
    for bit in "".join(f"{value:0{bits}b}" for value, bits in numbers):
        split = 1 + (span - 1 >> 1)
        bottom, span = (bottom + split, span - split) if bit == "1" else (bottom, split)
        while span < 128:
            bottom, span, shifts = bottom << 1, span << 1, shifts + 1
    return bytes(10) + (bottom << -shifts % 8).to_bytes(1 + (shifts + 7) // 8, "big") + bytes(9)


@pytest.mark.parametrize(
    ("quantisers", "probabilities", "quality"),
    [
        ((36, 32, 28, 20), (128, 128, 128), 69),  # as libwebp's: what they are on average
        ((126, 10, 10, 126), (200, 150, 255), 59),  # no coarser than 24 above the finest
        ((126, 10, 126, 126), (255, 253, 255), 0),  # but for one that is hardly used
    ],
)
def test_segments_of_other_encoders(
    quantisers: tuple[int, int, int, int], probabilities: tuple[int, int, int], quality: float
) -> None:
    assert webp.vp8_quality(header(quantisers, probabilities)) == pytest.approx(quality, abs=1.5)


def test_frames_of_both_kinds_stay_so() -> None:
    still, moving = saved(scene((80, 54)), quality=80), animation(lossless=True)
    first = moving.index(b"ANMF")
    frame = moving[first : first + 8 + int.from_bytes(moving[first + 4 : first + 8], "little")]
    lossy = frame[8:14] + (79).to_bytes(3, "little") + (53).to_bytes(3, "little") + frame[20:24] + still[12:]
    mixed = moving[:first] + b"ANMF" + struct.pack("<I", len(lossy)) + lossy + moving[first:]
    mixed = mixed[:4] + struct.pack("<I", len(mixed) - 8) + mixed[8:]
    result = webp.mirror(mixed)
    assert result.notes == {"mirror": "reencoded"}
    data = result.image or b""
    assert (data.count(b"VP8 "), data.count(b"VP8L")) == (1, 6)
    assert len(shown(data)) == 7
    assert ImageOps.mirror(shown(mixed)[-1][0]).tobytes() == shown(data)[-1][0].tobytes()


@given(st.binary(max_size=60))
def test_any_header_tells_some_quality(data: bytes) -> None:
    assert 0 <= webp.vp8_quality(bytes(10) + data) <= 100
