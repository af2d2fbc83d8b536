"""C1: what operators look at, in Prometheus' text format. One registry for each gateway, no globals."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

if TYPE_CHECKING:
    from safelight.gateway.admission import Admission
    from safelight.gateway.dispatch import Dispatch
    from safelight.gateway.workers import Workers

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

KEPT = 64  # answers that are counted together
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The gateway's series; gauges are read when they are asked for.

    An answer is kept and counted with others: one at a time, counting takes five times as long (`docs/why.md`).
    """

    def __init__(self, admission: Admission, dispatch: Dispatch, workers: Workers) -> None:
        self._registry = registry = CollectorRegistry()
        requests = Counter(
            "safelight_requests", "Requests to /query, by outcome (an error's code).", ["outcome"], registry=registry
        )
        jobs = Counter("safelight_jobs", "Answered jobs.", ["worker", "operation"], registry=registry)
        seconds = Histogram(
            "safelight_phase_seconds", "Time in each phase of a request.", ["phase"], buckets=SECONDS, registry=registry
        )
        self._answers: list[tuple[str, dict[str, float]]] = []
        self._works: list[tuple[str, tuple[str, ...]]] = []
        # `labels` checks its words each time, which took longer than the counting.
        self._request = cache(requests.labels)
        self._phase = cache(seconds.labels)
        self._job = cache(jobs.labels)
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
        self._answers.append((outcome, phases))
        if len(self._answers) >= KEPT:
            self._count()

    def worked(self, worker: str, operations: tuple[str, ...]) -> None:
        """A worker answered a job."""
        self._works.append((worker, operations))

    def _count(self) -> None:
        answers, self._answers, works, self._works = self._answers, [], self._works, []
        for outcome, phases in answers:
            self._request(outcome).inc()
            for phase, seconds in phases.items():
                self._phase(phase).observe(seconds)
        for worker, operations in works:
            for operation in operations:
                self._job(worker, operation).inc()

    def exposition(self) -> bytes:
        """All series as text."""
        self._count()
        return generate_latest(self._registry)
