"""The least Python that goes a request's way, and nothing besides: python benchmarks/skeleton.py PART ARGUMENT ...

gateway SOCKET PORT STORE   reads a form, puts the image on a stream, saves the reply's image, answers
worker SOCKET               reads the stream, has a child mirror the image, replies
child DESCRIPTOR MEMORY     the bare codec, on images in a memory file

Raw ASGI, hiredis, a child behind a memory file, the settings of malloc and of the kernel's scheduler as in the product;
no limits, deadlines, leases, counted starts, checks, metrics, failures. What a machine gives it is what Python, the
server and the kernel leave of the codec there; what the product takes beyond it, its promises take.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import sys
from collections import deque
from typing import Any

import hiredis
import uvicorn
import uvloop
from multipart import MultipartSegment, PushMultipartParser, parse_options_header
from service import BROKERS
from system import Part, Place, System

from safelight.brokers import embedded
from safelight.operations.mirror import scan, turbojpeg
from safelight.operations.mirror.exif import Axis
from safelight.process import keep_freed_memory, work_in_batches

__all__ = ["SKELETON"]

JOBS, GROUP, INBOX = b"jobs", b"workers", b"inbox"
BIG = 16 * 1024
AHEAD = 2  # jobs that a worker holds: the child's, and one that waits for it
BLOCK_MS = 1_000
MAX_HEADER = 64
NOT_YET = object()


class Line(asyncio.Protocol):
    """A connection: commands out, answers in, in one order."""

    def __init__(self) -> None:
        self._parser = hiredis.Reader(notEnoughData=NOT_YET)
        self._waiting: deque[tuple[int, asyncio.Future[list[Any]]]] = deque()
        self._batch: list[Any] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed(data)
        while (answer := self._parser.gets()) is not NOT_YET:
            self._batch.append(answer)
            if len(self._batch) == self._waiting[0][0]:
                self._waiting.popleft()[1].set_result(self._batch)
                self._batch = []

    def call(self, *commands: tuple[Any, ...]) -> asyncio.Future[list[Any]]:
        answers = asyncio.get_running_loop().create_future()
        self._waiting.append((len(commands), answers))
        out = []
        for command in commands:
            last = command[-1]
            if isinstance(last, bytes) and len(last) > BIG:
                head = hiredis.pack_command((*command[:-1], b"")).removesuffix(b"$0\r\n\r\n")
                out += [head + b"$%d\r\n" % len(last), last, b"\r\n"]
            else:
                out.append(hiredis.pack_command(command))
        self._transport.writelines(out)
        return answers


async def connected(path: str) -> Line:
    while True:
        try:
            return (await asyncio.get_running_loop().create_unix_connection(Line, path))[1]
        except OSError:  # it is still starting
            await asyncio.sleep(0.05)


class Gateway:
    """The ASGI application."""

    def __init__(self, broker: str, store: str) -> None:
        self._broker, self._store = broker, store
        self._waiting: dict[bytes, asyncio.Future[list[bytes]]] = {}
        self._ids = itertools.count()
        self._line: asyncio.Future[Line] | None = None
        self._replies: asyncio.Task[None] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        image = await self._image(dict(scope["headers"])[b"content-type"].decode(), receive)
        if self._line is None:
            self._line = asyncio.ensure_future(connected(self._broker))
            self._replies = asyncio.create_task(self._listen())
        job = b"%d" % next(self._ids)
        reply = self._waiting[job] = asyncio.get_running_loop().create_future()
        await (await self._line).call(("XADD", JOBS, "*", "id", job, "body", image))
        mirrored = (await reply)[3]
        file = os.open(f"{self._store}/{job.decode()}.jpg", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(file, mirrored)
        os.close(file)
        body = json.dumps({"status": "SUCCESS", "size": f"{len(image) // 1024}kb"}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _image(self, content_type: str, receive: Any) -> bytes:
        parser = PushMultipartParser(parse_options_header(content_type)[1]["boundary"])
        chunks, is_inside, is_more = [], False, True
        while is_more:
            message = await receive()
            for event in parser.parse(message["body"]):
                if isinstance(event, MultipartSegment):
                    is_inside = event.name == "image"
                elif event is None:
                    is_inside = False
                elif is_inside:
                    chunks.append(bytes(event))
            is_more = message.get("more_body", False)
        return b"".join(chunks)

    async def _listen(self) -> None:
        line, last, chores = await connected(self._broker), b"0-0", []
        while True:
            read = ("XREAD", "COUNT", 64, "BLOCK", BLOCK_MS, "STREAMS", INBOX, last)
            *_, found = await line.call(*chores, read)
            entries = found[0][1] if found else []
            chores = [("XDEL", INBOX, *(entry for entry, _ in entries))] if entries else []
            for entry, fields in entries:
                last = entry
                self._waiting.pop(fields[1]).set_result(fields)


class Child(asyncio.Protocol):
    """A worker's end of its child's socket."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def ask(self, size: int) -> asyncio.Future[bytes]:
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(b"%d" % size)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._answer.set_result(data)


