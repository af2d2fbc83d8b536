"""The judge must be able to say "wrong": each defect that it looks for is made here once."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import judge
import pytest
from conftest import need_judges
from judging import Findings, metadata
from PIL import Image, ImageOps, PngImagePlugin

TEST_IMAGE = Path(__file__).parents[1] / "test_image.jpg"
LOSSLESS, REENCODED = {"mirror": "lossless"}, {"mirror": "reencoded"}
XMP = b'http://ns.adobe.com/xap/1.0/\0<Container:Item Semantic="Primary"/><Container:Item Item:Length="%d"/>'


@pytest.fixture(autouse=True, scope="module")
def tools() -> None:
    need_judges()


@pytest.fixture(scope="module")
def exiftool() -> Iterator[metadata.ExifTool]:
    tool = metadata.ExifTool()
    yield tool
    tool.close()


def scene(size: tuple[int, int] = (64, 48)) -> Image.Image:
    with Image.open(TEST_IMAGE) as image:
        return image.resize(size).convert("RGB")


def saved(picture: Image.Image, name: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, name, **options)
    return out.getvalue()


def flipped(jpeg: bytes, way: str = "horizontal") -> bytes:
    return subprocess.run(
        ["jpegtran", "-perfect", "-flip", way, "-copy", "all"], input=jpeg, capture_output=True, check=True
    ).stdout


def defects(source: bytes, result: bytes, notes: dict[str, str] = LOSSLESS) -> list[str]:
    findings = judge.judge(source, result, notes)
    assert findings.judges or findings.defects
    return findings.defects


def test_an_aligned_jpeg_must_keep_its_coefficients() -> None:
    source = saved(scene(), "JPEG", progressive=True)
    assert defects(source, flipped(source)) == []
    assert defects(source, flipped(source), REENCODED) == ["#1: aligned, but not lossless"]
    assert "coefficients differ" in defects(source, source)[0]
    with Image.open(io.BytesIO(source)) as picture:
        again = saved(ImageOps.mirror(picture), "JPEG", qtables=picture.quantization)
    assert "coefficients differ" in defects(source, again)[0]


@pytest.mark.parametrize(("orientation", "way"), [(3, "horizontal"), (6, "vertical")])
def test_the_orientation_says_which_edge_is_flipped(orientation: int, way: str) -> None:
    turned = Image.Exif()
    turned[0x0112] = orientation
    source = saved(scene(), "JPEG", exif=turned)
    assert defects(source, flipped(source, way)) == []
    assert defects(source, flipped(source, "vertical" if way == "horizontal" else "horizontal"))


def test_a_jpeg_that_was_encoded_again_keeps_its_tables_and_kind() -> None:
    picture = scene((61, 41)).resize((305, 205))
    source = saved(picture, "JPEG", quality=90, subsampling="4:2:0")
    right = saved(ImageOps.mirror(picture), "JPEG", quality=90, subsampling="4:2:0")
    assert defects(source, right, REENCODED) == []
    other = saved(ImageOps.mirror(picture), "JPEG", quality=85, subsampling="4:4:4", progressive=True)
    found = " ".join(defects(source, other, REENCODED))
    assert all(word in found for word in ("quantisation tables", "sampling", "kind of scan"))
    assert "shows another picture" in defects(source, source, REENCODED)[0]
    poor = saved(scene((61, 41)), "JPEG", quality=30)
    with Image.open(io.BytesIO(poor)) as shown:
        again = judge.judge(poor, saved(ImageOps.mirror(shown), "JPEG", quality=30), REENCODED)
    assert (again.defects, [kind for kind, _ in again.remarks]) == ([], ["low"])


def test_every_picture_of_a_file_is_judged_and_the_index_must_lead_to_it() -> None:
    pictures = [scene(), ImageOps.invert(scene((32, 32)))]
    first, second = (saved(picture, "JPEG") for picture in pictures)
    source = saved(pictures[0], "MPO", save_all=True, append_images=pictures[1:])
    assert source[6:10] != b"MPF\0"
    at = source.rindex(b"\xff\xd8\xff")
    head, tail = source[:at], source[at:]
    result = flipped(head) + flipped(tail)
    index = result.index(b"MPF\0") + 4
    entry = result.index(struct.pack("<I", len(head)), index)
    right = bytearray(result)
    struct.pack_into("<I", right, entry, len(flipped(head)))
    struct.pack_into("<II", right, entry + 16, len(flipped(tail)), len(flipped(head)) - index)
    assert first
    assert second
    assert defects(source, bytes(right)) == []
    assert any("leads to" in text or "gives picture" in text for text in defects(source, result))
    assert any("#2" in text for text in defects(source, bytes(right[: len(flipped(head))]) + tail))


def test_the_lengths_of_a_container_must_lead_to_its_pictures() -> None:
    small = saved(scene((32, 32)), "JPEG")
    base = saved(scene(), "JPEG", progressive=True)

    def of(first: bytes, second: bytes, length: int) -> bytes:
        xmp = XMP % length
        return first[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + first[2:] + second

    source = of(base, small, len(small))
    assert defects(source, of(flipped(base), flipped(small), len(flipped(small)))) == []
    assert any("container" in text for text in defects(source, of(flipped(base), flipped(small), 99)))


@pytest.mark.parametrize("name", ["PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_one_wrong_pixel_is_seen(name: str) -> None:
    options = {"lossless": True} if name == "WEBP" else {}
    picture = scene().quantize(64) if name == "GIF" else scene()
    mirrored = ImageOps.mirror(picture)
    source, result = saved(picture, name, **options), saved(mirrored, name, **options)
    assert defects(source, result) == []
    assert defects(source, source)
    mirrored.putpixel((0, 0), 9 if name == "GIF" else (1, 2, 3))
    assert defects(source, saved(mirrored, name, **options))


def test_deep_samples_are_compared_whole() -> None:
    source, result = Image.new("I;16", (3, 1)), Image.new("I;16", (3, 1))
    for x in range(3):
        source.putpixel((x, 0), 1000 + x)
        result.putpixel((x, 0), 1002 - x)
    for name in ("PNG", "TIFF"):
        assert defects(saved(source, name), saved(result, name)) == []
    result.putpixel((0, 0), 1003)
    for name in ("PNG", "TIFF"):
        assert defects(saved(source, name), saved(result, name))


@pytest.mark.parametrize("name", ["GIF", "PNG", "WEBP"])
def test_frames_and_their_durations_are_compared(name: str) -> None:
    frames = [scene().quantize(64).convert("RGB").rotate(90 * number) for number in range(3)]
    mirrored = [ImageOps.mirror(frame) for frame in frames]

    def of(pictures: list[Image.Image], durations: list[int], loop: int = 2) -> bytes:
        options = {"lossless": True} if name == "WEBP" else {}
        return saved(
            pictures[0], name, save_all=True, append_images=pictures[1:], duration=durations, loop=loop, **options
        )

    source = of(frames, [50, 60, 70])
    assert defects(source, of(mirrored, [50, 60, 70])) == []
    assert defects(source, of(mirrored, [50, 60, 80]))
    assert defects(source, of(mirrored, [50, 60, 70], loop=3))
    assert defects(source, of(mirrored[:2], [50, 60]))
    assert defects(source, of([mirrored[0], mirrored[2], mirrored[1]], [50, 60, 70]))


def test_lost_and_changed_metadata_is_told(exiftool: metadata.ExifTool) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "a title")
    source = saved(scene(), "PNG", pnginfo=text, icc_profile=b"p" * 200, dpi=(72, 72))

    def told(**options: object) -> str:
        findings = Findings("PNG")
        metadata.judge(source, saved(scene(), "PNG", **options), exiftool, findings)
        return " ".join(findings.defects)

    whole = {"pnginfo": text, "icc_profile": b"p" * 200, "dpi": (72, 72)}
    assert told(**whole) == ""
    assert "Title" in told(**{**whole, "pnginfo": None})
    assert "rofile" in told(**{**whole, "icc_profile": None})
    assert "PixelsPerUnit" in told(**{**whole, "dpi": (90, 90)})


def test_a_thumbnail_that_is_still_there_must_be_mirrored(exiftool: metadata.ExifTool) -> None:
    def of(small: Image.Image | None) -> bytes:
        thumbnail = saved(small, "JPEG") if small else b""
        first = struct.pack("<HHHII", 1, 0x0112, 3, 1, 1) + struct.pack("<I", 26)
        second = struct.pack("<HHHIIHHIII", 2, 0x0201, 4, 1, 56, 0x0202, 4, 1, len(thumbnail), 0)
        exif = b"Exif\0\0II*\0\x08\0\0\0" + first + second + thumbnail
        return saved(scene(), "JPEG", exif=exif if small else b"")

    def told(result: bytes) -> Findings:
        findings = Findings("JPEG")
        metadata.judge(of(scene((40, 30))), result, exiftool, findings)
        return findings

    assert told(of(ImageOps.mirror(scene((40, 30))))).remarks == [("thumbnail mirrored", "")]
    assert "thumbnail" in " ".join(told(of(scene((40, 30)))).defects)
    assert ("thumbnail dropped", "") in told(of(None)).remarks


def test_hangs_crashes_and_refusals_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exiftool: metadata.ExifTool
) -> None:
    monkeypatch.setattr(judge, "_tools", [exiftool])
    path = tmp_path / "picture.png"
    path.write_bytes(saved(scene(), "PNG"))
    assert judge._verdict(path).outcome == "right"
    monkeypatch.setattr(judge, "SECONDS", 0.2)
    monkeypatch.setattr(judge, "_mirrored", lambda *_: time.sleep(30))
    assert judge._verdict(path).outcome == "hung"
    monkeypatch.setattr(judge, "_mirrored", lambda *_: os._exit(3))
    assert judge._verdict(path).outcome == "crashed"
    monkeypatch.undo()
    monkeypatch.setattr(judge, "_tools", [exiftool])
    path.write_bytes(saved(scene(), "PNG")[:200])
    assert judge._verdict(path).outcome == "refused"
