"""The codec alone, in a bare loop: python benchmarks/codec.py FILE SECONDS, once a line comes on standard input.

What the operation `mirror` calls for this image and nothing around it: libjpeg-turbo's transform where the edge is a
whole number of MCUs, else Pillow with the source's own tables. Prints its count, seconds, median and CPU time as JSON.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, JpegImagePlugin

from safelight.operations.mirror import jpeg, turbojpeg
from safelight.operations.mirror.exif import Axis

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["codec"]


def codec(image: bytes) -> Callable[[], bytes]:
    """The call for this image."""
    found, library = jpeg.scan(image), turbojpeg.find()
    if library is not None and found.is_aligned(Axis.HORIZONTAL):
        return lambda: library.flip(image, Axis.HORIZONTAL, found.kind)
    return lambda: _reencoded(image)


def _reencoded(image: bytes) -> bytes:
    with Image.open(io.BytesIO(image), formats=["JPEG"]) as picture:
        picture.draft("YCbCr", picture.size)
        tables, sampling = picture.quantization, JpegImagePlugin.get_sampling(picture)
        out = io.BytesIO()
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(out, "JPEG", qtables=tables, subsampling=sampling)
        return out.getvalue()


def main(path: str, seconds: float) -> None:
    call = codec(Path(path).read_bytes())
    call()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    spent: list[int] = []
    cpu = time.process_time_ns()
    begun = before = time.perf_counter_ns()
    while before - begun < seconds * 1e9:
        call()
        now = time.perf_counter_ns()
        spent.append(now - before)
        before = now
    result = {
        "count": len(spent),
        "seconds": (before - begun) / 1e9,
        "median_us": statistics.median(spent) / 1_000,
        "cpu_us": (time.process_time_ns() - cpu) / len(spent) / 1_000,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    sys.stdin.readline()  # until our CPU time was read


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
