"""Every wait for a client has its time: the server alone, with short times, around a small ASGI application."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import needed, wait_until
from raw_http import Connection, check_failure, head

from safelight.gateway import server as module
from safelight.gateway.listen import BACKLOG, listen
from safelight.gateway.server import Protocol, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GET = head("/", method="GET")
MEGABYTE = 1024 * 1024


class Application:
    """Answers `/` at once, `/body` when the body is there, `/large` with 64 MB, `/wait` when it is told to."""

    def __init__(self) -> None:
        self.draining = self.refuses = False
        self.told = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b"here"
        if scope["path"] == "/body":
            while (await receive()).get("more_body"):
                pass
        elif scope["path"] == "/wait":
            await asyncio.to_thread(self.told.wait)
        elif scope["path"] == "/large":
            body = bytes(64 * MEGABYTE)
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": body})


class Running:
    """A server in a thread of its own."""

    def __init__(self) -> None:
        self.app = Application()
        self.server = Server(self.app)  # type: ignore[arg-type]
        self.sockets = listen("127.0.0.1", 0)
        self.port = self.sockets[0].getsockname()[1]
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve(sockets=self.sockets)))
        self.thread.start()

    def connections(self) -> int:
        return len(self.server.server_state.connections)

    def stop(self) -> None:
        self.app.told.set()
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def running(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A server whose times are the test's own, by `short`."""
    for name, value in getattr(request, "param", {}).items():
        monkeypatch.setattr(module, name, value)
    running = Running()
    yield running
    running.stop()


def short(**times: float) -> pytest.MarkDecorator:
    """Constants of the module as this test needs them."""
    return pytest.mark.parametrize("running", [times], indirect=True, ids=str)


@short(HEADER_SECONDS=0.1)
def test_a_client_that_says_nothing_is_left_without_a_word(running: Running) -> None:
    with Connection(running.port) as connection:
        assert connection.closed()


@short(HEADER_SECONDS=0.1)
@pytest.mark.parametrize("data", [b"G", GET[:-2], b"\r\n", GET[:20]])
def test_half_a_head_is_408(data: bytes, running: Running) -> None:
    with Connection(running.port) as connection:
        connection.send(data)
        check_failure(connection.answer(), 408, "request_too_slow")
        assert connection.closed()


@short(HEADER_SECONDS=0.1)
def test_a_head_that_trickles_is_408(running: Running) -> None:
    with Connection(running.port) as connection:
        connection.send(GET[:-2])
        while connection.quiet(0.02):
            connection.send(b"X: x\r\n")
        check_failure(connection.answer(), 408, "request_too_slow")


@short(HEADER_SECONDS=0.1)
def test_a_later_head_has_its_time_too(running: Running) -> None:
    with Connection(running.port) as connection:
        for _ in range(2):
            connection.send(GET)
            assert connection.answer().body == b"here"
        connection.send(GET[:10])
        check_failure(connection.answer(), 408, "request_too_slow")
        assert connection.closed()


@short(HEADER_SECONDS=0.05)
def test_a_head_behind_a_slow_request_waits_for_it(running: Running) -> None:
    with Connection(running.port) as connection:
        connection.send(head("/wait", method="GET") + GET[:10])
        assert connection.quiet(0.3)
        running.app.told.set()
        assert connection.answer().body == b"here"
        check_failure(connection.answer(), 408, "request_too_slow")


@short(KEEP_ALIVE_SECONDS=0.2)
def test_an_idle_connection_is_closed(running: Running) -> None:
    with Connection(running.port) as connection:
        connection.send(GET)
        assert connection.answer().body == b"here"
        assert connection.closed()


@short(KEEP_ALIVE_SECONDS=0.2)
def test_an_empty_line_does_not_keep_a_connection_for_ever(running: Running) -> None:
    with Connection(running.port) as connection:
        connection.send(GET + b"\r\n")
        assert connection.answer().body == b"here"
        connection.send(b"\r\n")
        assert connection.closed()


@short(KEEP_ALIVE_SECONDS=0.2)
def test_a_refused_body_that_stops_is_not_waited_for(running: Running) -> None:
    with Connection(running.port) as connection:
        connection.send(head("/", "Content-Length: 1000"))
        assert connection.answer().body == b"here"
        connection.send(b"x")
        assert connection.closed()


@short(DISCARD_SECONDS=0.2)
def test_a_refused_body_that_trickles_comes_to_an_end(running: Running) -> None:
    with Connection(running.port) as connection:
        connection.send(head("/", "Content-Length: 1000"))
        assert connection.answer().body == b"here"
        while connection.quiet(0.02):
            connection.send(b"x")
        assert connection.closed()


