"""RabbitMQ: the conformance suite, and a test for each fact that `rabbitmq.py` relies on."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import aiormq
import pytest
import uvloop
from aiormq import spec
from rabbit_server import RabbitServer

from safelight.brokers import open_broker
from safelight.brokers.rabbitmq import HEADER, JOBS, QUARANTINE, QUEUES
from safelight.conformance import LEASE, Conformance, Worker, a_job, answered, is_true, presence_of, sent, until
from safelight.errors import BrokerAwayError, BrokerFullError, ConfigurationError, TooLargeError

BOUNDS = "bounds"
SETTLED_SECONDS = 3.0  # a quorum queue of RabbitMQ 3.10 that is killed sooner after it was made never answers again


async def emptied(server: RabbitServer) -> None:
    """Purge all queues; make those that are not there."""
    connection = await aiormq.connect(server.url)
    for name, arguments in QUEUES.items():
        channel = await connection.channel()
        try:
            await channel.queue_declare(name, passive=True)
        except aiormq.exceptions.ChannelNotFoundEntity:
            channel = await connection.channel()
            await channel.queue_declare(name, durable=True, arguments=arguments)
            await asyncio.sleep(SETTLED_SECONDS if name == JOBS else 0)
        await channel.queue_purge(name)
    await connection.close()


class TestRabbit(Conformance):
    redelivery = 1.0
    frozen_redelivery = 15.0
    keeps = True

    @pytest.fixture
    def server(self, rabbit_node: RabbitServer) -> RabbitServer:
        if rabbit_node.process is None:
            rabbit_node.start()
        asyncio.run(emptied(rabbit_node))
        return rabbit_node

    async def put_by_hand(self, server: RabbitServer, header: bytes, body: bytes) -> None:
        connection = await aiormq.connect(server.url)
        channel = await connection.channel()
        properties = spec.Basic.Properties(headers={HEADER: bytearray(header)})
        await channel.basic_publish(body, routing_key=JOBS, properties=properties)
        await connection.close()

    async def inboxes(self, server: RabbitServer) -> int:
        names = await asyncio.to_thread(server.control, "list_queues", "name")
        return sum(name.startswith("safelight.inbox.") for name in names.splitlines())

    async def lose(self, worker: Worker) -> None:
        await worker.broker._consuming._connection.close()  # type: ignore[attr-defined]

    @pytest.fixture(autouse=True)
    def policies(self, server: RabbitServer) -> Iterator[None]:
        """What a test told the broker of the quarantine ends with it."""
        yield
        if BOUNDS in server.control("list_policies"):
            server.control("clear_policy", BOUNDS)

    async def bound(
        self,
        server: RabbitServer,
        monkeypatch: pytest.MonkeyPatch,
        *,
        jobs: int = 100,
        size: int = 2_500,
        age_ms: int = 60_000,
    ) -> None:
        """By a policy: the smaller of it and the queue's own arguments holds."""
        bounds = json.dumps({"max-length": jobs, "max-length-bytes": size, "message-ttl": age_ms})
        await asyncio.to_thread(server.control, "set_policy", "--apply-to", "queues", BOUNDS, f"^{QUARANTINE}$", bounds)

    async def test_a_connection_that_ends_without_a_reason_is_away(self, server: RabbitServer) -> None:
        async with self.gateway(server) as (gateway, inbox):
            for turns in range(40):  # of the event loop, so that a job is met at each point of its way
                channel = await gateway._publishing.channel()  # type: ignore[attr-defined]
                sending = asyncio.create_task(gateway.send(a_job(inbox.name)))
                for _ in range(turns):
                    await asyncio.sleep(0)
                await channel.connection.close(None)
                with suppress(BrokerAwayError):
                    await sending

    async def test_queues_are_of_the_right_kinds(self, server: RabbitServer) -> None:
        async with self.gateway(server) as (_, inbox):
            told = await asyncio.to_thread(server.control, "list_queues", "name", "type", "durable", "arguments")
            rows = {row.split("\t")[0]: row for row in told.splitlines()}
            assert "quorum\ttrue" in rows[JOBS]
            assert "reject-publish" in rows[JOBS]
            for bound in ('"x-max-length",100', '"x-max-length-bytes",268435456', '"x-message-ttl",604800000'):
                assert bound in rows[QUARANTINE]
            assert "x-expires" in rows[f"safelight.inbox.{inbox.name}"]

    async def test_a_full_queue_refuses(self, server: RabbitServer) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            await asyncio.to_thread(
                server.control, "set_policy", "--apply-to", "queues", "small", f"^{JOBS}$", '{"max-length": 3}'
            )
            try:

                async def refused() -> bool:  # a moment after it is full
                    with suppress(BrokerFullError):
                        await gateway.send(a_job(inbox.name))
                        return False
                    return True

                await until(refused)
                await worker.answer(await worker.take())
                await until(lambda: sent(gateway, a_job(inbox.name)))
            finally:
                await asyncio.to_thread(server.control, "clear_policy", "small")

    async def test_a_message_that_is_too_large_is_refused_and_the_next_one_taken(self, server: RabbitServer) -> None:
        await asyncio.to_thread(server.control, "eval", "application:set_env(rabbit, max_message_size, 300000).")
        try:
            async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
                small = [a_job(inbox.name, bytes(290_000)) for _ in range(5)]
                large = a_job(inbox.name, bytes(300_001))
                results = await asyncio.gather(*map(gateway.send, [large, *small]), return_exceptions=True)
                assert isinstance(results[0], TooLargeError)
                assert "300,000 bytes" in results[0].detail
                assert results[1:] == [None] * 5
                with pytest.raises(TooLargeError):
                    await gateway.send(large)
                delivery = await worker.take()
                await worker.answer(delivery, image=bytes(300_001))
                reply = await inbox.reply_to(delivery.job)
                assert (reply.error, reply.image) == ("unprocessable_image", b"")
                assert "300,000 bytes" in reply.detail
                delivery = await worker.take()
                await worker.answer(delivery, image=bytes(290_000))
                assert len((await inbox.reply_to(delivery.job)).image) == 290_000
        finally:
            await asyncio.to_thread(server.control, "eval", "application:set_env(rabbit, max_message_size, 134217728).")

    async def test_an_alarm_that_stops_publishers(self, server: RabbitServer) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            jobs = [a_job(inbox.name) for _ in range(2)]
            for job in jobs:
                await gateway.send(job)
            held = [await worker.take() for _ in jobs]
            await asyncio.to_thread(server.control, "set_vm_memory_high_watermark", "0.00001")
            try:

                async def refused() -> bool:
                    try:
                        await gateway.send(a_job(inbox.name))
                    except BrokerFullError:
                        return True
                    return False

                await until(refused)
                assert await worker.broker.backlog() >= 0  # reading goes on
                through = [await answered(worker, delivery) for delivery in held]
                assert through[1] is False  # the first message of a connection may still get through
            finally:
                await asyncio.to_thread(server.control, "set_vm_memory_high_watermark", "0.4")
            for delivery in held:
                await until(lambda d=delivery: answered(worker, d))
                await inbox.reply_to(delivery.job)

    async def test_a_consumer_that_takes_too_long_for_the_broker(self, server: RabbitServer) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            job = a_job(inbox.name)
            await gateway.send(job)
            delivery = await worker.take()
            await worker.broker._jobs.close()  # type: ignore[attr-defined] - what the broker does then
            assert [lost.job for lost in await worker.broker.beat([delivery], presence_of("worker-0"))] == [job]
            again = await worker.take()
            assert again.job == job
            await worker.answer(again)
            await inbox.reply_to(job)

    async def test_a_queue_of_another_kind_is_named(self, server: RabbitServer) -> None:
        connection = await aiormq.connect(server.url)
        channel = await connection.channel()
        await channel.queue_delete(JOBS)
        await channel.queue_declare(JOBS, durable=True)
        try:
            with pytest.raises(ConfigurationError, match=r"safelight\.jobs"):
                await self.open(server).connect()
        finally:
            await channel.queue_delete(JOBS)
            await connection.close()

    async def test_a_worker_that_stops_gives_back_what_it_was_handed(self, server: RabbitServer) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as stops:
            taking = asyncio.create_task(stops.take())
            jobs = [a_job(inbox.name) for _ in range(2)]
            for job in jobs:
                await gateway.send(job)
            held = await taking
            await stops.answer(held)  # its consumer is handed the next one at once
            await stops.nothing()
            async with self.worker(server, "other") as other:
                assert (await other.take(LEASE)).job == jobs[1]

    async def test_a_queue_of_jobs_that_was_deleted_is_made_anew(self, server: RabbitServer) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            await gateway.send(first := a_job(inbox.name))
            await worker.answer(await worker.take())
            await inbox.reply_to(first)
            connection = await aiormq.connect(server.url)
            await (await connection.channel()).queue_delete(JOBS)
            await connection.close()
            job = a_job(inbox.name)
            await until(lambda: sent(gateway, job))
            await worker.answer(await worker.take())
            await inbox.reply_to(job)

    async def test_a_lost_connection_loses_nothing(self, server: RabbitServer) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            await gateway.send(job := a_job(inbox.name))
            delivery = await worker.take()
            await gateway._consuming._connection.close()  # type: ignore[attr-defined]
            await worker.answer(delivery)
            await inbox.reply_to(job)
            assert inbox.renewed == 0  # so nothing is sent again

    async def test_an_inbox_that_was_deleted_is_made_anew(self, server: RabbitServer) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            connection = await aiormq.connect(server.url)
            await (await connection.channel()).queue_delete(f"safelight.inbox.{inbox.name}")
            await connection.close()
            await until(lambda: is_true(inbox.renewed == 1))
            job = a_job(inbox.name)
            await gateway.send(job)
            await worker.answer(await worker.take())
            await inbox.reply_to(job)


