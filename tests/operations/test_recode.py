"""JPEGs whose edge is not aligned: encoded again with the source's own tables, sampling and kind of scan."""

from __future__ import annotations

import io
import struct
import subprocess
from pathlib import Path

import pytest
from conftest import needed
from judging import psnr
from PIL import Image

from safelight.errors import ImageError
from safelight.operations.mirror import jpeg, scan, turbojpeg

TEST_IMAGE = Path(__file__).parents[2] / "test_image.jpg"
FLIP = Image.Transpose.FLIP_LEFT_RIGHT


def scene(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    with Image.open(TEST_IMAGE) as image:
        return image.crop((100, 60, 100 + size[0], 60 + size[1])).convert(mode)


def saved(picture: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", **options)
    return out.getvalue()


def opened(data: bytes | None) -> Image.Image:
    picture = Image.open(io.BytesIO(data or b""))
    picture.load()
    return picture


def cjpeg(picture: Image.Image, *options: str) -> bytes:
    """A picture by an independent encoder, which knows every sampling."""
    out = io.BytesIO()
    picture.save(out, "PPM")
    return subprocess.run(
        [needed("cjpeg", "libjpeg-turbo-progs"), *options], input=out.getvalue(), capture_output=True, check=True
    ).stdout


def by_pillow(source: bytes) -> Image.Image:
    """What Pillow alone makes of it with the same tables and sampling."""
    with Image.open(io.BytesIO(source)) as picture:
        sampling = {(1, 1): 0, (2, 1): 1, (2, 2): 2}[picture.layer[0][1:3]]
        tables = picture.quantization
        mirrored = saved(picture.convert("RGB").transpose(FLIP), qtables=tables, subsampling=sampling)
    return opened(mirrored)


@pytest.mark.parametrize("width", [661, 662, 671])
@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("quality", [75, 85, 95])
def test_as_near_as_its_tables_allow(width: int, sampling: str, quality: int) -> None:
    source = saved(scene((width, 300)), subsampling=sampling, quality=quality)
    result = jpeg.mirror(source)
    assert result.notes == {"mirror": "reencoded"}
    expected = opened(source).transpose(FLIP)
    reached = psnr(opened(result.image), expected)
    assert reached >= 40
    assert reached >= psnr(by_pillow(source), expected) - 0.01
    assert 0.9 < len(result.image or b"") / len(source) < 1.1


SAMPLINGS = [
    "1x1",
    "2x1",
    "1x2",
    "2x2",
    "4x1",
    "4x2",
    "1x4",
    "2x4",
    "3x1",
    "1x3",
    "2x2,1x2,1x2",
    "2x2,2x1,2x1",
    "2x2,1x1,2x2",
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("size", [(384, 192), (369, 177)])
def test_every_sampling_stays(sampling: str, size: tuple[int, int]) -> None:
    source = cjpeg(scene(size), "-quality", "90", "-sample", sampling)
    result = jpeg.mirror(source)
    aligned = size == (384, 192) and turbojpeg.find(turbojpeg.OPTIMISED) is not None
    if turbojpeg.find(turbojpeg.OPTIMISED) is not None and turbojpeg.find(turbojpeg.OPTIMISED).optimises:  # type: ignore[union-attr]
        assert result.notes["mirror"] == ("lossless" if aligned else "reencoded")
    before, after = scan.scan(source), scan.scan(result.image or b"")
    assert after.components == before.components
    assert after.tables == before.tables
    assert after.kind == before.kind
    assert psnr(opened(result.image), opened(source).transpose(FLIP)) > 36


@pytest.mark.parametrize("components", [3, 4])
@pytest.mark.parametrize("transform", [0, 1, 2])
def test_what_the_components_mean_is_left_alone(components: int, transform: int) -> None:
    """RGB, YCbCr, CMYK and YCCK differ by Adobe's segment alone, which stays."""
    source = bytearray(saved(scene((193, 121), "CMYK" if components == 4 else "RGB"), quality=92, subsampling=0))
    if components == 4:
        source[source.index(b"Adobe") + 11] = transform
    else:
        source[2:20] = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])
    result = jpeg.mirror(bytes(source))
    before, after = opened(bytes(source)), opened(result.image)
    assert (after.mode, after.info) == (before.mode, before.info)
    assert scan.scan(result.image or b"").components == scan.scan(bytes(source)).components
    # Decoders clip colours that only false labels make possible; the true ones are as near as everywhere.
    assert psnr(after, before.transpose(FLIP)) > (40 if transform == (0 if components == 4 else 1) else 33)


def test_tables_of_16_bits_stay() -> None:
    source = saved(scene((193, 121)), qtables=[[300] * 64, [7] * 64])
    result = jpeg.mirror(source)
    assert result.notes == {"mirror": "reencoded"}
    assert (
        scan.scan(result.image or b"").tables
        == scan.scan(source).tables
        == {
            0: struct.pack(">64H", *[300] * 64),
            1: bytes([7] * 64),
        }
    )
    assert opened(result.image).size == (193, 121)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"subsampling": "4:2:2"}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_without_a_library_sampling_and_tables_stay_too(
    mode: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turbojpeg, "find", lambda _=0: None)
    source = saved(scene((193, 121), mode), quality=90, **options)
    result = jpeg.mirror(source)
    assert result.notes == {"mirror": "reencoded"}
    before, after = scan.scan(source), scan.scan(result.image or b"")
    assert (after.components, after.tables) == (before.components, before.tables)
    assert psnr(opened(result.image), opened(source).transpose(FLIP)) > 38


def test_components_that_nobody_can_show_are_refused() -> None:
    source = bytearray(saved(scene((33, 17), "L")))
    at = source.index(b"\xff\xc0")
    two = source[:at] + b"\xff\xc0\0\x0e\x08\0\x11\0\x21\2\1\x11\0\2\x11\0" + source[at + 13 :]
    with pytest.raises(ImageError):
        jpeg.mirror(bytes(two))


def test_components_of_one_name_are_told_apart() -> None:
    source = bytearray(saved(scene((193, 121)), quality=92))
    frame, scans = source.index(b"\xff\xc0"), source.index(b"\xff\xda")
    for at in (frame + 10, frame + 13, frame + 16, scans + 5, scans + 7, scans + 9):
        source[at] = 1
    assert psnr(opened(jpeg.mirror(bytes(source)).image), opened(bytes(source)).transpose(FLIP)) > 40
