"""C1: what operators look at, in Prometheus' text format. One registry for each gateway, no globals.

Counting is plain here and becomes Prometheus' at a scrape: its own counters and histograms cost 160 µs a request
(`docs/why.md`).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from safelight.gateway.admission import Admission
    from safelight.gateway.dispatch import Dispatch
    from safelight.gateway.workers import Workers

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
BOUNDS = [*map(floatToGoString, SECONDS), "+Inf"]


class _Durations:
    """How many of one phase took at most each of `SECONDS`, and no less; and their sum."""

    def __init__(self) -> None:
        self.counts = [0] * len(BOUNDS)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds


class Metrics(Collector):
    """The gateway's series; gauges are read when they are asked for."""

    def __init__(self, admission: Admission, dispatch: Dispatch, workers: Workers) -> None:
        self._requests: Counter[str] = Counter()
        self._jobs: Counter[tuple[str, str]] = Counter()
        self._phases: dict[str, _Durations] = {}
        self._canaries: Counter[str] = Counter()  # failed ones, by code
        self._canaries_passed = 0
        self._canary_seconds: float | None = None
        self._canary_passed_at = 0.0
        self._registry = registry = CollectorRegistry()
        registry.register(self)
        for kind in admission.held:
            gauge = Gauge(f"safelight_in_flight_{kind}", f"Admitted {kind} not answered yet.", registry=registry)
            gauge.set_function(lambda kind=kind: admission.held[kind])  # type: ignore[misc]
        Gauge("safelight_backlog", "Jobs on the broker, waiting or worked on.", registry=registry).set_function(
            lambda: dispatch.backlog
        )
        Gauge("safelight_workers", "Workers with a fresh sign of life.", registry=registry).set_function(
            lambda: workers.fresh
        )

    def answered(self, outcome: str, phases: dict[str, float]) -> None:
        """A request to /query ended; `phases` in seconds."""
        self._requests[outcome] += 1
        for phase, seconds in phases.items():
            if phase not in self._phases:
                self._phases[phase] = _Durations()
            self._phases[phase].add(seconds)

    def worked(self, worker: str, operations: tuple[str, ...]) -> None:
        """A worker answered a job."""
        for operation in operations:
            self._jobs[worker, operation] += 1

    def canary_passed(self, seconds: float) -> None:
        """A canary was answered after so long."""
        self._canaries_passed += 1
        self._canary_seconds = seconds
        self._canary_passed_at = time.time()

    def canary_failed(self, code: str) -> None:
        """A canary was not answered, for the reason that a request would be told."""
        self._canaries[code] += 1

    def collect(self) -> Iterator[Metric]:
        """What was counted, for the registry."""
        requests = CounterMetricFamily(
            "safelight_requests", "Requests to /query, by outcome (an error's code).", labels=["outcome"]
        )
        for outcome, count in self._requests.items():
            requests.add_metric([outcome], count)
        yield requests
        jobs = CounterMetricFamily("safelight_jobs", "Answered jobs.", labels=["worker", "operation"])
        for labels, count in self._jobs.items():
            jobs.add_metric(labels, count)
        yield jobs
        seconds = HistogramMetricFamily("safelight_phase_seconds", "Time in each phase of a request.", labels=["phase"])
        for phase, found in self._phases.items():
            buckets = list(zip(BOUNDS, accumulate(found.counts), strict=True))
            seconds.add_metric([phase], buckets, sum_value=found.sum)
        yield seconds
        yield from self._collect_canaries()

    def _collect_canaries(self) -> Iterator[Metric]:
        name = "safelight_canary"
        yield CounterMetricFamily(f"{name}_successes", "Canaries that were answered.", value=self._canaries_passed)
        failures = CounterMetricFamily(f"{name}_failures", "Canaries that failed, by error's code.", labels=["error"])
        for code, count in self._canaries.items():
            failures.add_metric([code], count)
        yield failures
        yield GaugeMetricFamily(
            f"{name}_last_success_timestamp_seconds",
            "When the last canary was answered, in Unix time (0: none was yet).",
            value=self._canary_passed_at,
        )
        if self._canary_seconds is not None:
            yield GaugeMetricFamily(
                f"{name}_seconds", "How long the last canary that was answered took.", value=self._canary_seconds
            )

    def exposition(self) -> bytes:
        """All series as text."""
        return generate_latest(self._registry)
