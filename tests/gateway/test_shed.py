"""A connection that is opened while requests are refused: refused at once, or handed on as it came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import free_port
from raw_http import head

from safelight.conformance import is_true, until
from safelight.errors import GatewayFullError
from safelight.gateway import shed
from safelight.gateway.app import closing_response
from safelight.gateway.shed import Shedder

ASKING = head("/query", "Content-Length: 5", "Expect: 100-continue")
REFUSAL = closing_response(GatewayFullError(), "an-id", 3)
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}  # the product's


class Echo(asyncio.Protocol):
    """What is handed on to: it tells what it was handed."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        transport.write(b"handed on: ")

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


class Gateway:
    """An application that refuses all, and asks for nothing else."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []
        self.answer: bytes | None = REFUSAL

    def shed(self, announced: int, request_id: str) -> bytes | None:
        self.asked.append((announced, request_id))
        return self.answer


@asynccontextmanager
async def a_connection(gateway: Gateway) -> AsyncIterator[Any]:
    port = free_port()
    make: Any = lambda: Shedder(gateway, Echo)  # type: ignore[arg-type]  # noqa: E731
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", port)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield SimpleNamespace(reader=reader, writer=writer)
    finally:
        writer.close()
        server.close()


async def sends_on(connection: Any, data: bytes) -> None:
    while True:
        connection.writer.write(data)
        await connection.writer.drain()
        await asyncio.sleep(0)


@asynccontextmanager
async def a_refused_connection() -> AsyncIterator[Any]:
    """One whose refusal was not read yet; what is written from here on comes by itself."""
    gateway = Gateway()
    async with a_connection(gateway) as connection:
        connection.writer.write(ASKING)
        await until(lambda: is_true(bool(gateway.asked)))
        yield connection


async def test_refused_at_once() -> None:
    gateway = Gateway()
    async with a_connection(gateway) as connection:
        connection.writer.write(
            head("/query?timeout=3", "content-length:7 ", "eXpect:\t100-Continue", "X-Request-Id: me")
        )
        assert await connection.reader.read() == REFUSAL
    assert gateway.asked == [(7, "me")]


async def test_a_body_that_comes_all_the_same_does_not_cost_the_answer(monkeypatch: Any) -> None:
    monkeypatch.setattr(shed, "DISCARD_BYTES", 8_000_000)
    async with a_refused_connection() as connection:
        for _ in range(70):
            connection.writer.write(bytes(100_000))
            await connection.writer.drain()
        assert await connection.reader.read() == REFUSAL


async def test_a_body_without_an_end_is_cut_off(monkeypatch: Any) -> None:
    monkeypatch.setattr(shed, "DISCARD_BYTES", 1_000_000)
    async with a_refused_connection() as connection:
        with pytest.raises(ConnectionError):
            await sends_on(connection, bytes(100_000))


@pytest.mark.parametrize("sent", [b"", ASKING], ids=["silent", "refused"])
async def test_who_stays_without_a_word_is_closed(sent: bytes, monkeypatch: Any) -> None:
    for name in ("HEADER_SECONDS", "DISCARD_SECONDS"):
        monkeypatch.setattr(shed, name, 0.05)
    async with a_connection(Gateway()) as connection:
        connection.writer.write(sent)
        assert await connection.reader.read() == (REFUSAL if sent else b"")
        with pytest.raises(ConnectionError):  # a closed end answers what comes by a reset
            await sends_on(connection, b"more")


HANDED_ON = {
    "there is room": ASKING,
    "a part of a head": ASKING[:50],
    "no wait for 100": head("/query", "Content-Length: 5") + b"image",
    "its body is there": ASKING + b"image",
    "another request is there": ASKING + ASKING,
    "no length": head("/query", "Transfer-Encoding: chunked", "Expect: 100-continue"),
    "another method": head("/query", "Content-Length: 5", "Expect: 100-continue", method="PUT"),
    "another path": head("/queries", "Content-Length: 5", "Expect: 100-continue"),
    "an older version": head("/query", "Content-Length: 5", "Expect: 100-continue", version="1.0"),
    "a huge head": head("/query", "Content-Length: 5", "Expect: 100-continue", "X: " + "x" * 32 * 1024),
    "no HTTP": b"\x16\x03\x01 hello",
}


@pytest.mark.parametrize("data", HANDED_ON.values(), ids=HANDED_ON)
async def test_handed_on(data: bytes) -> None:
    gateway = Gateway()
    gateway.answer = None if data is ASKING else REFUSAL
    async with a_connection(gateway) as connection:
        connection.writer.write(data)
        expected = b"handed on: " + data
        assert await connection.reader.readexactly(len(expected)) == expected
        connection.writer.write(b"and on")
        assert await connection.reader.readexactly(6) == b"and on"
    assert len(gateway.asked) == (data is ASKING)
