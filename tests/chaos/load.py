"""A load generator that costs little: one thread, one epoll, no HTTP library, and bodies only to who asks for them."""

from __future__ import annotations

import errno
import heapq
import itertools
import select
import socket
import time
from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Answer", "Load", "Picture", "crowd", "offer", "repeat"]

HOST = "127.0.0.1"
READ_BYTES = 64 * 1024
LATEST_SECONDS = 0.05  # of a look at what is due


@dataclass(frozen=True)
class Picture:
    """A request for one image: what is sent at first, and what only when the gateway says 100 (or at once)."""

    image: bytes
    target: str = "/query"
    asks: bool = True

    @property
    def head(self) -> bytes:
        lines = [f"POST {self.target} HTTP/1.1", "Host: here", "Content-Type: application/octet-stream"]
        lines += [f"Content-Length: {len(self.image)}", *(["Expect: 100-continue"] if self.asks else [])]
        return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n"


@dataclass(frozen=True)
class Answer:
    """What became of one request: a status (0: none came), seconds, and those since its body was asked for."""

    status: int
    seconds: float
    at: float
    was_asked: bool = False
    retry_after: str = ""
    closes: bool = False
    admitted_seconds: float = 0.0


@dataclass
class Load:
    """All answers, and what could not even be offered since too many connections were open."""

    answers: list[Answer] = field(default_factory=list)
    not_offered: int = 0
    most_open: int = 0

    def with_status(self, *statuses: int) -> list[Answer]:
        return [answer for answer in self.answers if answer.status in statuses]

    @property
    def statuses(self) -> Counter[int]:
        return Counter(answer.status for answer in self.answers)


class _Exchange:
    """One request on one connection, step by step."""

    def __init__(self, port: int, picture: Picture, head: bytes) -> None:
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.code = self.socket.connect_ex((HOST, port))
        self._picture = picture
        self._head = head
        self.begin()

    def begin(self) -> None:
        """A request, also the next one on a connection that stays."""
        self.begun = time.perf_counter()
        self._left = memoryview(self._head if self._picture.asks else self._head + self._picture.image)
        self._read = b""
        self.was_asked = False

    @property
    def wants(self) -> int:
        return select.EPOLLIN | (select.EPOLLOUT if self._left else 0)

    def write(self) -> None:
        self._left = self._left[self.socket.send(self._left) :]

    def read(self) -> Answer | None:
        """The answer, if it is complete; a lost connection is an answer of status 0."""
        data = self.socket.recv(READ_BYTES)
        if not data:
            return self.lost()
        self._read += data
        while (end := self._read.find(b"\r\n\r\n")) >= 0:
            lines = self._read[:end].lower().split(b"\r\n")
            status = int(lines[0].split(b" ", 2)[1])
            if status == 100:
                self._read = self._read[end + 4 :]
                self.was_asked = True
                self._asked_at = time.perf_counter()
                self._left = memoryview(self._picture.image)
                continue
            headers = dict(line.split(b": ", 1) for line in lines[1:])
            if len(self._read) < end + 4 + int(headers[b"content-length"]):
                return None
            now = time.perf_counter()
            return Answer(
                status,
                now - self.begun,
                now,
                self.was_asked,
                headers.get(b"retry-after", b"").decode(),
                headers.get(b"connection") == b"close",
                now - self._asked_at if self.was_asked else now - self.begun,
            )
        return None

    def lost(self) -> Answer:
        return Answer(0, time.perf_counter() - self.begun, time.perf_counter(), self.was_asked)


