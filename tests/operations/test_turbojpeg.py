"""The facts about libjpeg-turbo that the lossless path is built on, against every library that is found."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import time
from pathlib import Path

import pytest
from conftest import needed
from PIL import Image

from safelight.errors import ImageError
from safelight.operations.mirror import jpeg, scan, turbojpeg
from safelight.operations.mirror.exif import Axis

TEST_IMAGE = Path(__file__).parents[2] / "test_image.jpg"
EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"
FLIPS = {Axis.HORIZONTAL: "horizontal", Axis.VERTICAL: "vertical"}


def jpegtran(data: bytes, *arguments: str) -> bytes:
    """An independent tool's transform: bytes that are equal exactly if tables, sampling and coefficients are."""
    done = subprocess.run(
        [needed("jpegtran", "libjpeg-turbo-progs"), "-copy", "none", *(arguments or ["-optimize"])],
        input=data,
        capture_output=True,
        check=True,
    )
    return done.stdout


def test_a_library_is_installed() -> None:
    assert turbojpeg.find() is not None or "CI" not in os.environ


LIBRARIES = [name for name in turbojpeg.candidates() if turbojpeg.open_library(name)]


@pytest.fixture(params=LIBRARIES, ids=[str(turbojpeg.open_library(name)).replace(" ", "-") for name in LIBRARIES])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> turbojpeg.Library:
    found = turbojpeg.open_library(request.param)
    assert found is not None
    monkeypatch.setattr(turbojpeg, "find", lambda _=0: found)
    return found


@functools.cache
def picture(mode: str = "RGB", size: tuple[int, int] = (192, 128), **options: object) -> bytes:
    """A part of the test image in another kind of JPEG."""
    out = io.BytesIO()
    with Image.open(TEST_IMAGE) as scene:
        scene.crop((180, 100, 180 + size[0], 100 + size[1])).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


