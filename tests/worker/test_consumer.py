"""A worker on a real broker: leases, starts, refusals, quarantine, withdrawal, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import BrokerServer
from redis.asyncio import Redis

from safelight import settings
from safelight.brokers import Broker, open_broker
from safelight.conformance import Inbox, a_job, is_true, until
from safelight.formats import MAX_PIXELS
from safelight.message import Job, now_ms
from safelight.worker.consumer import Consumer
from safelight.worker.pool import Pool

LEASE = 1.0
MEGABYTE = 1024 * 1024
HERE = Path(__file__).parent

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def server(runtime_folder: Path) -> Iterator[BrokerServer]:
    """What a worker does is the same on every broker; the conformance suite holds the others to it."""
    started = BrokerServer("embedded", Path(tempfile.mkdtemp(dir=runtime_folder)))
    started.start()
    yield started
    started.stop()


@pytest.fixture
async def gateway(server: BrokerServer) -> AsyncIterator[tuple[Broker, Inbox]]:
    broker = open_broker(server.url, lease=LEASE)
    inbox = Inbox(broker, "gateway")
    yield broker, inbox
    inbox.task.cancel()
    with suppress(asyncio.CancelledError):
        await inbox.task
    await broker.close()


@asynccontextmanager
async def a_worker(
    server: BrokerServer,
    monkeypatch: pytest.MonkeyPatch,
    name: str = "worker",
    *,
    lease: float = LEASE,
    alive: Callable[[], None] = lambda: None,
    **options: Any,
) -> AsyncIterator[Consumer]:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    given = settings.Worker(imports=("hostile",), **({"max_clock_skew": 0.0} | options))
    broker = open_broker(server.url, lease=lease)
    recycling = {"jobs": given.child_jobs, "resident": given.child_resident}
    async with Pool(given.concurrency, given.imports, given.child_memory, **recycling) as pool:
        consumer = Consumer(broker, pool, name, given, lease=lease, alive=alive)
        running = asyncio.create_task(consumer.run())
        try:
            yield consumer
        finally:
            consumer.stop()
            await running
            await broker.close()


def counted(path: Path, inbox: Inbox, operation: str, **members: Any) -> Job:
    """A job whose starts are counted in a file."""
    return a_job(inbox.name, f"SAFELIGHT-TEST-COUNT:{path}".encode(), operations=[(operation, {})], **members)


def starts(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


async def test_work_is_answered(server: BrokerServer, gateway: Any, monkeypatch: Any, image: bytes) -> None:
    broker, inbox = gateway
    async with a_worker(server, monkeypatch):
        job = a_job(inbox.name, image, operations=[("size", {}), ("mirror", {})])
        await broker.send(job)
        reply = await inbox.reply_to(job)
        assert (reply.error, reply.facts) == (None, {"size": "82kb"})
        assert reply.image
        assert reply.worker == "worker"
        assert reply.work > 0


@pytest.mark.parametrize(
    ("operation", "cause"),
    [("segfault", "SIGSEGV"), ("hang", "still at work after 0.3 s"), ("fail", "ValueError: it does not like this one")],
)
async def test_a_job_whose_attempts_run_out_is_quarantined(
    server: BrokerServer, gateway: Any, monkeypatch: Any, tmp_path: Path, operation: str, cause: str
) -> None:
    broker, inbox = gateway
    async with a_worker(server, monkeypatch, work_limit=0.3):
        job = counted(tmp_path / "starts", inbox, operation)
        good = a_job(inbox.name, b"good", operations=[("echo", {})])
        await broker.send(job)
        await broker.send(good)
        assert (await inbox.reply_to(job)).error == "quarantined"
        assert (await inbox.reply_to(good)).image == b"good"  # not blamed for its neighbour
    assert starts(tmp_path / "starts") == 3
    [record] = await broker.quarantined()
    assert (record.id, record.attempts, record.worker) == (job.id, 3, "worker")
    assert cause in record.cause
    assert record.job is not None
    assert record.job.operations == job.operations
    taken = await broker.take_out(job.id)
    assert taken is not None
    assert taken[1] == job.image
    assert await broker.backlog() == 0


async def test_a_short_lease_is_renewed_in_time(
    server: BrokerServer, gateway: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    broker, inbox = gateway
    beats: list[None] = []
    async with a_worker(server, monkeypatch, lease=0.3, alive=lambda: beats.append(None), work_limit=3.0, attempts=1):
        await broker.send(job := counted(tmp_path / "starts", inbox, "hang"))
        assert (await inbox.reply_to(job)).error == "quarantined"
    assert len(beats) > 10  # one for each lease; about 30


async def test_a_kill_at_the_deadline_costs_no_further_attempt(
    server: BrokerServer, gateway: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    broker, inbox = gateway
    async with a_worker(server, monkeypatch):
        job = counted(tmp_path / "starts", inbox, "hang", deadline=now_ms() + 700)
        await broker.send(job)
        assert (await inbox.reply_to(job)).error == "deadline_passed"
    assert starts(tmp_path / "starts") == 1
    assert await broker.quarantined() == []


async def test_late_work_is_not_begun(server: BrokerServer, gateway: Any, monkeypatch: Any, tmp_path: Path) -> None:
    broker, inbox = gateway
    job = counted(tmp_path / "starts", inbox, "count", deadline=now_ms() - 1_000)
    within_the_skew = counted(tmp_path / "skewed", inbox, "count", deadline=now_ms() - 1_000)
    await broker.send(job)
    async with a_worker(server, monkeypatch, max_clock_skew=0.5):
        assert (await inbox.reply_to(job)).error == "deadline_passed"
    await broker.send(within_the_skew)
    async with a_worker(server, monkeypatch, max_clock_skew=60.0):
        assert (await inbox.reply_to(within_the_skew)).error is None
    assert (starts(tmp_path / "starts"), starts(tmp_path / "skewed")) == (0, 1)


async def test_an_operation_that_this_worker_lacks_goes_to_another(
    server: BrokerServer, gateway: Any, monkeypatch: Any
) -> None:
    broker, inbox = gateway
    lacking = open_broker(server.url, lease=LEASE)
    async with Pool(1, [], 0) as pool:
        consumer = Consumer(lacking, pool, "lacking", settings.Worker(), lease=LEASE)
        running = asyncio.create_task(consumer.run())
        job = a_job(inbox.name, b"picture", operations=[("echo", {})])
        await broker.send(job)
        async with a_worker(server, monkeypatch, "offering"):
            assert (await inbox.reply_to(job)).worker == "offering"
        consumer.stop()
        await running
    await lacking.close()


async def test_what_no_worker_offers_is_taken_once_a_beat(
    server: BrokerServer, gateway: Any, monkeypatch: Any, caplog: Any
) -> None:
    broker, inbox = gateway
    caplog.set_level("DEBUG", "safelight.worker.consumer")
    async with a_worker(server, monkeypatch):
        began = asyncio.get_running_loop().time()
        await broker.send(a_job(inbox.name, operations=[("nonsense", {})]))

        async def given_back() -> bool:
            return caplog.text.count("does not offer nonsense") >= 5

        await until(given_back)
        assert asyncio.get_running_loop().time() - began > 1.5  # two slots, each waits a beat
    assert "withdrawn" not in caplog.text


async def test_the_child_of_a_withdrawn_job_is_stopped(
    server: BrokerServer, gateway: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    broker, inbox = gateway
    async with a_worker(server, monkeypatch):
        job = counted(tmp_path / "starts", inbox, "hang")
        await broker.send(job)

        async def begun() -> bool:
            return starts(tmp_path / "starts") == 1

        await until(begun)
        await broker.withdraw(job)
        after = a_job(inbox.name, b"next", operations=[("echo", {})])
        await broker.send(after)
        assert (await inbox.reply_to(after, seconds=5)).image == b"next"
    assert starts(tmp_path / "starts") == 1
    assert [reply.id for reply in inbox.replies] == [after.id]


@pytest.mark.parametrize(("sent", "finished"), [(2, 1), (3, 2)], ids=["nothing behind it", "more behind it"])
async def test_what_waits_in_a_worker_that_stops_is_handed_over_if_nothing_waits_behind_it(
    server: BrokerServer, gateway: Any, monkeypatch: Any, tmp_path: Path, sent: int, finished: int
) -> None:
    broker, inbox = gateway
    jobs = [counted(tmp_path / f"starts-{n}", inbox, "slow") for n in range(sent)]
    async with a_worker(server, monkeypatch, "stopping") as consumer:
        for job in jobs:
            await broker.send(job)

        async def begun() -> bool:
            return starts(tmp_path / "starts-0") == 1 and len(consumer._held) == 2

        await until(begun)
        consumer.stop()
    for job in jobs[:finished]:
        assert (await inbox.reply_to(job)).worker == "stopping"
    assert await broker.backlog() == 1
    async with a_worker(server, monkeypatch, "next"):
        assert (await inbox.reply_to(jobs[-1], seconds=LEASE * 2)).worker == "next"
    assert [starts(tmp_path / f"starts-{n}") for n in range(sent)] == [1] * sent


async def test_what_comes_after_the_stop_does_not_wait_for_what_runs(
    server: BrokerServer, gateway: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    broker, inbox = gateway
    running, after = (counted(tmp_path / name, inbox, "gated") for name in ("running", "after"))
    (tmp_path / "after.go").touch()
    async with a_worker(server, monkeypatch, "stopping") as consumer:
        await broker.send(running)

        async def begun() -> bool:
            return starts(tmp_path / "running") == 1

        await until(begun)
        consumer.stop()
        await broker.send(after)  # it still asks, for a second at most
        async with a_worker(server, monkeypatch, "next"):
            assert (await inbox.reply_to(after)).worker == "next"
        assert [reply.id for reply in inbox.replies] == [after.id]
        (tmp_path / "running.go").touch()
    assert (await inbox.reply_to(running)).worker == "stopping"
    assert [starts(tmp_path / name) for name in ("running", "after")] == [1, 1]


async def test_what_is_being_given_back_at_the_stop_is_given_back_once(
    server: BrokerServer, gateway: Any, monkeypatch: Any
) -> None:
    broker, inbox = gateway
    given, go_on = asyncio.Event(), asyncio.Event()
    async with a_worker(server, monkeypatch) as consumer:
        give_back = consumer._broker.give_back

        async def slowly(delivery: Any, starts: int) -> None:
            await give_back(delivery, starts)
            given.set()
            await go_on.wait()  # for the broker's answer

        monkeypatch.setattr(consumer._broker, "give_back", slowly)
        await broker.send(a_job(inbox.name, operations=[("nonsense", {})]))
        await given.wait()
        consumer.stop()
        await asyncio.sleep(0)  # what was cancelled is at work on it
        go_on.set()
    assert await broker.backlog() == 1


async def test_no_job_waits_behind_a_heavy_one(
    server: BrokerServer, gateway: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    """Both workers take what they may hold; while one has a heavy job, all light ones are done by the other."""
    broker, inbox = gateway
    image = b"\x89PNG\r\n\x1a\nWAIT-FOR:" + bytes(tmp_path / "file")
    heavy = a_job(inbox.name, image, operations=[("wait_for_a_file", {})], pixels=MAX_PIXELS)
    assert heavy.heavy
    async with a_worker(server, monkeypatch, "one") as one, a_worker(server, monkeypatch, "two") as two:
        for _ in range(2):  # the second time a worker's places must all be there again
            await broker.send(heavy)
            await until(lambda: is_true(one._pool.free + two._pool.free == 1))
            light = [a_job(inbox.name, b"light", operations=[("echo", {})]) for _ in range(20)]
            for job in light:
                await broker.send(job)
            for job in light:
                await inbox.reply_to(job)
            assert heavy.id not in {reply.id for reply in inbox.replies}
            (tmp_path / "file").touch()
            await inbox.reply_to(heavy)
            (tmp_path / "file").unlink()
            inbox.replies.clear()
        await until(lambda: is_true(one._room._value == two._room._value == 1))  # one of two is held while it asks


async def test_a_broker_that_is_emptied_stops_no_worker(server: BrokerServer, gateway: Any, monkeypatch: Any) -> None:
    broker, inbox = gateway
    async with a_worker(server, monkeypatch):
        for fault in (lambda: server.command("FLUSHALL"), lambda: (server.kill(), server.start())):
            renewed = inbox.renewed
            fault()

            async def inbox_is_back(renewed: int = renewed) -> bool:
                return inbox.renewed > renewed

            await until(inbox_is_back)
            job = a_job(inbox.name, b"again", operations=[("echo", {})])
            await broker.send(job)
            assert (await inbox.reply_to(job)).image == b"again"


@pytest.mark.skipif(sys.platform != "linux", reason="no cheap way to a process's resident size")
async def test_no_job_fails_of_an_operation_that_leaks(server: BrokerServer, gateway: Any, monkeypatch: Any) -> None:
    broker, inbox = gateway
    pids = set()
    async with a_worker(server, monkeypatch, child_resident=64 * MEGABYTE):
        for _ in range(2_500):  # the address space bears 2,000 of them
            job = a_job(inbox.name, str(MEGABYTE).encode(), operations=[("leak", {})])
            await broker.send(job)
            reply = await inbox.reply_to(job)
            assert reply.error is None
            pids.add(reply.facts["pid"])
            if len(pids) == 3:
                break
    assert len(pids) == 3
    assert await broker.quarantined() == []


async def _killed_worker(server: BrokerServer, folder: Path, ready: Any) -> None:
    """A whole worker process, killed with SIGKILL once `ready` is true."""
    environment = os.environ | {"PYTHONPATH": str(HERE), "SAFELIGHT_BROKER": server.url, "SAFELIGHT_LEASE": str(LEASE)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "safelight", "worker", "--import", "hostile"), env=environment, cwd=folder
    )
    await until(ready, seconds=20)
    process.send_signal(signal.SIGKILL)
    await process.wait()


async def test_sigkill_of_the_whole_worker_counts_as_an_attempt(
    server: BrokerServer, gateway: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    broker, inbox = gateway
    job = counted(tmp_path / "starts", inbox, "hang")
    await broker.send(job)
    for n in range(1, 4):

        async def begun(n: int = n) -> bool:
            return starts(tmp_path / "starts") == n

        await _killed_worker(server, tmp_path, begun)
    async with a_worker(server, monkeypatch):
        assert (await inbox.reply_to(job)).error == "quarantined"
    assert starts(tmp_path / "starts") == 3
    [record] = await broker.quarantined()
    assert record.cause == "a worker was killed while it worked on it, 3 times"


async def test_a_job_that_only_waited_in_workers_that_died_is_answered(
    server: BrokerServer, gateway: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    broker, inbox = gateway
    ahead, waiting = counted(tmp_path / "ahead", inbox, "hang"), counted(tmp_path / "waiting", inbox, "count")
    await broker.send(ahead)
    await broker.send(waiting)
    for n in range(1, 4):

        async def both_held(n: int = n) -> bool:
            return starts(tmp_path / "ahead") == n and await _held(server) == 2

        await _killed_worker(server, tmp_path, both_held)
    async with a_worker(server, monkeypatch):
        assert (await inbox.reply_to(waiting)).error is None
        assert (await inbox.reply_to(ahead)).error == "quarantined"
    assert starts(tmp_path / "waiting") == 1


async def _held(server: BrokerServer) -> int:
    """Jobs under a lease that was renewed within a beat and a half."""
    async with Redis(unix_socket_path=str(server.socket)) as client:
        pending = await client.xpending_range("{safelight}:jobs", "workers", "-", "+", 10)
        return sum(entry["time_since_delivered"] < 1_500 for entry in pending)
