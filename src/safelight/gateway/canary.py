"""C1: the canary: a tiny job through broker and worker, again and again, which shows in the metrics alone.

It goes the way of a request's job, by the same `Dispatch`, but it is no request: it takes no place of admission, is not
counted among requests or jobs, and /readyz does not know of it (a gateway that is taken out because workers are slow
helps nobody). There is one at a time. Where a request would be refused, and where no worker lives, none is sent: that
is a failure too, and a queue that is full or that nobody reads does not grow.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from safelight.errors import InternalError, NoWorkerError, SafelightError, from_code
from safelight.message import Job, new_id, now_ms

if TYPE_CHECKING:
    from safelight.gateway.dispatch import Dispatch
    from safelight.gateway.metrics import Metrics
    from safelight.gateway.workers import Workers

__all__ = ["Canary"]

log = logging.getLogger(__name__)

OPERATION = "size"  # each worker has it, and a child is done with it at once
TIMEOUT_SECONDS = 5.0  # a tiny job that takes longer than this has met no load that anybody wants
# A JPEG of one grey pixel. `size` does not look at it; an operation that somebody put in its place may.
IMAGE = bytes.fromhex(
    "ffd8ffdb004300" + "01" * 64 + "ffc0000b080001000101011100ffc400140001000000000000000000000000000000"
    "09ffc40014100100000000000000000000000000000000ffda0008010100003f0054dfffd9"
)


class Canary:
    """One gateway's canary; `run` sends one every `interval` seconds until it is cancelled."""

    def __init__(self, dispatch: Dispatch, workers: Workers, metrics: Metrics, *, interval: float) -> None:
        self._dispatch = dispatch
        self._workers = workers
        self._metrics = metrics
        self._interval = interval
        self._failing: str | None = None  # the code that was logged

    async def run(self) -> None:
        """Send, wait for the answer, pause; the first one is sent after a pause, when the workers are known."""
        while self._interval:
            await asyncio.sleep(self._interval)
            begun = time.perf_counter()
            try:
                await self._send()
            except SafelightError as exc:
                self._failed(exc)
            except Exception:  # whatever it meets must not end the gateway
                log.exception("the canary failed by a defect")
                self._failed(InternalError())
            else:
                self._passed(time.perf_counter() - begun)

    async def _send(self) -> None:
        self._dispatch.check()
        self._workers.check([OPERATION])
        if not self._workers.fresh:  # a request would be sent, in case that one comes; this one need not wait for it
            raise NoWorkerError
        job = Job(
            id=new_id(),
            operations=[(OPERATION, {})],
            deadline=now_ms() + round(TIMEOUT_SECONDS * 1_000),
            reply_to=self._dispatch.inbox,
            canary=True,
            image=IMAGE,
        )
        reply = await self._dispatch.ask(job, TIMEOUT_SECONDS)
        if reply.error is not None:
            raise from_code(reply.error, reply.detail)

    def _passed(self, seconds: float) -> None:
        self._metrics.canary_passed(seconds)
        if self._failing is not None:
            log.info("the canary is well again, after %.3f s", seconds)
        self._failing = None

    def _failed(self, error: SafelightError) -> None:
        self._metrics.canary_failed(error.code)
        if self._failing != error.code:
            log.warning("the canary fails: %s: %s", error.code, error.detail)
        self._failing = error.code
