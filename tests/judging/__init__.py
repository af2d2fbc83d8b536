"""What `judge.py` goes by: what was found in one file, and pictures as plain rows of bytes.

Nothing here imports the operation that is judged: what it must keep is read anew, by other programs where there are.
"""

from __future__ import annotations

import math
import subprocess
from dataclasses import dataclass, field
from typing import NamedTuple

from PIL import Image, ImageChops

__all__ = ["Findings", "Pixels", "orientation", "psnr", "run"]

SECONDS = 60


@dataclass
class Findings:
    """Of one file: what is wrong, what is worth counting (kind, details), and which decoders could judge it."""

    format: str
    defects: list[str] = field(default_factory=list)
    remarks: list[tuple[str, str]] = field(default_factory=list)
    judges: list[str] = field(default_factory=list)

    def defect(self, text: str) -> None:
        self.defects.append(text)

    def remark(self, kind: str, details: str = "") -> None:
        self.remarks.append((kind, details))


class Pixels(NamedTuple):
    """A picture: `step` bytes for each pixel, rows without padding."""

    width: int
    height: int
    step: int
    data: bytes

    @classmethod
    def of(cls, picture: Image.Image) -> Pixels:
        if picture.mode in ("1", "P", "PA"):
            picture = picture.convert("L" if picture.mode == "1" else "RGBA")
        data = picture.tobytes()
        return cls(*picture.size, len(data) // (picture.width * picture.height), data)

    def mirrored(self, upright: bool = True) -> Pixels:
        """Left and right exchanged, or top and bottom of a picture that lies on its side."""
        length = self.width * self.step
        if not upright:
            starts = range(len(self.data) - length, -1, -length)
            return self._replace(data=b"".join(self.data[at : at + length] for at in starts))
        out = bytearray(len(self.data))
        for start in range(0, len(self.data), length):
            row = self.data[start : start + length]
            for at in range(self.step):
                out[start + at : start + length : self.step] = row[at :: self.step][::-1]
        return self._replace(data=bytes(out))


def psnr(one: Image.Image, other: Image.Image) -> float:
    """In dB, over all bands; infinite if the two are equal."""
    histogram = ImageChops.difference(one, other).histogram()
    squares = sum(count * (value % 256) ** 2 for value, count in enumerate(histogram))
    return 10 * math.log10(255**2 * sum(histogram) / squares) if squares else math.inf


def orientation(exif: bytes | None) -> int | None:
    """1 to 8, or None if the metadata does not say."""
    read = Image.Exif()
    try:
        read.load(exif or b"")
        value = read.get(0x0112)
    except Exception:  # noqa: BLE001 - whatever Pillow makes of damaged metadata, it says nothing
        return None
    return value if isinstance(value, int) and 1 <= value <= 8 else None


def run(*command: str, data: bytes | None = None) -> tuple[int, bytes]:
    """A tool's exit code and what it wrote to its standard output."""
    done = subprocess.run(command, input=data, capture_output=True, timeout=SECONDS, check=False)
    return done.returncode, done.stdout
