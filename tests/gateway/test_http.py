"""What arrives on a connection and is no HTTP, or HTTP at its edges: a clean answer or a clean end, never a 500."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from raw_http import FORM, GOOD, SUCCESS, Connection, check_failure, chunked, form, head, part, post, refused, works

if TYPE_CHECKING:
    from conftest import System

LIVEZ = head("/livez", method="GET")
CHUNKED = head("/query", f"Content-Type: {FORM}", "Transfer-Encoding: chunked")

NO_HTTP = {
    "zeros": bytes(1_000),
    "noise": bytes(range(256)) * 50,
    "a TLS hello": bytes.fromhex("16030100c6010000c20303") + b"x" * 200,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "HTTP/3.0": b"GET /livez HTTP/3.0\r\nHost: here\r\n\r\n",
    "HTTP/0.9": b"GET /livez\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
    "Redis": b"*1\r\n$4\r\nPING\r\n",
    "no method": b"/livez HTTP/1.1\r\nHost: here\r\n\r\n",
    "an unknown method": b"FROB /livez HTTP/1.1\r\nHost: here\r\n\r\n",
    "a method in small letters": b"get /livez HTTP/1.1\r\nHost: here\r\n\r\n",
    "bare line ends": LIVEZ.replace(b"\r\n", b"\n"),
    "no host": LIVEZ.replace(b"Host: here\r\n", b""),
    "two hosts": LIVEZ.replace(b"Host: here\r\n", b"Host: here\r\nHost: there\r\n"),
    "NUL in a header": head("/livez", "X: a\0b", method="GET"),
    "NUL in the path": head("/li\0vez", method="GET"),
    "a folded header": head("/livez", "X: a\r\n b", method="GET"),
    "a blank before the colon": head("/livez", "X : a", method="GET"),
    "a header without a name": head("/livez", ": a", method="GET"),
    "a header without a colon": head("/livez", "X", method="GET"),
    "bytes over 127 in the path": LIVEZ.replace(b"livez", b"\xff\xfe"),
    "bytes over 127 in the query": LIVEZ.replace(b"livez", b"livez?\xff\xfe"),
    "an absolute target without a path": head("http://here", method="GET"),
    "CONNECT": head("here:80", method="CONNECT"),
    "CONNECT with a body": head("here:80", "Content-Length: 5", method="CONNECT") + b"hello",
    "a negative length": head("/query", "Content-Length: -1"),
    "a signed length": head("/query", "Content-Length: +1"),
    "a length that is none": head("/query", "Content-Length: many"),
    "an empty length": head("/query", "Content-Length:"),
    "a list of lengths": head("/query", "Content-Length: 5, 5"),
    "a length in hex": head("/query", "Content-Length: 0x10"),
    "a length over 64 bits": head("/query", "Content-Length: 99999999999999999999999"),
    "two lengths": head("/query", "Content-Length: 5", "Content-Length: 6"),
    "the same length twice": head("/query", "Content-Length: 5", "Content-Length: 5"),
    "a length and chunks": head("/query", "Content-Length: 5", "Transfer-Encoding: chunked") + chunked(b"hello"),
    "chunks and a length": head("/query", "Transfer-Encoding: chunked", "Content-Length: 5") + chunked(b"hello"),
    "chunked twice": head("/query", "Transfer-Encoding: chunked, identity") + chunked(b"hello"),
    "another coding": head("/query", "Transfer-Encoding: xchunked"),
    "a chunk's size that is none": CHUNKED + b"hello\r\n",
    "a negative chunk": CHUNKED + b"-5\r\nhello\r\n",
    "a chunk over 64 bits": CHUNKED + b"f" * 20 + b"\r\n",
    "a chunk longer than it says": CHUNKED + b"3\r\nhello\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", NO_HTTP)
def test_no_http(name: str, shared_system: System) -> None:
    answer = refused(shared_system, NO_HTTP[name], 400, "malformed_request", closes=True)
    assert answer.headers["content-length"] == str(len(answer.body))


HARMLESS = {
    "an absolute target": (head("http://elsewhere/livez", method="GET"), b"ok\n"),
    "a host that is none": (LIVEZ.replace(b"here", b"["), b"ok\n"),
    "an empty host": (LIVEZ.replace(b"here", b""), b"ok\n"),
    "a query that is no UTF-8": (LIVEZ.replace(b"livez", b"livez?%ff%fe"), b"ok\n"),
    "empty lines first": (b"\r\n\r\n" + LIVEZ, b"ok\n"),
    "WebSocket": (
        head("/livez", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", method="GET"),
        b"ok\n",
    ),
    "h2c": (head("/livez", "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", method="GET"), b"ok\n"),
    "an upgrade with a form": (post(form(part()), "Upgrade: h2c", "Connection: Upgrade"), SUCCESS),
    "an upgrade with chunks": (
        CHUNKED.replace(b"Host", b"Upgrade: websocket\r\nConnection: upgrade\r\nHost") + chunked(form(part())),
        SUCCESS,
    ),
    "trailers": (CHUNKED + chunked(form(part()))[:-2] + b"X-Request-ID: trailer\r\n\r\n", SUCCESS),
    "extensions of chunks": (CHUNKED + chunked(form(part())).replace(b"2710\r\n", b"2710;a=b\r\n"), SUCCESS),
    "headers of 31 KB": (head("/livez", *[f"X-{n}: {'x' * 990}" for n in range(31)], method="GET"), b"ok\n"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_edges_that_are_fine(name: str, shared_system: System) -> None:
    data, body = HARMLESS[name]
    with Connection(shared_system.port) as connection:
        for _ in range(2):
            connection.send(data)
            answer = connection.answer()
            assert (answer.status, answer.body) == (200, body)
            assert re.fullmatch(r"[0-9a-f-]{36}", answer.headers["x-request-id"])
        connection.send(data + data + LIVEZ)
        assert [connection.answer().body for _ in range(3)] == [body, body, b"ok\n"]
        works(connection)


LARGE = {
    "a header": head("/livez", f"X: {'x' * 33_000}", method="GET"),
    "a header of 1 MB": head("/livez", f"X: {'x' * 1_000_000}", method="GET"),
    "a name of 1 MB": head("/livez", f"{'x' * 1_000_000}: x", method="GET"),
    "many headers": head("/livez", *[f"X-{n}: {'x' * 100}" for n in range(400)], method="GET"),
    "a target": head(f"/livez?{'x' * 33_000}", method="GET"),
    "a target of 1 MB": head(f"/{'x' * 1_000_000}", method="GET"),
    "headers that never end": head("/livez", *["X: x"] * 100_000, method="GET")[:-2],
    "one header that never ends": head("/livez", f"X: {'x' * 1_000_000}", method="GET")[:-4],
    "empty lines that never end": b"\r\n" * 100_000,
}


@pytest.mark.parametrize("name", LARGE)
def test_headers_over_32_kb(name: str, shared_system: System) -> None:
    refused(shared_system, LARGE[name], 431, "headers_too_large", closes=True)


@pytest.mark.parametrize("size", [100, 4_000])
def test_headers_of_31_kb_in_pieces(size: int, shared_system: System) -> None:
    data = head("/livez", *[f"X-{n}: {'x' * 990}" for n in range(31)], method="GET")
    with Connection(shared_system.port) as connection:
        for at in range(0, len(data), size):
            connection.send(data[at : at + size])
        assert connection.answer().body == b"ok\n"


@pytest.mark.parametrize("end", [b"0\r\nX: ", b"0\r\n" + b"X: x\r\n" * 20_000, b"5;"])
def test_what_follows_a_chunk_is_limited_too(end: bytes, shared_system: System) -> None:
    refused(shared_system, CHUNKED + end + b"x" * 1_000_000, 431, "headers_too_large", closes=True)


def test_what_is_no_http_is_answered_after_what_came_before(shared_system: System) -> None:
    with Connection(shared_system.port) as connection:
        connection.send(GOOD + LIVEZ + GOOD + b"\0nonsense\r\n\r\n" + GOOD)
        assert [connection.answer().body for _ in range(3)] == [SUCCESS, b"ok\n", SUCCESS]
        check_failure(connection.answer(), 400, "malformed_request")
        assert connection.closed()


def test_a_broken_body_is_answered_after_what_came_before(shared_system: System) -> None:
    with Connection(shared_system.port) as connection:
        connection.send(GOOD + CHUNKED + b"5\r\nhello\r\nnonsense\r\n")
        assert connection.answer().body == SUCCESS
        check_failure(connection.answer(), 400, "malformed_request")
        assert connection.closed()


def test_a_body_that_breaks_after_its_refusal_gets_no_second_answer(shared_system: System) -> None:
    with Connection(shared_system.port) as connection:
        connection.send(CHUNKED.replace(b"/query", b"/nowhere") + b"5\r\nhello\r\n")
        check_failure(connection.answer(), 404, "not_found")
        connection.send(b"nonsense\r\n")
        assert connection.closed()


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_query_takes_post_alone(method: str, shared_system: System) -> None:
    with Connection(shared_system.port) as connection:
        connection.send(head("/query", method=method))
        answer = connection.answer(method)
        assert (answer.status, answer.headers["allow"]) == (405, "POST")
        if method != "HEAD":
            check_failure(answer, 405, "method_not_allowed")
        works(connection)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/openapi.json"])
def test_head_is_get_without_a_body(path: str, shared_system: System) -> None:
    with Connection(shared_system.port) as connection:
        for method in ("HEAD", "GET"):
            connection.send(head(path, method=method))
            answer = connection.answer(method)
            assert answer.status == 200
            assert (len(answer.body) > 0) == (method == "GET")
        connection.send(head(path, "Content-Length: 5") + b"hello")
        answer = connection.answer()
        check_failure(answer, 405, "method_not_allowed")
        assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}
        works(connection)


@pytest.mark.parametrize("given", ["a" * 129, "a b", "é", "<script>", "", "x,y"])
def test_an_id_that_cannot_be_one_is_replaced(given: str, shared_system: System) -> None:
    with Connection(shared_system.port) as connection:
        connection.send(LIVEZ.replace(b"here\r\n", f"here\r\nX-Request-ID: {given}\r\n".encode()))
        assert re.fullmatch(r"[0-9a-f-]{36}", connection.answer().headers["x-request-id"])


def test_many_connections_at_once_hold_nobody_up(shared_system: System) -> None:
    idle = [Connection(shared_system.port) for _ in range(300)]
    try:
        for at, connection in enumerate(idle):
            connection.send(LIVEZ[: at % len(LIVEZ)])
        with Connection(shared_system.port) as connection:
            works(connection)
        for at, connection in enumerate(idle):
            connection.send(LIVEZ[at % len(LIVEZ) :])
        assert {connection.answer().body for connection in idle} == {b"ok\n"}
    finally:
        for connection in idle:
            connection.__exit__()
