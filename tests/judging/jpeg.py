"""How a mirrored JPEG is judged: its quantised coefficients by Debian's jpegtran, what was encoded again by PSNR.

A file may hold several pictures: those of a multi-picture index (CIPA DC-007), and those that simply follow, as gain
maps do (https://developer.android.com/media/platform/hdr-image-format). Each is judged like the first one.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image

from judging import Findings, orientation, psnr, run

__all__ = ["judge"]

LOW_DB, WRONG_DB = 40.0, 20.0
"""Under the first, a second loss is told with the quality that explains it; under the second it is another picture."""

SIZE_SHARE = 0.1
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_MARKER = re.compile(rb"\xff[^\0\xd0-\xd7\xff]")
_STANDARD_SUM = 3689  # of the luminance table of ITU-T T.81, annex K.1


@dataclass
class Picture:
    """One JPEG in a file: where it lies, and what its headers say."""

    start: int
    end: int = 0
    frame: int = 0  # the kind of SOF marker
    width: int = 0
    height: int = 0
    components: list[tuple[int, int, int, int]] = field(default_factory=list)  # id, across, down, table
    tables: dict[int, bytes] = field(default_factory=dict)
    exif: bytes | None = None
    xmp: bytes = b""
    index: int | None = None  # where the TIFF header of its multi-picture index stands

    def is_aligned(self, upright: bool) -> bool:
        factors = [part[1 if upright else 2] for part in self.components]
        edge = self.width if upright else self.height
        return edge % (8 * (max(factors) if len(factors) > 1 else 1)) == 0

    def quantisers(self) -> list[bytes | None]:
        return [self.tables.get(part[3]) for part in self.components]

    def quality(self) -> int:
        """Of the Independent JPEG Group's scale, by the sum of the first table."""
        share = 100 * sum(self.quantisers()[0] or b"\1") / _STANDARD_SUM
        return round((200 - share) / 2 if share <= 100 else 5000 / share)


def judge(source: bytes, result: bytes, notes: Mapping[str, str], findings: Findings) -> None:
    """Every picture of the file, then what leads from one to the next."""
    before, after = pictures(source), pictures(result)
    dropped = notes.get("mirror-dropped")
    if dropped:
        before = before[: len(after)]
    if len(before) != len(after):
        findings.defect(f"{len(before)} pictures became {len(after)}")
    ways = (
        notes.get("mirror-pictures", "").split(", ") if "mirror-pictures" in notes else [notes["mirror"]] * len(before)
    )
    first = orientation(before[0].exif)
    for number, (old, new) in enumerate(zip(before, after, strict=False), 1):
        upright = (orientation(old.exif) or first or 1) < 5
        picture = _Pair(source[old.start : old.end], result[new.start : new.end], old, new, upright, f"#{number}: ")
        lossless = ways[number - 1 : number] == ["lossless"]
        if old.is_aligned(upright) and not lossless:
            findings.defect(f"#{number}: aligned, but not lossless")
        if old.is_aligned(upright) or lossless:
            _judge_coefficients(picture, findings)
        else:
            _judge_again_encoded(picture, findings)
    if ways[0] != notes["mirror"]:
        findings.defect("the notes contradict each other")
    if not dropped:
        _judge_index(source, result, before, after, findings)
        _judge_container(source, result, before, after, findings)
        # Zeros before it may be more or fewer: so it can stay in its place, to which some metadata points.
        if source[before[-1].end :].lstrip(b"\0") != result[after[-1].end :].lstrip(b"\0"):
            findings.defect("what follows the last picture is not the source's")


@dataclass
class _Pair:
    source: bytes
    result: bytes
    old: Picture
    new: Picture
    upright: bool
    label: str

    def decoded(self) -> tuple[Image.Image, Image.Image] | None:
        """The source as it should be, and the result; None if Pillow cannot decode the source."""
        try:
            before = Image.open(io.BytesIO(self.source), formats=["JPEG", "MPO"])
            before.load()
        except Exception:  # noqa: BLE001 - it cannot judge what it cannot read
            return None
        after = Image.open(io.BytesIO(self.result), formats=["JPEG", "MPO"])
        flip = Image.Transpose.FLIP_LEFT_RIGHT if self.upright else Image.Transpose.FLIP_TOP_BOTTOM
        return before.transpose(flip), after.convert(before.mode)


