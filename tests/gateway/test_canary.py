"""The canary shows what a request would meet, and changes nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable

from conftest import SUCCESS, System, wait_until
from raw_http import metric

from safelight.gateway.canary import IMAGE
from safelight.operations.size import size

SUCCESSES = "safelight_canary_successes_total"


def failures(system: System, code: str) -> float:
    return metric(system, f'safelight_canary_failures_total{{error="{code}"}}')


def test_it_passes_is_no_request_and_ends_with_the_drain(new_system: Callable[..., System], image: bytes) -> None:
    system = new_system("--workers", "1", "--canary-interval", "0.02", "--drain-delay", "1")
    assert size(IMAGE) == {"size": "1kb"}
    wait_until(lambda: metric(system, SUCCESSES) >= 3)
    text = system.client.get("/metrics").text
    assert "safelight_requests_total{" not in text
    assert "safelight_jobs_total{" not in text
    assert 0 < metric(system, "safelight_canary_seconds") < 5
    assert metric(system, "safelight_canary_last_success_timestamp_seconds") > 0
    assert not list(system.store.iterdir())

    system.part("gateway").send_signal(signal.SIGTERM)
    wait_until(lambda: not system.ready())
    passed = metric(system, SUCCESSES)
    assert [system.post(image).text for _ in range(10)] == [SUCCESS] * 10
    assert metric(system, SUCCESSES) == passed
    assert system.log.read_text().count("the canary") <= 2  # changes alone: the worker may have come late


def test_frozen_workers_show_and_readiness_is_presence_alone(new_system: Callable[..., System]) -> None:
    system = new_system("--workers", "2", "--canary-interval", "0.02", "--lease", "60")
    wait_until(lambda: metric(system, SUCCESSES) >= 1)
    frozen = [*system.parts("worker"), *system.parts("safelight.worker.child")]
    for process in frozen:
        process.suspend()
    backlogs = set()

    def failed() -> bool:
        backlogs.add(metric(system, "safelight_backlog"))
        return failures(system, "deadline_passed") >= 1

    wait_until(failed)
    assert system.ready()
    assert backlogs <= {0, 1}  # one at a time
    passed = metric(system, SUCCESSES)
    for process in frozen:
        process.resume()
    wait_until(lambda: metric(system, SUCCESSES) > passed)
    wait_until(lambda: "the canary is well again" in system.log.read_text())
    assert system.log.read_text().count("the canary fails: deadline_passed") == 1


def test_one_that_its_worker_cannot_do_leaves_nothing_in_quarantine(new_system: Callable[..., System]) -> None:
    system = new_system("--workers", "1", "--canary-interval", "0.02", "--work-limit", "0.3", "--attempts", "1")
    wait_until(lambda: metric(system, SUCCESSES) >= 1)
    system.part("safelight.worker.child").suspend()
    wait_until(lambda: failures(system, "quarantined") >= 1)
    wait_until(lambda: "the canary is well again" in system.log.read_text())
    assert system.ready()
    command = [sys.executable, "-m", "safelight", "quarantine", "list", "--port", str(system.port)]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"The quarantine is empty.\n"


def test_without_a_worker_it_fails_and_the_queue_stays_empty(new_system: Callable[..., System]) -> None:
    system = new_system("--workers", "0", "--canary-interval", "0.02", "--lease", "0.5", wait=False)
    wait_until(lambda: "listening on" in system.log.read_text())
    wait_until(lambda: failures(system, "no_worker") >= 10)
    assert metric(system, "safelight_backlog") == 0
    assert metric(system, SUCCESSES) == 0
    assert system.log.read_text().count("the canary fails") == 1