@short(DISCARD_SECONDS=0.2)
def test_a_refused_body_that_arrives_in_time_leaves_the_connection_open(running: Running) -> None:
    with Connection(running.port) as connection:
        connection.send(head("/", "Content-Length: 100000"))
        assert connection.answer().body == b"here"
        connection.send(bytes(100_000))
        assert connection.quiet(0.4)
        connection.send(GET)
        assert connection.answer().body == b"here"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_refused_body_of_a_last_request_does_not_cost_the_answer(version: str, running: Running) -> None:
    with Connection(running.port) as connection:  # as nginx sends it by default
        connection.send(head("/", f"Content-Length: {MEGABYTE}", "Connection: close", version=version))
        wait_until(lambda: not connection.quiet(0))
        for _ in range(16):  # closing on unread bytes would have reset the connection
            connection.send(bytes(MEGABYTE // 16))
        assert connection.answer().body == b"here"
        assert connection.closed()
        wait_until(lambda: running.connections() == 0)


@short(DISCARD_SECONDS=0.2)
def test_a_refused_body_of_a_last_request_is_not_waited_for(running: Running) -> None:
    with Connection(running.port) as connection:
        connection.send(head("/", "Content-Length: 1000", "Connection: close"))
        assert connection.answer().body == b"here"
        assert connection.closed()
        wait_until(lambda: running.connections() == 0)


@short(DISCARD_BYTES=MEGABYTE)
def test_a_refused_body_is_not_read_without_end(running: Running) -> None:
    with Connection(running.port) as connection:
        connection.send(head("/", f"Content-Length: {100 * MEGABYTE}"))
        assert connection.answer().body == b"here"
        with pytest.raises(ConnectionError):
            connection.send(bytes(100 * MEGABYTE))


@short(DISCARD_BYTES=MEGABYTE)
def test_what_follows_a_refusal_is_not_read_without_end(running: Running) -> None:
    with Connection(running.port) as connection, pytest.raises(ConnectionError):
        connection.send(bytes(100 * MEGABYTE))


@short(LINGER_SECONDS=0.2)
def test_a_refused_connection_ends_though_its_client_does_not(running: Running) -> None:
    with Connection(running.port) as connection:
        connection.send(b"nonsense\r\n\r\n")
        check_failure(connection.answer(), 400, "malformed_request")
        assert connection.closed()
        wait_until(lambda: running.connections() == 0)


@short(STALLED_SECONDS=0.2)
def test_a_client_that_takes_nothing_of_its_answer_is_cut_off(running: Running) -> None:
    with Connection(running.port) as connection:
        connection.send(head("/large", method="GET"))
        assert not connection.quiet(10)
        wait_until(lambda: running.connections() == 0)


def test_a_client_that_takes_its_answer_gets_all_of_it(running: Running) -> None:
    with Connection(running.port) as connection:
        connection.send(head("/large", method="GET"))
        assert len(connection.answer().body) == 64 * MEGABYTE
        connection.send(GET)
        assert connection.answer().body == b"here"


class Clockwork:
    """A loop whose time comes when the test says so, and a transport with so many bytes left to write."""

    def __init__(self) -> None:
        self.left = 1_000
        self.aborted = False
        self.due: list[Callable[[], None]] = []

    def call_later(self, seconds: float, then: Callable[[], None]) -> Clockwork:
        assert seconds == module.STALLED_SECONDS
        self.due.append(then)
        return self

    def cancel(self) -> None:
        self.due.clear()

    def get_write_buffer_size(self) -> int:
        return self.left

    def abort(self) -> None:
        self.aborted = True


def test_slow_is_not_stalled() -> None:
    protocol, clockwork = Protocol.__new__(Protocol), Clockwork()
    protocol.loop = protocol.transport = clockwork  # type: ignore[assignment]
    protocol._watch(clockwork.left)
    for _ in range(10):
        clockwork.left -= 1
        clockwork.due.pop()()
        assert not clockwork.aborted
    clockwork.due.pop()()
    assert clockwork.aborted


def test_a_drain_answers_what_is_held(running: Running) -> None:
    with Connection(running.port) as waiting, Connection(running.port) as idle:
        idle.send(GET)
        assert idle.answer().body == b"here"
        waiting.send(head("/wait", method="GET"))
        wait_until(lambda: running.server.server_state.tasks)
        running.server.should_exit = True
        assert idle.closed()
        assert waiting.quiet(0)
        running.app.told.set()
        answer = waiting.answer()
        assert (answer.body, answer.headers["connection"]) == (b"here", "close")
        running.thread.join(10)
        assert not running.thread.is_alive()


def test_readiness_is_the_first_to_go() -> None:
    async def drained() -> tuple[bool, bool]:
        app = Application()
        server = Server(app)  # type: ignore[arg-type]
        draining = asyncio.create_task(server.drain(0.05))
        await asyncio.sleep(0)
        at_first = app.draining and not server.should_exit
        await draining
        return at_first, server.should_exit

    assert asyncio.run(drained()) == (True, True)


def test_so_many_may_wait_to_be_accepted(running: Running) -> None:
    """uvicorn listens again on the sockets that it is given, with a queue of its own length."""
    needed("ss", "iproute2")
    told = subprocess.run(["ss", "-Hltn", f"sport = :{running.port}"], check=True, capture_output=True, text=True)
    most = int(Path("/proc/sys/net/core/somaxconn").read_text())
    assert int(told.stdout.split()[2]) == min(BACKLOG, most)