def _judge_coefficients(pair: _Pair, findings: Findings) -> None:
    flip = ("-perfect", "-flip", "horizontal" if pair.upright else "vertical")
    same = ("jpegtran", "-copy", "none", "-optimize")
    failed, expected = run(*same, *flip, data=pair.source)
    if failed == 1:
        _judge_exact_pixels(pair, findings)
        return
    findings.judges.append("jpegtran")
    if failed:
        findings.remark("jpegtran warns of the source")
    failed, found = run(*same, data=pair.result)
    if failed:
        findings.remark("jpegtran warns of the result") if failed == 2 else findings.defect("jpegtran: not readable")
    if found != expected:
        shown = pair.decoded()
        same_size = shown is not None and shown[0].size == shown[1].size
        number = f"{psnr(*shown):.1f} dB" if shown and same_size else "?"
        findings.defect(f"{pair.label}coefficients differ from jpegtran's ({number})")


def _judge_exact_pixels(pair: _Pair, findings: Findings) -> None:
    """Of what jpegtran cannot read, or what was mirrored losslessly though the edge is not aligned."""
    shown = pair.decoded()
    if shown is None:
        return
    findings.judges.append("Pillow")
    if shown[0].size != shown[1].size or (number := psnr(*shown)) < 50:
        findings.defect(f"{pair.label}called lossless, but is shown differently ({number:.1f} dB)")


def _judge_again_encoded(pair: _Pair, findings: Findings) -> None:
    old, new, label = pair.old, pair.new, pair.label
    if (shown := pair.decoded()) is not None:
        findings.judges.append("Pillow")
        if shown[0].size != shown[1].size:
            findings.defect(f"{label}{shown[0].size} became {shown[1].size}")
        elif (number := psnr(*shown)) < WRONG_DB:
            findings.defect(f"{label}shows another picture ({number:.1f} dB)")
        elif number < LOW_DB:
            findings.remark("low", f"{label}{number:.1f} dB, quality {old.quality()}, {old.width} x {old.height}")
    if old.quantisers() != new.quantisers():
        findings.defect(f"{label}quantisation tables differ")
    if [part[1:3] for part in old.components] != [part[1:3] for part in new.components]:
        findings.defect(f"{label}sampling differs: {old.components} became {new.components}")
    if max(old.frame, 0xC1) != max(new.frame, 0xC1):  # baseline and extended sequential differ in their tables only
        findings.defect(f"{label}kind of scan: SOF{old.frame - 0xC0} became SOF{new.frame - 0xC0}")
    share = len(pair.result) / len(pair.source)
    if abs(share - 1) > SIZE_SHARE and abs(len(pair.result) - len(pair.source)) > 2000:
        findings.remark("size", f"{label}{len(pair.source):,} became {len(pair.result):,} bytes ({share:.0%})")


def pictures(data: bytes) -> list[Picture]:
    """Those that an index names and those that follow each other, in the file's order."""
    found = {0: _picture(data, 0)}
    index = found[0].index
    if index is not None:
        for offset, _ in _entries(data, index):
            if offset and data[index + offset : index + offset + 2] == b"\xff\xd8":
                found[index + offset] = _picture(data, index + offset)
    for start in _container(data, found[0]):
        if data[start : start + 3] == b"\xff\xd8\xff" and start not in found:
            found[start] = _picture(data, start)
    start = _next(data, max(picture.end for picture in found.values()))
    while data[start : start + 3] == b"\xff\xd8\xff":
        found[start] = _picture(data, start)
        start = _next(data, found[start].end)
    return [found[start] for start in sorted(found)]


def _next(data: bytes, end: int) -> int:
    """Behind the zeros with which cameras fill up."""
    while data[end : end + 1] == b"\0":
        end += 1
    return end


def _picture(data: bytes, start: int) -> Picture:
    picture, position = Picture(start, len(data)), start + 2
    while (match := _MARKER.search(data, position)) is not None:
        marker, position = match.group()[1], match.end()
        if marker == 0xD9:
            picture.end = position
            break
        if marker in (0x01, 0xD8):
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        _read_segment(picture, marker, data[position + 2 : position + length], position + 2)
        position += length
    return picture


