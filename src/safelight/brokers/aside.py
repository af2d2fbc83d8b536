"""C2: how much is kept in quarantine, on every broker: the newest, within bounds of number, bytes and age."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight.message import now_ms

if TYPE_CHECKING:
    from collections.abc import Iterable

    from safelight.message import Quarantined

__all__ = ["KEPT_BYTES", "KEPT_JOBS", "KEPT_MS", "within_bounds"]

KEPT_JOBS = 100
KEPT_BYTES = 256 * 1024 * 1024  # of images
KEPT_MS = 7 * 24 * 3_600_000


def within_bounds(records: Iterable[Quarantined]) -> list[Quarantined]:
    """Those that are kept, the oldest first; where the broker itself does not hold to the bounds, or coarsely."""
    oldest = now_ms() - KEPT_MS
    newest = sorted((record for record in records if record.at >= oldest), key=lambda record: record.at)[-KEPT_JOBS:]
    size = sum(record.size for record in newest)
    while size > KEPT_BYTES:
        size -= newest.pop(0).size
    return newest
