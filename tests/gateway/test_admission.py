"""Bounds of what is in flight."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.errors import GatewayFullError
from safelight.gateway.admission import Admission, Place


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_jobs_are_bounded() -> None:
    admission = Admission(jobs=2, image_bytes=100, pixels=100)
    first = admission.enter(0)
    with admission.enter(0):
        with pytest.raises(GatewayFullError):
            admission.enter(0)
        assert admission.held["jobs"] == 2
    with admission.enter(0):
        first.leave()
    assert admission.held == {"jobs": 0, "bytes": 0, "pixels": 0}


def test_announced_bytes_are_bounded_and_a_refusal_holds_nothing() -> None:
    admission = Admission(jobs=10, image_bytes=100, pixels=100)
    with admission.enter(60):
        with pytest.raises(GatewayFullError):
            admission.enter(41)
        assert admission.held == {"jobs": 1, "bytes": 60, "pixels": 0}
        with admission.enter(40):
            assert admission.held["bytes"] == 100


def test_growing_counts_what_is_more_than_before() -> None:
    admission = Admission(jobs=10, image_bytes=100, pixels=50)
    with admission.enter(60) as place:
        place.grow("bytes", 10)
        place.grow("bytes", 60)
        assert admission.held["bytes"] == 60
        place.grow("bytes", 100)
        with pytest.raises(GatewayFullError):
            place.grow("bytes", 101)
        place.grow("pixels", 50)
        with pytest.raises(GatewayFullError):
            place.grow("pixels", 51)
        assert admission.held == {"jobs": 1, "bytes": 100, "pixels": 50}
    assert admission.held == {"jobs": 0, "bytes": 0, "pixels": 0}


def test_a_place_is_left_once_whatever_happens() -> None:
    admission = Admission(jobs=1, image_bytes=10, pixels=10)
    with pytest.raises(ValueError, match="inside"), admission.enter(5) as place:
        raise ValueError("inside")
    place.leave()
    assert admission.held == {"jobs": 0, "bytes": 0, "pixels": 0}


def test_retry_after_is_the_time_until_half_has_left() -> None:
    clock = Clock()
    admission = Admission(jobs=100, image_bytes=10, pixels=10, clock=clock)
    assert admission.retry_after() == 1
    places = [admission.enter(0) for _ in range(80)]
    assert admission.retry_after() == 30  # nobody has left yet
    for place in places[:50]:
        clock.now += 0.1
        place.leave()
    fast = admission.retry_after()  # about 10 a second, and 30 are there
    assert 1 <= fast <= 4
    clock.now += 60
    assert admission.retry_after() == 30


def test_a_crowd_is_told_to_come_again_at_the_pace_of_leaving() -> None:
    clock = Clock()
    admission = Admission(jobs=10, image_bytes=10, pixels=10, clock=clock)
    for _ in range(100):  # 10 a second leave
        with admission.enter(0):
            clock.now += 0.1
    for _ in range(10):
        admission.enter(0)
    told = []
    for _ in range(200):
        with pytest.raises(GatewayFullError):
            admission.enter(0)
        told.append(admission.retry_after())
    assert told == sorted(told)
    assert told[0] == 1
    assert 18 <= told[-1] <= 30  # 200 of them, 10 a second
    assert all(told.count(seconds) <= 15 for seconds in range(1, 18))


STEPS = st.lists(st.tuples(st.sampled_from(["enter", "bytes", "pixels", "leave"]), st.integers(0, 120)), max_size=60)


@settings(deadline=None)
@given(STEPS)
def test_what_is_held_is_the_sum_of_the_shares_and_never_too_much(steps: list[tuple[str, int]]) -> None:
    most = {"jobs": 3, "bytes": 100, "pixels": 100}
    admission = Admission(jobs=3, image_bytes=100, pixels=100)
    places: list[Place] = []
    for step, amount in steps:
        before = dict(admission.held)
        try:
            if step == "enter":
                places.append(admission.enter(amount))
            elif places and step == "leave":
                places.pop(amount % len(places)).leave()
            elif places:
                places[amount % len(places)].grow(step, amount)
        except GatewayFullError:
            assert admission.held == before
        for kind, limit in most.items():
            assert admission.held[kind] == sum(place.shares.get(kind, 0) for place in places) <= limit
    for place in places:
        place.leave()
    assert set(admission.held.values()) == {0}
