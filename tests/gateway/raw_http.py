"""A client that sends any bytes and reads the answers one by one: also what HTTP libraries would not send."""

from __future__ import annotations

import json
import select
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conftest import TEST_IMAGE

if TYPE_CHECKING:
    from typing import Self

    from conftest import System

IMAGE = TEST_IMAGE.read_bytes()
SUCCESS = b'{"status": "SUCCESS", "size": "82kb"}'
FORM = "multipart/form-data; boundary=limit"


@dataclass
class Answer:
    """One response; the names of `headers` are in lower case, `interim` are the 1xx statuses before it."""

    status: int
    headers: dict[str, str]
    body: bytes
    interim: list[int]

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One TCP connection to a gateway."""

    def __init__(self, port: int, seconds: float = 20.0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=seconds)
        self._reading = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._reading.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self, method: str = "POST") -> Answer:
        """The next answer, read to its own end and no further."""
        interim: list[int] = []
        while True:
            version, status, _ = self._reading.readline().split(b" ", 2)
            assert version == b"HTTP/1.1"
            headers = {}
            while line := self._reading.readline().strip():
                name, _, value = line.decode("latin-1").partition(":")
                assert name.lower() not in headers, f"{name} is there twice"
                headers[name.lower()] = value.strip()
            if int(status) >= 200:
                break
            interim.append(int(status))
        bodiless = method == "HEAD" or int(status) == 304
        body = b"" if bodiless else self._reading.read(int(headers["content-length"]))
        return Answer(int(status), headers, body, interim)

    def closed(self) -> bool:
        """Wait for the end of the connection; false if anything comes before it."""
        try:
            return self._reading.read(1) == b""
        except ConnectionResetError:
            return True

    def quiet(self, seconds: float) -> bool:
        """Whether nothing comes for so long."""
        return not select.select([self.socket], [], [], seconds)[0]


def part(body: bytes = IMAGE, disposition: str = 'name="image"; filename="picture.jpg"', *headers: str) -> bytes:
    """One part of a form, from its delimiter to the line end before the next one."""
    lines = [f"Content-Disposition: form-data; {disposition}", *headers] if disposition else list(headers)
    return b"--limit\r\n" + "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + body + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--limit--\r\n"


def head(target: str = "/query", *headers: str, method: str = "POST", version: str = "1.1") -> bytes:
    lines = [f"{method} {target} HTTP/{version}", "Host: here", *headers]
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n"


def post(body: bytes, *headers: str, target: str = "/query", content_type: str = FORM) -> bytes:
    typed = [f"Content-Type: {content_type}"] if content_type else []
    return head(target, *typed, f"Content-Length: {len(body)}", *headers) + body


def chunked(body: bytes, size: int = 10_000) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


GOOD = post(form(part()))


def check_failure(answer: Answer, status: int, code: str) -> None:
    """The shape that every failure has."""
    assert (answer.status, answer.json()["error"]) == (status, code), answer
    assert set(answer.json()) == {"status", "error", "detail"}
    assert answer.json()["status"] == "FAILURE"
    assert answer.json()["detail"].endswith((".", "picture.jpg"))
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert "total;dur=" in answer.headers["server-timing"]
    assert ("retry-after" in answer.headers) == (status == 503)


def works(connection: Connection) -> None:
    """The next request is answered as ever."""
    connection.send(GOOD)
    answer = connection.answer()
    assert (answer.status, answer.body) == (200, SUCCESS)


def refused(system: System, data: bytes, status: int, code: str, *, closes: bool = False) -> Answer:
    """Send, get this failure, and nothing is saved; the next requests work, here (if it stays open) and elsewhere."""
    before = set(system.store.iterdir())
    with Connection(system.port) as connection:
        connection.send(data)
        answer = connection.answer()
        check_failure(answer, status, code)
        assert set(system.store.iterdir()) == before
        if closes:
            assert answer.headers["connection"] == "close"
            assert connection.closed()
        else:
            works(connection)
    with Connection(system.port) as connection:
        connection.send(head("/readyz", method="GET"))
        assert connection.answer().body == b"ready\n"
        if closes:
            works(connection)
    return answer


def metric(system: System, series: str) -> float:
    """The value of one series of /metrics, 0 if there is none yet."""
    for line in system.client.get("/metrics").text.splitlines():
        name, _, value = line.rpartition(" ")
        if name == series:
            return float(value)
    return 0.0
