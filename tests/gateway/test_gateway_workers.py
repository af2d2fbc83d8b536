"""Who lives, and what is offered."""

from __future__ import annotations

import itertools

import pytest

from safelight.errors import NoWorkerError, UnknownOperationError
from safelight.gateway.workers import Workers
from safelight.message import Presence


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


SEEN = itertools.count(1)


def _presence(worker: str, *operations: str) -> Presence:
    """A new sign of life."""
    return Presence(worker=worker, operations=list(operations), free=1, slots=2, seen=next(SEEN))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def workers(clock: Clock) -> Workers:
    return Workers(10.0, clock)


def test_nothing_is_certain_before_two_leases(workers: Workers, clock: Clock) -> None:
    clock.now += 9.9
    workers.update([])
    workers.check(["size", "nonsense"])
    clock.now += 0.1
    workers.update([])
    with pytest.raises(NoWorkerError):
        workers.check(["size"])


def test_nothing_is_certain_before_a_look_after_two_leases(workers: Workers, clock: Clock) -> None:
    """A worker that came since the last look has been heard, and is seen with the next one."""
    clock.now += 9.9
    workers.update([_presence("old", "size")])
    clock.now += 0.2
    workers.check(["fresh"])
    workers.update([_presence("old", "size"), _presence("new", "fresh")])
    workers.check(["fresh"])
    with pytest.raises(UnknownOperationError):
        workers.check(["nonsense"])


def test_no_worker_comes_before_not_offered(workers: Workers, clock: Clock) -> None:
    clock.now += 10
    workers.update([])
    with pytest.raises(NoWorkerError):
        workers.check(["nonsense"])
    workers.update([_presence("a", "size")])
    with pytest.raises(UnknownOperationError, match="'nonsense'"):
        workers.check(["size", "nonsense"])
    workers.check(["size", "size"])


def test_what_any_living_worker_offers_is_offered(workers: Workers, clock: Clock) -> None:
    clock.now += 10
    workers.update([_presence("a", "size"), _presence("b", "mirror")])
    workers.check(["size", "mirror"])


def test_a_worker_that_is_being_restarted_is_not_missed(workers: Workers, clock: Clock) -> None:
    clock.now += 50
    workers.update([_presence("a", "size"), _presence("b", "mirror")])
    for _ in range(9):
        clock.now += 1
        workers.update([_presence("a", "size")])
        workers.check(["mirror"])
        assert workers.fresh == 1
    clock.now += 2
    workers.update([_presence("a", "size")])
    with pytest.raises(UnknownOperationError):
        workers.check(["mirror"])


def test_a_worker_that_comes_back_with_less_offers_less(workers: Workers, clock: Clock) -> None:
    clock.now += 50
    workers.update([_presence("a", "size", "mirror")])
    workers.update([_presence("a", "size")])
    with pytest.raises(UnknownOperationError):
        workers.check(["mirror"])


def test_without_news_the_last_worker_is_dead_after_the_window(workers: Workers, clock: Clock) -> None:
    clock.now += 50
    workers.update([_presence("a", "size")])
    clock.now += 10
    workers.check(["size"])
    clock.now += 0.1
    with pytest.raises(NoWorkerError):
        workers.check(["size"])


def test_of_a_time_without_news_nothing_is_known(workers: Workers, clock: Clock) -> None:
    """The broker was away, and the gateway is back before the workers are."""
    clock.now += 50
    workers.update([_presence("a", "size")])
    clock.now += 30
    workers.listen_anew()
    workers.update([])
    clock.now += 9.9
    workers.check(["size"])
    clock.now += 0.1
    workers.update([])
    with pytest.raises(NoWorkerError):
        workers.check(["size"])


def test_the_same_sign_again_is_no_new_one(workers: Workers, clock: Clock) -> None:
    clock.now += 50
    last = _presence("a", "size")
    for _ in range(10):
        workers.update([last])
        workers.check(["size"])
        clock.now += 1
    clock.now += 0.1
    with pytest.raises(NoWorkerError):
        workers.check(["size"])


def test_who_left_is_forgotten(workers: Workers, clock: Clock) -> None:
    for number in range(1_000):
        clock.now += 1
        workers.update([_presence(f"worker-{number}", "size")])
    assert len(workers._seen) <= 11
