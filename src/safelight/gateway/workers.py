"""C1: who lives and what is offered, from the workers' presence. Pure state; `dispatch.py` feeds it once a beat.

Judged over the last two leases, and not before a look that came after so long a listening: a worker that is just being
restarted makes no request fail, nor does one that comes back after the broker more slowly than the gateway.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from safelight.errors import NoWorkerError, UnknownOperationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from safelight.message import Presence

__all__ = ["Workers"]


class Workers:
    """The workers seen within `window` seconds."""

    def __init__(self, window: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._window = window
        self._clock = clock
        self._listening_since = self._looked_at = clock()
        self._seen: dict[str, tuple[float, Presence]] = {}
        self.fresh = 0  # at the last look
        self._slots = 0

    def listen_anew(self) -> None:
        """The broker was away: who announced itself meanwhile was not heard."""
        self._listening_since = self._clock()

    def update(self, presences: Sequence[Presence]) -> None:
        """What the broker shows now: a sign of life counts from when it is new, for the broker shows it for a while."""
        now = self._looked_at = self._clock()
        self.fresh = len(presences)
        self._slots = sum(presence.slots for presence in presences)
        for presence in presences:
            if presence != self._seen.get(presence.worker, (now, None))[1]:
                self._seen[presence.worker] = (now, presence)
        self._seen = {name: seen for name, seen in self._seen.items() if now - seen[0] <= self._window}

    @property
    def children(self) -> int:
        """How many jobs run at once, at least 1: a slot is for one that runs or for one that waits for its child."""
        return max(1, self._slots // 2)

    @property
    def heavy_children(self) -> int:
        """How many of them may be busy with heavy jobs: half, so that light ones find another."""
        return max(1, self.children // 2)

    def check(self, operations: Iterable[str]) -> None:
        """Raise `NoWorkerError`, then `UnknownOperationError`, if that is certain by now."""
        if self._looked_at - self._listening_since < self._window:
            return
        now = self._clock()
        living = [presence for at, presence in self._seen.values() if now - at <= self._window]
        if not living:
            raise NoWorkerError
        offered = {name for presence in living for name in presence.operations}
        for name in operations:
            if name not in offered:
                raise UnknownOperationError(
                    f"No worker offers the operation {name!r}; `safelight operations` lists them."
                )
