"""A system under load: what it is made of, started and ended.

Every system, ours or another, is a list of processes (`Part`) that together answer `POST` with an image once they have
saved its mirror in a folder. Each part has a process group of its own, and ends by it. A folder that was saved into
stays until the whole run ends: on ext4 each file that follows deletions in its folder costs several times as much.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from safelight.settings import usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "STARTED_SECONDS",
    "BenchmarkError",
    "Part",
    "Parts",
    "Place",
    "Running",
    "System",
    "fetch",
    "free_port",
    "running",
    "wait_until",
]

STARTED_SECONDS = 60.0
ENDED_SECONDS = 30.0
LOOK_SECONDS = 0.005
LAST_WORDS = 2_000  # characters
# What a process of Safelight is, by a word of its command line.
WORDS = {"safelight.worker.child": "child", "gateway": "gateway", "worker": "worker", "up": "supervisor"}


class BenchmarkError(Exception):
    """What was measured cannot be trusted."""


@dataclass(frozen=True)
class Place:
    """Where a system is to run."""

    port: int
    store: Path
    folder: Path
    redis_url: str | None
    workers: int


@dataclass(frozen=True)
class Part:
    """One process to start; its CPU time and its descendants' are counted as its kind's."""

    kind: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class System:
    """Something that answers POST with an image in a form's part `image` once it has saved its mirror."""

    name: str
    needs_redis: bool
    parts: Callable[[Place], list[Part]]
    raw_body: bool = False
    path: str = "/query"
    counts: Callable[[Place], dict[str, float]] | None = None
    """Requests by outcome, `workers`, `in_flight_jobs`, as it counts them itself; without: saved files are counted."""


class Parts:
    """Processes that were started one after the other, and end in the opposite order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[tuple[Part, subprocess.Popen[bytes]]] = []

    def start(self, part: Part) -> None:
        """Start one more; it and what it leaves behind ends at the latest with the end of its standard input."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("SAFELIGHT_")}
        with (self._folder / f"{len(self._started)}-{part.kind}.log").open("wb") as log:
            process = subprocess.Popen(
                part.command,
                env=variables | part.environment,
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append((part, process))

    def last_words(self) -> str:
        """What those wrote last that have ended by themselves."""
        ended = [n for n, (_, process) in enumerate(self._started) if process.poll() is not None]
        logs = [path for n in ended for path in self._folder.glob(f"{n}-*.log")]
        return "".join(f"\n{path.name}: {path.read_text(errors='replace')[-LAST_WORDS:]}" for path in logs)

    def check(self) -> None:
        """Raise `BenchmarkError` if one of them has ended."""
        for part, process in self._started:
            if process.poll() is not None:
                raise BenchmarkError(f"{part.kind} has ended ({process.returncode}): {' '.join(part.command)}")

    def processes(self) -> dict[psutil.Process, str]:
        """All processes, descendants too, and their kinds."""
        self.check()
        given = {process.pid: part.kind for part, process in self._started}
        ours = {each.pid: each for each in psutil.Process().children(recursive=True)}
        found: dict[psutil.Process, str] = {}
        for each in ours.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                top = each
                while top.pid not in given and (above := ours.get(top.ppid())):
                    top = above
                if top.pid in given:
                    found[each] = _kind(each, given[top.pid])
        return found

    def end(self) -> None:
        """SIGTERM to each group, the last started first; SIGKILL to what does not end."""
        for _, process in reversed(self._started):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(ENDED_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdin.close()


def _kind(process: psutil.Process, given: str) -> str:
    """Safelight's own processes by their command lines, since `safelight up` starts them; others as they were told."""
    words = process.cmdline()
    if given == "worker" and words[2:3] in (["safelight.worker.child"], ["child"]):
        return "child"
    if given != "supervisor" or not words:
        return given
    if "valkey-server" in words[0] or "redis-server" in words[0] or "-I" in words[1:2]:  # the last watches over it
        return "broker"
    return next((kind for word, kind in WORDS.items() if word in words[2:4]), "other")


@dataclass(frozen=True)
class Running:
    """One running system; `start_seconds` from its first command to its readiness."""

    system: System
    place: Place
    parts: Parts
    start_seconds: float

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.place.port}{self.system.path}"

    def counts(self) -> dict[str, float]:
        """Requests by outcome."""
        if self.system.counts is not None:
            return self.system.counts(self.place)
        return {"success": sum(1 for _ in self.place.store.iterdir())}


@contextlib.contextmanager
def running(system: System, folder: Path, *, probe: Callable[[Place], bool], workers: int = 0) -> Iterator[Running]:
    """A system on a free port with a new store, once `probe` finds it ready; ended with all its processes."""
    own = Path(tempfile.mkdtemp(prefix="s-", dir=folder))
    store = own / "store"
    store.mkdir()
    redis_port = free_port()
    redis_url = f"redis://127.0.0.1:{redis_port}/0" if system.needs_redis else None
    place = Place(free_port(), store, own, redis_url, workers or usable_cores())
    parts = Parts(own)
    try:
        if system.needs_redis:
            parts.start(redis_server(redis_port, own))
            wait_until(lambda: _listens(redis_port))
        begun = time.monotonic()
        for part in system.parts(place):
            parts.start(part)
        wait_until(lambda: parts.check() or probe(place))
        yield Running(system, place, parts, time.monotonic() - begun)
    except BenchmarkError as exc:
        raise BenchmarkError(f"{exc}{parts.last_words()}") from exc
    finally:
        parts.end()


def redis_server(port: int, folder: Path) -> Part:
    """A Redis that keeps nothing on disk."""
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
    return Part("broker", ["redis-server", *options])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def fetch(port: int, path: str, body: bytes | None = None, media_type: str = "") -> tuple[int, bytes]:
    """Status and body of an answer; a status of 0 when there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=STARTED_SECONDS)
    try:
        headers = {"Content-Type": media_type} if media_type else {}
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def wait_until(condition: Callable[[], Any], seconds: float = STARTED_SECONDS, every: float = LOOK_SECONDS) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise BenchmarkError(f"not within {seconds} s: {condition.__qualname__}")
        time.sleep(every)
