"""A cluster of Valkey or Redis servers on this machine, for the tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import redis
from conftest import BrokerServer, free_port, wait_until

SLOTS = 16_384
PRIMARIES = 3
NODE_TIMEOUT_MS = 1_000  # after which a node that does not answer is called dead, and a replica takes its place


@contextmanager
def admin(node: BrokerServer) -> Iterator[Any]:
    """A client of one server, with text for answers."""
    with redis.Redis(unix_socket_path=str(node.socket), decode_responses=True, socket_timeout=1) as client:
        yield client


def on_a_port(program: str, folder: Path, *options: str) -> tuple[BrokerServer, int]:
    """A server, not started yet, on a port of the loopback too."""
    port, folder = free_port(), Path(mkdtemp(dir=folder))
    common = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--repl-diskless-sync-delay", "0")
    return BrokerServer(program, folder, (*common, *options)), port


def ask(node: BrokerServer, *words: Any) -> Any:
    """One command's answer; None while the server is away."""
    with suppress(redis.RedisError), admin(node) as client:
        return client.execute_command(*words)


def is_primary(node: BrokerServer) -> bool:
    return bool((role := ask(node, "ROLE")) and role[0] == "master")


def is_replica(node: BrokerServer) -> bool:
    """Whether it is one and has its primary's data."""
    return bool((role := ask(node, "ROLE")) and role[0] == "slave" and role[3] == "connected")


class Cluster:
    """Three primaries, and `replicas` of the one that has our slot."""

    def __init__(self, program: str, folder: Path, replicas: int = 0) -> None:
        self.ports: dict[int, BrokerServer] = {}
        for _ in range(PRIMARIES + replicas):
            options = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT_MS))
            node, port = on_a_port(program, folder, *options, "--cluster-port", str(free_port()))
            self.ports[port] = node

    @property
    def nodes(self) -> list[BrokerServer]:
        return list(self.ports.values())

    def begin(self) -> None:
        """Start all, and make a cluster of them."""
        bounds = [SLOTS * n // PRIMARIES for n in range(PRIMARIES + 1)]
        ranges = [(first, after - 1) for first, after in itertools.pairwise(bounds)]
        for number, node in enumerate(self.nodes):
            node.start()
            with admin(node) as client:
                client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
                if number < PRIMARIES:
                    client.execute_command("CLUSTER", "ADDSLOTSRANGE", *ranges[number])
        with admin(self.nodes[0]) as client:
            for port in self.ports:
                bus = self.ports[port].options[-1]
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", port, bus)
        self.settle()
        for node in self.nodes[PRIMARIES:]:
            with admin(node) as client:
                client.execute_command("CLUSTER", "REPLICATE", self.id_of(self.owner))
            wait_until(lambda node=node: is_replica(node))
        self.settle()

    def settle(self) -> None:
        """Return when each node that runs knows all others, and calls the cluster well."""
        wait_until(lambda: all(map(self._is_settled, self.nodes)), 30)

    def _is_settled(self, node: BrokerServer) -> bool:
        if node.process is None:
            return True
        told = str(ask(node, "CLUSTER", "INFO")).splitlines()
        return "cluster_state:ok" in told and f"cluster_known_nodes:{len(self.nodes)}" in told

    @staticmethod
    def id_of(node: BrokerServer) -> str:
        return str(ask(node, "CLUSTER", "MYID"))

    @property
    def slot(self) -> int:
        running = next(node for node in self.nodes if node.process)
        return int(ask(running, "CLUSTER", "KEYSLOT", "{safelight}"))

    @property
    def owner(self) -> BrokerServer:
        """The primary that has our keys: the one that does not send us elsewhere."""

        def found() -> BrokerServer | None:
            running = [node for node in self.nodes if node.process]
            return next((node for node in running if ask(node, "DEL", "{safelight}:none") is not None), None)

        owner: BrokerServer = wait_until(found, 30)
        return owner

    @property
    def strangers(self) -> list[int]:
        """Ports of primaries that do not have our keys."""
        owner = self.owner
        return [port for port, node in self.ports.items() if node is not owner and is_primary(node)]

    def url(self, *ports: int) -> str:
        return f"valkey://{','.join(f'127.0.0.1:{port}' for port in ports)}/0"


@contextmanager
def running_cluster(program: str, folder: Path, replicas: int = 0) -> Iterator[Cluster]:
    cluster = Cluster(program, folder, replicas)
    try:
        cluster.begin()
        yield cluster
    finally:
        for node in cluster.nodes:
            node.stop()
