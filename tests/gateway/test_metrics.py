"""What operators look at."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from conftest import wait_until
from prometheus_client.parser import text_string_to_metric_families
from raw_http import metric

from safelight.gateway.admission import Admission
from safelight.gateway.metrics import Metrics

if TYPE_CHECKING:
    from conftest import System


class Standing:
    """A dispatch and workers with numbers."""

    backlog = 7
    fresh = 3


def _samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(value for name, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }


def test_counts_and_gauges() -> None:
    standing: Any = Standing()
    admission = Admission(jobs=5, image_bytes=100, pixels=100)
    metrics = Metrics(admission, standing, standing)
    metrics.answered("success", {"upload": 0.003, "work": 0.2})
    metrics.answered("success", {"upload": 0.003, "work": 1_000})
    metrics.answered("too_large", {})
    metrics.worked("here-0", ["size", "mirror"])
    before = _samples(metrics)
    metrics.canary_passed(0.25)
    metrics.canary_failed("no_worker")
    with admission.enter(60) as place:
        place.grow("pixels", 9)
        samples = _samples(metrics)
    assert samples["safelight_requests_total", "success"] == 2
    assert samples["safelight_requests_total", "too_large"] == 1
    assert samples["safelight_jobs_total", "mirror", "here-0"] == 1
    assert samples["safelight_phase_seconds_bucket", "0.005", "upload"] == 2
    assert samples["safelight_phase_seconds_bucket", "300.0", "work"] == 1
    assert samples["safelight_phase_seconds_count", "work"] == 2
    assert samples["safelight_in_flight_jobs",] == 1
    assert samples["safelight_in_flight_bytes",] == 60
    assert samples["safelight_in_flight_pixels",] == 9
    assert samples["safelight_backlog",] == 7
    assert samples["safelight_workers",] == 3
    assert before["safelight_canary_last_success_timestamp_seconds",] == 0
    assert ("safelight_canary_seconds",) not in before
    assert samples["safelight_canary_last_success_timestamp_seconds",] > 1_700_000_000
    assert samples["safelight_canary_seconds",] == 0.25
    assert samples["safelight_canary_successes_total",] == 1
    assert samples["safelight_canary_failures_total", "no_worker"] == 1


def test_two_gateways_in_one_process_do_not_meet() -> None:
    standing: Any = Standing()
    first, second = (Metrics(Admission(jobs=1, image_bytes=1, pixels=1), standing, standing) for _ in range(2))
    first.answered("success", {})
    assert ("safelight_requests_total", "success") not in _samples(second)


def test_a_running_system_counts_its_requests(shared_system: System, image: bytes) -> None:
    def counted() -> tuple[float, ...]:
        text = shared_system.client.get("/metrics").text
        return (
            metric(shared_system, 'safelight_requests_total{outcome="success"}'),
            metric(shared_system, 'safelight_requests_total{outcome="unsupported_format"}'),
            metric(shared_system, 'safelight_phase_seconds_count{phase="store"}'),
            sum(map(float, re.findall(r'safelight_jobs_total\{operation="mirror",worker="[^"]+"\} (.*)', text))),
        )

    before = counted()
    for _ in range(3):
        shared_system.post(image)
    shared_system.post(b"text")
    assert tuple(now - then for now, then in zip(counted(), before, strict=True)) == (3, 1, 3, 3)
    assert metric(shared_system, "safelight_workers") >= 1
    wait_until(lambda: metric(shared_system, "safelight_backlog") == 0)
    answer = shared_system.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
