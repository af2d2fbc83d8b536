"""Whole systems on brokers of their own: the seed's answer, and no admitted request fails while parts are killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest
from conftest import SUCCESS, BrokerServer, System, admitted_answer, answers_through, needed

from safelight.conformance import Server

NODES = {"rabbitmq": "rabbit_node", "kafka": "kafka_node"}  # one for all tests: they take seconds to start
REQUESTS = 120


@pytest.fixture(params=["redis", "rabbitmq", "kafka"])
def broker(request: pytest.FixtureRequest, runtime_folder: Path) -> Iterator[Server]:
    if request.param in NODES:
        node = request.getfixturevalue(NODES[request.param])
        if node.process is None:
            node.start()
        yield node
        return
    needed("redis-server", "redis-server")
    server = BrokerServer("redis-server", Path(mkdtemp(dir=runtime_folder)))
    server.start()
    yield server
    server.stop()


def _killed_worker(system: System, broker: Server) -> None:
    system.part("worker").kill()


def _killed_child(system: System, broker: Server) -> None:
    system.part("safelight.worker.child").kill()


def _restarted_broker(system: System, broker: Server) -> None:
    broker.kill()
    broker.start()


def _closed_by_sigterm(system: System, broker: Server) -> None:
    system.part("worker").terminate()


def test_the_seeds_answer(broker: Server, new_system: Callable[..., System], image: bytes) -> None:
    system = new_system("--broker", broker.url, "--workers", "1")
    answer = system.post(image)
    assert answer.text == SUCCESS
    assert len(list(system.store.iterdir())) == 1


@pytest.mark.parametrize("fault", [_killed_worker, _killed_child, _closed_by_sigterm, _restarted_broker])
def test_no_admitted_request_fails_through(
    fault: Callable[[System, Server], None], broker: Server, new_system: Callable[..., System], image: bytes
) -> None:
    system = new_system("--broker", broker.url, "--workers", "2")
    texts = answers_through(lambda: fault(system, broker), lambda: admitted_answer(system, image), REQUESTS)
    assert texts == [SUCCESS] * REQUESTS
    assert len(list(system.store.iterdir())) == REQUESTS
