"""How the other formats are judged: what each decoder shows of the result is what it shows of the source, mirrored.

For most formats two decoders are asked, of which at least one is not the one that the operation uses. A decoder that
cannot read the source says nothing; one that can must read the result too.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from judging import Findings, Pixels, orientation, psnr, run

__all__ = ["judge"]

LOSSY_DB, POOR_DB = 35.0, 28.0
"""Of pictures that were decoded and encoded again with a loss: under the first is told, under the second is wrong."""

TRANSFORMED_DB = 45.0
"""Of JPEG coefficients inside a TIFF: a decoder's rounding between samples of colour is not symmetrical."""


@dataclass
class Shown:
    """What a decoder makes of a file; `upright` says of each frame whether left and right are those on display."""

    frames: list[Pixels]
    upright: list[bool]
    facts: list[object]


def judge(source: bytes, result: bytes, notes: Mapping[str, str], findings: Findings) -> None:
    least = _least(source, findings.format, notes["mirror"] == "lossless")
    for name, decoder in _DECODERS[findings.format]:
        before = _read(decoder, source)
        if before is None:
            continue
        findings.judges.append(name)
        try:
            after = decoder(result)
        except Exception as error:  # noqa: BLE001 - whatever it is, the result cannot be read
            findings.defect(f"{name} cannot read the result: {type(error).__name__}: {error}")
            continue
        _compare(name, before, after, least, findings)
    if findings.format == "PNG" and run("pngcheck", "-q", data=source)[0] == 0:
        findings.judges.append("pngcheck")
        code, said = run("pngcheck", "-q", data=result)
        if code:
            findings.defect(f"pngcheck: {said.decode(errors='replace').strip()}")


def _read(decoder: Callable[[bytes], Shown], source: bytes) -> Shown | None:
    try:
        return decoder(source)
    except Exception:  # noqa: BLE001 - whatever it is, the decoder cannot judge
        return None


def _least(source: bytes, name: str, lossless: bool) -> float:
    if not lossless:
        return LOSSY_DB
    return TRANSFORMED_DB if name == "TIFF" and b"Compression Scheme: JPEG" in _tiffinfo(source) else math.inf


def _compare(decoder: str, before: Shown, after: Shown, least: float, findings: Findings) -> None:
    if len(before.frames) != len(after.frames):
        findings.defect(f"{decoder}: {len(before.frames)} frames became {len(after.frames)}")
        return
    if before.facts != after.facts:
        findings.defect(f"{decoder}: {_differences(before.facts, after.facts)}")
    for number, (old, new, upright) in enumerate(zip(before.frames, after.frames, before.upright, strict=True), 1):
        expected = old.mirrored(upright)
        if expected == new:
            continue
        if expected[:3] != new[:3]:
            findings.defect(f"{decoder}: frame {number} has {new[:3]} instead of {expected[:3]}")
        elif (found := _similarity(expected, new)) >= least:
            continue
        elif least == LOSSY_DB and found >= POOR_DB:
            findings.remark("low", f"{decoder}: frame {number}, {found:.1f} dB")
        else:
            findings.defect(f"{decoder}: frame {number} differs ({found:.1f} dB)")
        return  # one frame is enough to look at


def _differences(old: list[object], new: list[object]) -> str:
    pairs = [(one, other) for one, other in itertools.zip_longest(old, new) if one != other]
    return f"{pairs[0][0]} became {pairs[0][1]}"


def _similarity(one: Pixels, other: Pixels) -> float:
    """Colours weighed by their opacity; samples of other sizes than a byte count byte by byte."""
    if one.step == 4:
        size = (one.width, one.height)
        return psnr(*(Image.frombytes("RGBA", size, each.data).convert("RGBa") for each in (one, other)))
    size = (one.width * one.step, one.height)
    return psnr(*(Image.frombytes("L", size, each.data) for each in (one, other)))


