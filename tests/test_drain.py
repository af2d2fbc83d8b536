"""SIGTERM under load: gateways behind a balancer that asks /readyz, workers that hold jobs, and all of them in turn."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import count
from pathlib import Path

import httpx
import pytest
from conftest import STARTED_SECONDS, free_port, wait_until

from safelight.brokers import Broker, open_broker
from safelight.conformance import Inbox, Server, a_job, until
from safelight.message import Job, new_id

CHECK_SECONDS = 0.1  # from one look of the balancer's at /readyz to the next
DRAIN_SECONDS = "1"
LEASE = 2.0
CLIENTS = 4
# Half a minute each; what differs between brokers is held by the test of a worker's end on each.
BROKERS = ["redis", "rabbitmq", "kafka"] if os.environ.get("EVERY_BROKER") else ["redis"]
OPERATIONS = {
    "v1": """
def version(image):
    return {"version": "v1"}
""",
    "v2": """
def version(image):
    return {"version": "v2"}

def fresh(image):
    return {"version": "v2"}
""",
    # An image names a file, in which each start writes its worker; it is done when another is there.
    "gated": """
import os, pathlib, time

def gated(image):
    if image.startswith(b"/"):
        path = pathlib.Path(image.decode())
        with path.open("a") as file:
            file.write(f"{os.getppid()}\\n")
        while not path.with_suffix(".go").exists():
            time.sleep(0.01)
    return {}
""",
}


class Parts:
    """Gateways and workers as processes of the test's own."""

    def __init__(self, folder: Path, broker: Server) -> None:
        self.folder, self.broker = folder, broker
        self.processes: list[subprocess.Popen[bytes]] = []
        for name, text in OPERATIONS.items():
            (folder / name).mkdir()
            (folder / name / "ours.py").write_text(text)

    def _run(self, folder: Path, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "safelight", *words, "--broker", self.broker.url, "--lease", str(LEASE)]
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=os.environ)
        self.processes.append(process)
        return process

    def gateway(self, port: int) -> subprocess.Popen[bytes]:
        store = ("--store", str(self.folder / "mirrored"))
        return self._run(self.folder, "gateway", "--port", str(port), "--drain-delay", DRAIN_SECONDS, *store)

    def worker(self, operations: str) -> subprocess.Popen[bytes]:
        """One that has these operations, out of a folder of their own."""
        return self._run(self.folder / operations, "worker", "--import", "ours", "--work-limit", "60")

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            process.wait(timeout=30)


@pytest.fixture
def parts(tmp_path: Path, broker: Server) -> Iterator[Parts]:
    started = Parts(tmp_path, broker)
    yield started
    started.end()


