"""What every broker must do, as tests that its own tests inherit; also for a driver that is none of ours.

It knows no driver, only `Broker`. It needs pytest and anyio's plugin for it (which comes with Safelight):

    class TestMine(Conformance):
        @pytest.fixture
        def server(self): ...               # a fresh server, as `Server` has it
        def open(self, server): ...         # where `open_broker` does not know the URL
        async def put_by_hand(self, server, header, body): ...
        async def inboxes(self, server): ...
        async def lose(self, worker): ...   # where a lease is not only kept up by beats
        async def bound(self, server, monkeypatch, jobs, size, age_ms): ...  # where `brokers.aside` does not do it

`python -m safelight.conformance URL NAME STARTS SIGNAL` is a worker's end that sends itself SIGKILL or SIGSTOP with a
job in its hands.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

import pytest

from safelight.brokers import Broker, Delivery, Renewed, aside, open_broker
from safelight.errors import BrokerAwayError
from safelight.message import Job, Presence, Quarantined, Reply, new_id, now_ms

__all__ = [
    "LEASE",
    "Conformance",
    "Inbox",
    "Server",
    "Worker",
    "a_job",
    "answered",
    "is_equal",
    "is_true",
    "presence_of",
    "sent",
    "until",
]

LEASE = 0.5


class Server(Protocol):
    """A broker of the tests' own."""

    url: str

    def kill(self) -> None:
        """SIGKILL."""

    def start(self) -> None:
        """Start it again; done when it answers."""


def a_job(inbox: str, image: bytes = b"an image", **members: Any) -> Job:
    fields: dict[str, Any] = {"operations": [("size", {})], "deadline": now_ms() + 60_000} | members
    return Job(id=new_id(), reply_to=inbox, image=image, **fields)


def presence_of(worker: str, free: int = 2) -> Presence:
    return Presence(worker=worker, operations=["mirror", "size"], free=free, slots=2)


async def until(condition: Callable[[], Awaitable[Any]], seconds: float = 10.0) -> Any:
    """The first true value of `condition`, looked at again and again."""
    end = time.monotonic() + seconds
    while not (value := await condition()):
        assert time.monotonic() < end, f"not within {seconds} s"
        await asyncio.sleep(0.01)
    return value


class Inbox:
    """A gateway's replies, collected by a task."""

    def __init__(self, broker: Broker, name: str) -> None:
        self.name = name
        self.replies: list[Reply] = []
        self.renewed = -1  # the first time it was made
        self.task = asyncio.create_task(self._collect(broker))

    async def _collect(self, broker: Broker) -> None:
        async for item in broker.replies(self.name):
            if isinstance(item, Renewed):
                self.renewed += 1
            else:
                self.replies.append(item)

    async def reply_to(self, job: Job, seconds: float = 10.0) -> Reply:
        async def found() -> Reply | None:
            return next((reply for reply in self.replies if reply.id == job.id), None)

        reply: Reply = await until(found, seconds)
        return reply


class Worker:
    """A worker's end: `take` gives the next delivery."""

    def __init__(self, broker: Broker, name: str) -> None:
        self.broker = broker
        self.name = name
        self.stopping = False
        self._jobs = broker.jobs(name, lambda: self.stopping)

    async def take(self, seconds: float = 10.0) -> Delivery:
        async with asyncio.timeout(seconds):
            return await anext(self._jobs)

    async def nothing(self) -> None:
        """Nothing is handed out: the iterator ends, having been told to stop, without a delivery."""
        self.stopping = True
        async with asyncio.timeout(10):
            assert await anext(self._jobs, None) is None
        self.stopping = False
        self._jobs = self.broker.jobs(self.name, lambda: self.stopping)

    async def answer(self, delivery: Delivery, **members: Any) -> None:
        await self.broker.reply(delivery, Reply(id=delivery.job.id, worker=self.name, **members))


