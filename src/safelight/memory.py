"""glibc's malloc told to keep what is freed, Python's collector to leave alone what was there from the start.

By default malloc gives memory back to the kernel after each image and faults it in again for the next. Kept, Pillow
mirrors a JPEG in 55 % of the time and an upload costs 60 % (`docs/why.md`); a process holds the most that it ever
needed at once, at most `TRIM_THRESHOLD` more than it uses.
"""

from __future__ import annotations

import ctypes
import gc
import sys

__all__ = ["MALLOC_ENVIRONMENT", "freeze_start_up", "keep_freed_memory"]

# mallopt(3): the parameters' numbers are in <malloc.h>
M_TRIM_THRESHOLD, TRIM_THRESHOLD = -1, 256 * 1024 * 1024
M_TOP_PAD, TOP_PAD = -2, 16 * 1024 * 1024
M_MMAP_THRESHOLD, MMAP_THRESHOLD = -3, 32 * 1024 * 1024

MALLOC_ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": str(TRIM_THRESHOLD),
    "MALLOC_TOP_PAD_": str(TOP_PAD),
    "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD),
}
"""The same for a program that is not ours (mallopt(3))."""


def keep_freed_memory() -> None:
    """Tell this process's malloc; does nothing where it is not glibc's."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
        mallopt(M_TOP_PAD, TOP_PAD)
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)


def freeze_start_up() -> None:
    """Call when all is imported and made: no collection looks at it again, and none stops the process for long.

    A full one took over 20 ms in a gateway (`docs/why.md`), in which no request is served.
    """
    gc.collect()
    gc.freeze()
