"""TIFFs made byte by byte or by libtiff, and read again by these functions alone: what the tests compare with."""

from __future__ import annotations

import functools
import itertools
import random
import struct
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from conftest import needed
from PIL import Image

TEST_IMAGE = Path(__file__).parents[2] / "test_image.jpg"

TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 12: 8, 13: 4, 16: 8}
CODES = {1: "B", 3: "H", 4: "I", 7: "B", 13: "I", 16: "Q"}
PLACES = {273, 279, 324, 325}
Tags = dict[int, tuple[int, bytes]]  # type, packed values


@dataclass
class Page:
    """A directory to be written: its pieces as stored, and its tags; `tiles` if they are."""

    pieces: list[bytes]
    tags: dict[int, tuple[int, list[int]]]
    tiles: bool = False
    private: dict[int, bytes] = field(default_factory=dict)


def written(pages: list[Page], order: str = "<", *, big: bool = False, short: bool = False) -> bytes:
    """Directories first, then values, then pieces; numbers of places are of 16 bits if `short`."""
    code, width, size = ("Q", 8, 20) if big else ("I", 4, 12)
    magic = b"II" if order == "<" else b"MM"
    head = magic + (struct.pack(order + "HHH", 43, 8, 0) if big else struct.pack(order + "H", 42))
    start = len(head) + width
    out = bytearray(head + struct.pack(order + code, start))
    for number, page in enumerate(pages):
        names = (324, 325) if page.tiles else (273, 279)
        kind = 3 if short else 4
        entries: Tags = {tag: (t, struct.pack(f"{order}{len(v)}{CODES[t]}", *v)) for tag, (t, v) in page.tags.items()}
        entries |= {tag: (7, data) for tag, data in page.private.items()}
        lengths = list(map(len, page.pieces))
        blank = bytes(TYPE_BYTES[kind] * len(lengths))
        entries |= {names[0]: (kind, blank), names[1]: (kind, blank)}
        values_at = start + (8 if big else 2) + size * len(entries) + width
        data_at = values_at + sum(len(data) + len(data) % 2 for _, data in entries.values() if len(data) > width)
        offsets = list(itertools.accumulate(lengths[:-1], initial=data_at))
        for tag, numbers in zip(names, (offsets, lengths), strict=True):
            entries[tag] = (kind, struct.pack(f"{order}{len(numbers)}{CODES[kind]}", *numbers))
        directory, values = b"", b""
        for tag, (t, data) in sorted(entries.items()):
            count = struct.pack(order + "HH" + code, tag, t, len(data) // TYPE_BYTES[t])
            if len(data) > width:
                directory += count + struct.pack(order + code, values_at + len(values))
                values += data + bytes(len(data) % 2)
            else:
                directory += count + data.ljust(width, b"\0")
        pixels = b"".join(page.pieces)
        following = data_at + len(pixels) + len(pixels) % 2
        out += struct.pack(order + ("Q" if big else "H"), len(entries)) + directory
        out += struct.pack(order + code, following if number + 1 < len(pages) else 0) + values + pixels
        out += bytes(len(pixels) % 2 if number + 1 < len(pages) else 0)
        start = following
    return bytes(out)


def page_of(pieces: list[bytes], size: tuple[int, int], bits: tuple[int, ...] = (8,), **names: int) -> Page:
    known = {"compression": 259, "photometric": 262, "orientation": 274, "planar": 284, "rows": 278}
    known |= {"predictor": 317, "fill_order": 266}
    photometric = 2 if len(bits) >= 3 else 1
    tags = {256: (4, [size[0]]), 257: (4, [size[1]]), 258: (3, list(bits)), 259: (3, [1]), 262: (3, [photometric])}
    tags |= {277: (3, [len(bits)])}
    return Page(pieces, tags | {known[name]: (3, [value]) for name, value in names.items()})


def directories(data: bytes) -> list[tuple[Tags, list[bytes], str]]:
    """The tags of each chained directory and of its sub-directories, its pieces, and the byte order."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    code, width, size = ("Q", 8, 20) if big else ("I", 4, 12)
    waiting = [struct.unpack_from(order + code, data, width)[0]]
    found = []
    while waiting:
        at = waiting.pop(0)
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
        at += 8 if big else 2
        tags: Tags = {}
        for place in range(at, at + size * count, size):
            tag, kind, amount = struct.unpack_from(order + "HH" + code, data, place)
            length = amount * TYPE_BYTES.get(kind, 1)
            value_at = place + size - width
            if length > width:
                (value_at,) = struct.unpack_from(order + code, data, value_at)
            assert value_at + length <= len(data)
            tags[tag] = kind, data[value_at : value_at + length]
        (following,) = struct.unpack_from(order + code, data, at + size * count)
        waiting += [following] if following else []
        waiting += numbers(tags, 330, order)
        starts = numbers(tags, 324, order) or numbers(tags, 273, order)
        lengths = numbers(tags, 325, order) or numbers(tags, 279, order)
        pieces = [data[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        assert list(map(len, pieces)) == lengths
        found.append((tags, pieces, order))
    return found


def numbers(tags: Tags, tag: int, order: str) -> list[int]:
    if tag not in tags:
        return []
    kind, data = tags[tag]
    return list(struct.unpack(f"{order}{len(data) // TYPE_BYTES[kind]}{CODES[kind]}", data))


def stable(data: bytes) -> list[Tags]:
    """Every tag but those that say where the pixels are."""
    found = [{tag: value for tag, value in tags.items() if tag not in PLACES} for tags, _, _ in directories(data)]
    return [{tag: value for tag, value in tags.items() if tag != 330} for tags in found]


def grid(rows: bytes, width: int, bits: int) -> list[list[str]]:
    """Packed rows as the digits of each pixel."""
    size = (width * bits + 7) // 8
    digits = [f"{int.from_bytes(rows[at : at + size], 'big'):0{8 * size}b}" for at in range(0, len(rows), size)]
    return [[row[at : at + bits] for at in range(0, width * bits, bits)] for row in digits]


def packed(pixels: list[list[str]]) -> bytes:
    rows = ["".join(row) for row in pixels]
    rows = [row + "0" * (-len(row) % 8) for row in rows]
    return b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)


def flipped(rows: bytes, width: int, bits: int, orientation: int = 1) -> bytes:
    pixels = grid(rows, width, bits)
    return packed(pixels[::-1] if orientation >= 5 else [row[::-1] for row in pixels])


def noise(width: int, height: int, bits: int, seed: int = 0) -> bytes:
    dice = random.Random(seed)
    return packed([[f"{dice.getrandbits(bits):0{bits}b}" for _ in range(width)] for _ in range(height)])


def strips(rows: bytes, row_bytes: int, rows_per_strip: int) -> list[bytes]:
    step = row_bytes * rows_per_strip
    return [rows[at : at + step] for at in range(0, len(rows), step)]


def tiles(rows: bytes, width: int, bits: int, tile: tuple[int, int]) -> list[bytes]:
    """Padded with zeros."""
    pixels = grid(rows, width, bits)
    across, down = -(-width // tile[0]) * tile[0], -(-len(pixels) // tile[1]) * tile[1]
    pixels = [row + ["0" * bits] * (across - width) for row in pixels]
    pixels += [["0" * bits] * across] * (down - len(pixels))
    return [
        packed([row[x : x + tile[0]] for row in pixels[y : y + tile[1]]])
        for y in range(0, down, tile[1])
        for x in range(0, across, tile[0])
    ]


def scene(size: tuple[int, int] = (96, 64), mode: str = "RGB") -> Image.Image:
    with Image.open(TEST_IMAGE) as image:
        return image.resize(size).convert(mode)


def tiffcp(data: bytes, *options: str) -> bytes:
    """The same pictures as libtiff writes them with those options."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source.tif"), Path(folder, "target.tif")
        source.write_bytes(data)
        subprocess.run([needed("tiffcp", "libtiff-tools"), *options, source, target], check=True, capture_output=True)
        return target.read_bytes()