def _read_segment(picture: Picture, marker: int, body: bytes, at: int) -> None:
    if marker == 0xDB:
        while body:
            length = 129 if body[0] >> 4 else 65
            picture.tables[body[0] & 15], body = body[1:length], body[length:]
    elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 6 and not picture.frame:
        picture.frame = marker
        picture.height, picture.width = struct.unpack_from(">HH", body, 1)
        for number, factors, table in struct.iter_unpack("BBB", body[6 : 6 + 3 * body[5]]):
            picture.components.append((number, factors >> 4, factors & 15, table))
    elif marker == 0xE1 and body.startswith(b"Exif\0\0") and picture.exif is None:
        picture.exif = body
    elif marker == 0xE1 and body.startswith(_XMP) and not picture.xmp:
        picture.xmp = body[len(_XMP) :]
    elif marker == 0xE2 and body.startswith(b"MPF\0") and picture.index is None:
        picture.index = at + 4


def _entries(data: bytes, index: int) -> list[tuple[int, int]]:
    """Of a multi-picture index: each picture's offset from the index, and its size."""
    order = "<" if data[index : index + 2] == b"II" else ">"
    try:
        (at,) = struct.unpack_from(f"{order}I", data, index + 4)
        (count,) = struct.unpack_from(f"{order}H", data, index + at)
        for number in range(count):
            tag, _, length, value = struct.unpack_from(f"{order}HHII", data, index + at + 2 + 12 * number)
            if tag == 0xB002:
                raw = data[index + value : index + value + min(length, 16_000)]
                return [(offset, size) for _, size, offset, _ in struct.iter_unpack(f"{order}IIII", raw)]
    except struct.error:
        pass
    return []


def _judge_index(source: bytes, result: bytes, before: list[Picture], after: list[Picture], findings: Findings) -> None:
    """Whatever the source's index says truly of a picture, the result's must say truly of the mirrored one."""
    old, new = before[0].index, after[0].index
    if old is None or new is None:
        if old != new:
            findings.defect("the multi-picture index is gone or new")
        return
    entries, others = _entries(source, old), _entries(result, new)
    if len(entries) != len(others):
        findings.defect(f"the multi-picture index has {len(others)} entries instead of {len(entries)}")
        return
    for number, ((offset, size), (to, length)) in enumerate(zip(entries, others, strict=True), 1):
        start, end = (old + offset, new + to) if offset else (0, 0)
        places = next((at for at, picture in enumerate(before) if picture.start == start), None)
        if places is None or places >= len(after):
            continue
        findings.remark("index entry checked")
        if after[places].start != end:
            findings.defect(f"the multi-picture index leads to {end}, but picture {number} is at {after[places].start}")
        actual, growth = after[places].end - end, after[places].end - end - (before[places].end - start)
        if length not in (actual, size + growth):  # right, or wrong by as much as the source's
            findings.defect(f"the multi-picture index gives picture {number} {length} bytes: wrong")


def _items(xmp: bytes) -> list[int]:
    """The lengths (with padding) of the items that follow the first one, by a GContainer directory."""
    lengths = []
    for item in re.findall(rb"<(?:Container|GContainer):Item\b[^>]*>", xmp):
        found = re.search(rb'Length="(\d+)"', item)
        padding = re.search(rb'Padding="(\d+)"', item)
        lengths.append((int(found[1]) if found else 0) + (int(padding[1]) if padding else 0))
    return lengths[1:]


def _container(data: bytes, first: Picture) -> list[int]:
    """Where the items begin: they fill the file's end."""
    lengths = _items(first.xmp)
    return [start for at in range(len(lengths)) if (start := len(data) - sum(lengths[at:])) > 0 and lengths[at]]


def _judge_container(
    source: bytes, result: bytes, before: list[Picture], after: list[Picture], findings: Findings
) -> None:
    def kinds(data: bytes, first: Picture) -> list[str]:
        heads = [data[start : start + 8] for start in _container(data, first)]
        return ["JPEG" if head[:2] == b"\xff\xd8" else "MP4" if head[4:] == b"ftyp" else "?" for head in heads]

    old, new = kinds(source, before[0]), kinds(result, after[0])
    if old and "?" not in old:
        findings.remark("container checked")
        if old != new:
            findings.defect(f"the container's lengths lead to {new} instead of {old}")