def test_a_wrong_password_is_a_sentence(rabbit_node: RabbitServer) -> None:
    broker = open_broker(rabbit_node.url.replace("guest:guest", "guest:wrong"), lease=LEASE)
    with pytest.raises(ConfigurationError, match="refuses the user"):
        asyncio.run(broker.connect())


async def _answers(url: str) -> bool:
    broker = open_broker(url, lease=LEASE)
    await broker.connect()
    try:
        return await broker.backlog() >= 0
    finally:
        await broker.close()


def test_over_tls(rabbit_node: RabbitServer) -> None:
    assert asyncio.run(_answers(rabbit_node.tls_url))


def test_a_certificate_that_nobody_vouches_for_is_refused(rabbit_node: RabbitServer) -> None:
    with pytest.raises(BrokerAwayError):
        asyncio.run(_answers(rabbit_node.tls_url.partition("?")[0]))


def test_nobody_at_the_address_is_away() -> None:
    broker = open_broker("amqp://127.0.0.1:1/", lease=LEASE)
    with pytest.raises(BrokerAwayError):
        asyncio.run(broker.connect())


def test_who_hangs_up_at_once_is_away() -> None:
    """As a balancer does whose broker is down; a busy uvloop sees the end together with the connection."""

    async def busy() -> None:
        while True:
            time.sleep(0.002)  # noqa: ASYNC251 - it is to block the loop
            await asyncio.sleep(0)

    async def test(port: int) -> None:
        blocking = asyncio.create_task(busy())
        for _ in range(20):
            with pytest.raises(BrokerAwayError):
                await open_broker(f"amqp://127.0.0.1:{port}/", lease=LEASE).connect()
        blocking.cancel()

    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            with suppress(OSError):
                while True:
                    server.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        uvloop.run(test(server.getsockname()[1]))
        server.shutdown(socket.SHUT_RDWR)


def test_a_missing_driver_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "safelight.brokers.rabbitmq")
    monkeypatch.setitem(sys.modules, "aiormq", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'safelight\[rabbitmq\]'"):
        open_broker("amqp://127.0.0.1/", lease=LEASE)
