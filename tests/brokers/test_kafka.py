"""C2 over Kafka: the conformance suite on Apache Kafka in KRaft mode, and what is Kafka's own."""

from __future__ import annotations

import asyncio
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from conftest import Apart
from kafka_server import KafkaServer

from safelight.brokers import Delivery, kafka, open_broker
from safelight.brokers.kafka import HEADER, PARTITIONS, RETENTION, WINDOW
from safelight.conformance import (
    LEASE,
    Conformance,
    Worker,
    a_job,
    answered,
    is_equal,
    is_true,
    presence_of,
    sent,
    until,
)
from safelight.errors import BrokerAwayError, ConfigurationError, TooLargeError
from safelight.message import new_id

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Topics(Apart):
    """Topics of a test's own on the node that all share."""

    prefix: str

    def topic(self, name: str) -> str:
        return f"{self.prefix}.{name}"

    @property
    def client(self) -> dict[str, str]:
        return {"bootstrap.servers": f"127.0.0.1:{self.node.port}"}

    async def make(self, name: str, largest: int) -> None:
        """One of the topics, before any of ours does."""
        new = NewTopic(self.topic(name), 1, 1, config={"max.message.bytes": str(largest)})
        admin = AdminClient(self.client)
        await asyncio.wrap_future(admin.create_topics([new], request_timeout=10)[new.topic])

    async def delete(self) -> None:
        """All of them."""
        admin = AdminClient(self.client)
        for future in admin.delete_topics(list(map(self.topic, RETENTION)), request_timeout=10).values():
            await asyncio.wrap_future(future)


@dataclass
class LostCommit:
    """What a test says of a commit that does not come back by itself."""

    is_next: threading.Event = field(default_factory=threading.Event)
    is_answered: threading.Event = field(default_factory=threading.Event)