def _by_pillow(name: str) -> Callable[[bytes], Shown]:
    """Frame by frame as composed; a TIFF and an AVIF are turned by Pillow, the others lie as they are stored."""

    def decoder(data: bytes) -> Shown:
        shown = Shown([], [], [])
        with Image.open(io.BytesIO(data), formats=[name]) as picture:
            turned = orientation(picture.info.get("exif")) or 1
            upright = name in ("TIFF", "AVIF") or turned < 5
            shown.facts.append(("loop", picture.info.get("loop"), picture.info.get("background")))
            for number in range(getattr(picture, "n_frames", 1)):
                picture.seek(number)
                if name == "TIFF" and _is_misread(picture):
                    raise ValueError("not read rightly by Pillow")
                picture.load()
                frame = picture.convert("RGBA") if name in ("GIF", "PNG") and picture.mode != "I;16" else picture
                if name == "AVIF":
                    frame = _turned(frame, turned)
                elif name == "GIF" and shown.frames:  # a frame that leaves the screen enlarges it for Pillow alone
                    frame = frame.crop((0, 0, shown.frames[0].width, shown.frames[0].height))
                shown.frames.append(Pixels.of(frame))
                shown.upright.append(upright)
                known = {key: picture.info.get(key) for key in ("dpi", "transparency")}
                if getattr(picture, "is_animated", False):  # of a still picture, such numbers are ignored everywhere
                    known |= {key: picture.info.get(key) for key in ("duration", "timestamp", "disposal", "blend")}
                    known["disposal method"] = getattr(picture, "disposal_method", None)
                shown.facts.append((number, known))
        return shown

    return decoder


def _is_misread(picture: Image.Image) -> bool:
    """Planes of 16 bits, of which Pillow takes the half, and orientations of a type that only libtiff goes by."""
    tags = getattr(picture, "tag_v2", {})
    planes = tags.get(284, 1) == 2 and any(bits != 8 for bits in tags.get(258, (1,)))
    return planes or not isinstance(tags.get(274, 1), int)


def _turned(picture: Image.Image, turned: int) -> Image.Image:
    """As displayed."""
    ways = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270"}
    ways |= {7: "TRANSVERSE", 8: "ROTATE_90"}
    return picture.transpose(Image.Transpose[ways[turned]]) if turned > 1 else picture


def _by_pipe(*command: str) -> Callable[[bytes], Shown]:
    """A program that writes PAM, PPM, PGM or PBM, one picture or several, to its standard output."""

    def decoder(data: bytes) -> Shown:
        code, out = run(*command, data=data)
        if code or not out:
            raise ValueError(f"exit code {code}")
        frames = _anymaps(out)
        return Shown(frames, [_upright(data)] * len(frames), [])

    return decoder