KINDS = {
    "baseline-420": picture(),
    "baseline-422": picture(subsampling="4:2:2"),
    "baseline-444": picture(subsampling="4:4:4", quality=97),
    "progressive": picture(progressive=True),
    "optimised": picture(optimize=True),
    "grey": picture("L", (184, 120)),
    "grey-progressive": picture("L", (184, 120), progressive=True),
    "cmyk": picture("CMYK", (184, 120)),
    "cmyk-progressive": picture("CMYK", (184, 120), progressive=True),
    "rgb": picture("RGB", (184, 120), keep_rgb=True),
    "restarts": picture(restart_marker_rows=1),
    "test image": TEST_IMAGE.read_bytes(),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> bytes:
    return KINDS[request.param]


@pytest.mark.parametrize("axis", Axis)
def test_coefficients_are_the_sources_mirrored(library: turbojpeg.Library, kind: bytes, axis: Axis) -> None:
    ours = library.flip(kind, axis, scan.scan(kind).kind)
    assert jpegtran(ours) == jpegtran(kind, "-flip", FLIPS[axis], "-perfect", "-optimize")
    assert jpegtran(library.flip(ours, axis)) == jpegtran(kind)


def test_mirror_is_the_same_and_keeps_the_kind_of_scan(library: turbojpeg.Library, kind: bytes) -> None:
    result = jpeg.mirror(kind)
    assert result.notes == {"mirror": "lossless"}
    assert result.image is not None
    assert jpegtran(result.image) == jpegtran(kind, "-flip", "horizontal", "-perfect", "-optimize")
    before, after = scan.scan(kind), scan.scan(result.image)
    assert after.kind & turbojpeg.PROGRESSIVE == before.kind & turbojpeg.PROGRESSIVE
    assert after.components == before.components
    if library.optimises:
        assert after.kind == before.kind
        assert len(result.image) < 1.01 * len(kind) + 32
    else:  # a 2.x library cannot make Huffman tables for a baseline picture
        assert len(result.image) < 1.08 * len(kind) + 400


def test_an_arithmetic_source(library: turbojpeg.Library) -> None:
    source = jpegtran(KINDS["baseline-420"], "-arithmetic")
    assert scan.scan(source).kind & turbojpeg.ARITHMETIC
    mirrored = jpeg.mirror(source).image
    assert mirrored is not None
    assert jpegtran(mirrored) == jpegtran(KINDS["baseline-420"], "-flip", "horizontal", "-optimize")
    assert bool(scan.scan(mirrored).kind & turbojpeg.ARITHMETIC) == library.optimises


def test_markers_are_kept(library: turbojpeg.Library) -> None:
    options = {"exif": EXIF, "icc_profile": b"profile" * 9_000, "comment": b"a comment", "dpi": (300, 300)}
    source = picture(xmp=b"<x:xmpmeta/>", **options)
    with Image.open(io.BytesIO(jpeg.mirror(source).image or b"")) as mirrored:
        info = mirrored.info
    assert (info["exif"], info["icc_profile"], info["comment"]) == (EXIF, options["icc_profile"], b"a comment")
    assert info["xmp"] == b"<x:xmpmeta/>"
    assert info["dpi"] == (300, 300)


@pytest.mark.parametrize("before", [turbojpeg.PROGRESSIVE, turbojpeg.OPTIMISED, turbojpeg.ARITHMETIC])
def test_a_picture_is_not_spoilt_by_the_one_before_it(library: turbojpeg.Library, before: int) -> None:
    source = KINDS["test image"]
    first = library.flip(source, Axis.HORIZONTAL)
    library.flip(KINDS["progressive"], Axis.HORIZONTAL, before)
    assert library.flip(source, Axis.HORIZONTAL) == first


@pytest.mark.parametrize(
    ("source", "across", "down"),
    [
        (picture("RGB", (192, 120)), True, False),
        (picture("RGB", (184, 128)), False, True),
        (picture("RGB", (184, 121), subsampling="4:4:4"), True, False),
        (picture("RGB", (184, 120), subsampling="4:2:2"), False, True),
        (picture("L", (183, 120)), False, True),
        (picture("CMYK", (183, 121)), False, False),
    ],
    ids=["420 across", "420 down", "444", "422", "grey", "cmyk"],
)
def test_the_library_agrees_about_which_edges_are_aligned(
    library: turbojpeg.Library, source: bytes, across: bool, down: bool
) -> None:
    for axis, expected in ((Axis.HORIZONTAL, across), (Axis.VERTICAL, down)):
        assert scan.scan(source).is_aligned(axis) is expected
        if expected:
            library.flip(source, axis)
        else:
            with pytest.raises(turbojpeg.DamageError, match="not perfect"):
                library.flip(source, axis)


def test_a_grey_picture_with_sampling_factors_has_mcus_of_one_block(library: turbojpeg.Library) -> None:
    source = bytearray(picture("L", (184, 120)))
    at = source.index(b"\xff\xc0") + 11
    assert source[at] == 0x11
    source[at] = 0x22  # T.81, A.2.2: they mean nothing where there is one component
    result = jpeg.mirror(bytes(source))
    assert result.notes["mirror"] == "lossless"
    assert result.image is not None
    assert jpegtran(result.image) == jpegtran(bytes(source), "-flip", "horizontal", "-optimize")


def test_what_is_cut_short_is_told_from_a_missing_end(library: turbojpeg.Library) -> None:
    source = KINDS["test image"]
    whole = jpeg.mirror(source)
    for enough in (source[:-1], source[:-2]):
        assert jpeg.mirror(enough).image == whole.image
    for cut in (source[:-3], source[:-20], source[: len(source) // 2], source[:700]):
        with pytest.raises(ImageError, match="premature end of data segment"):
            jpeg.mirror(cut)
    progressive = KINDS["progressive"]
    for at in range(len(progressive) // 2, len(progressive) - 40, 501):
        with pytest.raises(ImageError):
            jpeg.mirror(progressive[:at])


def test_stray_bytes_before_a_marker_do_no_harm(library: turbojpeg.Library) -> None:
    source = KINDS["baseline-420"]
    stray = source[:-2] + b"\0\0\0" + source[-2:]
    assert jpeg.mirror(stray).image == jpeg.mirror(source).image


def test_a_flood_of_tiny_segments_is_refused_before_the_library_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    source, flood = KINDS["baseline-420"], b"\xff\xfe\0\2" * 32_000
    monkeypatch.setattr(turbojpeg, "find", lambda _=0: pytest.fail("the library would need 800 ms for it"))
    for bomb in (source[:2] + flood + source[2:], source[:-2] + flood + source[-2:]):
        began = time.process_time()
        with pytest.raises(ImageError, match="more than 2,000 segments"):
            jpeg.mirror(bomb)
        assert time.process_time() - began < 0.4  # it takes 8 ms


def test_a_flood_of_scans_is_refused(library: turbojpeg.Library) -> None:
    source = KINDS["progressive"]
    last = source.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match="500 scans"):
        jpeg.mirror(source[:last] + 600 * source[last:-2] + source[-2:])


def test_many_segments_are_allowed(library: turbojpeg.Library) -> None:
    source = KINDS["baseline-420"]
    began = time.process_time()
    result = jpeg.mirror(source[:2] + b"\xff\xfe\0\3c" * 1_900 + source[2:])
    assert time.process_time() - began < 0.4  # it takes 17 ms
    assert result.image is not None
    assert result.image.count(b"\xff\xfe\0\3c") == 1_900


def test_the_system_comes_before_the_wheel() -> None:
    candidates = turbojpeg.candidates()
    wheels = ["turbojpeg.libs" in name or ".dylibs" in name for name in candidates]
    assert wheels == sorted(wheels)
    assert not wheels[0]


def test_a_library_that_is_not_there_or_not_one() -> None:
    assert turbojpeg.open_library("/nonexistent/libturbojpeg.so") is None
    assert turbojpeg.open_library("libc.so.6") is None


def test_the_start_up_line(library: turbojpeg.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    assert turbojpeg.describe().startswith("libjpeg-turbo 2.1." if "libjpeg-turbo 2.1." in str(library) else "libjpeg")
    monkeypatch.setattr(turbojpeg, "find", lambda _=0: None)
    assert "libturbojpeg0" in turbojpeg.describe() or "brew install" in turbojpeg.describe()
