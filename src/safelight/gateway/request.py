"""C1: one request as the server hands it over, and what every response to it carries."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from safelight.message import new_id

if TYPE_CHECKING:
    import asyncio

    from starlette.types import Receive, Scope

__all__ = ["CONNECTION_LOST", "REQUEST_ID", "Request"]

CONNECTION_LOST = "safelight.connection_lost"
"""The ASGI extension by which `server.py` hands over a future that is done when the client is gone."""

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
"""What a client's own id of a request may be."""

TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C Trace Context, 3.2


class Request:
    """One request: its headers, its id, seconds by phase, and response headers that are known before the response."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.begun = time.perf_counter()
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope["query_string"]
        self.receive = receive
        self.connection_lost: asyncio.Future[None] = scope["extensions"][CONNECTION_LOST]
        self._headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:  # a repeated field is the list of its values (RFC 9110, 5.3)
            self._headers[name] = self._headers[name] + b", " + value if name in self._headers else value
        self.job_id = new_id()  # the request's own as well, unless its client gives it one
        given = self.header(b"x-request-id")
        self.id = given if REQUEST_ID.fullmatch(given) else self.job_id
        self.phases: dict[str, float] = {}
        self.notes: list[tuple[bytes, bytes]] = []
        self.body_begun = False

    def header(self, name: bytes) -> str:
        """A header's value; empty when there is none. `name` in lower case."""
        return self._headers.get(name, b"").decode("latin-1")

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self.begun

    @property
    def traceparent(self) -> str | None:
        """The client's trace, if it is well-formed."""
        given = self.header(b"traceparent")
        return given if TRACEPARENT.fullmatch(given) else None

    def response_headers(self) -> list[tuple[bytes, bytes]]:
        """What every response has, whoever made it: the request's id and its timing; and the notes."""
        timing = "".join(f"{name};dur={seconds * 1_000:.2f}, " for name, seconds in self.phases.items())
        timing += f"total;dur={self.elapsed * 1_000:.2f}"
        return [*self.notes, (b"x-request-id", self.id.encode()), (b"server-timing", timing.encode())]
