"""C1: load shedding: while requests are refused for want of room, a new connection's first request is looked at here.

A client that waits to be asked for its body (`Expect: 100-continue`) is refused at half of what it costs by uvicorn and
ASGI (`docs/why.md`), by the same answer, and its connection is closed as it is there. All else, and what there is room
for by now, is handed on, with what was read of it.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from safelight.gateway.limits import DISCARD_BYTES, DISCARD_SECONDS, HEADER_SECONDS, MAX_HEADER_BYTES
from safelight.gateway.request import REQUEST_ID
from safelight.message import new_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from safelight.gateway.app import App

__all__ = ["Shedder"]

REQUEST = re.compile(rb"POST /query(\?[!-~]*)? HTTP/1\.1\r\n")
EXPECT = re.compile(rb"\r\nexpect:[ \t]*100-continue[ \t]*\r\n", re.IGNORECASE)
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*\r\n", re.IGNORECASE)
ID = re.compile(rb"\r\nx-request-id:[ \t]*(%b)[ \t]*\r\n" % REQUEST_ID.pattern.encode(), re.IGNORECASE)


class Shedder(asyncio.Protocol):
    """One connection until it is refused, or handed on to what `make` makes."""

    def __init__(self, app: App, make: Callable[[], asyncio.Protocol]) -> None:
        self._app = app
        self._make = make
        self._is_refused = False
        self._discarded = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the request, for as long as uvicorn's protocol would."""
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(HEADER_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Its client has gone, or was waited for long enough."""
        self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Refuse or hand on; after a refusal read over what comes."""
        if self._is_refused:  # a body may come all the same; closing on it would lose the answer
            return self._discard(len(data))
        self._timer.cancel()
        answer = self._answer(data)
        if answer is None:
            protocol = self._make()
            self._transport.set_protocol(protocol)
            protocol.connection_made(self._transport)
            return protocol.data_received(data)
        self._is_refused = True
        self._transport.write(answer)
        self._transport.write_eof()
        self._timer = self._loop.call_later(DISCARD_SECONDS, self._transport.abort)
        return None

    def _discard(self, count: int) -> None:
        self._discarded += count
        if self._discarded > DISCARD_BYTES:
            self._transport.abort()

    def _answer(self, head: bytes) -> bytes | None:
        """The refusal, if there is no room for the request of which this is all that a client sends unasked."""
        if head.find(b"\r\n\r\n") != len(head) - 4 or len(head) > MAX_HEADER_BYTES:
            return None
        length = LENGTH.search(head)
        if length is None or not REQUEST.match(head) or not EXPECT.search(head):
            return None
        given = ID.search(head)
        return self._app.shed(int(length[1]), given[1].decode() if given else new_id())