class TestKafka(Conformance):
    redelivery = 15.0
    frozen_redelivery = 15.0
    keeps = True

    @pytest.fixture
    def server(self, kafka_node: KafkaServer) -> Topics:
        if kafka_node.process is None:
            kafka_node.start()
        prefix = new_id()
        return Topics(kafka_node, kafka_node.url_apart(prefix), prefix)

    @pytest.fixture
    def ordered_server(self, server: Topics) -> Topics:
        server.url += "&partitions=1"
        return server

    async def put_by_hand(self, server: Topics, header: bytes, body: bytes) -> None:
        producer = Producer(server.client)
        producer.produce(server.topic("jobs"), body, partition=0, headers={HEADER: header})
        assert await asyncio.to_thread(producer.flush, 10) == 0

    async def inboxes(self, server: Topics) -> int:
        """What there is beside the four topics, which are there without gateways too."""
        admin = AdminClient(server.client)
        topics = (await asyncio.to_thread(admin.list_topics, timeout=10)).topics
        return len({name for name in topics if name.startswith(server.prefix)} - set(map(server.topic, RETENTION)))

    async def joined(self, *workers: Worker) -> None:
        await until(lambda: is_true(all(w.broker._member and w.broker._member._partitions for w in workers)))  # type: ignore[attr-defined]

    async def lose(self, worker: Worker) -> None:
        await worker.broker._member.close()  # type: ignore[attr-defined]

    async def test_done_out_of_turn_is_not_done_again(self, ordered_server: Topics) -> None:
        async with self.gateway(ordered_server) as (gateway, inbox):
            jobs = [a_job(inbox.name) for _ in range(3)]
            for job in jobs:
                await gateway.send(job)
            async with self.worker(ordered_server, "leaves") as leaves:
                first, second, third = [await leaves.take() for _ in jobs]
                await leaves.broker.start(first, 1)
                await leaves.answer(second)
                await leaves.broker.start(third, 2)
                await until(lambda: is_equal(gateway.backlog, 2))
            async with self.worker(ordered_server, "other") as other:
                held = [await other.take() for _ in range(2)]
                assert [(each.job, each.starts) for each in held] == [(jobs[0], 1), (jobs[2], 2)]
                for each in held:
                    await other.answer(each)
                await self.nothing_waits(gateway)

    async def test_a_lease_that_is_not_beaten_for_ends_with_the_starts_so_far(self, server: Topics) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            await gateway.send(job := a_job(inbox.name))
            delivery = await worker.take()
            await worker.broker.start(delivery, 1)
            again = await worker.take()
            assert (again.job.id, again.starts) == (job.id, 1)
            assert await worker.broker.beat([delivery, again], presence_of("worker-0")) == [delivery]

    async def test_a_job_whose_lease_ended_is_passed_on_once(self, server: Topics) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            await gateway.send(job := a_job(inbox.name))
            await worker.broker.start(await worker.take(), 1)
            with server.node.frozen():
                await asyncio.sleep(3 * LEASE)  # so long its lease has ended
            again = await worker.take()
            assert (again.job.id, again.starts) == (job.id, 1)
            await worker.answer(again)
            await self.nothing_waits(gateway)
            await worker.nothing()

    async def test_a_worker_that_beats_keeps_its_job_while_the_broker_is_slow(self, server: Topics) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            await gateway.send(job := a_job(inbox.name))
            await worker.broker.start(delivery := await worker.take(), 1)
            with server.node.frozen():
                beating = asyncio.create_task(worker.broker.beat([delivery], presence_of("worker-0")))
                await asyncio.sleep(3 * LEASE)  # so long it would have ended
                assert not beating.done()
            assert await beating == []
            await worker.answer(delivery)
            assert await inbox.reply_to(job)
            await self.nothing_waits(gateway)
            await worker.nothing()

    @pytest.fixture
    def lost_commit(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[LostCommit]:
        """The driver as it is now and then after a broker's restart: one of its commits does not come back."""
        lost = LostCommit()

        class Losing(Consumer):
            def commit(self, **how: Any) -> Any:
                if lost.is_next.is_set():
                    lost.is_next.clear()
                    lost.is_answered.wait()
                return super().commit(**how)

        monkeypatch.setattr(kafka, "Consumer", Losing)
        monkeypatch.setattr(kafka, "STUCK_SECONDS", 7.0)  # the driver allows no less than a session
        yield lost
        lost.is_answered.set()

    async def test_a_commit_that_is_never_answered_costs_a_membership(
        self, server: Topics, lost_commit: LostCommit
    ) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            await gateway.send(job := a_job(inbox.name))
            delivery = await worker.take()
            lost_commit.is_next.set()
            with pytest.raises(BrokerAwayError):
                await worker.broker.start(delivery, 1)
            again = await worker.take(60)
            assert (again.job.id, again.starts) == (job.id, 0)
            assert await worker.broker.beat([delivery, again], presence_of("worker-0")) == [delivery]
            await worker.answer(again)
            await inbox.reply_to(job)
            lost_commit.is_answered.set()  # its thread ends

    async def test_a_commit_that_is_answered_soon_after_the_broker_is_back_costs_none(
        self, server: Topics, lost_commit: LostCommit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            await gateway.send(job := a_job(inbox.name))
            delivery = await worker.take()
            member, learn = worker.broker._member, worker.broker._learn  # type: ignore[attr-defined]

            async def learn_and_be_answered(*told: bytes) -> None:
                await learn(*told)
                lost_commit.is_answered.set()

            monkeypatch.setattr(worker.broker, "_learn", learn_and_be_answered)
            lost_commit.is_next.set()
            with pytest.raises(BrokerAwayError):
                await worker.broker.start(delivery, 1)
            again = await worker.take(60)
            assert again.job.id == job.id
            assert again.handle.member is member
            await worker.answer(again)
            await inbox.reply_to(job)

    async def test_no_start_fails_because_workers_come_and_go(self, server: Topics) -> None:
        """A commit in the middle of a rebalance is refused; the partition stays, and it is taken a moment later."""
        async with self.gateway(server) as (gateway, inbox), self.worker(server, "stays") as stays:

            async def feed() -> None:
                for sent in count(1):
                    await gateway.send(a_job(inbox.name))
                    await until(lambda sent=sent: is_true(len(inbox.replies) > sent - 20), 60)  # type: ignore[misc]

            held: list[Delivery] = []

            async def work() -> None:
                while True:
                    held[:] = [delivery := await stays.take(60)]
                    await stays.broker.start(delivery, delivery.starts + 1)
                    await stays.answer(delivery)

            async def beat() -> None:
                while True:
                    await stays.broker.beat(held, presence_of("stays"))
                    await asyncio.sleep(LEASE / 10)

            tasks = [asyncio.create_task(each()) for each in (feed, work, beat)]
            for number in range(4):
                async with self.worker(server, f"comes-{number}") as comes:
                    await comes.answer(await comes.take(60))
            for task in tasks:
                assert not task.done(), task.exception()
                task.cancel()

    async def test_a_start_in_a_partition_that_was_lost_meanwhile_is_none(
        self, server: Topics, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            await gateway.send(a_job(inbox.name))
            delivery = await worker.take()
            member = worker.broker._member  # type: ignore[attr-defined]
            mark = member._mark

            def mark_and_lose(*given: Any, **more: Any) -> None:
                mark(*given, **more)
                member._forget({delivery.handle.partition})
                monkeypatch.undo()

            monkeypatch.setattr(member, "_mark", mark_and_lose)
            with pytest.raises(BrokerAwayError):
                await worker.broker.start(delivery, 1)

    async def test_what_was_at_work_comes_before_what_waits(self, server: Topics) -> None:
        async with self.gateway(server) as (gateway, inbox):
            async with self.worker(server, "dies") as dies:
                for _ in range(40):
                    await gateway.send(a_job(inbox.name))
                begun = [await dies.take() for _ in range(2)]
                for delivery in begun:
                    await dies.broker.start(delivery, 1)
                await self.lose(dies)
                async with self.worker(server, "next") as after:
                    first = [await after.take() for _ in begun]
            assert sorted((d.job.id, d.starts) for d in first) == sorted((d.job.id, 1) for d in begun)

    async def test_a_slow_job_does_not_stop_its_partition(self, ordered_server: Topics) -> None:
        async with self.gateway(ordered_server) as (gateway, inbox), self.worker(ordered_server) as worker:
            for _ in range(2 * WINDOW):
                await gateway.send(a_job(inbox.name))
            slow = await worker.take()
            for number in range(WINDOW - 1):
                await worker.answer(await worker.take())
                if number % 50 == 0:
                    await worker.broker.beat([slow], presence_of("worker-0"))
            await until(lambda: is_equal(gateway.backlog, WINDOW + 1))
            await worker.answer(slow)
            for _ in range(WINDOW):
                await worker.answer(await worker.take())
            await self.nothing_waits(gateway)

    async def test_a_partition_that_was_paused_and_comes_back_is_read(self, server: Topics) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server, "full") as full:
            await gateway.send(a_job(inbox.name))
            await full.answer(await full.take())
            member = full.broker._member  # type: ignore[attr-defined]
            await gateway.send(a_job(inbox.name))  # it waits: nobody asks for it
            await until(lambda: is_true(len(member._paused) == PARTITIONS))
            async with self.worker(server, "other") as other:
                asking = asyncio.create_task(other.take(60))
                await self.joined(other)
                asking.cancel()
            await until(lambda: is_true(len(member._partitions) == PARTITIONS))
            for _ in range(2 * PARTITIONS):
                await gateway.send(a_job(inbox.name))
            for _ in range(2 * PARTITIONS + 1):
                await full.answer(await full.take())
            await self.nothing_waits(gateway)

    async def test_what_waits_behind_slow_jobs_goes_to_who_has_room(self, server: Topics) -> None:
        ends = self.gateway(server), self.worker(server, "busy"), self.worker(server, "idle")
        async with ends[0] as (gateway, inbox), ends[1] as busy, ends[2] as idle:
            taking = {asyncio.create_task(each.take(60)): each for each in (busy, idle)}
            await self.joined(busy, idle)
            jobs = [a_job(inbox.name) for _ in range(32)]
            for job in jobs:
                await gateway.send(job)
            await asyncio.wait(taking)
            slow, first = [task.result() for task in taking]  # `busy` asks for no more
            await idle.answer(first)

            async def work() -> None:
                for _ in range(len(jobs) - 2):
                    await idle.answer(await idle.take(60))

            working = asyncio.create_task(work())
            while not working.done():
                await idle.broker.beat([], presence_of("idle"))
                assert await busy.broker.beat([slow], presence_of("busy", free=0)) == []
                await asyncio.wait([working], timeout=LEASE / 2)
            await working
            await until(lambda: is_equal(gateway.backlog, 1))

    async def test_a_topic_that_cannot_carry_the_limit_is_named(self, server: Topics) -> None:
        await server.make("replies", 1_000_000)
        with pytest.raises(ConfigurationError, match=r"\.replies takes messages of 1,000,000 bytes at most"):
            await self.open(server).connect()
        server.url += "&largest=900000"
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            with pytest.raises(TooLargeError, match="900,000 bytes"):
                await gateway.send(a_job(inbox.name, bytes(900_001)))
            await gateway.send(job := a_job(inbox.name))
            await worker.answer(await worker.take(), image=bytes(900_001))
            reply = await inbox.reply_to(job)
            assert (reply.error, reply.image) == ("unprocessable_image", b"")
            assert "900,000 bytes" in reply.detail

    async def test_ends_that_begin_together_on_a_new_cluster(self, server: Topics) -> None:
        async def begin(name: str) -> list[Delivery]:
            async with self.end(server) as broker:
                return await broker.beat([], presence_of(name))

        assert await asyncio.gather(*(begin(str(n)) for n in range(4))) == [[]] * 4

    async def test_topics_that_were_deleted_are_made_anew(self, server: Topics) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            await gateway.send(job := a_job(inbox.name))
            await worker.answer(await worker.take())
            await inbox.reply_to(job)
            await server.delete()
            job = a_job(inbox.name)

            async def taken() -> Delivery | None:
                with suppress(BrokerAwayError, TimeoutError):
                    await gateway.presence()
                    await worker.broker.beat([], presence_of("worker-0"))
                    if inbox.renewed:
                        await gateway.send(job)
                        return await worker.take(2)
                return None

            delivery = await until(taken, seconds=60)
            await until(lambda: answered(worker, delivery))
            await inbox.reply_to(job)

    async def test_topics_that_others_deleted_and_made_anew(self, ordered_server: Topics) -> None:
        """At once, with jobs of the old offsets and behind them."""
        async with self.gateway(ordered_server) as (gateway, inbox), self.worker(ordered_server) as worker:
            await gateway.send(job := a_job(inbox.name))
            await worker.answer(await worker.take())
            await inbox.reply_to(job)
            await ordered_server.delete()
            async with self.end(ordered_server) as other:
                for _ in range(3):
                    await other.send(job := a_job(inbox.name))

            async def is_renewed() -> bool:
                with suppress(BrokerAwayError):
                    await gateway.presence()
                return inbox.renewed > 0

            async def last_of_all() -> bool:
                with suppress(BrokerAwayError, TimeoutError):
                    await worker.broker.beat([], presence_of("worker-0"))
                    delivery = await worker.take(1)
                    await worker.answer(delivery)
                    taken.append(delivery.job.id)
                return job.id in taken

            taken: list[str] = []
            await until(is_renewed)
            await until(last_of_all, seconds=30)
            assert len(set(taken)) == 3

    async def test_an_offset_in_a_topic_that_was_deleted_is_not_one_in_the_next(self, ordered_server: Topics) -> None:
        """A worker that does not know yet commits it by name."""
        async with self.gateway(ordered_server) as (gateway, inbox), self.worker(ordered_server) as worker:
            for _ in range(3):
                await gateway.send(a_job(inbox.name))
                await worker.answer(await worker.take())
            await self.nothing_waits(gateway)
        group = {"group.id": f"{ordered_server.prefix}.workers"}
        committing = Consumer(ordered_server.client | group)
        old = committing.committed([TopicPartition(ordered_server.topic("jobs"), 0)], timeout=10)
        assert old[0].offset == 3
        await ordered_server.delete()
        async with self.gateway(ordered_server) as (gateway, inbox):
            assert committing.commit(offsets=old, asynchronous=False)[0].error is None
            jobs = [a_job(inbox.name) for _ in range(5)]
            for job in jobs:
                await gateway.send(job)
            assert await gateway.backlog() == 5
            async with self.worker(ordered_server) as worker:
                for job in jobs:
                    assert (await worker.take()).job.id == job.id
        committing.close()

    async def test_what_is_under_way_when_topics_are_deleted_is_told(self, server: Topics) -> None:
        async with self.gateway(server) as (gateway, inbox):
            deleting = asyncio.create_task(server.delete())
            sending = [asyncio.create_task(sent(gateway, a_job(inbox.name))) for _ in range(50)]
            await deleting
            sending += [asyncio.create_task(sent(gateway, a_job(inbox.name))) for _ in range(50)]
            async with asyncio.timeout(30):
                assert len(await asyncio.gather(*sending)) == 100

    async def test_over_tls_with_a_password(self, server: Topics, kafka_node: KafkaServer) -> None:
        broker = open_broker(f"{kafka_node.tls_url}&prefix={server.prefix}", lease=LEASE)
        await broker.connect()
        await broker.send(a_job("an inbox"))
        assert await broker.backlog() == 1
        await broker.close()

    @pytest.mark.parametrize("wrong", ["password", "certificate"])
    async def test_what_the_broker_refuses_is_a_sentence(self, wrong: str, kafka_node: KafkaServer) -> None:
        url = kafka_node.tls_url
        url = url.replace("cret", "wrong") if wrong == "password" else url.partition("?")[0]
        with pytest.raises(ConfigurationError, match="The broker refuses us"):
            await open_broker(url, lease=LEASE).connect()


def test_nobody_at_the_address_is_away() -> None:
    with pytest.raises(BrokerAwayError):
        asyncio.run(open_broker("kafka://127.0.0.1:1", lease=LEASE).connect())


@pytest.mark.parametrize("query", ["nonsense=1", "partitions=many"])
def test_a_url_that_cannot_be_used_is_a_sentence(query: str) -> None:
    with pytest.raises(ConfigurationError, match=r"The broker's URL"):
        open_broker(f"kafka://127.0.0.1:1?{query}", lease=LEASE)


def test_a_missing_driver_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "safelight.brokers.kafka")
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'safelight\[kafka\]'"):
        open_broker("kafka://127.0.0.1", lease=LEASE)
