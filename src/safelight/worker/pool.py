"""C3: the child processes: started, fed through a memory file, killed, replaced.

A child that crashes, hangs or overruns is killed; a new one takes its place. The pool knows which job did it, since a
child has one job at a time. Nothing a child sends is trusted: headers are decoded to a fixed shape, and a result is
copied out of the memory file once (by `pread`, never through a mapping: a child that cuts the file short could then
end this process with SIGBUS) before anyone looks at it.

A child is recycled when it has had its share of jobs or holds too much memory: its successor is started beside it, and
takes its place when it is warm and the child has no job in hand. So a job is neither interrupted nor kept waiting, no
more than `size` jobs run at once, and there is one child more for the time of a start, never two.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import tempfile
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from safelight.errors import ConfigurationError
from safelight.worker.child import FRAME, MAX_FRAME, MAX_RESULT, Outcome, Ready, Request, frame

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from types import TracebackType
    from typing import Self

    from safelight.message import Job

__all__ = ["Child", "ChildDiedError", "OverrunError", "Pool"]

R = TypeVar("R", Ready, Outcome)
DECODERS: dict[type, msgspec.json.Decoder[Any]] = {kind: msgspec.json.Decoder(kind) for kind in (Ready, Outcome)}

log = logging.getLogger(__name__)

START_SECONDS = 30.0
FAILED_STARTS = 5  # of children in a row: then the worker ends with the reason
AGAIN_SECONDS = 30.0  # from a successor that did not start to the next one; the child goes on meanwhile
ENDING_SECONDS = 0.5  # a process that crashed is gone this long after its socket closed
SIZE_BYTES = 128  # more than seven numbers of pages
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
KEEP_MEMORY = 16 * 1024 * 1024  # a memory file that a big image made longer than this is emptied again

# What a child's environment may hold: never the broker's URL.
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "TMPDIR")


class ChildDiedError(Exception):
    """A child that ended, or sent what it should not; `cause` is for a person."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class OverrunError(Exception):
    """A child that was killed because its time was over."""


START_ERRORS = (ConfigurationError, ChildDiedError, TimeoutError, OSError)


def _memory_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("safelight", os.MFD_CLOEXEC)
    descriptor, path = tempfile.mkstemp(prefix="safelight-")
    os.unlink(path)  # noqa: PTH108 - it is a descriptor's name, no path of ours
    return descriptor


def _size_file(pid: int) -> int:
    """A descriptor of the file that tells a process's size (proc_pid_statm(5)); -1 where there is none."""
    try:
        return os.open(f"/proc/{pid}/statm", os.O_RDONLY)
    except OSError:
        return -1


