"""Redis and Valkey: the conformance suite on both servers, and a test for each fact that `redis.py` relies on."""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hiredis
import pytest
from conftest import BrokerServer, certify, free_port, needed, wait_until
from redis.asyncio import Redis

from safelight.brokers import open_broker
from safelight.brokers.redis import BIG_VALUE_BYTES, _packed
from safelight.conformance import LEASE, Conformance, a_job, answered, is_true, presence_of, sent, until
from safelight.errors import BrokerAwayError, BrokerFullError, ConfigurationError, TooLargeError
from safelight.message import Quarantined, Reply, now_ms

JOBS = "{safelight}:jobs"


@pytest.mark.parametrize("length", [0, 1, BIG_VALUE_BYTES - 1, BIG_VALUE_BYTES, 1_000_000])
def test_commands_are_packed_as_the_driver_does_and_big_values_are_not_copied(length: int) -> None:
    value = bytes(range(256)) * (length // 256) + bytes(length % 256)
    commands = [("MULTI",), ("XADD", JOBS, "*", "body", value), ("XDEL", JOBS, b"1-0", 7), ("SET", "k", value, "PX", 1)]
    pieces = _packed([*commands, commands[1]])
    assert b"".join(pieces) == b"".join(map(hiredis.pack_command, [*commands, commands[1]]))
    assert sum(piece is value for piece in pieces) == (2 if length >= BIG_VALUE_BYTES else 0)


@pytest.fixture(params=[(), ("--rename-command", "CONFIG", "")], ids=["told", "untold"])
def small_server(request: pytest.FixtureRequest, runtime_folder: Path) -> Iterator[BrokerServer]:
    """One that takes no more than 1 MB, which it tells or (as managed ones) does not."""
    needed("redis-server", "redis-server")
    options = ("--proto-max-bulk-len", "1mb", *request.param)
    server = BrokerServer("redis-server", Path(tempfile.mkdtemp(dir=runtime_folder)), options)
    server.start()
    yield server
    server.stop()


class TestRedis(Conformance):
    @pytest.fixture
    def server(self, broker_server: BrokerServer) -> BrokerServer:
        return broker_server

    @pytest.fixture
    async def redis(self, server: BrokerServer) -> Any:
        async with Redis(unix_socket_path=str(server.socket)) as client:
            yield client

    async def put_by_hand(self, server: BrokerServer, header: bytes, body: bytes) -> None:
        server.command("XADD", JOBS, "*", "header", header, "body", body)

    async def inboxes(self, server: BrokerServer) -> int:
        async with Redis(unix_socket_path=str(server.socket)) as client:
            return len(await client.keys("{safelight}:inbox:*"))

    async def test_a_lease_is_held_to_its_end(self, server: BrokerServer) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server, "silent") as silent:
            await gateway.send(a_job(inbox.name))
            await silent.take()
            begun = time.monotonic()
            async with self.worker(server, "other") as other:
                await other.take()
                assert time.monotonic() - begun >= LEASE * 0.9

    async def test_a_message_that_is_too_large_is_refused_and_the_next_one_taken(
        self, small_server: BrokerServer
    ) -> None:
        async with self.gateway(small_server) as (gateway, inbox), self.worker(small_server) as worker:
            with pytest.raises(TooLargeError, match="takes no message"):
                await gateway.send(a_job(inbox.name, bytes(1_048_577)))
            job = a_job(inbox.name, bytes(1_048_576))
            await until(lambda: sent(gateway, job))
            delivery = await worker.take()
            await until(lambda: answered(worker, delivery, image=bytes(1_048_577)))
            reply = await inbox.reply_to(job)
            assert (reply.error, reply.image) == ("unprocessable_image", b"")
            assert "takes no message" in reply.detail
            await self.nothing_waits(gateway)

    async def test_an_entry_of_other_fields_is_kept_aside(self, server: BrokerServer) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            server.command("XADD", JOBS, "*", "something", "else")
            await gateway.send(a_job(inbox.name))
            await worker.take()
            assert len(await gateway.quarantined()) == 1

    async def test_an_emptied_server_keeps_connections_and_loses_inboxes(self, server: BrokerServer) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            job = a_job(inbox.name)
            await gateway.send(job)
            held = await worker.take()
            await worker.broker.beat([held], presence_of("worker-0"))
            server.command("FLUSHALL")
            assert await worker.broker.beat([held], presence_of("worker-0")) == [held]
            await until(lambda: is_true(inbox.renewed > 0), seconds=3)
            await gateway.send(job)
            await worker.answer(await worker.take())
            await inbox.reply_to(job)

    async def test_a_lost_connection_that_was_not_noticed_yet(self, server: BrokerServer) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            gateway._pipe._line._transport.abort()  # type: ignore[attr-defined]
            await asyncio.sleep(0)  # the transport is closed now, and its reader not yet told
            job = a_job(inbox.name)
            await gateway.send(job)
            await worker.answer(await worker.take())
            await inbox.reply_to(job)

    async def test_every_key_has_an_age(self, server: BrokerServer, redis: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            for _ in range(2):
                await gateway.send(a_job(inbox.name))
            record = Quarantined(id="x", cause="", attempts=3, worker="", at=now_ms(), size=8)
            await worker.broker.quarantine(await worker.take(), record, Reply(id="x"))
            await worker.broker.beat([], presence_of("worker-0"))
            keys = [key async for key in redis.scan_iter()]
            assert len(keys) == 5
            assert {key: await redis.pttl(key) > 0 for key in keys} == dict.fromkeys(keys, True)
            assert all(key.startswith(b"{safelight}:") for key in keys)

    async def test_a_killed_gateways_inbox_expires(self, server: BrokerServer, redis: Any) -> None:
        async with self.gateway(server) as (_, inbox):
            key = f"{{safelight}}:inbox:{inbox.name}"
            await until(lambda: redis.pttl(key))
            assert 0 < await redis.pttl(key) <= 60_000

    async def test_replies_that_were_read_are_deleted(self, server: BrokerServer, redis: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            for _ in range(10):
                job = a_job(inbox.name)
                await gateway.send(job)
                await worker.answer(await worker.take(), image=b"x" * 1000)
                await inbox.reply_to(job)

            async def empty() -> bool:
                return bool(await redis.xlen(f"{{safelight}}:inbox:{inbox.name}") == 0)

            await until(empty)

    async def test_a_beat_is_stamped_by_the_clock_of_the_server_that_it_goes_to(self, server: BrokerServer) -> None:
        async with self.end(server) as gateway, self.worker(server) as worker:
            await worker.broker.beat([], presence_of("worker-0"))
            worker.broker._clock_offset -= 3_600_000  # type: ignore[attr-defined] - the clock before was an hour behind
            server.kill()
            with pytest.raises(BrokerAwayError):
                await worker.broker.beat([], presence_of("worker-0"))
            with suppress(BrokerAwayError):
                await gateway.backlog()
            server.start()
            await worker.broker.beat([], presence_of("worker-0"))
            assert await gateway.presence()

    async def test_full_memory_has_a_way_out(self, server: BrokerServer, redis: Any) -> None:
        results = {0: 4_000, 1_000: 1_000, 50_000: 0, 300_000: 350_000, 300_001: 900_000, 1_000_000: 5_000_000}
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            jobs = {length: a_job(inbox.name, bytes(length)) for length in results}
            for job in jobs.values():
                await gateway.send(job)
            held = [await worker.take() for _ in range(3)]
            await redis.config_set("maxmemory", 1)  # nothing is room enough, whatever is deleted
            with pytest.raises(BrokerFullError):
                await gateway.send(a_job(inbox.name))
            held += [await worker.take() for _ in range(3)]
            for delivery in held:
                await worker.answer(delivery, image=bytes(results[len(delivery.job.image)]))
            for length, job in jobs.items():
                reply = await inbox.reply_to(job)
                fits = results[length] <= 4_096 + 1.25 * length
                assert (len(reply.image), reply.error) == ((results[length], None) if fits else (0, "broker_full"))
            await self.nothing_waits(gateway)
            assert len(inbox.replies) == len(jobs)
            await redis.config_set("maxmemory", 0)
            await gateway.send(job := a_job(inbox.name))
            await worker.answer(await worker.take(), image=bytes(100_000))
            assert (await inbox.reply_to(job)).error is None

    async def test_all_but_new_jobs_goes_on_in_full_memory(self, server: BrokerServer, redis: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server, "other") as other:
            jobs = [a_job(inbox.name, bytes(100_000)) for _ in range(3)]
            for job in jobs:
                await gateway.send(job)
            await redis.config_set("maxmemory", 1)
            async with self.worker(server, "leaves") as leaves:
                await leaves.broker.start(await leaves.take(), 1)
            async with self.gateway(server) as (_, late):
                assert await redis.pttl(f"{{safelight}}:inbox:{late.name}") > 0
            held = [await other.take() for _ in jobs]
            assert sorted(delivery.starts for delivery in held) == [0, 0, 1]
            assert await other.broker.beat(held, presence_of("other")) == []
            assert [presence.worker for presence in await gateway.presence()] == ["other"]
            assert await redis.pttl("{safelight}:workers") > 0
            for delivery in held:
                await other.broker.give_back(delivery, delivery.starts)
            again = [await other.take() for _ in jobs]
            assert sorted((d.job.id, d.starts) for d in again) == sorted((d.job.id, d.starts) for d in held)
            for delivery in again:
                record = Quarantined(id=delivery.job.id, cause="", attempts=3, worker="", at=now_ms(), size=100_000)
                reply = Reply(id=delivery.job.id, error="quarantined")
                await other.broker.quarantine(delivery, record, reply)
                assert (await inbox.reply_to(delivery.job)).error == "quarantined"
            await self.nothing_waits(gateway)

    async def test_nothing_is_handed_over_to_a_server_that_was_emptied(self, server: BrokerServer) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            await gateway.send(a_job(inbox.name))
            delivery = await worker.take()
            server.command("FLUSHALL")
            assert not await worker.broker.hand_over(delivery)
            assert await worker.broker.beat([delivery], presence_of("worker-0")) == [delivery]

    async def test_a_job_stays_where_the_way_out_is_forbidden(
        self, server: BrokerServer, redis: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        await redis.acl_setuser("default", enabled=True, commands=["-eval"])
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            job = a_job(inbox.name)
            await gateway.send(job)
            delivery = await worker.take()
            await redis.config_set("maxmemory", 1)
            with pytest.raises(BrokerFullError):
                await worker.answer(delivery)
            assert "way out" in caplog.text
            await redis.config_set("maxmemory", 0)
            await worker.answer(delivery)
            await inbox.reply_to(job)

    async def test_names_of_the_dead_are_forgotten(
        self, server: BrokerServer, redis: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def names() -> set[bytes]:
            return {told["name"] for told in await redis.xinfo_consumers(JOBS, "workers")}

        async with self.gateway(server) as (gateway, inbox):
            for _ in range(2):
                await gateway.send(a_job(inbox.name))
            async with self.worker(server, "closed") as closed, self.worker(server, "holds") as holds:
                delivery, kept = await closed.take(), await holds.take()
                for worker in (closed, holds):
                    await worker.broker.beat([], presence_of(worker.name))
                await closed.answer(delivery)
            monkeypatch.setattr("safelight.brokers.redis.SWEEP_SECONDS", 0.5)
            async with self.worker(server, "other") as other:
                monkeypatch.setattr("safelight.brokers.redis.IDLE_NAME_MS", 0)
                await other.broker.beat([], presence_of("other"))
                assert await names() == {b"holds"}  # with a job that is not answered
                await other.answer(await other.take())
                assert await inbox.reply_to(kept.job)
                monkeypatch.setattr("safelight.brokers.redis.IDLE_NAME_MS", 60_000)
                await other.broker.beat([], presence_of("other"))
                assert await names() == {b"holds", b"other"}
                monkeypatch.setattr("safelight.brokers.redis.IDLE_NAME_MS", 0)
                taking = asyncio.create_task(other.take())  # it waits in a blocked read, and its own name goes too

                async def forgotten() -> bool:
                    await other.broker.beat([], presence_of("other"))
                    return await names() <= {b"other"}

                await until(forgotten)
                await gateway.send(job := a_job(inbox.name))
                await other.answer(await taking)
                await inbox.reply_to(job)

    async def test_an_evicting_memory_policy_is_named(
        self, server: BrokerServer, redis: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        await redis.config_set("maxmemory", "1gb")
        await redis.config_set("maxmemory-policy", "volatile-lru")
        async with self.end(server):
            pass
        assert "volatile-lru" in caplog.text
        caplog.clear()
        await redis.config_set("maxmemory-policy", "noeviction")
        async with self.end(server):
            pass
        assert caplog.text == ""

    async def test_connections_killed_again_and_again(self, server: BrokerServer, redis: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            for _ in range(5):
                job = a_job(inbox.name)
                await until(lambda j=job: sent(gateway, j))
                await redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                delivery = await worker.take()
                await until(lambda d=delivery: answered(worker, d, image=b""))
                await inbox.reply_to(job)
            assert inbox.renewed > 0

    async def test_a_server_that_answers_nothing_is_away(
        self, server: BrokerServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("safelight.brokers.redis.ANSWER_SECONDS", 0.3)
        async with self.end(server) as broker:
            with server.frozen():
                with pytest.raises(BrokerAwayError):
                    await broker._pipe.one("PING")
                with pytest.raises(BrokerAwayError):
                    await broker.backlog()
            assert await broker.backlog() == 0

    async def test_what_is_no_answer_ends_the_connection(self, tmp_path: Path) -> None:
        connections = 0

        async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            while data := await reader.read(65536):
                probed = b":0\r\n-ERR no cluster\r\n" * data.count(b"DEL")
                writer.write(b"!?\r\n" if b"XLEN" in data else b"+OK\r\n" * data.count(b"CLIENT") + probed)
            writer.close()

        path = tmp_path / "babbler.sock"
        broker = open_broker(f"unix://{path}", lease=LEASE)
        async with await asyncio.start_unix_server(babble, path):
            for _ in range(2):
                with pytest.raises(BrokerAwayError):
                    await broker.backlog()
            await broker.close()
        assert connections == 2

    async def test_a_cursor_finds_an_ended_lease_among_many_fresh_ones(self, server: BrokerServer, redis: Any) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server, "busy") as busy:
            for _ in range(150):
                await gateway.send(a_job(inbox.name))
            held = [await busy.take() for _ in range(150)]
            beating = asyncio.create_task(_beat_for_ever(busy, held[:-1]))
            async with self.worker(server, "other") as other:
                assert (await other.take()).job == held[-1].job
            beating.cancel()

    async def test_sending_again_leaves_no_double_behind(self, server: BrokerServer) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            job = a_job(inbox.name)
            await gateway.send(job)
            await gateway.send(job)
            await worker.answer(await worker.take())
            await inbox.reply_to(job)

            async def gone() -> bool:
                return await gateway.backlog() == 0

            await until(gone)


async def _beat_for_ever(worker: Any, held: list[Any]) -> None:
    while True:
        await worker.broker.beat(held, presence_of(worker.name))
        await asyncio.sleep(LEASE / 5)


@pytest.fixture
def tls_server() -> Iterator[tuple[int, Path]]:
    """Debian's redis-server with TLS, a password and its own authority's certificate."""
    with tempfile.TemporaryDirectory() as folder:
        certify(Path(folder))
        certificate, key = Path(folder, "certificate.pem"), Path(folder, "key.pem")
        port = free_port()
        options = {"port": "0", "tls-port": str(port), "requirepass": "secret word", "tls-auth-clients": "no"}
        options |= {"tls-cert-file": str(certificate), "tls-key-file": str(key), "tls-ca-cert-file": str(certificate)}
        command = ["redis-server", *(word for name, value in options.items() for word in (f"--{name}", value))]
        process = subprocess.Popen([*command, "--save", "", "--dir", folder], stdout=subprocess.PIPE)
        assert process.stdout is not None
        wait_until(lambda: b"Ready to accept" in process.stdout.readline())
        yield port, certificate
        process.terminate()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
def test_tls_password_and_database(tls_server: tuple[int, Path], scheme: str) -> None:
    port, certificate = tls_server

    async def backlog(password: str) -> int:
        url = f"{scheme}://:{password}@localhost:{port}/3?ssl_ca_certs={certificate}"
        broker = open_broker(url, lease=LEASE)
        try:
            await broker.connect()
            return await broker.backlog()
        finally:
            await broker.close()

    assert asyncio.run(backlog("secret%20word")) == 0
    with pytest.raises(ConfigurationError, match="refuses the user or the password"):
        asyncio.run(backlog("wrong"))


@pytest.mark.parametrize("url", ["http://localhost", "redis", "", "redis://localhost:port"])
def test_a_url_that_cannot_be_used_is_a_sentence(url: str) -> None:
    with pytest.raises(ConfigurationError, match="URL"):
        open_broker(url, lease=LEASE)


def test_nobody_at_the_address_is_away() -> None:
    async def connect() -> None:
        broker = open_broker(f"valkey://127.0.0.1:{free_port()}/0", lease=LEASE)
        begun = time.monotonic()
        with pytest.raises(BrokerAwayError):
            await broker.connect()
        assert time.monotonic() - begun < 2
        await broker.close()

    asyncio.run(connect())
