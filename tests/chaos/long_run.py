"""A whole system under a steady load for a long time, and whether anything in it grows.

PYTHONPATH=tests python -m chaos.long_run --minutes 60 [--rate 20] [--broker URL] [--write FILE]   (`make soak`)

It starts `safelight up`, posts varied pictures at a steady rate (some are refused, some clients leave early, some make
a connection for each request), and looks at each process every few seconds. Exit code 1, with the reasons in words,
if a request failed that should not have, a process died, a traceback was logged, or memory, open descriptors,
threads, keys or queue entries grew. Saved images are deleted half a minute later.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import io
import json
import os
import random
import re
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from conftest import TEST_IMAGE
from PIL import Image
from redis import Redis

from safelight.brokers import embedded

JOBS_KEY = "{safelight}:jobs"
QUARANTINE_KEY = "{safelight}:quarantine"
MARKS = b"{safelight}:withdrawn:"

WARM_UP = 0.1  # of the time: caches fill, and malloc takes what it keeps
WINDOW = 0.1  # of the rest: what is compared, at its beginning and its end
FEWEST = 6  # samples in a window, so that one odd sample does not decide
# Growth: more than this share of the beginning, and more than this much.
BOUNDS = {
    "memory KB": (0.05, 4 * 1024.0),
    "descriptors": (0.05, 8.0),  # of a gateway they vary with the clients of the moment
    "threads": (0.0, 1.0),
    "processes": (0.0, 0.5),
    "keys": (0.0, 1.0),
    "marks of withdrawal": (0.0, 20.0),  # each expires after six minutes
    "queue entries": (0.0, 5.0),
}

START_SECONDS = 60.0
END_SECONDS = 60.0
ANSWER_SECONDS = 60.0
KEPT_SECONDS = 30.0  # a saved image, which its client may still ask for
MOST_AT_ONCE = 64  # requests; beyond, the load waits: this is no trial of overload

type_of = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}


# What is judged


@dataclasses.dataclass(frozen=True)
class Row:
    """How one figure of one part went: medians at its beginning and end, and a line through all of it."""

    part: str
    what: str
    first: float
    last: float
    slope_per_hour: float
    grew: bool


def judge(part: str, what: str, samples: list[tuple[float, float]]) -> Row:
    """The row of a series of (seconds since the start, figure); `ValueError` when it is too short to judge."""
    end = samples[-1][0] if samples else 0.0
    steady = [(seconds, figure) for seconds, figure in samples if seconds >= WARM_UP * end]
    window = max(FEWEST, round(WINDOW * len(steady)))
    if len(steady) < 2 * window:
        raise ValueError(f"{len(steady)} samples of {part}'s {what} after the warm-up: {2 * window} are needed")
    seconds, figures = zip(*steady, strict=True)
    first, last = statistics.median(figures[:window]), statistics.median(figures[-window:])
    share, least = BOUNDS[what]
    slope = statistics.linear_regression(seconds, figures).slope * 3_600
    return Row(part, what, first, last, slope, grew=last - first > max(share * first, least))


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| part | what | first | last | slope per hour | |", "|---|---|--:|--:|--:|---|"]
    lines += [
        f"| {row.part} | {row.what} | {row.first:,.1f} | {row.last:,.1f} | {row.slope_per_hour:+,.1f} "
        f"| {'**grew**' if row.grew else 'steady'} |"
        for row in rows
    ]
    return "\n".join(lines)


# The load


@dataclasses.dataclass(frozen=True)
class Picture:
    """What is posted, and the status and word that must answer it."""

    name: str
    data: bytes
    status: int = 200
    word: bytes = b'"status": "SUCCESS"'
    media: str = "image/jpeg"


def pictures() -> list[Picture]:
    """Sizes and formats of the test image, and what is refused."""
    original = TEST_IMAGE.read_bytes()
    made = [Picture("as it is", original)]
    with Image.open(TEST_IMAGE) as opened:
        for name, size, options in (
            ("JPEG", (512, 344), {"quality": 90, "subsampling": "4:4:4"}),
            ("JPEG", (500, 333), {"quality": 80}),
            ("JPEG", (64, 48), {"progressive": True}),
            ("JPEG", (2048, 1376), {"quality": 85}),
            ("PNG", (320, 215), {}),
            ("PNG", (97, 61), {}),
            ("WEBP", (200, 134), {"quality": 80}),
            ("WEBP", (120, 80), {"lossless": True}),
        ):
            out = io.BytesIO()
            opened.resize(size).save(out, name, **options)
            made.append(Picture(f"{name} {size[0]}", out.getvalue(), media=type_of[name]))
    made.append(Picture("a text", b"This is not an image. " * 500, 415, b'"unsupported_format"', "text/plain"))
    made.append(Picture("cut in half", original[: len(original) // 2], 422, b'"unprocessable_image"'))
    return made


class Load:
    """The clients: each request is of a kind and a picture drawn by a seeded die; what went wrong is kept."""

    def __init__(self, port: int, rate: float, seed: int = 1) -> None:
        self._port = port
        self._rate = rate
        self._dice = random.Random(seed)
        self._pictures = pictures()
        self._client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_SECONDS)
        self._kinds = [(self._form, 10), (self._raw, 4), (self._image, 2), (self._anew, 6), (self._left, 2)]
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []

    async def run(self, seconds: float) -> None:
        """Post for so long at the rate, then wait for the last answers."""
        loop = asyncio.get_running_loop()
        end, due, tasks = loop.time() + seconds, loop.time(), set[asyncio.Task[None]]()
        async with self._client, asyncio.TaskGroup() as group:
            while loop.time() < end:
                due = max(due + 1 / self._rate, loop.time() - 1)
                await asyncio.sleep(due - loop.time())
                if len(tasks) < MOST_AT_ONCE:
                    kinds, weights = zip(*self._kinds, strict=True)
                    [kind] = self._dice.choices(kinds, weights)
                    task = group.create_task(self._one(kind, self._dice.choice(self._pictures)))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)

    async def _one(self, kind: Callable[[Picture], Awaitable[str]], picture: Picture) -> None:
        try:
            problem = await kind(picture)
        except (httpx.HTTPError, OSError, ValueError) as exc:
            problem = f"{type(exc).__name__}: {exc}"
        name = kind.__name__.strip("_")
        self.answers[f"{name} {picture.status}"] += 1
        if problem:
            self.failures.append(f"{name}, {picture.name}: {problem}")

    def _wrong(self, picture: Picture, status: int, body: bytes) -> str:
        if status == picture.status and picture.word in body:
            return ""
        return f"{status} instead of {picture.status}: {body[:200]!r}"

    async def _form(self, picture: Picture) -> str:
        """A form on a kept connection; every fourth asks for the saved image too."""
        answer = await self._client.post("/query", files={"image": ("picture", picture.data)})
        if wrong := self._wrong(picture, answer.status_code, answer.content):
            return wrong
        if picture.status == 200 and self._dice.random() < 0.25:
            link = answer.headers["link"].partition(">")[0].removeprefix("<")
            saved = await self._client.get(link)
            if saved.status_code != 200 or not saved.content:
                return f"{link} is {saved.status_code}"
        return ""

    async def _raw(self, picture: Picture) -> str:
        """A raw body on a kept connection, for a fact alone: every picture of an allowed format has a size."""
        answer = await self._client.post(
            "/query?operations=size", content=picture.data, headers={"Content-Type": picture.media}
        )
        expected = dataclasses.replace(picture, status=200, word=Picture.word) if picture.status == 422 else picture
        return self._wrong(expected, answer.status_code, answer.content)

    async def _image(self, picture: Picture) -> str:
        """The image itself as the answer."""
        answer = await self._client.post(
            "/query", files={"image": ("picture", picture.data)}, headers={"Accept": "image/*"}
        )
        if picture.status != 200:
            return self._wrong(picture, answer.status_code, answer.content)
        is_image = answer.status_code == 200 and answer.headers["content-type"] == picture.media and answer.content
        return "" if is_image else f"{answer.status_code} instead of the image: {answer.text[:200]}"

    async def _anew(self, picture: Picture) -> str:
        """A connection of its own."""
        async with self._connected() as (reader, writer):
            writer.write(self._request(picture))
            async with asyncio.timeout(ANSWER_SECONDS):
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        return self._wrong(picture, int(head.split(b" ", 2)[1]), body)

    async def _left(self, picture: Picture) -> str:
        """A client that goes away: in the middle of its body, or before its answer."""
        async with self._connected() as (_, writer):
            request = self._request(picture)
            writer.write(request[: self._dice.choice((len(request) // 2, len(request)))])
            await writer.drain()
            await asyncio.sleep(self._dice.random() * 0.02)
        return ""

    def _request(self, picture: Picture) -> bytes:
        head = "POST /query HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: {picture.media}\r\nContent-Length: {len(picture.data)}\r\n\r\n"
        return head.encode() + picture.data

    @contextlib.asynccontextmanager
    async def _connected(self) -> Any:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


# What is looked at


class DiedError(Exception):
    """A part that is not there any more."""


class Watch:
    """The processes of one system and its broker, sampled."""

    def __init__(self, supervisor: psutil.Process, broker_url: str) -> None:
        self._started = time.monotonic()
        self._parts = {"supervisor": supervisor} | dict(self._named(supervisor))
        self._workers = [process for name, process in self._parts.items() if name.startswith("worker")]
        is_redis = not broker_url.startswith(("amqp", "kafka"))
        self._broker = Redis.from_url(broker_url.replace("valkey://", "redis://")) if is_redis else None
        self.series: dict[tuple[str, str], list[tuple[float, float]]] = {}

    @staticmethod
    def _named(supervisor: psutil.Process) -> Iterator[tuple[str, psutil.Process]]:
        workers = 0
        for process in sorted(supervisor.children(), key=lambda process: process.pid):
            command = process.cmdline()
            if "worker" in command:
                workers += 1
                yield f"worker {workers}", process
            else:
                yield "gateway" if "gateway" in command else "broker", process

    def sample(self) -> None:
        """Add a figure to each series; `DiedError` when a part is gone."""
        now = time.monotonic() - self._started
        for name, process in self._parts.items():
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                raise DiedError(f"the {name} (process {process.pid}) died")
            self._add(now, name, [process])
        children = [child for worker in self._workers for child in worker.children()]
        self._add(now, "children", children)
        self._put(now, "children", "processes", len(children))
        if self._broker is not None:
            marks, keys = _counted(self._broker.scan_iter(count=1_000))
            self._put(now, "broker's data", "keys", keys)
            self._put(now, "broker's data", "marks of withdrawal", marks)
            self._put(now, "broker's data", "queue entries", self.entries())
            used: Any = self._broker.info("memory")
            self._put(now, "broker's data", "memory KB", used["used_memory"] / 1024)

    def entries(self) -> int:
        """Jobs on the broker; 0 where it cannot be asked."""
        return 0 if self._broker is None else int(self._broker.xlen(JOBS_KEY))  # type: ignore[arg-type]

    def quarantined(self) -> int:
        """Jobs in quarantine; 0 where the broker cannot be asked."""
        return 0 if self._broker is None else int(self._broker.hlen(QUARANTINE_KEY))  # type: ignore[arg-type]

    def _add(self, now: float, part: str, processes: list[psutil.Process]) -> None:
        memory = descriptors = threads = 0
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # a child that is just recycled
                memory += (
                    process.memory_info().rss
                )  # the proportional size grows when a neighbour that shared pages ends
                descriptors += process.num_fds()
                threads += process.num_threads()
        self._put(now, part, "memory KB", memory / 1024)
        self._put(now, part, "descriptors", descriptors)
        self._put(now, part, "threads", threads)

    def _put(self, now: float, part: str, what: str, figure: float) -> None:
        self.series.setdefault((part, what), []).append((now, figure))


def _counted(keys: Iterator[bytes]) -> tuple[int, int]:
    """How many are marks of withdrawal, and how many are not."""
    is_mark = Counter(key.startswith(MARKS) for key in keys)
    return is_mark[True], is_mark[False]


# The run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def delete_old(store: Path) -> None:
    """Delete what was saved a while ago. It costs each later save some time, which this load does not notice."""
    old = time.time() - KEPT_SECONDS
    for path in store.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < old:
                path.unlink()


async def until(condition: Callable[[], Awaitable[Any]], seconds: float) -> bool:
    """Whether it became true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if await condition():
            return True
        await asyncio.sleep(0.1)
    return False


