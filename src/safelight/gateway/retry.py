"""C1: one job out of quarantine, sent anew by a person: a gateway for a single job, with an inbox of its own."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from msgspec.structs import replace

from safelight.errors import from_code
from safelight.gateway.dispatch import Dispatch
from safelight.gateway.workers import Workers
from safelight.message import new_id, now_ms

if TYPE_CHECKING:
    from safelight.brokers import Broker
    from safelight.message import Job, Reply

__all__ = ["retry"]


async def retry(broker: Broker, job: Job, image: bytes, *, timeout: float, lease: float) -> Reply:
    """The reply to the job, all its attempts before it again; its failure is raised as its `SafelightError`."""
    dispatch = Dispatch(broker, new_id(), Workers(window=2 * lease))
    anew = replace(job, image=image, starts=0, reply_to=dispatch.inbox, deadline=now_ms() + round(timeout * 1_000))
    running = asyncio.create_task(dispatch.run(), name="dispatch")
    try:
        reply = await dispatch.ask(anew, timeout)
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
    if reply.error is not None:
        raise from_code(reply.error, reply.detail)
    return reply