BASES = {
    "bw": ((75, 50), (1,)),
    "grey": ((75, 50), (8,)),
    "rgb": ((75, 50), (8, 8, 8)),
    "rgba": ((75, 50), (8, 8, 8, 8)),
    "grey16": ((75, 50), (16,)),
    "rgb16": ((75, 50), (16, 16, 16)),
    "rgb32": ((21, 50), (32, 32, 32)),
    "grey64": ((21, 50), (64,)),
    "planes16": ((75, 50), (16, 16, 16)),
}


@functools.cache
def base(name: str, *, is_float: bool = False, orientation: int = 1) -> bytes:
    """A picture without compression: half a smooth one and half noise."""
    size, bits = BASES[name]
    depth = sum(bits)
    rows = noise(size[0], size[1], depth)
    if name == "bw":
        rows = scene(size, "1").tobytes()
    elif bits[0] == 8:
        smooth = scene(size, {1: "L", 3: "RGB", 4: "RGBA"}[len(bits)]).tobytes()
        rows = smooth[: len(smooth) // 2] + rows[len(smooth) // 2 :]
    page = page_of([rows], size, bits, rows=size[1], orientation=orientation)
    if name == "planes16":
        page = page_of(strips(rows, 2 * size[0], size[1]), size, bits, rows=size[1], orientation=orientation, planar=2)
    if is_float:
        page.tags[339] = (3, [3] * len(bits))
    return written([page])
