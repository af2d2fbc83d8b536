"""C3: lease, start, run, reply, acknowledge; and the beat.

Two tasks run beside the jobs: `_take` asks the broker for the next job when there is room for it (each child's job
and one that waits for it, no more: what waits here could start elsewhere; a heavy one takes the place behind it as
well, so that none waits for its end), and `_beat` renews the leases of all that
is held, once a second, and learns what is no longer ours to do. On SIGTERM taking stops, what waits is handed over to
workers that begin it sooner, and the rest is finished.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from safelight.errors import BrokerAwayError, DeadlinePassedError, QuarantinedError, SafelightError
from safelight.message import Presence, Quarantined, Reply, now_ms
from safelight.worker.pool import ChildDiedError, OverrunError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from safelight import settings
    from safelight.brokers import Broker, Delivery
    from safelight.message import Job
    from safelight.worker.pool import Child, Pool

__all__ = ["Consumer"]

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
BEATS_PER_LEASE = 3  # so that one may be late
RETRY_SECONDS = 0.1
WAITING_PER_CHILD = 1  # so that a child which ends a job finds the next one here


@dataclass(eq=False)
class _Held:
    """A job of this worker, and where it stands."""

    delivery: Delivery
    task: asyncio.Task[None] | None = None
    waits: bool = False  # for a child
    offered: bool = False  # to other workers, after the stop, and not taken
    withdrawn: bool = False
    places: int = 1  # among those that are worked on or wait for it


class Consumer:
    """One worker: `run` until `stop` is called.

    `pool` is entered and warm; `lease` is the broker's, in seconds; `alive` is called with each beat.
    """

    def __init__(
        self,
        broker: Broker,
        pool: Pool,
        name: str,
        options: settings.Worker,
        *,
        lease: float,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._broker = broker
        self._pool = pool
        self._name = name
        self._options = options
        self._beat_seconds = min(BEAT_SECONDS, lease / BEATS_PER_LEASE)
        self._alive = alive
        self._held: dict[Any, _Held] = {}
        self._slots = options.concurrency * (1 + WAITING_PER_CHILD)
        self._room = asyncio.Semaphore(self._slots)
        self._stopping = False

    def stop(self) -> None:
        """Take no more, hand over what waits if others begin it sooner, finish the rest."""
        self._stopping = True
        self._offer()

    def _offer(self) -> None:
        for held in self._held.values():
            if held.waits and held.task is not None:
                held.task.cancel()

    async def run(self) -> None:
        """Work until stopped."""
        async with asyncio.TaskGroup() as group:
            beat = group.create_task(self._beat(), name="beat")
            broken = group.create_task(self._watch_pool(), name="pool")
            async with asyncio.TaskGroup() as jobs:
                await self._take(jobs)
            beat.cancel()
            broken.cancel()

    async def _watch_pool(self) -> None:
        await asyncio.shield(self._pool.broken)

    async def _take(self, group: asyncio.TaskGroup) -> None:
        jobs = self._broker.jobs(self._name, lambda: self._stopping)
        while True:
            await self._room.acquire()
            delivery = await anext(jobs, None)
            if delivery is None:
                return
            if delivery.handle in self._held:  # we were frozen for longer than a lease, and took over from ourselves
                self._room.release()
                continue
            held = self._held[delivery.handle] = _Held(delivery)
            held.task = group.create_task(self._handle(held), name=f"job {delivery.job.id}")
            if delivery.job.heavy:
                await self._take_second_place(held)

    async def _take_second_place(self, held: _Held) -> None:
        """Before the next job is asked for: a light one would wait behind this, and could start elsewhere."""
        await self._room.acquire()
        if held.places:
            held.places += 1
        else:  # it ended meanwhile
            self._room.release()

    async def _handle(self, held: _Held) -> None:
        try:
            while not await self._ended(held):
                held.offered = True
        except BrokerAwayError:
            log.warning("job %s is left to its lease: the broker is away", held.delivery.job.id)
        finally:
            self._held.pop(held.delivery.handle, None)
            self._leave_places(held)

    async def _ended(self, held: _Held) -> bool:
        """Do it; false if it was to be handed over instead, and nobody would begin it sooner."""
        try:
            await self._do(held)
        except asyncio.CancelledError:
            held.waits = False
            if held.withdrawn:
                log.info("job %s was withdrawn", held.delivery.job.id)
            elif self._stopping:
                if held.task is not None:
                    held.task.uncancel()  # a driver may ask whether its caller was cancelled, and do nothing
                return await self._broker.hand_over(held.delivery)
            else:
                raise
        return True

    def _leave_places(self, held: _Held) -> None:
        for _ in range(held.places):
            self._room.release()
        held.places = 0

    async def _do(self, held: _Held) -> None:
        delivery, job = held.delivery, held.delivery.job
        if self._late(delivery):
            return await self._reply(held, self._refusal(job, DeadlinePassedError()))
        if unknown := [name for name, _ in job.operations if name not in self._pool.operations]:
            log.debug("job %s goes back: this worker does not offer %s", job.id, ", ".join(unknown))
            await self._broker.give_back(delivery, delivery.starts)
            del self._held[delivery.handle]
            return await asyncio.sleep(BEAT_SECONDS)  # its place stays taken, so that another worker takes the job
        starts, cause = delivery.starts, f"a worker was killed while it worked on it, {delivery.starts} times"
        while starts < self._options.attempts:
            if self._stopping and starts == delivery.starts and not held.offered:
                raise asyncio.CancelledError  # what was handed out meanwhile is offered before what runs has ended
            held.waits = starts == delivery.starts
            async with self._pool.child() as child:
                held.waits = False
                starts += 1
                ended = await self._attempt(delivery, child, starts)
            if isinstance(ended, Reply):
                await asyncio.sleep(0)  # the job that waits for the child goes first: it must not idle meanwhile
                return await self._reply(held, ended)
            cause = ended
            log.warning("job %s, attempt %d of %d: %s", job.id, starts, self._options.attempts, cause)
        return await self._quarantine(held, starts, cause)

    async def _attempt(self, delivery: Delivery, child: Child, starts: int) -> Reply | str:
        """Run the job once: its reply, or the cause that it must be started again for."""
        job = delivery.job
        if self._late(delivery):
            return self._refusal(job, DeadlinePassedError())
        await self._broker.start(delivery, starts)
        until_deadline = (job.deadline - now_ms()) / 1_000 + self._options.max_clock_skew
        try:
            outcome, image = await child.run(job, min(self._options.work_limit, until_deadline))
        except OverrunError:
            if until_deadline <= self._options.work_limit:
                return self._refusal(job, DeadlinePassedError())
            return f"it was still at work after {self._options.work_limit:g} s"
        except ChildDiedError as exc:
            return exc.cause
        if outcome.failure is not None:
            return outcome.failure
        return Reply(
            id=job.id,
            worker=self._name,
            work=outcome.work,
            facts=outcome.facts,
            notes=outcome.notes,
            error=outcome.error,
            detail=outcome.detail,
            image=image,
        )

    def _late(self, delivery: Delivery) -> bool:
        return now_ms() > delivery.job.deadline + self._options.max_clock_skew * 1_000

    def _refusal(self, job: Job, error: SafelightError) -> Reply:
        return Reply(id=job.id, worker=self._name, error=error.code, detail=error.detail)

    async def _reply(self, held: _Held, reply: Reply) -> None:
        await self._patiently(held, lambda: self._broker.reply(held.delivery, reply))

    async def _quarantine(self, held: _Held, attempts: int, cause: str) -> None:
        job = held.delivery.job
        reply = self._refusal(job, QuarantinedError())
        if job.canary:  # what is kept is for people to look at; in an hour it would be nothing but these
            log.error("the canary %s failed after %d attempts: %s", job.id, attempts, cause)
            return await self._reply(held, reply)
        log.error("job %s goes to quarantine after %d attempts: %s", job.id, attempts, cause)
        record = Quarantined(
            id=job.id,
            cause=cause,
            attempts=attempts,
            worker=self._name,
            at=now_ms(),
            size=len(job.image),
            job=replace(job, image=b""),
        )
        return await self._patiently(held, lambda: self._broker.quarantine(held.delivery, record, reply))

    async def _patiently(self, held: _Held, send: Callable[[], Awaitable[None]]) -> None:
        """Send what is done; while the broker is away, try again until nobody waits for it any more.

        Its place is free at once, so that the broker is asked for the next job together with this answer; an answer
        that has to be sent again takes a place anew.
        """
        while True:
            self._leave_places(held)
            try:
                return await send()
            except BrokerAwayError:
                if self._late(held.delivery):
                    raise
                await asyncio.sleep(RETRY_SECONDS)
                await self._room.acquire()
                held.places = 1

    async def _beat(self) -> None:
        away = False
        while True:
            presence = Presence(
                worker=self._name,
                operations=self._pool.operations,
                free=0 if self._stopping else max(0, self._slots - sum(held.places for held in self._held.values())),
                slots=self._slots,
            )
            try:
                lost = await self._broker.beat([held.delivery for held in self._held.values()], presence)
            except BrokerAwayError:
                if not away:
                    log.warning("the broker is away; waiting for it")
                away = True
            else:
                if away:
                    log.info("the broker is back")
                away = False
                for delivery in lost:
                    held = self._held.get(delivery.handle)
                    if held is not None and held.task is not None:
                        held.withdrawn = True
                        held.task.cancel()
                if self._stopping:
                    self._offer()  # others may have room by now
            self._alive()
            await asyncio.sleep(self._beat_seconds)
