"""AVIFs: turned by their container, judged as displayed by two readers, libavif (in Pillow) and libheif."""

from __future__ import annotations

import io
import itertools
import struct
import subprocess
from pathlib import Path

import pytest
from conftest import needed
from PIL import Image, ImageOps

from safelight.errors import ImageError, TooManyPixelsError
from safelight.operations.mirror import avif, isobmff

TEST_IMAGE = Path(__file__).parents[2] / "test_image.jpg"
TURNED_LEFT = b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, 8, 0, 0)


def scene(size: tuple[int, int] = (64, 48), mode: str = "RGB") -> Image.Image:
    with Image.open(TEST_IMAGE) as image:
        picture = image.resize(size)
    if mode == "RGBA":
        picture.putalpha(Image.linear_gradient("L").resize(size))
    return picture.convert(mode)


def saved(picture: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, "AVIF", speed=10, **options)
    return out.getvalue()


def avifenc(folder: Path, picture: Image.Image, *options: str, inputs: int = 1) -> bytes:
    """By the encoder's own tool, which knows depths, turns and grids."""
    names = []
    for number in range(inputs):
        names.append(str(folder / f"{number}.png"))
        picture.rotate(number).save(names[-1])
    command = [needed("avifenc", "libavif-bin"), "-s", "10", *options, *names, str(folder / "out.avif")]
    subprocess.run(command, check=True, capture_output=True)
    return (folder / "out.avif").read_bytes()


def shown(data: bytes | None) -> list[Image.Image]:
    """Every frame as displayed; Pillow tells `irot` and `imir` as an EXIF orientation."""
    with Image.open(io.BytesIO(data or b"")) as picture:
        orientation = picture.getexif().get(0x0112, 1)
        frames = []
        for number in range(picture.n_frames):
            picture.seek(number)
            frame = picture.convert("RGBA")
            frame.getexif()[0x0112] = orientation
            frames.append(ImageOps.exif_transpose(frame))
        return frames


def shown_by_libheif(folder: Path, data: bytes | None) -> Image.Image:
    (folder / "shown.avif").write_bytes(data or b"")
    command = [needed("heif-convert", "libheif-examples"), str(folder / "shown.avif"), str(folder / "shown.png")]
    subprocess.run(command, check=True, capture_output=True)
    with Image.open(folder / "shown.png") as picture:
        return picture.convert("RGBA")


def is_mirrored(result: bytes | None, source: bytes) -> bool:
    before, after = shown(source), shown(result)
    both = zip(before, after, strict=True)
    return all(ImageOps.mirror(old).tobytes() == new.tobytes() for old, new in both)


ENCODED = {
    "8 bits": [],
    "10 bits": ["-d", "10"],
    "12 bits": ["-d", "12"],
    "4:2:0": ["-y", "420"],
    "grey": ["-y", "400"],
    "lossless": ["--lossless"],
    "limited range": ["-r", "limited"],
}


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("name", ENCODED)
def test_every_kind_is_mirrored_exactly(name: str, mode: str, tmp_path: Path) -> None:
    source = avifenc(tmp_path, scene(mode=mode), *ENCODED[name])
    result = avif.mirror(source)
    assert result.notes == {"mirror": "lossless"}
    assert is_mirrored(result.image, source)
    data = source[source.index(b"mdat") :]
    assert (result.image or b"").endswith(data)  # not a byte of what is coded has changed
    assert is_mirrored(avif.mirror(result.image or b"").image, result.image or b"")


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize(("quarters", "axis"), list(itertools.product(range(4), [None, 0, 1])))
def test_every_turn_is_mirrored_as_displayed(quarters: int, axis: int | None, mode: str, tmp_path: Path) -> None:
    options = ["--irot", str(quarters)] if quarters else []
    options += [] if axis is None else ["--imir", str(axis)]
    source = avifenc(tmp_path, scene(mode=mode), *options)
    result = avif.mirror(source).image
    assert is_mirrored(result, source)
    expected = ImageOps.mirror(shown_by_libheif(tmp_path, source))
    assert shown_by_libheif(tmp_path, result).tobytes() == expected.tobytes()
    assert shown(avif.mirror(result or b"").image)[0].tobytes() == shown(source)[0].tobytes()


def test_a_grid_is_turned_as_a_whole(tmp_path: Path) -> None:
    source = avifenc(tmp_path, scene((64, 64)), "--grid", "2x2", inputs=4)
    result = avif.mirror(source).image
    assert shown(source)[0].size == (128, 128)
    assert is_mirrored(result, source)
    assert shown_by_libheif(tmp_path, result).tobytes() == ImageOps.mirror(shown_by_libheif(tmp_path, source)).tobytes()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_sequence_keeps_its_frames_and_durations(mode: str) -> None:
    first = scene(mode=mode)
    others = [first.rotate(9), first.rotate(20)]
    source = saved(first, save_all=True, append_images=others, duration=[40, 70, 900])
    result = avif.mirror(source).image
    assert is_mirrored(result, source)
    with Image.open(io.BytesIO(source)) as before, Image.open(io.BytesIO(result or b"")) as after:
        for number in range(3):
            before.seek(number)
            after.seek(number)
            for picture in (before, after):
                picture.load()
            assert after.info["duration"] == before.info["duration"]
    twice = avif.mirror(result or b"").image
    assert [frame.tobytes() for frame in shown(twice)] == [frame.tobytes() for frame in shown(source)]


def test_metadata_is_kept() -> None:
    options = {"icc_profile": b"a profile" * 20, "xmp": b"<x:xmpmeta/>", "exif": b"MM\0*\0\0\0\x08\0\0\0\0\0\0"}
    source = saved(scene(), **options)
    with Image.open(io.BytesIO(source)) as before, Image.open(io.BytesIO(avif.mirror(source).image or b"")) as after:
        assert after.info["icc_profile"] == before.info["icc_profile"] == options["icc_profile"]
        assert after.info["xmp"] == before.info["xmp"] == options["xmp"]


