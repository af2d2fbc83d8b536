"""C1: uvicorn with what it lacks: limits on headers and their time, and a drain.

httptools takes headers of any size and waits for them for ever (1 MB was taken, a half-sent one stayed open), and
uvicorn reads what follows a refusal without an end; `Protocol` bounds all three.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from safelight.errors import (
    ConfigurationError,
    HeadersTooLargeError,
    MalformedRequestError,
    RequestTooSlowError,
    SafelightError,
)
from safelight.gateway.app import error_body
from safelight.message import new_id

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from safelight.gateway.app import App

__all__ = ["Server", "listen"]

MAX_HEADER_BYTES = 32 * 1024
HEADER_SECONDS = 10.0
DISCARD_BYTES = 64 * 1024 * 1024  # of a refused body that is read over, so that its sender gets to read the refusal
KEEP_ALIVE_SECONDS = 65  # above the 60 s of common load balancers, so that they close first
BACKLOG = 1024
NO_IPV6 = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with limits."""

    _in_headers = True
    _header_bytes = 0
    _discarded = 0
    _refusal: SafelightError = MalformedRequestError("The bytes are not an HTTP/1.1 request.")
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_done()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_headers:  # still, so all of it was headers
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                self._refuse(HeadersTooLargeError())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = self._discarded = 0
        self._expect_headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > MAX_HEADER_BYTES:
            self._refusal = HeadersTooLargeError()
            raise self._refusal  # httptools makes it a parser's error, and uvicorn calls `send_400_response`
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._headers_done()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle.response_complete:
            self._discarded += len(body)
            if self._discarded > DISCARD_BYTES:
                self.transport.abort()
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's sentence gives way to ours
        self._refuse(self._refusal)

    def _expect_headers(self) -> None:
        self._headers_done()
        self._in_headers = True
        self._timer = self.loop.call_later(HEADER_SECONDS, self._too_slow)

    def _headers_done(self) -> None:
        self._in_headers = False
        if self._timer is not None:
            self._timer.cancel()

    def _too_slow(self) -> None:
        if self._header_bytes:
            self._refuse(RequestTooSlowError())
        else:
            self.transport.close()

    def _refuse(self, error: SafelightError) -> None:
        """Answer below ASGI, where there is no request yet, and close."""
        body = error_body(error)
        head = (
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
            f"x-request-id: {new_id()}\r\nserver-timing: total;dur=0\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[error.status] + head.encode() + body)
        self.transport.close()


class Server(uvicorn.Server):
    """One gateway's server; `drain` is called by whoever handles the process's signals."""

    def __init__(self, app: App) -> None:
        self._app = app
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
            )
        )

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Signals are the command line's."""
        return nullcontext()

    async def drain(self, delay: float) -> None:
        """Turn /readyz to 503, go on accepting for `delay` seconds, then answer what is held and end."""
        self._app.draining = True
        await asyncio.sleep(delay)
        self.should_exit = True


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets: both loopbacks for "localhost", all addresses for "*"; one sentence if the port is taken."""
    addresses: dict[str, tuple[str, ...]] = {"localhost": ("127.0.0.1", "::1"), "*": ("0.0.0.0", "::")}  # noqa: S104
    sockets: list[socket.socket] = []
    for address in addresses.get(host, (host,)):
        try:
            sockets.append(_listen(address, port))
        except OSError as exc:
            if sockets and exc.errno in NO_IPV6:
                continue
            for opened in sockets:
                opened.close()
            raise ConfigurationError(
                f"Port {port} cannot be used ({exc.strerror}); stop what uses it, or choose another: PORT=9000 make up"
            ) from exc
    return sockets


def _listen(address: str, port: int) -> socket.socket:
    [(family, kind, protocol, _, name), *_] = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    listening: Any = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(name)
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    listening.setblocking(False)
    return listening
