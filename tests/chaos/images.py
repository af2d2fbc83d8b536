"""Real images, each one distinct: a few pictures in several forms, and in each copy a comment that names its request.

A mirror keeps comments, so what comes back tells whose it is. The first result of each form is judged by `judge.py`,
which was written apart from the mirror; all others must then be the same but for their comment.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from conftest import TEST_IMAGE
from judge import judge
from PIL import Image, ImageOps

TAG_BYTES = len("safelight-chaos 00000000.00 good")
PNG_HEADER = 8 + 25  # the signature and IHDR


class Form(NamedTuple):
    """A picture without a comment, and where one is put into it."""

    name: str
    data: bytes

    def tagged(self, tag: bytes) -> bytes:
        """A copy with a comment."""
        if self.data.startswith(b"\xff\xd8"):
            return self.data[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(tag)) + tag + self.data[2:]
        chunk = b"tEXt" + b"Comment\0" + tag
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return self.data[:PNG_HEADER] + chunk + self.data[PNG_HEADER:]


def tag(number: int, attempt: int, asked: str) -> bytes:
    """What names one post of one image, and what `ledger` does with it (four letters)."""
    return f"safelight-chaos {number:08d}.{attempt:02d} {asked}".encode()


def forms() -> list[Form]:
    """JPEGs that are mirrored losslessly, one that is not, grey and progressive ones, and PNGs; 3 to 82 KB."""
    picture = Image.open(TEST_IMAGE)
    made = [Form("the test image", TEST_IMAGE.read_bytes())]

    def add(name: str, image: Image.Image, kind: str, **options: object) -> None:
        out = io.BytesIO()
        image.save(out, kind, **options)
        made.append(Form(name, out.getvalue()))

    add("small", picture.resize((320, 208)), "JPEG", quality=88)
    add("upside down", ImageOps.flip(picture).resize((640, 432)), "JPEG", quality=80)
    add("progressive", picture.resize((512, 336)), "JPEG", quality=85, progressive=True)
    add("grey", picture.convert("L").resize((496, 320)), "JPEG", quality=85)
    add("unaligned", picture.resize((413, 277)), "JPEG", quality=90)
    add("png", picture.resize((160, 108)), "PNG")
    add("png with alpha", ImageOps.invert(picture).resize((128, 86)).convert("RGBA"), "PNG")
    return made


class Judge:
    """What is wrong with a result; empty when nothing is."""

    def __init__(self) -> None:
        self._right: dict[str, bytes] = {}  # form -> its mirror, without its comment

    def __call__(self, form: Form, mark: bytes, result: bytes, notes: dict[str, str]) -> str:
        """`mark` is the tag that was posted; `notes` are the mirror's, as the answer's headers had them."""
        if result.count(mark) != 1:
            return "the mirror of another image"
        plain = _without(result, mark)
        if form.name not in self._right:
            findings = judge(form.tagged(mark), result, notes)
            if findings.defects:
                return f"not the mirror: {findings.defects}"
            self._right[form.name] = plain
        return "" if plain == self._right[form.name] else "not the mirror that it was before"


def _without(image: bytes, mark: bytes) -> bytes:
    """An image with its comment blanked; a PNG's checksum of it as well."""
    at = image.index(mark)
    end = at + len(mark)
    return (
        image[:at] + bytes(len(mark)) + (image[end:] if image.startswith(b"\xff\xd8") else bytes(4) + image[end + 4 :])
    )


def read(path: Path) -> bytes | None:
    """A saved image; None if it is not there."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