class _Client:
    """Exchanges and their epoll."""

    def __init__(self, port: int) -> None:
        self.load = Load()
        self.open: dict[int, _Exchange] = {}
        self._port = port
        self._epoll = select.epoll()
        self._wanted: dict[int, int] = {}
        self._heads: dict[int, bytes] = {}

    def start(self, picture: Picture) -> None:
        head = self._heads.setdefault(id(picture), picture.head)
        exchange = _Exchange(self._port, picture, head)
        number = exchange.socket.fileno()
        if exchange.code not in (0, errno.EINPROGRESS):
            self._done(exchange, exchange.lost())
            return
        self.open[number] = exchange
        self._wanted[number] = exchange.wants
        self._epoll.register(number, exchange.wants)
        self.load.most_open = max(self.load.most_open, len(self.open))

    def turn(self, seconds: float) -> list[tuple[_Exchange, Answer]]:
        """Do what can be done within so long; those that ended are taken out, their sockets still open."""
        ended = []
        for number, events in self._epoll.poll(max(0.0, seconds)):
            exchange = self.open[number]
            answer = None
            try:
                if events & select.EPOLLIN:
                    answer = exchange.read()
                elif events & (select.EPOLLERR | select.EPOLLHUP):
                    answer = exchange.lost()
                if answer is None and events & select.EPOLLOUT:
                    exchange.write()
            except BlockingIOError:
                continue
            except OSError:
                answer = exchange.lost()
            if answer is not None:
                self.load.answers.append(answer)
                ended.append((exchange, answer))
            elif (wants := exchange.wants) != self._wanted[number]:
                self._wanted[number] = wants
                self._epoll.modify(number, wants)
        return ended

    def again(self, exchange: _Exchange) -> None:
        """The same request on the same connection."""
        exchange.begin()
        number = exchange.socket.fileno()
        self._wanted[number] = exchange.wants
        self._epoll.modify(number, exchange.wants)

    def close(self, exchange: _Exchange) -> None:
        del self.open[exchange.socket.fileno()]
        exchange.socket.close()

    def _done(self, exchange: _Exchange, answer: Answer) -> None:
        exchange.socket.close()
        self.load.answers.append(answer)

    def end(self) -> None:
        for exchange in list(self.open.values()):
            self.close(exchange)
        self._epoll.close()


def offer(
    port: int, pictures: list[Picture], *, rate: float, seconds: float, most_open: int, patience: float = 90.0
) -> Load:
    """An open loop: `rate` requests in a second, whatever becomes of those before, each on a connection of its own.

    Returns when all are answered, those that are not after `patience` seconds with a status of 0.
    """
    client, turns = _Client(port), itertools.cycle(pictures)
    begun, offered = time.perf_counter(), 0
    until = begun + seconds
    while (now := time.perf_counter()) < until:
        due = int((now - begun) * rate)
        while offered < due:
            offered += 1
            if len(client.open) < most_open:
                client.start(next(turns))
            else:
                client.load.not_offered += 1
        for exchange, _ in client.turn(min(LATEST_SECONDS, begun + (offered + 1) / rate - time.perf_counter())):
            client.close(exchange)
    while client.open and time.perf_counter() < until + patience:
        for exchange, _ in client.turn(LATEST_SECONDS):
            client.close(exchange)
    client.load.answers.extend(exchange.lost() for exchange in client.open.values())
    client.end()
    return client.load


def crowd(
    port: int, picture: Picture, *, clients: int, seconds: float, rush: float = 1.0, patience: float = 90.0
) -> Load:
    """So many clients, which come within `rush` seconds.

    Each posts again once it was answered, and after `Retry-After` once it was refused.
    """
    client = _Client(port)
    begun = time.perf_counter()
    until = begun + seconds
    due = [(begun + rush * number / clients, number) for number in range(clients)]
    while client.open or time.perf_counter() < until:
        now = time.perf_counter()
        if now > until + patience:
            break
        while now < until and due and due[0][0] <= now:
            heapq.heappop(due)
            client.start(picture)
        for exchange, answer in client.turn(LATEST_SECONDS if not due else min(LATEST_SECONDS, due[0][0] - now)):
            client.close(exchange)
            wait = float(answer.retry_after or 0) if answer.status == 503 else 0.0
            heapq.heappush(due, (answer.at + wait, id(answer)))
    client.load.answers.extend(exchange.lost() for exchange in client.open.values())
    client.end()
    return client.load


def repeat(port: int, pictures: dict[Picture, int], *, seconds: float, stays: bool = True) -> dict[Picture, Load]:
    """Closed loops: so many clients for each picture, each with the next request when the last one is answered.

    A client's connection `stays`, or is another one for each request.
    """
    clients = {picture: _Client(port) for picture in pictures}
    for picture, connections in pictures.items():
        for _ in range(connections):
            clients[picture].start(picture)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for picture, client in clients.items():
            for exchange, answer in client.turn(0.001 if len(clients) > 1 else LATEST_SECONDS):
                if stays and answer.status and not answer.closes:
                    client.again(exchange)
                else:
                    client.close(exchange)
                    client.start(picture)
    for client in clients.values():
        client.end()
    return {picture: client.load for picture, client in clients.items()}
