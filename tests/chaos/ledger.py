"""An operation that writes down each of its starts, and does what its image asks for; imported by the workers."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

STARTS = Path(__file__).with_name("starts")  # the run copies this file into a folder of its own
TAG = re.compile(rb"safelight-chaos (\d{8})\.(\d\d) ([a-z]{4})")
SLOWEST_SECONDS = 0.25
LEAK_BYTES = 64 * 1024
kept: list[bytes] = []


def ledger(image: bytes) -> Mapping[str, str]:
    """One line for each start: the tag, when (by a clock that all share), and in which worker; then the work.

    It is the same for each start of an image.
    """
    found = TAG.search(image)
    if found is None:  # one of the tiny pictures of a child's warm-up
        return {}
    with STARTS.open("ab") as file:
        line = b"%b.%b %b %.3f %d\n" % (*found.groups(), time.monotonic(), os.getppid())
        file.write(line)  # in one write: several children share the file
    _behave(found[3].decode())
    time.sleep(SLOWEST_SECONDS * (zlib.crc32(found[1]) % 100) / 100)
    kept.append(os.urandom(LEAK_BYTES))  # each child leaks
    return {}


def _behave(asked: str) -> None:
    if asked == "kill":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif asked == "hang":
        while True:
            time.sleep(60)
    elif asked == "fail":
        raise ValueError("it does not like this one")
    elif asked == "hogs":
        with contextlib.suppress(MemoryError):
            hoard = []
            while True:
                hoard.append(bytearray(64 * 1024 * 1024))
        raise MemoryError
