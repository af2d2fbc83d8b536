"""Whole systems on brokers of their own: the seed's answer, and no admitted request fails while parts are killed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import SUCCESS, System, admitted_answer, answers_through

from safelight.conformance import Server

REQUESTS = 120


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