async def ready(port: int) -> bool:
    async with httpx.AsyncClient() as client:
        try:
            return (await client.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200
        except httpx.TransportError:
            return False


async def watched(load: Load, watch: Watch, store: Path, options: argparse.Namespace) -> list[str]:
    """Run the load and look at the system meanwhile: what went wrong."""
    seconds = options.minutes * 60
    running = asyncio.create_task(load.run(seconds))
    try:
        while not running.done():
            await asyncio.wait([running], timeout=options.every)
            if not running.done():
                watch.sample()
                delete_old(store)
                sys.stderr.write(f"\r{sum(load.answers.values())} requests, {len(load.failures)} failed")
        await running
    except DiedError as exc:
        return [str(exc)]
    finally:
        running.cancel()
        sys.stderr.write("\n")

    async def is_empty() -> bool:
        return watch.entries() == 0

    reasons = []
    if not await until(is_empty, END_SECONDS):
        reasons.append(f"{watch.entries()} jobs were left on the broker when every client had its answer")
    if watch.quarantined():
        reasons.append(f"{watch.quarantined()} jobs are in quarantine")
    return reasons


async def run(options: argparse.Namespace, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """One run: the reasons why it failed, and its figures."""
    port, store, log = free_port(), folder / "mirrored", folder / "up.log"
    command = [sys.executable, "-m", "safelight", "up", "--port", str(port), "--store", str(store)]
    command += ["--child-jobs", str(options.child_jobs)]
    if options.broker:
        command += ["--broker", options.broker]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=folder, stdout=output, stderr=output, start_new_session=True
        )
    reasons: list[str] = []
    load = Load(port, options.rate)
    try:
        if not await until(lambda: ready(port), START_SECONDS):
            return [f"the system did not start: {log.read_text()}"], {}
        watch = Watch(psutil.Process(process.pid), options.broker or embedded.url(port))
        reasons += await watched(load, watch, store, options)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(process.wait(), END_SECONDS)
    if code != 0:
        reasons.append(f"`safelight up` ended with {code}")
    text = log.read_text()
    if tracebacks := text.count("Traceback"):
        reasons.append(f"{tracebacks} tracebacks were logged: {text[text.index('Traceback') :][:2_000]}")
    if load.failures:
        reasons.append(f"{len(load.failures)} requests failed, at first: {load.failures[:5]}")
    rows: list[Row] = []
    try:
        rows = [judge(part, what, samples) for (part, what), samples in watch.series.items()]
    except ValueError as exc:
        reasons.append(str(exc))
    reasons += [f"{r.part}: {r.what} grew from {r.first:,.1f} to {r.last:,.1f}" for r in rows if r.grew]
    figures = {
        "minutes": options.minutes,
        "rate": options.rate,
        "requests": dict(sorted(load.answers.items())),
        "failures": load.failures,
        "recycled": len(re.findall(r"child \d+ is recycled", text)),
        "rows": [dataclasses.asdict(row) for row in rows],
        "reasons": reasons,
        "series": {f"{part}: {what}": samples for (part, what), samples in watch.series.items()},
    }
    sys.stdout.write(f"{table(rows)}\n\n{sum(load.answers.values())} requests in {options.minutes:g} minutes, ")
    sys.stdout.write(f"{len(load.failures)} failed; {figures['recycled']} children were recycled.\n")
    return reasons, figures


def main() -> int:
    parser = argparse.ArgumentParser(description="A whole system under steady load, and whether anything in it grows.")
    parser.add_argument("--minutes", type=float, default=60.0, help="of load (60)")
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second (20)")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two samples (10)")
    parser.add_argument("--child-jobs", type=int, default=200, help="jobs of a child until it is recycled (200)")
    parser.add_argument("--broker", help="URL of a broker (the embedded one)")
    parser.add_argument("--write", type=Path, help="file for the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sl-", ignore_cleanup_errors=True) as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder  # sockets apart from those of a system that runs here
        reasons, figures = asyncio.run(run(options, Path(folder)))
    if options.write:
        options.write.write_text(json.dumps(figures, indent=1) + "\n")
    for reason in reasons:
        sys.stdout.write(f"FAILED: {reason}\n")
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
