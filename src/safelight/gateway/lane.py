"""C1: the lane of heavy jobs: so many are at the broker at once; further ones wait here, where all is held anyway.

One that would not begin within its time, as the work before it is predicted, is refused instead.

A queue is served in its order, so without this the workers would one after the other begin a heavy job, and a light
one would wait for the first of them to end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from safelight.errors import GatewayFullError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Lane"]


class Lane:
    """Whose turn it is. `room` tells how many may be inside at once, and may change."""

    def __init__(self, room: Callable[[], int]) -> None:
        self._room = room
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._inside = 0
        self._predicted: dict[asyncio.Future[Any], float] = {}  # seconds of work, of all inside and waiting

    async def enter(self, given_up: asyncio.Future[Any], seconds: float, timeout: float) -> bool:
        """Wait for one's turn: true when it has come (then `leave` must follow), false once `given_up` is done.

        `GatewayFullError` when the work of those before takes longer than `timeout`; one's own takes `seconds`.
        """
        if sum(self._predicted.values()) > timeout * self._room():
            raise GatewayFullError
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._predicted[given_up] = seconds
        self.admit()
        try:
            await asyncio.wait((turn, given_up), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._go(turn, given_up)
            raise
        if given_up.done():
            self._go(turn, given_up)
            return False
        return True

    def _go(self, turn: asyncio.Future[None], given_up: asyncio.Future[Any]) -> None:
        if turn.done():
            self.leave(given_up)
        else:
            self._waiting.remove(turn)
            del self._predicted[given_up]

    def leave(self, given_up: asyncio.Future[Any]) -> None:
        """Make room for the next; `given_up` is what was handed to `enter`."""
        del self._predicted[given_up]
        self._inside -= 1
        self.admit()

    def admit(self) -> None:
        """Let in whom there is room for: called again when there may be more room."""
        while self._waiting and self._inside < self._room():
            self._inside += 1
            self._waiting.popleft().set_result(None)
