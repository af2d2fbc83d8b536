"""The operation as a whole: which way an image goes, and that nothing but our own errors comes out of it."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageOps

from safelight.errors import ImageError, UnsupportedFormatError
from safelight.operations.mirror import mirror

TEST_IMAGE = Path(__file__).parents[2] / "test_image.jpg"


def saved(name: str, **options: object) -> bytes:
    out = io.BytesIO()
    with Image.open(TEST_IMAGE) as scene:
        scene.resize((40, 24)).save(out, name, **options)
    return out.getvalue()


def animated(name: str) -> bytes:
    with Image.open(TEST_IMAGE) as scene:
        return saved(name, save_all=True, append_images=[scene.resize((40, 24)).rotate(9)], duration=50)


SMALL = {
    "jpeg": saved("JPEG", subsampling="4:4:4"),
    "progressive": saved("JPEG", progressive=True),
    "png": saved("PNG"),
    "apng": animated("PNG"),
    "gif": animated("GIF"),
    "webp": saved("WEBP"),
    "lossless webp": saved("WEBP", lossless=True),
    "animated webp": animated("WEBP"),
    "tiff": saved("TIFF", compression="tiff_lzw"),
    "bmp": saved("BMP"),
    "avif": saved("AVIF"),
    "animated avif": animated("AVIF"),
}


def test_the_test_image_is_mirrored_losslessly() -> None:
    source = TEST_IMAGE.read_bytes()
    result = mirror(source)
    assert result.notes == {"mirror": "lossless"}
    assert result.facts == {}
    assert abs(len(result.image) - len(source)) < 1024
    with Image.open(io.BytesIO(result.image)) as after, Image.open(TEST_IMAGE) as before:
        assert after.quantization == before.quantization
        away = ImageChops.difference(after.convert("RGB"), ImageOps.mirror(before.convert("RGB")))
        # Equal coefficients, but the inverse DCT and the upsampling of colour round to one side.
        assert max(high for _, high in away.getextrema()) <= 3


@pytest.mark.parametrize("name", SMALL)
def test_a_format_stays_what_it_is(name: str) -> None:
    with Image.open(io.BytesIO(SMALL[name])) as before, Image.open(io.BytesIO(mirror(SMALL[name]).image)) as after:
        assert (after.format, after.size) == (before.format, before.size)
        assert after.mode == before.mode
        assert getattr(after, "n_frames", 1) == getattr(before, "n_frames", 1) == (
            2 if name.startswith(("animated", "apng")) else 1
        ) or (name == "gif" and after.n_frames == before.n_frames == 2)


@pytest.mark.parametrize("name", ["PPM", "ICO", "PDF", "JPEG2000"])
def test_formats_that_are_not_allowed_never_reach_a_decoder(name: str) -> None:
    with pytest.raises(UnsupportedFormatError):
        mirror(saved(name))


@pytest.mark.parametrize("data", [b"", b"\xff", b"not an image", b"<svg/>"])
def test_what_is_no_image(data: bytes) -> None:
    with pytest.raises(UnsupportedFormatError):
        mirror(data)


@pytest.mark.parametrize("data", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\4\0\0\0WEBP"])
def test_first_bytes_alone(data: bytes) -> None:
    with pytest.raises(ImageError):
        mirror(data)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted(SMALL)),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), min_size=1, max_size=6),
)
def test_damage_ends_in_an_image_or_in_our_own_error(name: str, damages: list[tuple[float, bytes]]) -> None:
    data = bytearray(SMALL[name])
    for where, damage in damages:
        at = 12 + int(where**3 * (len(data) - 12))  # more of it in the headers
        data[at : at + len(damage)] = damage
    with contextlib.suppress(ImageError, UnsupportedFormatError):
        assert mirror(bytes(data)).image
