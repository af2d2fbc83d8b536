"""C1: uvicorn with what it lacks: limits on headers and on every wait for a client, and a drain.

httptools takes headers of any size and waits for them for ever (1 MB was taken, a half-sent one stayed open), uvicorn
reads what follows a refusal without an end and answers what it cannot parse before the requests that came earlier on
the same connection; `Protocol` mends these.
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from safelight.errors import (
    HeadersTooLargeError,
    InternalError,
    MalformedRequestError,
    RequestTooSlowError,
    SafelightError,
)
from safelight.gateway.app import closing_response
from safelight.gateway.limits import (
    BUFFERED_BODY_BYTES,
    DISCARD_BYTES,
    DISCARD_SECONDS,
    HEADER_SECONDS,
    KEEP_ALIVE_SECONDS,
    LINGER_SECONDS,
    MAX_HEADER_BYTES,
    STALLED_SECONDS,
)
from safelight.gateway.listen import BACKLOG
from safelight.gateway.request import CONNECTION_LOST
from safelight.gateway.shed import Shedder
from safelight.message import new_id

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from safelight.gateway.app import App

__all__ = ["Server"]


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with limits; a refusal comes after the answers to the requests before it.

    A connection is between two ends of headers, `_in_headers`, or in a body. Each wait for the client has its time:
    `_timer` for headers, for what is left of a refused body and for the end of a refused connection, uvicorn's
    keep-alive for silence, `_stalled` for an answer that is not taken; a body's own time is `upload.py`'s.
    """

    _in_headers = True
    _has_begun = False  # with a request whose headers are not complete yet
    _heard = False
    _header_bytes = 0  # of the target, the headers and the trailers of one request
    _raw_bytes = 0  # since the parser last made something of them: an unfinished header, a chunk's extension
    _discarded = 0
    _refusal: SafelightError | None = None
    _is_last = False  # the response that was given; what is left of its request is read over
    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._lost: asyncio.Future[None] = self.loop.create_future()
        # What a response is written to: uvicorn closes it behind the last one.
        self._answering = SimpleNamespace(
            write=transport.write, is_closing=transport.is_closing, close=self._close_when_read
        )
        self._set_timer(HEADER_SECONDS, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_timer()
        self._taken()
        super().connection_lost(exc)
        self._lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        self._unset_keepalive_if_required()
        if self._refusal is not None:
            return self._discard(data)
        self._raw_bytes += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError as exc:
            ours = exc.__context__ if isinstance(exc.__context__, SafelightError) else None
            return self._refuse(ours or MalformedRequestError("The bytes are not an HTTP/1.1 request."))
        if self._raw_bytes > MAX_HEADER_BYTES:
            return self._refuse(HeadersTooLargeError())
        if self._has_begun and self._timer is None:  # not at the beginning: mostly all headers are there at once
            self._set_timer(HEADER_SECONDS, self._too_slow)
        if self.cycle is not None and self.cycle.response_complete and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(KEEP_ALIVE_SECONDS, self.timeout_keep_alive_handler)
        return None

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # httptools takes what follows for another protocol. We speak no other (RFC 9110, 7.8: Upgrade may be
            # ignored), so the request is parsed again without it: `curl --http2` sends it with a form.
            headers = b"".join(b"%b: %b\r\n" % field for field in self.headers if field[0] != b"upgrade")
            method, version = self.parser.get_method(), self.parser.get_http_version().encode()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            self._feed(b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, version, headers) + data[upgrade.args[0] :])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION_LOST: self._lost}  # type: ignore[dict-item]
        self._header_bytes = self._raw_bytes = self._discarded = 0
        self._has_begun = True
        if self._timer is not None:
            self._set_timer(HEADER_SECONDS, self._too_slow)

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        if self._in_headers:  # trailers are read over: RFC 9110, 6.5.1
            super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._raw_bytes = 0
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            raise HeadersTooLargeError  # httptools makes it the context of a parser's error

    def on_headers_complete(self) -> None:
        self._raw_bytes = 0
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise MalformedRequestError("This is no proxy.")
            return
        if self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False  # RFC 9110, 10.1.1
        elif [name for name, _ in self.headers].count(b"host") != 1:
            raise MalformedRequestError("A request must have one Host header.")  # RFC 9112, 3.2
        self._has_begun = False
        self._set_timer()
        super().on_headers_complete()
        self.cycle.transport = self._answering  # type: ignore[assignment]
        self._in_headers = False

    def on_chunk_header(self) -> None:
        self._raw_bytes = 0

    def on_body(self, body: bytes) -> None:
        self._raw_bytes = 0
        if self.cycle.response_complete:
            return self._discard(body)
        self.cycle.body += body
        if len(self.cycle.body) > BUFFERED_BODY_BYTES:
            self.flow.pause_reading()
        return self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        self._raw_bytes = 0
        if self.parser.should_upgrade():
            return
        self._in_headers = True
        self._set_timer()
        super().on_message_complete()
        if self._is_last:
            self.transport.close()

    def _close_when_read(self) -> None:
        """Close after the last response; not on unread bytes, for that resets the connection (RFC 9112, 9.6)."""
        if self._in_headers:
            return self.transport.close()
        self._is_last = True
        return self.transport.write_eof()

    def on_response_complete(self) -> None:
        if self._refusal is not None and (not self.pipeline or self.pipeline[-1][0].disconnected):
            return self._write_refusal()
        if not self._in_headers:
            self._set_timer(DISCARD_SECONDS, self.transport.abort)
        return super().on_response_complete()

    def _discard(self, data: bytes) -> None:
        self._discarded += len(data)
        if self._discarded > DISCARD_BYTES:
            self.transport.abort()

    def _set_timer(self, seconds: float = 0, then: Callable[[], None] | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, then) if then else None

    def _too_slow(self) -> None:
        if not self._heard:
            self.transport.close()
        elif self.cycle is not None and not self.cycle.response_complete:  # it may wait for that answer first
            self._set_timer(HEADER_SECONDS, self._too_slow)
        else:
            self._refuse(RequestTooSlowError())

    def _refuse(self, error: SafelightError) -> None:
        """Answer below ASGI, where there is no request yet, as soon as the requests before are answered; then close."""
        self._refusal = error
        self._set_timer()
        cycle = self.cycle
        if not self._in_headers:  # it is the body of this request that cannot be read
            if cycle.response_started:
                return self.transport.close()
            cycle.disconnected = True
            cycle.message_event.set()
        if cycle is None or cycle.response_complete or (cycle.disconnected and not self.pipeline):
            self._write_refusal()
        return None

    def _write_refusal(self) -> None:
        error = self._refusal or InternalError()
        if self.transport.is_closing():
            return
        self.transport.write(closing_response(error, new_id()))
        self.transport.write_eof()
        self.flow.resume_reading()
        self._set_timer(LINGER_SECONDS, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._taken()
        super().resume_writing()

    def _watch(self, left: int) -> None:
        """Look after `STALLED_SECONDS` whether the client took some of what is left to be written."""

        def look() -> None:
            now = self.transport.get_write_buffer_size()
            if now < left:
                self._watch(now)
            else:
                self.transport.abort()

        self._taken()
        self._stalled = self.loop.call_later(STALLED_SECONDS, look)

    def _taken(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


class Server(uvicorn.Server):
    """One gateway's server; `drain` is called by whoever handles the process's signals."""

    def __init__(self, app: App) -> None:
        self._app = app
        super().__init__(
            uvicorn.Config(
                app,
                http=self._protocol,  # type: ignore[arg-type]  # called as the class would be
                backlog=BACKLOG,  # it calls listen(2) again
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # nobody here asks for a client's address
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
            )
        )

    def _protocol(self, **given: Any) -> asyncio.Protocol:
        """What a new connection is handed to."""
        return Shedder(self._app, partial(Protocol, **given)) if self._app.refuses else Protocol(**given)

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Signals are the command line's."""
        return nullcontext()

    async def drain(self, delay: float) -> None:
        """Turn /readyz to 503, go on accepting for `delay` seconds, then answer what is held and end."""
        self._app.draining = True
        await asyncio.sleep(delay)
        self.should_exit = True
