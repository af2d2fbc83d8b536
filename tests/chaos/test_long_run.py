"""What the long run calls growth: planted series that grow must be found, and noise must not be."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable

import psutil
import pytest
from conftest import wait_until

from chaos import long_run
from chaos.long_run import judge

HOUR = [10.0 * n for n in range(1, 361)]

Shape = Callable[[float], float]  # of a part of the time, 0 to 1


def samples(shape: Shape, noise: float = 0.0, times: list[float] = HOUR) -> list[tuple[float, float]]:
    dice = random.Random(1)
    return [(seconds, shape(seconds / times[-1]) + dice.uniform(-noise, noise)) for seconds in times]


@pytest.mark.parametrize(
    ("what", "shape", "noise"),
    [
        ("memory KB", lambda t: 50_000 + 10_000 * t, 2_000),  # 10 MB in an hour
        ("memory KB", lambda t: 50_000 + 10_000 * (t > 0.5), 2_000),  # a step
        ("memory KB", lambda t: 500_000 + 40_000 * t, 2_000),
        ("descriptors", lambda t: 25 + 12 * t, 3),
        ("threads", lambda t: 2 + round(4 * t), 0),
        ("processes", lambda t: 2 + round(t), 0),  # one child that nobody ended
        ("keys", lambda t: 3 + 2 * (t > 0.5), 0),  # a job in quarantine
        ("marks of withdrawal", lambda t: 30 * t, 2),
        ("queue entries", lambda t: 1 + 10 * t, 1),
    ],
)
def test_what_grows_is_found(what: str, shape: Shape, noise: float) -> None:
    row = judge("gateway", what, samples(shape, noise))
    assert row.grew
    assert row.last > row.first
    assert "| gateway | " + what in long_run.table([row])
    assert "**grew**" in long_run.table([row])


@pytest.mark.parametrize(
    ("what", "shape", "noise"),
    [
        ("memory KB", lambda t: 50_000, 3_000),
        ("memory KB", lambda t: 20_000 + 30_000 * min(1, t * 20), 100),  # it fills while it warms up
        ("memory KB", lambda t: 40_000 + 30_000 * (t * 100 % 1), 0),  # children, recycled each 36 s
        ("memory KB", lambda t: 50_000 - 20_000 * t, 0),
        ("descriptors", lambda t: 25, 5),
        ("processes", lambda t: 2 + (t * 17 % 1 > 0.9), 0),  # two, and a successor now and then
        ("queue entries", lambda t: 2, 2),
        ("marks of withdrawal", lambda t: 8, 6),
    ],
)
def test_what_does_not_grow_is_not_found(what: str, shape: Shape, noise: float) -> None:
    assert not judge("gateway", what, samples(shape, noise)).grew


def test_the_slope_is_per_hour() -> None:
    assert judge("gateway", "keys", samples(lambda t: 3 + 36 * t)).slope_per_hour == pytest.approx(36)


def test_five_minutes_can_be_judged_and_one_cannot() -> None:
    def grows(t: float) -> float:
        return 50_000 + 10_000 * t

    assert judge("gateway", "memory KB", samples(grows, times=HOUR[:30])).grew
    with pytest.raises(ValueError, match="12 are needed"):
        judge("gateway", "memory KB", samples(grows, times=HOUR[:6]))


def test_an_unforeseen_answer_is_a_failure() -> None:
    load = long_run.Load(1, rate=20.0)
    [refused] = [picture for picture in load._pictures if picture.status == 422]
    assert load._wrong(refused, 422, b'{"status": "FAILURE", "error": "unprocessable_image"}') == ""
    assert load._wrong(refused, 422, b'{"status": "FAILURE", "error": "quarantined"}').startswith("422 instead of 422")
    assert load._wrong(refused, 503, b'{"status": "FAILURE"}').startswith("503 instead of 422")
    assert load._wrong(load._pictures[0], 200, b"{}").startswith("200 instead of 200")
    assert load._wrong(load._pictures[0], 200, b'{"status": "SUCCESS"}') == ""


def test_a_part_that_died_is_seen() -> None:
    script = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()', 'gateway']); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, start_new_session=True) as supervisor:
        process = psutil.Process(supervisor.pid)
        wait_until(process.children)
        watch = long_run.Watch(process, "amqp://nowhere")
        watch.sample()
        assert watch.series["gateway", "descriptors"][0][1] >= 3
        [gateway] = process.children()
        gateway.kill()
        wait_until(lambda: gateway.status() == psutil.STATUS_ZOMBIE)
        with pytest.raises(long_run.DiedError, match="the gateway"):
            watch.sample()
        os.kill(supervisor.pid, 9)
