"""What each of our processes tells the system and Python of itself; each is worth some of a request's CPU time.

- glibc's malloc is told to keep what is freed. By default it gives memory back to the kernel after each image and
  faults it in again for the next. Kept, Pillow mirrors a JPEG in 55 % of the time and an upload costs 60 %; a process
  holds the most that it ever needed at once, at most `TRIM_THRESHOLD` more than it uses.
- Python's collector is told to leave alone what was there from the start.
- The kernel is told that gateway, consumer and broker work in batches: woken, they do not push a child out of its
  core in the middle of a picture (and its data out of the core's caches), but wait for its turn to end.

The measurements are in `docs/why.md`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys

__all__ = ["MALLOC_ENVIRONMENT", "freeze_start_up", "keep_freed_memory", "work_in_batches"]

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


def work_in_batches(is_batch: bool = True) -> None:
    """Whether this process leaves a running one its turn (sched(7), `SCHED_BATCH`); children inherit it.

    Where a core is free nothing changes. Does nothing beyond Linux.
    """
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_BATCH if is_batch else os.SCHED_OTHER, os.sched_param(0))


def freeze_start_up() -> None:
    """Call when all is imported and made: no collection looks at it again, and none stops the process for long.

    A full one took over 20 ms in a gateway (`docs/why.md`), in which no request is served.
    """
    gc.collect()
    gc.freeze()
