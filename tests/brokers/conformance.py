"""What every broker must do: one suite that each broker's tests inherit. It knows no driver, only `Broker`.

A subclass gives `server` (with `url`, `kill`, `start`) and `put_by_hand`; the tests use leases of half a second.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from safelight.brokers import Broker, Delivery, Renewed, open_broker
from safelight.errors import BrokerAwayError
from safelight.message import Job, Presence, Quarantined, Reply, new_id, now_ms

LEASE = 0.5


def a_job(inbox: str, image: bytes = b"an image", **members: Any) -> Job:
    fields: dict[str, Any] = {"operations": [("size", {})], "deadline": now_ms() + 60_000} | members
    return Job(id=new_id(), reply_to=inbox, image=image, **fields)


def presence_of(worker: str, free: int = 1) -> Presence:
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


class Conformance:
    """The suite."""

    pytestmark = pytest.mark.anyio

    @pytest.fixture
    def anyio_backend(self) -> tuple[str, dict[str, bool]]:
        return "asyncio", {"use_uvloop": True}  # the product's loop: a closed transport of its raises

    @pytest.fixture
    def server(self) -> Any:
        raise NotImplementedError

    async def put_by_hand(self, server: Any, header: bytes, body: bytes) -> None:
        """Put a message on the queue that none of us made."""
        raise NotImplementedError

    @asynccontextmanager
    async def end(self, server: Any) -> AsyncIterator[Broker]:
        broker = open_broker(server.url, lease=LEASE)
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
                yield broker, inbox
            finally:
                inbox.task.cancel()
                with suppress(asyncio.CancelledError):
                    await inbox.task

    @asynccontextmanager
    async def worker(self, server: Any, name: str = "worker-0") -> AsyncIterator[Worker]:
        async with self.end(server) as broker:
            yield Worker(broker, name)

    async def test_round_trip(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            job = a_job(inbox.name, image=bytes(range(256)), traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")
            await gateway.send(job)
            delivery = await worker.take()
            assert (delivery.job, delivery.starts) == (job, 0)
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
            assert await gateway.backlog() == 0
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

    async def test_a_thousand_jobs_and_two_gateways_whose_replies_never_cross(self, server: Any) -> None:
        async with self.gateway(server) as one, self.gateway(server) as two, self.worker(server) as worker:
            jobs = {end: [a_job(end[1].name, str(n).encode()) for n in range(500)] for end in (one, two)}
            await asyncio.gather(*(end[0].send(job) for end, sent in jobs.items() for job in sent))
            for _ in range(1_000):
                delivery = await worker.take()
                await worker.answer(delivery, image=delivery.job.image)
            for end, sent in jobs.items():
                await asyncio.gather(*(end[1].reply_to(job) for job in sent))
                assert {r.id: r.image for r in end[1].replies} == {job.id: job.image for job in sent}
                assert len(end[1].replies) == 500

    async def test_a_job_starts_elsewhere_when_its_lease_ends(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server, "killed") as killed:
            job = a_job(inbox.name)
            await gateway.send(job)
            await killed.take()
            begun = time.monotonic()
            async with self.worker(server, "other") as other:
                delivery = await other.take()
                assert delivery.job == job
                assert time.monotonic() - begun >= LEASE * 0.9

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
            for n in range(4):  # waits in a worker that dies
                async with self.worker(server, f"waits-{n}") as worker:
                    assert (await worker.take()).starts == 0
            for n in range(3):  # starts in a worker that dies
                async with self.worker(server, f"starts-{n}") as worker:
                    delivery = await worker.take()
                    assert delivery.starts == n
                    await worker.broker.start(delivery, n + 1)

    async def test_given_back_to_another_with_the_starts_so_far(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server, "lacks-it") as worker:
            job = a_job(inbox.name)
            await gateway.send(job)
            delivery = await worker.take()
            await worker.broker.start(delivery, 1)
            await worker.broker.give_back(delivery, 1)
            async with self.worker(server, "other") as other:
                again = await other.take(seconds=LEASE)
                assert (again.job.id, again.job.image, again.starts) == (job.id, job.image, 1)
                assert await gateway.backlog() == 1
                await other.broker.start(again, 2)
            async with self.worker(server, "third") as third:
                last = await third.take()
                assert last.starts == 2
                await third.answer(last)
                assert await inbox.reply_to(job)

    async def test_presence_expires_and_is_taken_back(self, server: Any) -> None:
        async with self.end(server) as gateway:

            async def names() -> set[str]:
                return {presence.worker for presence in await gateway.presence()}

            async with self.worker(server, "leaves") as leaves, self.worker(server, "freezes") as freezes:
                await leaves.broker.beat([], presence_of("leaves"))
                await freezes.broker.beat([], presence_of("freezes", free=2))
                assert await names() == {"leaves", "freezes"}
                shown = next(p for p in await gateway.presence() if p.worker == "freezes")
                assert (shown.operations, shown.free, shown.slots) == (["mirror", "size"], 2, 2)
                begun = time.monotonic()
                await until(lambda: _is(names, set()))
                assert time.monotonic() - begun >= LEASE
                await leaves.broker.beat([], presence_of("leaves"))
                assert await names() == {"leaves"}
            assert await names() == set()

    async def test_a_withdrawn_job_is_not_handed_out(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            job = a_job(inbox.name)
            await gateway.send(job)
            await gateway.withdraw(job)
            assert await gateway.backlog() == 0
            await worker.nothing()

    async def test_the_holder_of_a_withdrawn_job_learns_by_its_beat(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            kept, job = a_job(inbox.name), a_job(inbox.name)
            for sent in (kept, job):
                await gateway.send(sent)
            held = [await worker.take(), await worker.take()]
            assert await worker.broker.beat(held, presence_of("worker-0")) == []
            await gateway.withdraw(job)
            lost = await until(lambda: worker.broker.beat(held, presence_of("worker-0")))
            assert [delivery.job.id for delivery in lost] == [job.id]

    async def test_a_withdrawn_job_that_was_given_back_goes_nowhere(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            given_back, held = a_job(inbox.name), a_job(inbox.name)
            for job in (given_back, held):
                await gateway.send(job)
            for delivery in [await worker.take(), await worker.take()]:
                await worker.broker.give_back(delivery, 0)
            first, second = await worker.take(), await worker.take()
            for job in (given_back, held):
                await gateway.withdraw(job)
            await worker.broker.give_back(first, 0)
            lost = await until(lambda: worker.broker.beat([second], presence_of("worker-0")))
            assert [delivery.job.id for delivery in lost] == [held.id]
            await worker.nothing()
            assert await gateway.backlog() == 0

    async def test_two_replies_to_one_job(self, server: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server, "slow") as slow:
            job, next_job = a_job(inbox.name), a_job(inbox.name)
            await gateway.send(job)
            late = await slow.take()
            async with self.worker(server, "quick") as quick:
                await quick.answer(await quick.take())
                await inbox.reply_to(job)
                await slow.answer(late)
                await gateway.send(next_job)
                await quick.answer(await quick.take())
                await inbox.reply_to(next_job)
                assert await gateway.backlog() == 0

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
            assert await gateway.backlog() == 0
            assert await gateway.quarantined() == [record]
            assert await gateway.take_out(job.id) == (record, b"poison")
            assert await gateway.drop(job.id) is True
            assert await gateway.drop(job.id) is False
            assert await gateway.take_out(job.id) is None
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
            assert await gateway.backlog() == 0
            [record] = await gateway.quarantined()
            assert record.cause.startswith("not a job: ")
            assert record.size == len(body)

    async def test_a_restarted_broker_that_kept_nothing(self, server: Any) -> None:
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
            await until(lambda: _is_true(lambda: inbox.renewed > 0), seconds=3)
            await gateway.send(job)
            await worker.answer(await worker.take())
            await inbox.reply_to(job)

    async def test_stopping_ends_the_jobs(self, server: Any) -> None:
        async with self.worker(server) as worker:
            await worker.nothing()

    async def test_a_dead_gateways_inbox_is_not_made_again(self, server: Any) -> None:
        async with self.worker(server) as worker:
            async with self.gateway(server) as (gateway, inbox):
                await gateway.send(a_job(inbox.name))
                await gateway.send(a_job(inbox.name))
                await worker.answer(await worker.take())
            await worker.answer(await worker.take())
            async with self.end(server) as other:
                assert await other.backlog() == 0


async def _is(read: Callable[[], Awaitable[Any]], wanted: Any) -> bool:
    return bool(await read() == wanted)


async def _is_true(condition: Callable[[], bool]) -> bool:
    return condition()
