"""The brokers of a chaos run: the tests' servers, with the faults that only they have and what each must not keep."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

import redis
from conftest import BrokerServer, free_port, wait_until
from kafka_server import KafkaServer
from rabbit_server import RabbitServer

from chaos.proxy import Streams

Fault = Callable[[], Awaitable[None]]
HOLD_SECONDS = 3.0  # for so long a server refuses, is read-only, is full


class Redis:
    """Debian's redis-server or the embedded Valkey."""

    takes_faketime = True
    recovery: ClassVar = {"kill_worker": 7.5, "kill_consumer": 7.5, "freeze_worker": 7.5}  # 1.5 leases of 5 s

    def __init__(self, program: str, folder: Path) -> None:
        self._folder = folder
        self.server = BrokerServer(program, folder, ("--dir", str(folder)))
        self.ports = {"gateways": free_port(), "workers": free_port()}
        self._ask = redis.Redis(unix_socket_path=str(self.server.socket), decode_responses=True)

    def url(self, side: str) -> str:
        return f"redis://127.0.0.1:{self.ports[side]}"

    async def connect(self, side: str) -> Streams:
        return await asyncio.open_unix_connection(str(self.server.socket))

    def _info(self, name: str) -> Any:
        return self._ask.info("persistence")[name]

    def _set(self, **options: Any) -> None:
        for name, value in options.items():
            self._ask.config_set(name.replace("_", "-"), value)

    async def _start(self, *options: str) -> None:
        usual = self.server.options
        self.server.options = (*usual, *options)
        try:
            await asyncio.to_thread(self.server.start)
        finally:
            self.server.options = usual

    async def restart_keeping(self) -> None:
        """SIGKILL, and back with all that its log of writes (AOF) has."""
        self._set(appendonly="yes")
        wait_until(lambda: not self._info("aof_rewrite_in_progress") and not self._info("aof_rewrite_scheduled"))
        await asyncio.sleep(1)  # so that there is work in it
        self.server.kill()
        await self._start("--appendonly", "yes")
        self._set(appendonly="no")
        shutil.rmtree(self._folder / "appendonlydir")

    async def slow_loading(self) -> None:
        """SIGKILL, and long in loading a snapshot: it is there and refuses all commands meanwhile."""
        for number in range(8):
            self._ask.set(f"filler-{number}", "x", ex=60)
        self._ask.save()
        self.server.kill()
        await self._start("--key-load-delay", "400000", "--loading-process-events-interval-bytes", "1024")
        self._set(key_load_delay=0)
        (self._folder / "dump.rdb").unlink()

    async def emptied(self) -> None:
        """FLUSHALL: everything is gone, and every connection stays."""
        self._ask.flushall()

    async def full_memory(self) -> None:
        """`OOM`."""
        self._set(maxmemory="1mb")
        await asyncio.sleep(HOLD_SECONDS)
        self._set(maxmemory=0)

    async def unwritable_disk(self) -> None:
        """`MISCONF`: it cannot save, and therefore takes no writes."""
        (self._folder / "dump.rdb").mkdir()
        self._set(save="3600 1")
        self._ask.bgsave()
        wait_until(lambda: self._info("rdb_last_bgsave_status") == "err")
        await asyncio.sleep(HOLD_SECONDS)
        self._set(save="")
        (self._folder / "dump.rdb").rmdir()

    async def read_only(self) -> None:
        """`READONLY`: another became the primary for a while."""
        self._ask.replicaof("127.0.0.1", 1)
        await asyncio.sleep(HOLD_SECONDS)
        self._ask.replicaof("NO", "ONE")

    async def killed_connections(self) -> None:
        """All of them, again and again."""
        for _ in range(10):
            self._ask.client_kill_filter(_type="normal")
            await asyncio.sleep(0.3)

    @property
    def faults(self) -> list[Fault]:
        return [
            self.restart_keeping,
            self.slow_loading,
            self.emptied,
            self.full_memory,
            self.unwritable_disk,
            self.read_only,
            self.killed_connections,
        ]

    def jobs(self) -> int:
        """How many wait, or are held by a worker."""
        return int(self._ask.xlen("{safelight}:jobs"))

    def leftovers(self) -> list[str]:
        """What is there though all is answered and all parts have ended, and would stay."""
        found = []
        for key in self._ask.keys("{safelight}*"):
            if key.startswith("{safelight}:quarantine"):
                continue
            if key == "{safelight}:jobs":
                jobs, leases = self.jobs(), self._ask.xpending(key, "workers")["pending"]
                if jobs or leases:
                    found.append(f"{jobs} jobs, {leases} leases")
            elif self._ask.ttl(key) == -1:
                found.append(f"{key} without an age")
        return found