class _Frames(asyncio.Protocol):
    """Our end of a child's socket. It stays registered with the event loop, unlike a socket read by `sock_recv`."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._data = b""
        self.is_lost = False
        self._waiting: asyncio.Future[bytes] | None = None
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        self._look()
        if len(self._data) > FRAME.size + MAX_FRAME:
            self.close()  # more than any frame: nothing that follows is ours

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self._look()

    def _look(self) -> None:
        if self._waiting is None or self._waiting.done():
            return
        length = FRAME.unpack_from(self._data)[0] if len(self._data) >= FRAME.size else MAX_FRAME
        end = FRAME.size + length
        if length > MAX_FRAME:
            self._waiting.set_exception(ChildDiedError(f"the child announced a header of {length} bytes"))
        elif len(self._data) >= end:
            self._waiting.set_result(self._data[FRAME.size : end])
            self._data = self._data[end:]
        elif self.is_lost:
            self._waiting.set_exception(EOFError())

    def send(self, frame: bytes) -> None:
        if not self.is_lost:  # else who waits for the answer is told
            self._transport.write(frame)

    async def receive(self, timeout: float) -> bytes:
        """The next frame; `TimeoutError` when none comes in `timeout` seconds, `EOFError` when the child closed its
        end, `ChildDiedError` when it announces too much.
        """
        self._waiting = self._loop.create_future()
        timer = self._loop.call_later(timeout, self._expire, self._waiting)
        self._look()
        try:
            return await self._waiting
        finally:
            timer.cancel()

    @staticmethod
    def _expire(waiting: asyncio.Future[bytes]) -> None:
        if not waiting.done():
            waiting.set_exception(TimeoutError())

    def close(self) -> None:
        self._transport.abort()


class Child:
    """One child process; `run` one job at a time."""

    def __init__(self, process: asyncio.subprocess.Process, frames: _Frames, memory: int) -> None:
        self._process = process
        self._frames = frames
        self._memory = memory
        self._size = _size_file(process.pid)  # kept open: that reads it in 3 µs, opened each time it is 45
        self.operations: list[str] = []
        self.jobs = 0

    @classmethod
    async def start(cls, modules: Sequence[str], address_space: int) -> Child:
        """Start a child and wait until it is warm; `ConfigurationError` if it says why it cannot start."""
        ours, theirs = socket.socketpair()
        with theirs:
            # Before there is a process: once there is one, whatever ends this must kill it.
            _, frames = await asyncio.get_running_loop().create_unix_connection(_Frames, sock=ours)
            memory = _memory_file()
            command = [sys.executable, "-m", "safelight.worker.child", str(os.getpid())]
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    *(str(theirs.fileno()), str(memory), str(address_space), *modules),
                    stdin=asyncio.subprocess.DEVNULL,
                    env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
                    pass_fds=(theirs.fileno(), memory),
                    start_new_session=True,  # Ctrl-C is for the consumer, which lets a running job finish
                )
            except BaseException:
                frames.close()
                os.close(memory)
                raise
        child = cls(process, frames, memory)
        try:
            ready = await child._receive(Ready, START_SECONDS)
        except (TimeoutError, asyncio.CancelledError):
            await child.kill()
            raise
        if ready.error is not None:
            await child.kill()
            raise ConfigurationError(ready.error)
        child.operations = ready.operations
        return child

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can take a job."""
        return self._process.returncode is None and self._memory >= 0 and not self._frames.is_lost

    def resident(self) -> int:
        """Bytes of memory that it holds now; 0 when it is gone, and where the system has no such file (macOS)."""
        try:
            return int(os.pread(self._size, SIZE_BYTES, 0).split(maxsplit=2)[1]) * PAGE_BYTES
        except OSError:
            return 0

    async def run(self, job: Job, limit: float) -> tuple[Outcome, bytes]:
        """The outcome of a job's operations and the resulting image (empty when there is none).

        `OverrunError` after `limit` seconds, `ChildDiedError` when it ended; it is dead then. So it is when the
        caller is cancelled.
        """
        self.jobs += 1
        os.pwrite(self._memory, job.image, 0)
        self._frames.send(frame(Request(len(job.image), job.operations, limit)))
        try:
            outcome = await self._receive(Outcome, limit)
        except TimeoutError:
            await self.kill()
            raise OverrunError from None
        except asyncio.CancelledError:
            await self.kill()
            raise
        return outcome, await self._result(outcome, len(job.image))

    async def _result(self, outcome: Outcome, given: int) -> bytes:
        image = b""
        if outcome.size >= 0:
            image = os.pread(self._memory, outcome.size, 0) if outcome.size <= MAX_RESULT else b""
            if len(image) != outcome.size:
                await self.kill()
                raise ChildDiedError("the child announced an image that is not there")
        if max(given, len(image)) > KEEP_MEMORY:
            os.ftruncate(self._memory, 0)
        return image

    async def _receive(self, kind: type[R], timeout: float) -> R:
        """One frame of this shape; anything else is a child that is not ours any more."""
        try:
            message: R = DECODERS[kind].decode(await self._frames.receive(timeout))
        except EOFError:
            raise await self._died() from None
        except ChildDiedError:
            await self.kill()
            raise
        except msgspec.DecodeError as exc:
            await self.kill()
            raise ChildDiedError(f"the child sent what is not a {kind.__name__.lower()}: {exc}") from exc
        return message

    async def kill(self) -> None:
        """End the child at once; done when it is gone."""
        self.close()
        await self._process.wait()

    def close(self) -> None:
        """End what still runs, and let go of what is ours of it."""
        if self._process.returncode is None:
            self._process.kill()
        if self._memory >= 0:
            self._frames.close()
            os.close(self._memory)
            self._memory = -1
            if self._size >= 0:
                os.close(self._size)
                self._size = -1

    async def _died(self) -> ChildDiedError:
        """How a child ended whose socket is closed: its own signal or code, if it ends by itself in a moment."""
        try:
            async with asyncio.timeout(ENDING_SECONDS):
                await self._process.wait()
        except TimeoutError:
            await self.kill()
            return ChildDiedError("the child closed its socket and went on")
        await self.kill()
        code = self._process.returncode or 0
        return ChildDiedError(
            f"the child was ended by {signal.Signals(-code).name}" if code < 0 else f"the child exited with {code}"
        )


