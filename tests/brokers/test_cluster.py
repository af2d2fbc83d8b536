"""Redis and Valkey Cluster, and a primary with replicas: whichever node is named, the one with our keys is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SUCCESS, BrokerServer, System, admitted_answer, answers_through, free_port, needed, wait_until
from redis_cluster import Cluster, admin, ask, is_primary, is_replica, on_a_port, running_cluster

from safelight.brokers import Broker, each_host, open_broker
from safelight.brokers.redis import _moved, _Nodes, _others
from safelight.conformance import LEASE, Conformance, a_job, presence_of, until
from safelight.errors import BrokerAwayError

REQUESTS = 200


def _program(name: str) -> str:
    return name if name == "embedded" else needed(name, name)


@pytest.fixture(scope="module")
def plain_cluster(runtime_folder: Path) -> Iterator[Cluster]:
    """Three primaries, and nobody who takes a dead one's place."""
    with running_cluster("embedded", runtime_folder) as cluster:
        yield cluster


@pytest.fixture(params=["embedded", "redis-server"])
def replicated_cluster(request: pytest.FixtureRequest, runtime_folder: Path) -> Iterator[Cluster]:
    """Three primaries, and a replica of the one that has our keys."""
    with running_cluster(_program(request.param), runtime_folder, replicas=1) as cluster:
        yield cluster


class ClusterServer:
    """The cluster as the suite's server: named by a node that does not have our keys; the one that has them dies."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.owner = cluster.owner
        self.url = cluster.url(cluster.strangers[0])

    def kill(self) -> None:
        self.owner.kill()

    def start(self) -> None:
        self.owner.start()
        self.cluster.settle()


async def _answers(broker: Broker) -> bool:
    try:
        return await broker.backlog() == 0
    except BrokerAwayError:
        return False


class TestCluster(Conformance):
    @pytest.fixture
    def server(self, plain_cluster: Cluster) -> ClusterServer:
        assert ask(plain_cluster.owner, "FLUSHALL")
        return ClusterServer(plain_cluster)

    async def put_by_hand(self, server: ClusterServer, header: bytes, body: bytes) -> None:
        assert server.owner.command("XADD", "{safelight}:jobs", "*", "header", header, "body", body)

    async def inboxes(self, server: ClusterServer) -> int:
        return len(ask(server.owner, "KEYS", "{safelight}:inbox:*"))

    async def test_a_node_that_is_down_is_passed_over(self, server: ClusterServer) -> None:
        broker = open_broker(server.cluster.url(free_port(), *server.cluster.strangers), lease=LEASE)
        await broker.connect()
        assert await broker.backlog() == 0
        await broker.close()

    async def test_what_was_named_may_go_when_the_others_are_known(self, server: ClusterServer) -> None:
        named = server.cluster.ports[server.cluster.strangers[0]]
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            named.freeze()
            try:
                await gateway._pipe.close()  # type: ignore[attr-defined]
                await gateway.send(job := a_job(inbox.name))
                await worker.answer(await worker.take())
                await inbox.reply_to(job)
            finally:
                named.thaw()
                server.cluster.settle()

    async def test_full_memory_has_a_way_out(self, server: ClusterServer) -> None:
        async with self.gateway(server) as (gateway, inbox), self.worker(server) as worker:
            await gateway.send(job := a_job(inbox.name))
            try:
                assert ask(server.owner, "CONFIG", "SET", "maxmemory", "1")
                delivery = await worker.take()
                assert await worker.broker.beat([delivery], presence_of("worker-0")) == []
                assert await gateway.presence()
                await worker.answer(delivery)
                assert (await inbox.reply_to(job)).error is None
            finally:
                assert ask(server.owner, "CONFIG", "SET", "maxmemory", "0")

    async def test_a_socket_leads_to_its_own_server_alone(self, server: ClusterServer) -> None:
        stranger = server.cluster.ports[server.cluster.strangers[0]]
        theirs, another = (open_broker(f"unix://{node.socket}", lease=LEASE) for node in (server.owner, stranger))
        assert await theirs.backlog() == 0
        server.kill()
        for broker in (theirs, another):
            with pytest.raises(BrokerAwayError):
                await broker.backlog()
        server.start()
        with pytest.raises(BrokerAwayError):  # it does not have our keys
            await another.backlog()
        await until(lambda: _answers(theirs))
        await theirs.close()
        await another.close()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_node_that_left_the_cluster_is_left(replicated_cluster: Cluster) -> None:
    """It says CLUSTERDOWN from then on, and not where our keys are."""
    cluster, old = replicated_cluster, replicated_cluster.owner
    broker = open_broker(cluster.url(cluster.strangers[0]), lease=LEASE)
    assert await broker.backlog() == 0
    assert ask(next(node for node in cluster.nodes if is_replica(node)), "CLUSTER", "FAILOVER", "TAKEOVER")
    wait_until(lambda: is_replica(old))
    assert ask(old, "CLUSTER", "RESET", "HARD")
    await until(lambda: _answers(broker))
    await broker.close()


def _migrate(cluster: Cluster, slot: int, source: BrokerServer, target: BrokerServer) -> None:
    """Bring a slot to another primary while it is used: https://valkey.io/commands/cluster-setslot/."""
    port = next(port for port, node in cluster.ports.items() if node is target)
    with admin(source) as giver, admin(target) as taker:
        taker.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", cluster.id_of(source))
        giver.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", cluster.id_of(target))
        while keys := giver.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            giver.execute_command("MIGRATE", "127.0.0.1", port, "", 0, 5_000, "KEYS", *keys)
        for node in (taker, giver):
            node.execute_command("CLUSTER", "SETSLOT", slot, "NODE", cluster.id_of(target))