def ended(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and its regular end."""
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0


class Balancer:
    """Hands each request to the next gateway that was ready when it was last asked, on connections that it keeps."""

    def __init__(self, ports: list[int]) -> None:
        self._clients = [httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=90) for port in ports]
        self._ready: list[httpx.Client] = []
        self._turn = count()
        self._is_over = threading.Event()
        self._watching = threading.Thread(target=self._watch)

    def __enter__(self) -> Balancer:
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._watching.join()
        for client in self._clients:
            client.close()

    def _watch(self) -> None:
        while not self._is_over.wait(CHECK_SECONDS):
            self._ready = [client for client in self._clients if self._get(client, "/readyz") is not None]

    @staticmethod
    def _get(client: httpx.Client, path: str) -> str | None:
        with suppress(httpx.TransportError):
            answer = client.get(path)
            return answer.text if answer.is_success else None
        return None

    def all_are_ready(self) -> bool:
        return len(self._ready) == len(self._clients)

    def all_know(self, workers: int) -> bool:
        """Whether each gateway has heard of so many workers."""
        line = f"\nsafelight_workers {workers}.0\n"
        return all(line in (self._get(client, "/metrics") or "") for client in self._clients)

    def all_offer(self, operation: str, image: bytes) -> bool:
        return all(post(client, image, operation).is_success for client in self._clients)

    def post(self, image: bytes, operation: str) -> httpx.Response:
        ready = self._ready
        return post(ready[next(self._turn) % len(ready)], image, operation)


def post(client: httpx.Client, image: bytes, operation: str) -> httpx.Response:
    return client.post(f"/query?operations={operation}", files={"image": ("picture.jpg", image)})


class Load:
    """Clients that post one image after the other; what came back is counted."""

    def __init__(self, balancer: Balancer, image: bytes) -> None:
        self._balancer, self._image = balancer, image
        self.operations = ["version"]
        self.answers: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._is_over = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(CLIENTS) as clients:
            going = [clients.submit(self._go_on) for _ in range(CLIENTS)]
            try:
                yield
            finally:
                self._is_over.set()
        for client in going:
            client.result()

    def _go_on(self) -> None:
        for turn in count():
            if self._is_over.is_set():
                return
            try:
                answer = self._balancer.post(self._image, self.operations[turn % len(self.operations)])
                told = str(answer.json().get("version", answer.text))
            except httpx.HTTPError as exc:
                told = repr(exc)
            with self._lock:
                self.answers[told] += 1

    def more(self, number: int = 3 * CLIENTS) -> None:
        """Return when so many more have been answered; more than there are clients, so some have begun since."""
        until = self.answers.total() + number
        wait_until(lambda: self.answers.total() >= until, 60)


@contextmanager
def under_load(parts: Parts, ports: list[int], image: bytes) -> Iterator[tuple[Balancer, Load]]:
    with Balancer(ports) as balancer:
        wait_until(lambda: balancer.all_are_ready() and balancer.all_know(2), STARTED_SECONDS)
        load = Load(balancer, image)
        with load.running():
            load.more()
            yield balancer, load


@pytest.mark.parametrize("broker", BROKERS, indirect=True)
def test_a_rolling_restart_of_everything_to_another_version(parts: Parts, image: bytes) -> None:
    ports = [free_port(), free_port()]
    gateways = [parts.gateway(port) for port in ports]
    workers = [parts.worker("v1") for _ in range(2)]
    with under_load(parts, ports, image) as (balancer, load):
        for port, gateway in zip(ports, gateways, strict=True):
            ended(gateway)
            load.more()
            parts.gateway(port)
            wait_until(balancer.all_are_ready, STARTED_SECONDS)
            load.more()
        assert set(load.answers) == {"v1"}
        for worker in workers:
            wait_until(lambda: balancer.all_know(2), STARTED_SECONDS)
            ended(worker)
            load.more()
            parts.worker("v2")
            wait_until(lambda: balancer.all_offer("fresh", image), STARTED_SECONDS)
            load.operations = ["version", "fresh"]  # which an old worker that is left gives back
            load.more()
        assert set(load.answers) == {"v1", "v2"}
        wait_until(lambda: balancer.all_know(2), STARTED_SECONDS)
        load.more(CLIENTS)  # what was begun before
        load.answers.clear()
        load.more()
    assert set(load.answers) == {"v2"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def an_inbox(broker: Broker) -> AsyncIterator[Inbox]:
    inbox = Inbox(broker, new_id())
    try:
        yield inbox
    finally:
        inbox.task.cancel()
        with suppress(asyncio.CancelledError):
            await inbox.task
        await broker.close()


class Gated:
    """A worker that is to leave and one that stays: each is in a job that does not end before it is told to, and holds
    another one. A job is known by the file in which its starts are written.
    """

    def __init__(self, parts: Parts, folder: Path, broker: Broker, inbox: Inbox) -> None:
        self.leaving, self.staying = parts.worker("gated"), parts.worker("gated")
        self._folder = folder
        self._broker = broker
        self.inbox = inbox
        self.jobs: dict[Path, Job] = {}

    async def send(self, name: str) -> Path:
        path = self._folder / name
        self.jobs[path] = a_job(self.inbox.name, str(path).encode(), operations=[("gated", {})])
        await self._broker.send(self.jobs[path])
        return path

    def starts(self, path: Path) -> list[int]:
        """The workers that started a job, by their processes."""
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []

    def end(self, *paths: Path) -> None:
        for path in paths:
            path.with_suffix(".go").touch()

    async def fill(self) -> None:
        await until(self._both_work, STARTED_SECONDS)
        self.jobs.clear()
        for number in range(4):
            await self.send(f"held-{number}")
        await until(self._both_are_full, STARTED_SECONDS)

    async def _both_work(self) -> bool:
        """Whether each has had a job: on Kafka it is handed none before the group has settled."""
        path = await self.send(f"early-{len(self.jobs)}")
        self.end(path)
        await self.inbox.reply_to(self.jobs[path], STARTED_SECONDS)
        return {self.leaving.pid, self.staying.pid} == {pid for path in self.jobs for pid in self.starts(path)}

    async def _both_are_full(self) -> bool:
        present = await self._broker.presence()
        begun = sorted(pid for path in self.jobs for pid in self.starts(path))
        return not any(each.free for each in present) and begun == sorted((self.leaving.pid, self.staying.pid))

    async def has_left(self) -> bool:
        return await asyncio.to_thread(self.leaving.wait, STARTED_SECONDS) == 0


@asynccontextmanager
async def full_workers(parts: Parts, folder: Path) -> AsyncIterator[Gated]:
    broker = open_broker(parts.broker.url, lease=LEASE)
    async with an_inbox(broker) as inbox:
        gated = Gated(parts, folder, broker, inbox)
        try:
            await gated.fill()
            yield gated
        finally:
            gated.end(*gated.jobs)


@pytest.mark.anyio
async def test_what_waits_in_a_worker_that_ends_is_started_before_its_last_job_has_ended(
    parts: Parts, tmp_path: Path
) -> None:
    async with full_workers(parts, tmp_path) as gated:
        leaving, staying, inbox, jobs = gated.leaving, gated.staying, gated.inbox, gated.jobs
        [last] = [path for path in jobs if gated.starts(path) == [leaving.pid]]
        leaving.send_signal(signal.SIGTERM)
        others = [path for path in jobs if path != last]
        gated.end(*others)
        for path in others:
            assert (await inbox.reply_to(jobs[path], STARTED_SECONDS)).error is None
        assert leaving.poll() is None
        assert jobs[last].id not in {reply.id for reply in inbox.replies}
        gated.end(last)
        assert (await inbox.reply_to(jobs[last])).error is None
        assert await gated.has_left()
    assert {path: gated.starts(path) for path in jobs} == {
        path: [leaving.pid if path == last else staying.pid] for path in jobs
    }


@pytest.mark.anyio
async def test_what_waits_in_a_worker_that_ends_is_started_before_what_waits_behind_it(
    parts: Parts, tmp_path: Path
) -> None:
    async with full_workers(parts, tmp_path) as gated:
        held = list(gated.jobs)
        behind = [await gated.send(f"behind-{number}") for number in range(10)]
        gated.leaving.send_signal(signal.SIGTERM)
        gated.end(*(path for path in held if gated.starts(path) != [gated.staying.pid]))
        assert await gated.has_left()
        assert not any(path.exists() for path in behind)
        gated.end(*gated.jobs)
        for job in gated.jobs.values():
            assert (await gated.inbox.reply_to(job, STARTED_SECONDS)).error is None

        def started(path: Path) -> int:
            [_] = gated.starts(path)
            return path.stat().st_mtime_ns

        assert max(map(started, held)) < min(map(started, behind))