class _Loan:
    """A child lent for an `async with`; a class, since a generator's context manager does more for each job."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def __aenter__(self) -> Child:
        self._child = await self._pool._lend()
        return self._child

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool._take_back(self._child)


class Pool:
    """`size` children; `async with pool.child() as child` lends one that is warm, and replaces it if it died.

    A child is recycled after so many `jobs`, and when it holds more than `resident` bytes after one (0: never).
    """

    def __init__(
        self, size: int, modules: Sequence[str], address_space: int, *, jobs: int = 0, resident: int = 0
    ) -> None:
        self._size = size
        self._modules = modules
        self._address_space = address_space
        self._jobs = jobs
        self._resident = resident
        self._idle: asyncio.Queue[Child] = asyncio.Queue()
        self._children: set[Child] = set()
        self._leaving: Child | None = None  # the one that is recycled, and its successor once that is warm
        self._successor: Child | None = None
        self._recycle_from = 0.0  # the loop's time
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed = 0
        self.operations: list[str] = []
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Self:
        for _ in range(self._size):
            self._replace()
        await asyncio.wait([*self._tasks, self.broken], return_when=asyncio.FIRST_COMPLETED)
        if self.broken.done():
            await self.__aexit__(None, None, None)
            self.broken.result()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(child.kill() for child in self._children))

    @property
    def free(self) -> int:
        """Children that wait for work."""
        return self._idle.qsize()

    def child(self) -> _Loan:
        """The next child that is free and warm, for an `async with`."""
        return _Loan(self)

    async def _lend(self) -> Child:
        while not (child := await self._idle.get()).alive:
            self._discard(child)
        return child

    def _take_back(self, child: Child) -> None:
        if not child.alive:
            self._discard(child)
        elif child is self._leaving and self._successor is not None:
            self._succeed(child, self._successor)
        else:
            self._idle.put_nowait(child)
            if self._leaving is None and self._is_due(child):
                self._leaving = child
                self._do(self._recycle(child), "child's successor")

    def _is_due(self, child: Child) -> bool:
        resident = child.resident() if self._resident else 0
        if not (0 < self._jobs <= child.jobs or resident > self._resident):
            return False
        if asyncio.get_running_loop().time() < self._recycle_from:
            return False
        log.info("child %d is recycled after %d jobs, with %d MB", child.pid, child.jobs, child.resident() >> 20)
        return True

    async def _recycle(self, child: Child) -> None:
        """Start the successor; it takes the child's place now, or from `_take_back` if the child has a job in hand."""
        try:
            successor = await Child.start(self._modules, self._address_space)
        except START_ERRORS as exc:
            log.warning("a child's successor did not start, so the child goes on: %s", exc)
            self._leaving = None
            self._recycle_from = asyncio.get_running_loop().time() + AGAIN_SECONDS
            if child not in self._children:
                self._replace()  # it died meanwhile
            return
        self._children.add(successor)
        if self._take_from_idle(child) or child not in self._children:
            self._succeed(child, successor)
        else:
            self._successor = successor

    def _take_from_idle(self, child: Child) -> bool:
        idle = [self._idle.get_nowait() for _ in range(self._idle.qsize())]
        for other in idle:
            if other is not child:
                self._idle.put_nowait(other)
        return child in idle

    def _succeed(self, child: Child, successor: Child) -> None:
        self._leaving = self._successor = None
        self.operations = successor.operations
        self._idle.put_nowait(successor)
        self._do(self._end(child), "child's end")

    async def _end(self, child: Child) -> None:
        await child.kill()
        self._children.discard(child)

    def _discard(self, child: Child) -> None:
        child.close()
        self._children.discard(child)
        if child is not self._leaving:
            self._replace()
        elif self._successor is not None:
            self._succeed(child, self._successor)

    def _replace(self) -> None:
        self._do(self._start(), "child's start")

    def _do(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start(self) -> None:
        """Start a child, and again if it dies of it; after `FAILED_STARTS` in a row the pool is broken."""
        while True:
            try:
                child = await Child.start(self._modules, self._address_space)
            except START_ERRORS as exc:
                self._failed += 1
                log.warning("a child did not start: %s", exc)
                if isinstance(exc, ConfigurationError) or self._failed >= FAILED_STARTS:
                    if not self.broken.done():
                        self.broken.set_exception(ConfigurationError(f"No child process starts: {exc}"))
                    return
                continue
            self._failed = 0
            self.operations = child.operations
            self._children.add(child)
            self._idle.put_nowait(child)
            return