def _killed(cluster: Cluster) -> None:
    cluster.owner.kill()


def _frozen(cluster: Cluster) -> None:
    """It takes connections still, and answers nothing."""
    cluster.owner.freeze()


def _handed_over(cluster: Cluster) -> None:
    assert ask(next(node for node in cluster.nodes if is_replica(node)), "CLUSTER", "FAILOVER")


def _migrated(cluster: Cluster) -> None:
    _migrate(cluster, cluster.slot, cluster.owner, cluster.ports[cluster.strangers[0]])


def _all_succeed_through(fault: Callable[[], Any], system: System, image: bytes) -> None:
    """Each request that was admitted is answered with success and saved, while `fault` is done in mid-load."""
    texts = answers_through(fault, lambda: admitted_answer(system, image), REQUESTS)
    assert texts == [SUCCESS] * REQUESTS
    assert len(list(system.store.iterdir())) == REQUESTS


@pytest.mark.parametrize("fault", [_killed, _frozen, _handed_over, _migrated])
def test_no_admitted_request_fails_through(
    fault: Callable[[Cluster], None], replicated_cluster: Cluster, new_system: Callable[..., System], image: bytes
) -> None:
    cluster = replicated_cluster
    system = new_system("--broker", cluster.url(*cluster.strangers), "--workers", "2")
    before = cluster.owner
    _all_succeed_through(lambda: fault(cluster), system, image)
    assert cluster.owner is not before


def test_a_primary_that_comes_back_as_a_replica(
    replicated_cluster: Cluster, new_system: Callable[..., System], image: bytes
) -> None:
    cluster = replicated_cluster
    system = new_system("--broker", cluster.url(*cluster.strangers), "--workers", "1")
    for _ in range(2):
        assert system.post(image).text == SUCCESS
        owner = cluster.owner
        owner.kill()
        assert cluster.owner is not owner
        assert admitted_answer(system, image) == SUCCESS
        owner.start()
        wait_until(lambda owner=owner: is_replica(owner), 30)
        cluster.settle()


