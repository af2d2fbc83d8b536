"""C2: what the ends tell each other where a broker cannot be asked for it: signs of life, and withdrawals."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from msgspec.structs import replace

from safelight.message import now_ms

if TYPE_CHECKING:
    from safelight.message import Job, Presence

__all__ = ["OLDEST_JOB_SECONDS", "Living", "Withdrawn", "withdrawal"]

OLDEST_JOB_SECONDS = 360  # the longest timeout is 300 s; what is older has been answered


class Living:
    """The workers that were heard of within two leases (of so many seconds); one without slots has left."""

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self._heard: dict[str, tuple[Presence, float]] = {}  # and when, on our monotonic clock

    def hear(self, presence: Presence) -> None:
        """Remember a sign of life, with the time of its arrival here."""
        self._heard.pop(presence.worker, None)
        if presence.slots:
            self._heard[presence.worker] = (replace(presence, seen=now_ms()), time.monotonic())

    def now(self) -> list[Presence]:
        """Those who live."""
        now = time.monotonic()
        self._heard = {name: heard for name, heard in self._heard.items() if now - heard[1] <= 2 * self._lease}
        return [presence for presence, _ in self._heard.values()]


def withdrawal(job: Job) -> bytes:
    """What is told of a job that nobody waits for; a person may send the same job anew from another inbox."""
    return f"{job.reply_to}:{job.id}".encode()


class Withdrawn:
    """The jobs that nobody waits for, as far as they can still be on their way."""

    def __init__(self) -> None:
        self._told: dict[bytes, float] = {}

    def hear(self, told: bytes) -> None:
        """Remember a `withdrawal`."""
        now = time.monotonic()
        self._told = {each: at for each, at in self._told.items() if now - at <= OLDEST_JOB_SECONDS}
        self._told[told] = now

    def __contains__(self, job: Job) -> bool:
        return withdrawal(job) in self._told
