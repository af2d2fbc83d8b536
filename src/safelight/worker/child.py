"""C3: what runs in a child process: operations, under limits, on bytes that nobody trusts.

The child has no connection to the broker, no credentials in its environment, and two open files: a socket to its
consumer and a memory file. A request comes as a header on the socket, with the image in the memory file; the result
goes back the same way. Headers are length-prefixed JSON; nothing is pickled in either direction.

The consumer runs this file as `python -m safelight.worker.child SOCKET MEMORY ADDRESS_SPACE [MODULE ...]`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from safelight import operations
from safelight.errors import ConfigurationError, SafelightError
from safelight.process import freeze_start_up, keep_freed_memory, work_in_batches

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FRAME", "MAX_FRAME", "MAX_RESULT", "Outcome", "Request"]

FRAME = struct.Struct(">I")  # the length of the header that follows
MAX_FRAME = 64 * 1024
MAX_RESULT = 256 * 1024 * 1024  # bytes of a resulting image; also the largest file that a child may write
OPEN_FILES = 64
# The consumer kills a child at its limit. This much later the child ends itself, should the consumer be gone.
ALARM_GRACE_SECONDS = 5.0
PR_SET_PDEATHSIG = 1
MOST_KILLABLE = "1000"  # proc_pid_oom_score_adj(5)

# Pictures of 8 x 8 grey pixels for the first run of each operation: what is imported lazily is then imported.
TINY_PICTURES = (
    bytes.fromhex(  # JPEG
        "ffd8ffe000104a46494600010100000100010000ffdb00430050373c463c32504641465a55505f78c882786e6e78f5afb991"
        "c8ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffc0000b08000800080101"
        "1100ffc40014000100000000000000000000000000000000ffc40014100100000000000000000000000000000000ffda0008"
        "010100003f003fffd9"
    ),
    bytes.fromhex(  # PNG
        "89504e470d0a1a0a0000000d4948445200000008000000080800000000e164e157000000104944415478da636c6080002606"
        "8a180026080090b5310a910000000049454e44ae426082"
    ),
)


class Request(msgspec.Struct, frozen=True):
    """What the consumer asks: `size` bytes of the memory file are the image, `limit` is in seconds."""

    size: int
    operations: list[tuple[str, dict[str, Any]]]
    limit: float


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of it: a result, an `error` (a code of `errors.py`: the image is at fault), or a `failure`.

    `size` bytes of the memory file are the resulting image (-1: there is none); `work` is in microseconds.
    A `failure` is what the operation raised: the job is started again, until its attempts run out.
    """

    size: int = -1
    work: int = 0
    facts: dict[str, Any] = {}
    notes: dict[str, str] = {}
    error: str | None = None
    detail: str = ""
    failure: str | None = None


class Ready(msgspec.Struct, frozen=True):
    """The child's first frame: what it offers, once each operation has run; or why it cannot start."""

    operations: list[str]
    error: str | None = None


def receive(connection: socket.socket) -> bytes:
    """One frame; `EOFError` when the other end is closed."""
    data, length = b"", FRAME.size
    while len(data) < length:
        if not (more := connection.recv(MAX_FRAME)):  # mostly all of it at once: the consumer asks one thing at a time
            raise EOFError
        data += more
        if len(data) >= FRAME.size:
            length = FRAME.size + FRAME.unpack_from(data)[0]
    return data[FRAME.size :]


def frame(message: msgspec.Struct) -> bytes:
    """A message with its length before it."""
    header = msgspec.json.encode(message)
    return FRAME.pack(len(header)) + header


def _limit(address_space: int) -> None:
    """Limits that hold whatever the operation's libraries do."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_RESULT, MAX_RESULT))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    if address_space and sys.platform == "linux":  # macOS refuses RLIMIT_AS
        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    if sys.platform == "linux":  # where memory runs out, in a container above all: the child, not its consumer
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(MOST_KILLABLE)


def _die_with_parent(parent: int) -> None:
    """End when the consumer is killed, also in the middle of an operation that never returns."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(0)


def _work(table: Mapping[str, operations.Operation], memory: int, request: Request) -> Outcome:
    image = os.pread(memory, request.size, 0)
    begun = time.perf_counter_ns()
    try:
        result = operations.run(table, request.operations, image)
    except SafelightError as exc:
        return Outcome(error=exc.code, detail=exc.detail, work=_since(begun))
    except Exception as exc:  # noqa: BLE001 - an operation is somebody's code, and may raise anything
        traceback.print_exc()
        return Outcome(failure=f"{type(exc).__name__}: {exc}"[:1_000], work=_since(begun))
    work = _since(begun)
    if result.image is None:
        return Outcome(work=work, facts=dict(result.facts), notes=dict(result.notes))
    if len(result.image) > MAX_RESULT:
        return Outcome(error="unprocessable_image", detail="The resulting image is too big to send back.", work=work)
    _write(memory, result.image)
    return Outcome(size=len(result.image), work=work, facts=dict(result.facts), notes=dict(result.notes))


def _write(memory: int, image: bytes) -> None:
    view, offset = memoryview(image), 0
    while offset < len(view):
        offset += os.pwrite(memory, view[offset:], offset)


def _since(begun: int) -> int:
    return (time.perf_counter_ns() - begun) // 1_000


def _encoded(outcome: Outcome) -> bytes:
    """The outcome's frame; facts that cannot be sent are the operation's failure."""
    try:
        message = frame(outcome)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        return frame(Outcome(failure=f"its facts cannot be written as JSON: {exc}"[:1_000]))
    if len(message) > MAX_FRAME:
        return frame(Outcome(failure=f"its facts and notes are {len(message)} bytes of JSON; {MAX_FRAME} are allowed"))
    return message


def main(connection: socket.socket, memory: int, address_space: int, modules: list[str]) -> None:
    """Load and warm the operations, then serve until the socket closes."""
    try:
        table = operations.load(modules)
    except ConfigurationError as exc:
        connection.sendall(frame(Ready([], exc.detail)))
        return
    _limit(address_space)
    for operation in table.values():
        for picture in TINY_PICTURES:
            with contextlib.suppress(Exception):  # that it dislikes the picture does not matter
                operation(picture)
    freeze_start_up()
    connection.sendall(frame(Ready(sorted(table))))
    requests = msgspec.json.Decoder(Request)
    while True:
        try:
            request = requests.decode(receive(connection))
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, request.limit + ALARM_GRACE_SECONDS)
        message = _encoded(_work(table, memory, request))
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.sendall(message)


if __name__ == "__main__":
    _die_with_parent(int(sys.argv[1]))
    keep_freed_memory()
    work_in_batches(False)
    main(socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