@pytest.fixture
def pair(runtime_folder: Path) -> Iterator[dict[int, BrokerServer]]:
    """Ports and servers, without a cluster: a replica, then its primary."""
    pair = {port: node for node, port in (on_a_port("embedded", runtime_folder) for _ in range(2))}
    try:
        for node in pair.values():
            node.start()
        replica, primary = pair.values()
        assert ask(replica, "REPLICAOF", "127.0.0.1", list(pair)[1])
        wait_until(lambda: is_replica(replica) and is_primary(primary))
        yield pair
    finally:
        for node in pair.values():
            node.stop()


@pytest.mark.parametrize("dies", [True, False], ids=["killed", "demoted"])
def test_a_replica_is_made_the_primary(
    dies: bool, pair: dict[int, BrokerServer], new_system: Callable[..., System], image: bytes
) -> None:
    replica, primary = pair.values()
    system = new_system("--broker", f"valkey://{','.join(f'127.0.0.1:{port}' for port in pair)}/0", "--workers", "2")

    def change_over() -> None:
        if dies:
            primary.kill()
        else:
            assert ask(primary, "REPLICAOF", "127.0.0.1", next(iter(pair)))
        assert ask(replica, "REPLICAOF", "NO", "ONE")

    _all_succeed_through(change_over, system, image)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("MOVED 10 10.0.0.2:7001", [("10.0.0.2", 7001)]),
        ("MOVED 10 node.example:7001", [("node.example", 7001)]),
        ("MOVED 10 2001:db8::2:7001", [("2001:db8::2", 7001)]),
        ("MOVED 10 [2001:db8::2]:7001", [("2001:db8::2", 7001)]),
        ("MOVED 10 :7001", [("here", 7001)]),  # the node does not know its own address: the one that was asked
        ("MOVED 10 ?:7001", [("here", 7001)]),
        ("READONLY You can't write against a read only replica.", []),
    ],
)
def test_where_a_node_sends_us(answer: str, found: list[Any]) -> None:
    assert _moved(("here", 6379), Exception(answer)) == found


def test_nodes_that_a_cluster_tells() -> None:
    slots = [
        [0, 5460, [b"10.0.0.1", 7000, b"id", []], [b"", 7003, b"id", []]],
        [5461, 16383, [None, 7001, b"id", [b"hostname", b"a"]], [b"2001:db8::2", 7002, b"id"]],
    ]
    told = [("10.0.0.1", 7000), ("here", 7003), ("here", 7001), ("2001:db8::2", 7002)]
    assert _others(("here", 6379), slots) == told
    assert _others(("here", 6379), Exception("ERR This instance has cluster support disabled")) == []
    assert _others(("", 0), slots) == []  # a socket leads nowhere else


@pytest.mark.parametrize(
    ("url", "nodes"),
    [
        ("valkeys://u:p%2C@a:1,b,[::1]:2/3?ssl_ca_certs=/x,y", [("a", 1), ("b", 6379), ("::1", 2)]),
        ("valkey://localhost", [("localhost", 6379)]),
        ("redis://", [("localhost", 6379)]),
        ("unix:///path,with:commas", [("", 0)]),
    ],
)
def test_hosts_of_a_url(url: str, nodes: list[Any]) -> None:
    broker: Any = open_broker(url, lease=LEASE)
    found: _Nodes = broker._pipe._nodes
    assert found._named == nodes
    if len(nodes) > 1:
        assert (found._options["username"], found._options["password"], found._options["db"]) == ("u", "p,", 3)
        assert found._options["ssl_ca_certs"] == "/x,y"


def test_hosts_keep_what_stands_around_them() -> None:
    assert each_host("amqp://u:p@a:1,b:2/v?x=1,2") == ["amqp://u:p@a:1/v?x=1,2", "amqp://u:p@b:2/v?x=1,2"]
    assert each_host("redis") == ["redis"]
