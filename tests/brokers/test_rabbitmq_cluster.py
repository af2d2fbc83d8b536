"""Three RabbitMQ nodes: what quorum queues keep through a killed node, and what we do about queues that go with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest
from conftest import SUCCESS, System, admitted_answer, answers_through, needed
from rabbit_server import RabbitServer

from safelight.brokers.rabbitmq import INBOX, JOBS, QUARANTINE

REQUESTS = 200


@pytest.fixture(scope="module")
def nodes(runtime_folder: Path) -> Iterator[list[RabbitServer]]:
    needed("rabbitmq-server", "rabbitmq-server")
    first = RabbitServer(Path(mkdtemp(dir=runtime_folder)))
    cluster = [first, *(RabbitServer(Path(mkdtemp(dir=runtime_folder)), first) for _ in range(2))]
    try:
        for node in cluster:
            node.start()
        yield cluster
    finally:
        for node in reversed(cluster):
            node.stop()


def _queues(node: RabbitServer, *columns: str) -> dict[str, str]:
    """What `rabbitmqctl` tells of each queue."""
    rows = node.control("list_queues", "--online", "name", *columns).splitlines()
    return dict(row.split("\t", 1) for row in rows if row.startswith("safelight."))


def _home_of_the_inbox(nodes: list[RabbitServer]) -> RabbitServer:
    pids = next(pid for name, pid in _queues(nodes[0], "pid").items() if name.startswith(INBOX))
    return next(node for node in nodes if node.name in pids)


@pytest.mark.timeout(300)
def test_no_admitted_request_fails_through_the_death_of_a_node(
    nodes: list[RabbitServer], new_system: Callable[..., System], image: bytes
) -> None:
    url = f"amqp://guest:guest@{','.join(f'127.0.0.1:{node.port}' for node in nodes)}/"
    system = new_system("--broker", url, "--workers", "2")
    assert system.post(image).text == SUCCESS
    members = _queues(nodes[0], "members")
    assert all(node.name in members[name] for node in nodes for name in (JOBS, QUARANTINE))
    dying = _home_of_the_inbox(nodes)
    texts = answers_through(dying.kill, lambda: admitted_answer(system, image), REQUESTS)
    assert texts == [SUCCESS] * REQUESTS
    assert len(list(system.store.iterdir())) == REQUESTS + 1
    dying.start()
    assert system.post(image).text == SUCCESS