def test_an_exif_orientation_is_only_informative(tmp_path: Path) -> None:
    (tmp_path / "turned.exif").write_bytes(TURNED_LEFT)
    source = avifenc(tmp_path, scene(), "--exif", str(tmp_path / "turned.exif"))
    result = avif.mirror(source).image
    assert TURNED_LEFT in source
    assert TURNED_LEFT in (result or b"")
    assert shown_by_libheif(tmp_path, result).tobytes() == ImageOps.mirror(shown_by_libheif(tmp_path, source)).tobytes()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_clean_aperture_stays(mode: str, tmp_path: Path) -> None:
    """With alpha it is one of the kinds that libavif does not decode, but others do."""
    source = avifenc(tmp_path, scene(mode=mode), "--clap", "48,1,32,1,0,1,0,1")
    result = avif.mirror(source).image
    before, after = shown_by_libheif(tmp_path, source), shown_by_libheif(tmp_path, result)
    assert before.size == after.size == (48, 32)
    assert after.tobytes() == ImageOps.mirror(before).tobytes()


def test_a_thumbnail_in_exif_is_dropped(tmp_path: Path) -> None:
    ifd0 = struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, 1, 0, 26)
    ifd1 = struct.pack(">HHHIIHHIII", 2, 0x0201, 4, 1, 56, 0x0202, 4, 1, 4, 0)
    (tmp_path / "thumbnail.exif").write_bytes(b"MM\0*\0\0\0\x08" + ifd0 + ifd1 + b"JPEG")
    source = avifenc(tmp_path, scene(), "--exif", str(tmp_path / "thumbnail.exif"))
    result = avif.mirror(source).image or b""
    assert ifd0 in source
    assert ifd0[:-4] + bytes(4) + ifd1 + b"JPEG" in result


def small() -> bytes:
    return saved(Image.radial_gradient("L").resize((8, 8)), quality=30)


def test_a_file_cut_short_anywhere_is_refused() -> None:
    source = small()
    for at in range(12, len(source)):
        with pytest.raises(ImageError):
            avif.mirror(source[:at])
    assert is_mirrored(avif.mirror(source + b"stray").image, source)


def test_damage_is_an_image_or_our_own_error() -> None:
    source = small()
    ends = 0
    for at in range(12, source.index(b"mdat")):
        for value in (0, 1, 0x7F, 0xFF):
            damaged = source[:at] + bytes([value]) + source[at + 1 :]
            try:
                ends += bool(avif.mirror(damaged).image)
            except ImageError:
                ends += 1
    assert ends == 4 * (source.index(b"mdat") - 12)


@pytest.mark.parametrize("kind", [b"mini", b"moof"])
def test_boxes_that_are_not_processed_are_named(kind: bytes) -> None:
    with pytest.raises(ImageError, match="reduced header, or in fragments"):
        avif.mirror(small() + struct.pack(">I4s", 8, kind))


def test_too_many_pixels_are_refused_by_the_header() -> None:
    source = small()
    at = source.index(b"ispe") + 8
    with pytest.raises(TooManyPixelsError):
        avif.mirror(source[:at] + struct.pack(">II", 20_000, 20_000) + source[at + 8 :])


def test_a_flood_of_boxes_is_refused() -> None:
    with pytest.raises(ImageError, match="more than 10,000 boxes"):
        avif.mirror(small() + struct.pack(">I4s", 8, b"free") * 10_001)


def test_a_clock_of_no_ticks_is_refused() -> None:
    source = bytearray(saved(scene(), save_all=True, append_images=[scene().rotate(9)], duration=50))
    at = source.index(b"mdhd") + 4
    width = 8 if source[at] else 4
    source[at + 4 + 2 * width : at + 8 + 2 * width] = bytes(4)
    with pytest.raises(ImageError):
        avif.mirror(bytes(source))


def test_the_exif_of_a_sequence_is_found_again() -> None:
    exif = b"MM\0*\0\0\0\x08\0\0\0\0\0\0"
    source = saved(scene(), save_all=True, append_images=[scene().rotate(9)], duration=50, exif=exif)
    result = avif.mirror(source).image
    assert is_mirrored(result, source)
    assert exif in (result or b"")


def test_a_base_offset_moves_where_the_offset_is_0() -> None:
    data, box = bytes(200), isobmff.Box(b"ipco", 20, 28, 40)
    edits = isobmff.Edits()
    edits.replace(data, box, bytes(11))  # 9 bytes shorter
    isobmff.shift_extents(edits, [isobmff.Extent(1, 0, 100, 0, 10, (60, 4), (66, 4))])
    assert edits.apply(data)[51:55] == struct.pack(">I", 91)
    assert edits.apply(data)[57:61] == bytes(4)


def of_alpha(data: bytes) -> bytes:
    """The associations of the second item in an `ipma` box of 16-bit ids and 8-bit indices."""
    at = data.index(b"ipma") + 12
    at += 3 + data[at + 2]
    return data[at : at + 3 + data[at + 2]]


def test_alpha_that_says_nothing_beside_a_clean_aperture_is_left_alone(tmp_path: Path) -> None:
    """This encoder gives the aperture to the picture alone; viewers refuse an alpha plane that is turned only."""
    source = avifenc(tmp_path, scene(mode="RGBA"), "--clap", "48,1,32,1,0,1,0,1")
    plain = avifenc(tmp_path, scene(mode="RGBA"))
    assert of_alpha(avif.mirror(source).image or b"") == of_alpha(source)
    assert of_alpha(avif.mirror(plain).image or b"") != of_alpha(plain)