async def work(broker: str) -> None:
    line, blocking, child, memory = await connected(broker), await connected(broker), *await started()
    await line.call(("XGROUP", "CREATE", JOBS, GROUP, "0", "MKSTREAM"))
    jobs: asyncio.Queue[tuple[bytes, list[bytes]]] = asyncio.Queue()
    room = asyncio.Semaphore(AHEAD)

    async def take() -> None:
        ask = ("XREADGROUP", "GROUP", GROUP, f"{os.getpid()}", "COUNT", 1)
        while await room.acquire():
            [found] = await line.call((*ask, "STREAMS", JOBS, b">"))
            while not found:
                [found] = await blocking.call((*ask, "BLOCK", BLOCK_MS, "STREAMS", JOBS, b">"))
            jobs.put_nowait(found[0][1][0])

    async def mirror() -> None:
        while True:
            entry, (_, job, _, image) = await jobs.get()
            os.pwrite(memory, image, 0)
            mirrored = os.pread(memory, int(await child.ask(len(image))), 0)
            room.release()
            answer = ("XADD", INBOX, "*", "id", job, "body", mirrored)
            line.call(("MULTI",), answer, ("XACK", JOBS, GROUP, entry), ("XDEL", JOBS, entry), ("EXEC",))

    await asyncio.gather(take(), mirror())


async def started() -> tuple[Child, int]:
    ours, theirs = socket.socketpair()
    memory = os.memfd_create("skeleton", 0)
    handed = (theirs.fileno(), memory)
    await asyncio.create_subprocess_exec(sys.executable, __file__, "child", *map(str, handed), pass_fds=handed)
    theirs.close()
    return (await asyncio.get_running_loop().create_unix_connection(Child, sock=ours))[1], memory


def flip(descriptor: str, memory: str) -> None:
    library, connection, file = turbojpeg.find(), socket.socket(fileno=int(descriptor)), int(memory)
    work_in_batches(False)
    kind = None
    while size := connection.recv(MAX_HEADER):
        image = os.pread(file, int(size), 0)
        if kind is None:
            kind = scan.scan(image).kind
        mirrored = library.flip(image, Axis.HORIZONTAL, kind)
        os.pwrite(file, mirrored, 0)
        connection.send(b"%d" % len(mirrored))


def _parts(place: Place) -> list[Part]:
    broker = str(embedded.socket_path(place.port))
    command = [sys.executable, __file__]
    workers = [Part("worker", [*command, "worker", broker])] * place.workers
    gateway = Part("gateway", [*command, "gateway", broker, str(place.port), str(place.store)])
    return [*BROKERS["embedded"].parts(place), *workers, gateway]


SKELETON = System("the skeleton", needs_redis=False, parts=_parts)


if __name__ == "__main__":
    keep_freed_memory()
    work_in_batches()
    match sys.argv[1:]:
        case ["gateway", broker, port, store]:
            uvicorn.run(Gateway(broker, store), port=int(port), loop="uvloop", lifespan="off", log_level="critical")
        case ["worker", broker]:
            uvloop.run(work(broker))
        case ["child", descriptor, memory]:
            flip(descriptor, memory)
