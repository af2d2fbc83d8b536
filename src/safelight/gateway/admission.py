"""C1: what may come in. Pure counters of jobs, bytes and pixels; over any of them a request is refused at once.

What is refused costs nothing; what is admitted is answered. A `Place` is one request's share, left when it ends.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from safelight.errors import GatewayFullError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

__all__ = ["Admission", "Place"]

RATE_SECONDS = 5.0  # over which the rate of leaving is averaged
LONGEST_RETRY_SECONDS = 30
REFUSING_SECONDS = 1.0


class Admission:
    """Bounds of one gateway process: requests, image bytes and pixels in flight."""

    def __init__(
        self, *, jobs: int, image_bytes: int, pixels: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most = {"jobs": jobs, "bytes": image_bytes, "pixels": pixels}
        self.held = dict.fromkeys(self._most, 0)
        self._clock = clock
        self._rate = 0.0  # requests that leave in a second
        self._left_at = clock()
        self._outside = 0.0  # who was refused and was told to come again, less those whose time has come
        self._refused_at = -math.inf
        self._told = 1  # the last answer to when, in seconds

    @property
    def refuses(self) -> bool:
        """Whether there was no room for a request within the last second."""
        return self._clock() - self._refused_at < REFUSING_SECONDS

    def check(self, expected_bytes: int) -> None:
        """Raise `GatewayFullError` if `enter` would."""
        self._check("jobs", 1)
        self._check("bytes", expected_bytes)

    def _check(self, kind: str, more: int) -> None:
        if self.held[kind] + more > self._most[kind]:
            self._outside = self._still_outside() + 1
            self._refused_at = self._clock()
            raise GatewayFullError

    def enter(self, expected_bytes: int) -> Place:
        """A place for one request that announces so many bytes (0 if it does not say), or `GatewayFullError`."""
        self.check(expected_bytes)
        place = Place(self)
        self.take(place, "jobs", 1)
        self.take(place, "bytes", expected_bytes)
        return place

    def take(self, place: Place, kind: str, amount: int) -> None:
        """Raise a place's share of `kind` to `amount`; it never shrinks before the request ends."""
        more = amount - place.shares.get(kind, 0)
        if more <= 0:
            return
        self._check(kind, more)
        self.held[kind] += more
        place.shares[kind] = amount

    def leave(self, place: Place) -> None:
        """Give back all of a place's shares."""
        for kind, amount in place.shares.items():
            self.held[kind] -= amount
        place.shares.clear()
        now = self._clock()
        self._rate = self._rate * math.exp((self._left_at - now) / RATE_SECONDS) + 1 / RATE_SECONDS
        self._left_at = now

    def retry_after(self) -> int:
        """Whole seconds until half of what is in flight will have left, and as many as were refused before; 1 to 30.

        At the present rate of leaving. So each of a crowd is told a time of its own, and they come again at the pace
        at which there is room, instead of all at once.
        """
        rate = self._rate * math.exp((self._left_at - self._clock()) / RATE_SECONDS)
        before = self.held["jobs"] / 2 + self._still_outside()
        self._told = max(1, min(LONGEST_RETRY_SECONDS, math.ceil(before / max(rate, 0.01))))
        return self._told

    def _still_outside(self) -> float:
        return self._outside * math.exp((self._refused_at - self._clock()) / self._told)


class Place:
    """One request's share of what may be in flight."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.shares: dict[str, int] = {}

    def grow(self, kind: str, amount: int) -> None:
        """Make the share of `kind` at least `amount`, or raise `GatewayFullError`."""
        self._admission.take(self, kind, amount)

    def leave(self) -> None:
        """Give the place back."""
        self._admission.leave(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()