class Rabbit:
    """Debian's rabbitmq-server."""

    takes_faketime = True
    recovery: ClassVar = {"kill_worker": 1.0, "kill_consumer": 1.0, "freeze_worker": 15.0}

    def __init__(self, folder: Path) -> None:
        self.server = RabbitServer(folder)
        self.ports = {"gateways": free_port(), "workers": free_port()}

    def url(self, side: str) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.ports[side]}/"

    async def connect(self, side: str) -> Streams:
        return await asyncio.open_connection("127.0.0.1", self.server.port)

    async def _control(self, *words: str) -> str:
        return await asyncio.to_thread(self.server.control, *words)

    async def full_memory(self) -> None:
        """The alarm of memory: publishers are stopped."""
        await self._control("set_vm_memory_high_watermark", "absolute", "1")
        await asyncio.sleep(HOLD_SECONDS)
        await self._control("set_vm_memory_high_watermark", "0.4")

    async def full_disk_of_the_broker(self) -> None:
        """The alarm of the disk."""
        await self._control("set_disk_free_limit", str(10**15))
        await asyncio.sleep(HOLD_SECONDS)
        await self._control("set_disk_free_limit", "50MB")

    async def killed_connections(self) -> None:
        """All of them."""
        await self._control("close_all_connections", "chaos")

    async def deleted_queue(self) -> None:
        """The queue of jobs, with all that is in it."""
        await self._control("delete_queue", "safelight.jobs")

    @property
    def faults(self) -> list[Fault]:
        return [self.full_memory, self.full_disk_of_the_broker, self.killed_connections, self.deleted_queue]

    def _queues(self) -> dict[str, int]:
        """Their messages, those that are held as well."""
        told = json.loads(self.server.control("list_queues", "name", "messages", "--formatter", "json"))
        return {queue["name"]: queue["messages"] for queue in told}

    def jobs(self) -> int:
        """As for Redis."""
        return self._queues().get("safelight.jobs", 0)

    def leftovers(self) -> list[str]:
        """As for Redis."""
        return [
            f"{name} with {messages} messages"
            for name, messages in self._queues().items()
            if name.startswith("safelight.worker.") or (name == "safelight.jobs" and messages)
        ]


class Kafka:
    """Apache Kafka, one node."""

    takes_faketime = False  # the driver's threads wait by a clock that it breaks (EINVAL of a sleep)
    recovery: ClassVar = {"kill_worker": 15.0, "kill_consumer": 15.0, "freeze_worker": 15.0}

    def __init__(self, folder: Path) -> None:
        self.ports = {"gateways": free_port(), "workers": free_port()}
        self._behind = {side: free_port() for side in self.ports}
        self.server = KafkaServer(folder, proxied={self._behind[side]: port for side, port in self.ports.items()})

    def url(self, side: str) -> str:
        return f"kafka://127.0.0.1:{self.ports[side]}"

    async def connect(self, side: str) -> Streams:
        return await asyncio.open_connection("127.0.0.1", self._behind[side])

    async def deleted_topics(self) -> None:
        """Jobs and replies, with all that is in them."""
        await asyncio.to_thread(self._delete, ["safelight.jobs", "safelight.replies"])

    def _delete(self, topics: list[str]) -> None:
        from confluent_kafka.admin import AdminClient  # noqa: PLC0415 - an extra

        admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{self.server.port}"})
        for deleted in admin.delete_topics(topics).values():
            deleted.result(30)

    @property
    def faults(self) -> list[Fault]:
        return [self.deleted_topics]

    def jobs(self) -> int:
        """The backlog is the group's lag, which the gateways' metrics tell."""
        return 0

    def leftovers(self) -> list[str]:
        """As for Redis; but all topics stay."""
        return []


Server = Redis | Rabbit | Kafka
KINDS: dict[str, Callable[[Path], Server]] = {
    "valkey": lambda folder: Redis("embedded", folder),
    "redis": lambda folder: Redis("redis-server", folder),
    "rabbitmq": Rabbit,
    "kafka": Kafka,
}


def make(broker: str, folder: Path) -> Any:
    """A broker of this kind, not started yet."""
    return KINDS[broker](folder)