async def hold(url: str, name: str, starts: int, number: int) -> None:
    """Take one job, write down that it starts if `starts` says so, and be killed or frozen."""
    broker = open_broker(url, lease=LEASE)
    delivery = await anext(broker.jobs(name, lambda: False))
    if starts:
        await broker.start(delivery, starts)
    print(f"{name} holds a job", flush=True)
    os.kill(os.getpid(), number)


class Conformance:
    """The suite."""

    pytestmark = pytest.mark.anyio

    redelivery = 3 * LEASE
    """Seconds after which a killed worker's job is with another one, at most."""

    frozen_redelivery = 3 * LEASE
    """The same of one that is frozen."""

    keeps = False
    """Whether a broker that is killed has kept what it confirmed."""

    @pytest.fixture
    def anyio_backend(self) -> tuple[str, dict[str, bool]]:
        return "asyncio", {"use_uvloop": True}  # the product's loop: a closed transport of its raises

    @pytest.fixture
    def server(self) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def ordered_server(self, server: Any) -> Any:
        """One that keeps the order of all jobs, where that is a matter of its set-up."""
        return server

    async def put_by_hand(self, server: Any, header: bytes, body: bytes) -> None:
        """Put a message on the queue that none of us made."""
        raise NotImplementedError

    async def inboxes(self, server: Any) -> int:
        """How many inboxes the server has."""
        raise NotImplementedError

    async def lose(self, worker: Worker) -> None:
        """Take from a worker that lives what it holds; without more, its leases end since it does not beat."""

    async def bound(
        self, server: Any, monkeypatch: pytest.MonkeyPatch, *, jobs: int = 100, size: int = 2_500, age_ms: int = 60_000
    ) -> None:
        """Give the quarantine smaller bounds for one test."""
        monkeypatch.setattr(aside, "KEPT_JOBS", jobs)
        monkeypatch.setattr(aside, "KEPT_BYTES", size)
        monkeypatch.setattr(aside, "KEPT_MS", age_ms)

    async def joined(self, *workers: Worker) -> None:
        """Return when each of these, which ask for jobs, can be handed one."""

    def open(self, server: Any) -> Broker:
        return open_broker(server.url, lease=LEASE)

    def holder(self, server: Any, name: str, starts: int, number: int) -> list[str]:
        """The command that runs `hold`."""
        return [sys.executable, "-m", "safelight.conformance", server.url, name, str(starts), str(int(number))]

    @asynccontextmanager
    async def end(self, server: Any) -> AsyncIterator[Broker]:
        broker = self.open(server)
        await broker.connect()
        try:
            yield broker
        finally:
            await broker.close()

    @asynccontextmanager
    async def gateway(self, server: Any) -> AsyncIterator[tuple[Broker, Inbox]]:
        async with self.end(server) as broker:
            inbox = Inbox(broker, new_id())
            try:
                await until(lambda: is_true(inbox.renewed >= 0))
                yield broker, inbox
            finally:
                inbox.task.cancel()
                with suppress(asyncio.CancelledError):
                    await inbox.task

    @asynccontextmanager
    async def worker(self, server: Any, name: str = "worker-0") -> AsyncIterator[Worker]:
        async with self.end(server) as broker:
            yield Worker(broker, name)

    async def killed(self, server: Any, name: str, starts: int = 0) -> None:
        """A worker takes a job, perhaps starts it, and is killed."""
        process = await asyncio.create_subprocess_exec(*self.holder(server, name, starts, signal.SIGKILL))
        assert await process.wait() == -signal.SIGKILL

    @staticmethod
    async def nothing_waits(gateway: Broker) -> None:
        """Nothing waits or is worked on; what was acknowledged may go a moment later."""
        await until(lambda: is_equal(gateway.backlog, 0))

    async def test_round_trip(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            job = a_job(inbox.name, image=bytes(range(256)), traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")
            await gateway.send(job)
            delivery = await worker.take()
            assert (delivery.job, delivery.starts) == (job, 0)
            await worker.broker.beat([delivery], presence_of("worker-0", free=1))
            await until(gateway.presence)
            assert await gateway.backlog() == 1
            await worker.broker.start(delivery, 1)
            await worker.answer(delivery, facts={"size": "1kb"}, notes={"mirror": "lossless"}, image=b"result", work=7)
            reply = await inbox.reply_to(job)
            assert reply == Reply(
                id=job.id,
                worker="worker-0",
                work=7,
                facts={"size": "1kb"},
                notes={"mirror": "lossless"},
                image=b"result",
            )
            await worker.broker.beat([], presence_of("worker-0"))
            await self.nothing_waits(gateway)
            await worker.nothing()

    async def test_images_up_to_the_upload_limit(self, server: Any) -> None:
        image = bytes(32 * 1024 * 1024)
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            job = a_job(inbox.name, image)
            await gateway.send(job)
            delivery = await worker.take()
            assert delivery.job.image == image
            await worker.answer(delivery, image=image)
            assert (await inbox.reply_to(job)).image == image

    async def test_thousands_of_jobs_and_two_gateways_whose_replies_never_cross(self, server: Any) -> None:
        async with self.gateway(server) as one, self.gateway(server) as two, self.worker(server) as worker:
            jobs = {end: [a_job(end[1].name, str(n).encode()) for n in range(1_000)] for end in (one, two)}
            await asyncio.gather(*(end[0].send(job) for end, sent in jobs.items() for job in sent))
            for _ in range(2_000):
                delivery = await worker.take()
                await worker.answer(delivery, image=delivery.job.image)
            for end, sent in jobs.items():
                await asyncio.gather(*(end[1].reply_to(job) for job in sent))
                assert {r.id: r.image for r in end[1].replies} == {job.id: job.image for job in sent}
                assert len(end[1].replies) == 1_000

    async def test_a_killed_workers_job_starts_elsewhere(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server, "other") as other:
            job = a_job(inbox.name)
            await gateway.send(job)
            await self.killed(server, "killed")
            begun = time.monotonic()
            delivery = await other.take(60)
            assert (delivery.job, delivery.starts) == (job, 0)
            assert time.monotonic() - begun <= self.redelivery

    async def test_a_frozen_workers_job_starts_elsewhere(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server, "other") as other:
            await gateway.send(job := a_job(inbox.name))
            command = self.holder(server, "frozen", 0, signal.SIGSTOP)
            frozen = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            try:
                assert frozen.stdout is not None
                assert await frozen.stdout.readline() == b"frozen holds a job\n"
                begun = time.monotonic()
                assert (await other.take(60)).job == job
                assert time.monotonic() - begun <= self.frozen_redelivery
            finally:
                frozen.kill()
                await frozen.wait()

    async def test_a_start_written_just_before_sigkill_arrives(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server, "other") as other:
            await gateway.send(a_job(inbox.name))
            await self.killed(server, "killed", starts=1)
            assert (await other.take(60)).starts == 1

    async def test_what_a_dead_worker_held_comes_first(self, ordered_server: Any) -> None:
        async with self.gateway(ordered_server) as (gateway, inbox):
            jobs = [a_job(inbox.name) for _ in range(3)]
            async with self.worker(ordered_server, "leaves") as leaves:
                for job in jobs:
                    await gateway.send(job)
                for _ in range(2):
                    await leaves.take()
            await asyncio.sleep(LEASE)  # where a lease is, it ends
            async with self.worker(ordered_server, "other") as other:
                *first, last = [(await other.take()).job.id for _ in jobs]
                assert ({*first}, last) == ({jobs[0].id, jobs[1].id}, jobs[2].id)

    async def test_a_renewed_lease_does_not_end(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server, "holder") as holder:
            await gateway.send(a_job(inbox.name))
            delivery = await holder.take()
            async with self.worker(server, "other") as other:
                taking = asyncio.create_task(other.take(seconds=60))
                for _ in range(20):  # 3 s, a beat each 0.15 s
                    assert await holder.broker.beat([delivery], presence_of("holder")) == []
                    await asyncio.wait([taking], timeout=0.15)
                assert not taking.done()
                taking.cancel()
                with suppress(asyncio.CancelledError):
                    await taking

    async def test_waiting_is_no_attempt_and_a_start_is(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox):
            await gateway.send(a_job(inbox.name))
            for n in range(4):  # waits in a worker that leaves
                async with self.worker(server, f"waits-{n}") as worker:
                    assert (await worker.take()).starts == 0
            for n in range(3):  # starts in a worker that leaves
                async with self.worker(server, f"starts-{n}") as worker:
                    delivery = await worker.take()
                    assert delivery.starts == n
                    await worker.broker.start(delivery, n + 1)

    async def test_given_back_to_another_with_the_starts_so_far(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox):
            async with self.worker(server, "one") as one, self.worker(server, "two") as two:
                taking = {asyncio.create_task(each.take(60)): each for each in (one, two)}
                await self.joined(one, two)
                job = a_job(inbox.name)
                await gateway.send(job)
                (taken,), (waiting,) = await asyncio.wait(taking, return_when=asyncio.FIRST_COMPLETED)
                delivery, giver, other = taken.result(), taking[taken], taking[waiting]
                await giver.broker.start(delivery, 1)
                await giver.broker.give_back(delivery, 1)
                again = await waiting
                assert (again.job.id, again.job.image, again.starts) == (job.id, job.image, 1)
                await other.broker.start(again, 2)
            async with self.worker(server, "third") as third:
                last = await third.take()
                assert last.starts == 2
                await third.answer(last)
                assert await inbox.reply_to(job)

    async def test_handed_over_to_another_or_kept(self, server: Any) -> None:
        async with (
            self.gateway(server) as (gateway, inbox),
            self.worker(server, "one") as one,
            self.worker(server, "two") as two,
        ):
            taking = {asyncio.create_task(each.take(60)): each for each in (one, two)}
            await self.joined(one, two)
            await gateway.send(job := a_job(inbox.name))
            (taken,), (waiting,) = await asyncio.wait(taking, return_when=asyncio.FIRST_COMPLETED)
            leaving, staying = taking[taken], taking[waiting]

            async def is_handed_over() -> bool:
                await staying.broker.beat([], presence_of(staying.name))
                await leaving.broker.beat([taken.result()], presence_of(leaving.name, free=0))
                return await leaving.broker.hand_over(taken.result())

            await until(is_handed_over)
            delivery = await waiting
            assert (delivery.job.id, delivery.starts) == (job.id, 0)
            for _ in range(3):
                await gateway.send(a_job(inbox.name))
            holder = staying
            if await staying.broker.hand_over(delivery):  # before what waits
                holder, delivery = leaving, await leaving.take()
            assert (delivery.job.id, delivery.starts) == (job.id, 0)
            await holder.answer(delivery)
            assert await inbox.reply_to(job)

    async def test_presence_expires_and_is_taken_back(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, _):

            async def names() -> set[str]:
                return {presence.worker for presence in await gateway.presence()}

            async with self.worker(server, "leaves") as leaves, self.worker(server, "freezes") as freezes:
                await freezes.broker.beat([], presence_of("freezes", free=1))
                begun = time.monotonic()
                await leaves.broker.beat([], presence_of("leaves"))
                await until(lambda: is_equal(names, {"leaves", "freezes"}))
                shown = next(p for p in await gateway.presence() if p.worker == "freezes")
                assert (shown.operations, shown.free, shown.slots) == (["mirror", "size"], 1, 2)
                await until(lambda: is_equal(names, set()))
                assert time.monotonic() - begun >= 2 * LEASE
                await leaves.broker.beat([], presence_of("leaves"))
                await until(lambda: is_equal(names, {"leaves"}))
            begun = time.monotonic()
            await until(lambda: is_equal(names, set()))
            assert time.monotonic() - begun < LEASE

    async def test_each_beat_is_a_new_sign_of_life(self, server: Any) -> None:
        """A gateway takes a worker for dead whose presence stays as it was, also while nothing in it changes."""
        async with self.gateway(server) as (gateway, _), self.worker(server) as worker:

            async def seen() -> int:
                await worker.broker.beat([], presence_of("worker-0"))
                return max((presence.seen for presence in await gateway.presence()), default=0)

            first: int = await until(seen)

            async def is_newer() -> bool:
                return await seen() > first

            await until(is_newer)

    async def test_a_withdrawn_job_is_not_handed_out(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            await worker.broker.beat([], presence_of("worker-0"))
            withdrawn, job = a_job(inbox.name), a_job(inbox.name)
            for each in (withdrawn, job):
                await gateway.send(each)
            await gateway.withdraw(withdrawn)
            await worker.broker.beat([], presence_of("worker-0"))
            delivery = await worker.take()
            assert delivery.job == job
            await worker.answer(delivery)
            await self.nothing_waits(gateway)

    async def test_the_holder_of_a_withdrawn_job_learns_by_its_beat(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            kept, job = a_job(inbox.name), a_job(inbox.name)
            for each in (kept, job):
                await gateway.send(each)
            held = [await worker.take(), await worker.take()]
            assert await worker.broker.beat(held, presence_of("worker-0")) == []
            await gateway.withdraw(job)
            lost = await until(lambda: worker.broker.beat(held, presence_of("worker-0")))
            assert [delivery.job.id for delivery in lost] == [job.id]

    async def test_a_withdrawn_job_that_was_given_back_goes_nowhere(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            jobs = [a_job(inbox.name) for _ in range(2)]
            for job in jobs:
                await gateway.send(job)
            for delivery in [await worker.take(), await worker.take()]:
                await worker.broker.give_back(delivery, 0)
            first, second = await worker.take(), await worker.take()
            for job in jobs:
                await gateway.withdraw(job)
            await worker.broker.give_back(first, 0)
            lost = await until(lambda: worker.broker.beat([second], presence_of("worker-0")))
            assert lost == [second]
            await gateway.send(job := a_job(inbox.name))
            assert (await worker.take()).job == job
            await worker.broker.beat([], presence_of("worker-0", free=1))
            await until(gateway.presence)
            await until(lambda: is_equal(gateway.backlog, 1))

    async def test_two_replies_to_one_job(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server, "slow") as slow:
            job, next_job = a_job(inbox.name), a_job(inbox.name)
            await gateway.send(job)
            late = await slow.take()
            await self.lose(slow)
            async with self.worker(server, "quick") as quick:
                await quick.answer(await quick.take())
                await inbox.reply_to(job)
                await slow.answer(late)
                await gateway.send(next_job)
                await quick.answer(await quick.take())
                await inbox.reply_to(next_job)
                await self.nothing_waits(gateway)

    async def test_quarantine(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            job = a_job(inbox.name, b"poison")
            await gateway.send(job)
            delivery = await worker.take()
            record = Quarantined(
                id=job.id, cause="SIGSEGV", attempts=3, worker="worker-0", at=now_ms(), size=6, job=a_job("x", b"")
            )
            reply = Reply(id=job.id, worker="worker-0", error="quarantined", detail="kept")
            await worker.broker.quarantine(delivery, record, reply)
            assert (await inbox.reply_to(job)).error == "quarantined"
            await self.nothing_waits(gateway)
            assert await gateway.quarantined() == [record]
            assert await gateway.take_out(job.id) == (record, b"poison")
            assert await gateway.drop(job.id) is True
            assert await gateway.drop(job.id) is False
            assert await gateway.take_out(job.id) is None
            assert await gateway.quarantined() == []

    async def test_a_job_that_was_sent_anew_and_failed_again_is_kept_once(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            job = a_job(inbox.name)
            for attempt in range(2):
                await gateway.send(job)
                record = Quarantined(
                    id=job.id, cause=str(attempt), attempts=3, worker="", at=now_ms() + attempt, size=8
                )
                await worker.broker.quarantine(await worker.take(), record, Reply(id=job.id, error="quarantined"))
            assert await gateway.quarantined() == [record]
            assert await gateway.take_out(job.id) == (record, job.image)
            assert await gateway.drop(job.id) is True
            assert await gateway.quarantined() == []

    async def test_quarantine_holds_the_newest_hundred(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            jobs = [a_job(inbox.name) for _ in range(103)]
            for number, job in enumerate(jobs):
                await gateway.send(job)
                record = Quarantined(id=job.id, cause="", attempts=3, worker="", at=now_ms() + number, size=8)
                await worker.broker.quarantine(await worker.take(), record, Reply(id=job.id, error="quarantined"))
            assert [record.id for record in await gateway.quarantined()] == [job.id for job in jobs[3:]]
            assert await gateway.take_out(jobs[0].id) is None

    async def put_aside(self, gateway: Broker, inbox: Inbox, worker: Worker, image: bytes) -> Job:
        """A job that ended in quarantine."""
        await gateway.send(job := a_job(inbox.name, image))
        at = now_ms() + len(inbox.replies)  # no two in the same millisecond
        record = Quarantined(id=job.id, cause="", attempts=3, worker="", at=at, size=len(image))
        await worker.broker.quarantine(await worker.take(), record, Reply(id=job.id, error="quarantined"))
        await inbox.reply_to(job)
        return job

    async def test_quarantine_holds_the_newest_within_its_bytes(
        self, server: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            await self.bound(server, monkeypatch, size=2_500)
            jobs = []
            for _ in range(4):
                jobs.append(await self.put_aside(gateway, inbox, worker, bytes(1_000)))
                assert [record.id for record in await gateway.quarantined()] == [job.id for job in jobs[-2:]]
            assert await gateway.take_out(jobs[1].id) is None
            taken = await gateway.take_out(jobs[2].id)
            assert taken is not None
            assert taken[1] == jobs[2].image

    async def test_quarantine_forgets_what_is_too_old(self, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            await self.bound(server, monkeypatch, age_ms=1_000)
            job = await self.put_aside(gateway, inbox, worker, b"old")
            await until(lambda: is_equal(gateway.quarantined, []))
            assert await gateway.take_out(job.id) is None
            assert await gateway.drop(job.id) is False

    async def test_workers_that_quarantine_at_once_hold_the_bounds(
        self, server: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            await self.bound(server, monkeypatch, jobs=2)
            deliveries = []
            for _ in range(5):
                await gateway.send(a_job(inbox.name))
                deliveries.append(await worker.take())
            at = now_ms()
            records = [
                Quarantined(id=each.job.id, cause="", attempts=3, worker="", at=at + number, size=8)
                for number, each in enumerate(deliveries)
            ]
            kept = (
                worker.broker.quarantine(each, record, Reply(id=record.id, error="quarantined"))
                for each, record in zip(deliveries, records, strict=True)
            )
            await asyncio.gather(*kept)
            assert len(await gateway.quarantined()) == 2

    @pytest.mark.parametrize(
        ("header", "body"),
        [(b"", b""), (b"{", b"x"), (b'{"v":1}', b"x"), (b'{"v":9,"id":"x"}', b"x"), (b"\xff\xfe", b"")],
    )
    async def test_a_malformed_message_is_kept_aside(self, server: Any, header: bytes, body: bytes) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            await self.put_by_hand(server, header, body)
            job = a_job(inbox.name)
            await gateway.send(job)
            await worker.answer(await worker.take())
            await inbox.reply_to(job)
            await self.nothing_waits(gateway)
            [record] = await gateway.quarantined()
            assert record.cause.startswith("not a job: ")
            assert record.size == len(body)

    async def test_a_broker_killed_and_restarted_in_mid_flight(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            job = a_job(inbox.name)
            await gateway.send(job)
            held = await worker.take()
            server.kill()
            with pytest.raises(BrokerAwayError):
                await gateway.send(job)
            with pytest.raises(BrokerAwayError):
                await worker.broker.beat([held], presence_of("worker-0"))
            server.start()
            await until(lambda: is_true(self.keeps or inbox.renewed > 0), seconds=10)
            await until(lambda: sent(gateway, job), seconds=30)
            await worker.answer(await worker.take())
            await inbox.reply_to(job)

    async def test_stopping_ends_the_jobs(self, server: Any) -> None:
        async with self.worker(server) as worker:
            await worker.nothing()

    async def test_a_worker_that_takes_no_more_gives_back_what_it_holds(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox):
            async with self.worker(server, "leaves") as leaves:
                await gateway.send(job := a_job(inbox.name))
                delivery = await leaves.take()
                await leaves.nothing()
                await leaves.broker.give_back(delivery, 0)
            async with self.worker(server, "stays") as stays:
                again = await stays.take(60)
                assert (again.job.id, again.starts) == (job.id, 0)

    async def test_a_question_that_is_cancelled_ends(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, _):
            for turns in range(60):  # of the event loop, so that it is met at each point of its way
                asking = asyncio.create_task(gateway.presence())
                for _ in range(turns):
                    await asyncio.sleep(0)
                if asking.cancel():
                    await asyncio.wait([asking])
                    assert asking.cancelled()

    async def test_a_dead_gateways_inbox_is_not_made_again(self, server: Any) -> None:
        before = await self.inboxes(server)  # one that another test could not delete is there for a minute
        async with self.worker(server) as worker:
            async with self.gateway(server) as (gateway, inbox):
                await gateway.send(a_job(inbox.name))
                await gateway.send(a_job(inbox.name))
                await worker.answer(await worker.take())
            await worker.answer(await worker.take())
            async with self.end(server) as other:
                await self.nothing_waits(other)
            assert await self.inboxes(server) <= before

    async def test_workers_come_and_go_under_load(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox):
            jobs = [a_job(inbox.name, str(n).encode()) for n in range(200)]
            sending = asyncio.create_task(_send_all(gateway, jobs))
            answered: set[str] = set()

            async def work(name: str, most: int) -> None:
                async with self.worker(server, name) as worker:
                    for _ in range(most):
                        delivery = await worker.take(60)
                        await worker.answer(delivery, image=delivery.job.image)
                        answered.add(delivery.job.id)
                    held = [await worker.take(60)]  # and leaves with a job in its hands
                    assert held

            for shift in range(3):
                await asyncio.gather(*(work(f"{shift}-{n}", 10) for n in range(3)))
            await sending
            async with self.worker(server, "last") as last:
                while len(answered) < len(jobs):
                    delivery = await last.take(60)
                    await last.answer(delivery, image=delivery.job.image)
                    answered.add(delivery.job.id)
            for job in jobs:
                assert (await inbox.reply_to(job)).image == job.image


async def sent(gateway: Broker, job: Job) -> bool:
    """Whether a job could be sent; false while the broker is away."""
    try:
        await gateway.send(job)
    except BrokerAwayError:
        return False
    return True


async def answered(worker: Worker, delivery: Delivery, **members: Any) -> bool:
    """Whether a job could be answered; false while the broker is away."""
    try:
        await worker.answer(delivery, **members)
    except BrokerAwayError:
        return False
    return True


async def _send_all(gateway: Broker, jobs: list[Job]) -> None:
    for job in jobs:
        await gateway.send(job)


async def is_equal(read: Callable[[], Awaitable[Any]], wanted: Any) -> bool:
    return bool(await read() == wanted)


async def is_true(value: bool) -> bool:
    """For `until`, which waits for something to be awaited."""
    return value


if __name__ == "__main__":
    asyncio.run(hold(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