def _upright(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return (orientation(picture.info.get("exif")) or 1) < 5
    except Exception:  # noqa: BLE001 - more damaged than Pillow takes, and none such has an orientation
        return True


def _anymaps(data: bytes) -> list[Pixels]:
    frames = []
    while data:
        if data.startswith(b"P7"):
            head, _, data = data.partition(b"ENDHDR\n")
            values = dict(line.split(b" ", 1) for line in head.splitlines()[1:] if b" " in line)
            width, height = int(values[b"WIDTH"]), int(values[b"HEIGHT"])
            step, most = int(values[b"DEPTH"]), int(values[b"MAXVAL"])
        else:
            found = re.match(
                rb"P([456])\s+(?:#.*\n)*(\d+)\s+(\d+)\s" + (b"" if data[1:2] == b"4" else rb"(\d+)\s"), data
            )
            if found is None:
                raise ValueError("not a picture")
            width, height, data = int(found[2]), int(found[3]), data[found.end() :]
            step, most = (3 if found[1] == b"6" else 1), int(found[4]) if found[1] != b"4" else 0
        if not most:
            length = (width + 7) // 8 * height
            frames.append(Pixels.of(Image.frombytes("1", (width, height), data[:length])))
        else:
            sample = 2 if most > 255 else 1
            length = width * height * step * sample
            picture = Pixels(width, height, step * sample, data[:length])
            frames.append(_coloured(picture, sample) if step == 2 else picture)
        if len(data) < length:
            raise ValueError("cut short")
        data = data[length:]
    return frames


def _coloured(grey: Pixels, sample: int) -> Pixels:
    """Grey and alpha as colours and alpha: of a palette, pngtopam writes the one or the other."""
    step = 4 * sample
    out = bytearray(2 * len(grey.data))
    for channel in range(4):
        for at in range(sample):
            out[channel * sample + at :: step] = grey.data[(channel // 3) * sample + at :: grey.step]
    return grey._replace(step=step, data=bytes(out))


def _tiffinfo(data: bytes) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        return run("tiffinfo", file.name)[1]


def _by_tiffcp(data: bytes) -> Shown:
    """Each page's samples as stored, whatever their depth: written again without compression, in one strip."""
    with tempfile.TemporaryDirectory() as folder:
        source, plain = Path(folder, "source.tiff"), Path(folder, "plain.tiff")
        source.write_bytes(data)
        options = ("-c", "none", "-s", "-r", "1000000", "-f", "msb2lsb", "-L", "-m", "0", str(source), str(plain))
        code, _ = run("tiffcp", "-p", "contig", *options)
        if code:  # which it cannot do of planes that are not of 8 bits
            code, _ = run("tiffcp", *options)
        if code:
            raise ValueError(f"exit code {code}")
        raw = plain.read_bytes()
    shown = Shown([], [], [])
    (at,) = struct.unpack_from("<I", raw, 4)
    while at:
        (count,) = struct.unpack_from("<H", raw, at)
        tags = {}
        for tag, kind, length, value in struct.iter_unpack("<HHI4s", raw[at + 2 : at + 2 + 12 * count]):
            tags[tag] = _values(raw, kind, length, value)
        (at,) = struct.unpack_from("<I", raw, at + 2 + 12 * count)
        shown.frames.append(_page(raw, tags))
        shown.upright.append(tags.get(274, [1])[0] < 5)
        shown.facts.append({tag: tags.get(tag) for tag in (254, 258, 262, 266, 277, 282, 283, 296, 320, 338, 339)})
    return shown


def _values(raw: bytes, kind: int, length: int, value: bytes) -> list[int]:
    code, size = {3: ("H", 2), 4: ("I", 4), 5: ("Q", 8), 16: ("Q", 8)}.get(kind, ("B", 1))
    if length * size > 4:
        (start,) = struct.unpack("<I", value)
        value = raw[start : start + length * size]
    return list(struct.unpack_from(f"<{length}{code}", value)) if kind not in (2, 7) else list(value[:length])


def _page(raw: bytes, tags: dict[int, list[int]]) -> Pixels:
    width, height = tags[256][0], tags[257][0]
    depths, samples = tags.get(258, [1]), tags.get(277, [1])[0]
    if tags.get(284) == [2]:  # planes, one under the other
        depths, height, samples = depths[:1], height * samples, 1
    bits = sum(depths) if len(depths) == samples else depths[0] * samples
    data = b"".join(raw[at : at + size] for at, size in zip(tags[273], tags[279], strict=True))
    if bits % 8 == 0:
        return Pixels(width, height, bits // 8, data)
    rows = []  # one byte, or several, for each pixel
    step, length = (bits + 7) // 8, (width * bits + 7) // 8
    for start in range(0, length * height, length):
        digits = f"{int.from_bytes(data[start : start + length], 'big'):0{8 * length}b}"
        numbers = (int(digits[at : at + bits], 2) for at in range(0, width * bits, bits))
        rows.append(b"".join(number.to_bytes(step, "big") for number in numbers))
    return Pixels(width, height, step, b"".join(rows))


def _by_heif_convert(data: bytes) -> Shown:
    """As displayed: turned and mirrored by its container's properties."""
    with tempfile.TemporaryDirectory() as folder:
        source, plain = Path(folder, "source.avif"), Path(folder, "plain.png")
        source.write_bytes(data)
        code, _ = run("heif-convert", str(source), str(plain))
        if code or not plain.exists():
            raise ValueError(f"exit code {code}")
        frames = _anymaps(run("pngtopam", "-alphapam", data=plain.read_bytes())[1])
    return Shown(frames, [True] * len(frames), [])


_DECODERS: dict[str, list[tuple[str, Callable[[bytes], Shown]]]] = {
    "PNG": [("Pillow", _by_pillow("PNG")), ("pngtopam", _by_pipe("pngtopam", "-alphapam", "-quiet"))],
    "GIF": [("Pillow", _by_pillow("GIF")), ("giftopnm", _by_pipe("giftopnm", "-image=all", "-quiet"))],
    "WebP": [("Pillow", _by_pillow("WEBP")), ("dwebp", _by_pipe("dwebp", "-quiet", "-pam", "-o", "-", "--", "-"))],
    "BMP": [("Pillow", _by_pillow("BMP")), ("bmptopnm", _by_pipe("bmptopnm", "-quiet"))],
    "TIFF": [("Pillow", _by_pillow("TIFF")), ("tiffcp", _by_tiffcp)],
    "AVIF": [("Pillow", _by_pillow("AVIF")), ("heif-convert", _by_heif_convert)],
}
