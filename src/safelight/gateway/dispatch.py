"""C1: jobs out, replies in: deadlines, matching, sending again. The same for every broker.

A request's state lives here and nowhere else: a job is kept until it is answered. Replies come through one inbox and
find their request by the job's id; a second reply finds nothing and is ignored. Whatever could not be sent, and all
that is unanswered after a connection or the inbox was lost, is sent (again) under the same ids by one task. A heavy
job is sent when there is room for it in the lane (`lane.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelight.brokers import Renewed
from safelight.errors import (
    BrokerAwayError,
    BrokerFullError,
    DeadlinePassedError,
    InternalError,
    NoWorkerError,
    SafelightError,
    UnknownOperationError,
)
from safelight.gateway.lane import Lane

if TYPE_CHECKING:
    from collections.abc import Callable

    from safelight.brokers import Broker
    from safelight.gateway.workers import Workers
    from safelight.message import Job, Reply

__all__ = ["Dispatch"]

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
RESEND_SECONDS = 0.2
AWAY_SECONDS = 2.0  # for so long the broker is waited for; then new requests are refused
MAX_BACKLOG = 10_000  # jobs of all gateways; over it new requests are refused


@dataclass(eq=False)
class _Pending:
    job: Job
    reply: asyncio.Future[Reply]
    is_due: bool  # or it waits for its turn in the lane, and no broker has heard of it


class Dispatch:
    """One gateway's jobs. `run` must be running; `ask` is called once for each admitted request."""

    def __init__(
        self, broker: Broker, inbox: str, workers: Workers, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.inbox = inbox
        self._broker = broker
        self._workers = workers
        self._clock = clock
        self._lane = Lane(lambda: workers.heavy_children)
        self._pending: dict[str, _Pending] = {}
        self._unsent: dict[str, None] = {}  # ordered, without doubles
        self._something_unsent = asyncio.Event()
        self._listening = False  # a reply to a job that is sent before its inbox is there would be lost
        self._away_since: float | None = None
        self._withdrawals: set[asyncio.Task[None]] = set()
        self.backlog = 0

    def check(self) -> None:
        """Raise `BrokerAwayError` or `BrokerFullError` if a new job could not be sent."""
        if self._away_since is not None and self._clock() - self._away_since >= AWAY_SECONDS:
            raise BrokerAwayError
        if self.backlog >= MAX_BACKLOG:
            raise BrokerFullError

    @property
    def ready(self) -> bool:
        """Whether the broker answers and a worker gave a sign of life."""
        return self._listening and self._away_since is None and self._workers.fresh > 0

    async def run(self) -> None:
        """Listen, beat and send again until cancelled; then every request that still waits fails."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._listen(), name="replies")
                group.create_task(self._beat(), name="beat")
                group.create_task(self._send_again(), name="sending again")
        finally:
            for job_id in self._pending:
                self.give_up(job_id, BrokerAwayError())

    async def ask(self, job: Job, timeout: float) -> Reply:
        """The reply to a job, or `DeadlinePassedError` after `timeout` seconds; withdrawn if nobody waits any more.

        `GatewayFullError` for a heavy one that would not begin within that time.
        """
        is_heavy = job.heavy
        pending = _Pending(job, asyncio.get_running_loop().create_future(), is_due=not is_heavy)
        self._pending[job.id] = pending
        try:
            async with asyncio.timeout(timeout):
                if is_heavy:
                    pending.is_due = await self._lane.enter(pending.reply, job.predicted_seconds, timeout)
                if pending.is_due:
                    await self._send(pending)
                return await pending.reply
        except TimeoutError:
            raise DeadlinePassedError from None
        finally:
            del self._pending[job.id]
            self._unsent.pop(job.id, None)
            if is_heavy and pending.is_due:
                self._lane.leave(pending.reply)
            failed = not pending.reply.done() or pending.reply.cancelled() or pending.reply.exception()
            if failed and pending.is_due:
                self._withdraw(job)

    def give_up(self, job_id: str, reason: Exception) -> None:
        """End the waiting for a job, if it goes on, with `reason`."""
        pending = self._pending.get(job_id)
        if pending is not None and not pending.reply.done():
            pending.reply.set_exception(reason)

    async def _send(self, pending: _Pending) -> None:
        if not self._listening:
            self._unsent[pending.job.id] = None
            return
        try:
            await self._broker.send(pending.job)
        except BrokerFullError:
            raise
        except BrokerAwayError:
            self._unsent[pending.job.id] = None
            self._something_unsent.set()
        except InternalError as exc:  # one that refuses our commands is as good as away; the reason is for the log
            log.error("job %s cannot be sent: %s", pending.job.id, exc.detail)  # noqa: TRY400 - no defect of ours
            raise BrokerAwayError from exc

    def _withdraw(self, job: Job) -> None:
        async def withdraw() -> None:
            with suppress(SafelightError):
                await self._broker.withdraw(job)

        task = asyncio.create_task(withdraw(), name=f"withdrawal of {job.id}")
        self._withdrawals.add(task)
        task.add_done_callback(self._withdrawals.discard)

    async def _listen(self) -> None:
        async for item in self._broker.replies(self.inbox):
            if isinstance(item, Renewed):
                unanswered = [job_id for job_id, pending in self._pending.items() if pending.is_due]
                if unanswered and self._listening:
                    log.info("the inbox was made anew; sending %d unanswered jobs again", len(unanswered))
                self._listening = True
                self._unsent |= dict.fromkeys(unanswered)
                self._something_unsent.set()
            elif (pending := self._pending.get(item.id)) is not None and not pending.reply.done():
                pending.reply.set_result(item)

    async def _send_again(self) -> None:
        while True:
            await self._something_unsent.wait()
            self._something_unsent.clear()
            for job_id in list(self._unsent):
                self._unsent.pop(job_id, None)  # first: while it is being sent it may come to need it again
                pending = self._pending.get(job_id)
                if pending is not None and not pending.reply.done():
                    try:
                        await self._broker.send(pending.job)
                    except SafelightError:
                        self._unsent[job_id] = None
                        self._something_unsent.set()
                        break
            await asyncio.sleep(RESEND_SECONDS)

    def _refuse_not_offered(self) -> None:
        """Fail what was admitted before it was certain that no worker offers its operations."""
        for pending in self._pending.values():
            try:
                self._workers.check(name for name, _ in pending.job.operations)
            except UnknownOperationError as exc:
                self.give_up(pending.job.id, exc)
            except NoWorkerError:  # one may come before the deadline
                return

    async def _beat(self) -> None:
        while True:
            begun = self._clock()
            try:
                presences = await self._broker.presence()
                self.backlog = await self._broker.backlog()
            except SafelightError as exc:
                if self._away_since is None:
                    log.warning("the broker is away: %s", exc.detail)
                    self._away_since = begun
            else:
                if self._away_since is not None:
                    log.info("the broker is back")
                    self._workers.listen_anew()
                self._away_since = None
                self._workers.update(presences)
                self._lane.admit()
                self._refuse_not_offered()
            await asyncio.sleep(BEAT_SECONDS if self._away_since is None else RESEND_SECONDS)
