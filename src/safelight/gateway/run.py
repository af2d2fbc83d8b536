"""C1: one gateway process, from its settings to its end."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from safelight.errors import BrokerAwayError
from safelight.gateway.admission import Admission
from safelight.gateway.app import App
from safelight.gateway.canary import Canary
from safelight.gateway.dispatch import Dispatch
from safelight.gateway.listen import listen
from safelight.gateway.metrics import Metrics
from safelight.gateway.server import Server
from safelight.gateway.store import FolderStore
from safelight.gateway.workers import Workers
from safelight.message import new_id
from safelight.process import freeze_start_up, keep_freed_memory, work_in_batches

if TYPE_CHECKING:
    from safelight import settings
    from safelight.brokers import Broker

__all__ = ["run"]

log = logging.getLogger(__name__)

DRAIN_DELAY_SECONDS = 5.0
CONNECT_SECONDS = 0.5


async def run(broker: Broker, options: settings.Gateway, *, port: int, lease: float, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, then drain. `ConfigurationError` for what cannot work."""
    keep_freed_memory()
    work_in_batches()
    sockets = listen(options.host, port)
    async with AsyncExitStack() as stack:
        for listening in sockets:
            stack.callback(listening.close)
        stack.push_async_callback(broker.close)
        store = FolderStore(options.store)
        workers = Workers(window=2 * lease)
        dispatch = Dispatch(broker, new_id(), workers)
        admission = Admission(jobs=options.max_jobs, image_bytes=options.max_bytes, pixels=options.max_pixels)
        metrics = Metrics(admission, dispatch, workers)
        canary = Canary(dispatch, workers, metrics, interval=options.canary_interval)
        app = App(
            options,
            dispatch=dispatch,
            workers=workers,
            admission=admission,
            store=store,
            metrics=metrics,
        )
        server = Server(app)
        freeze_start_up()
        async with asyncio.TaskGroup() as group:
            testing = group.create_task(canary.run(), name="canary")
            background = [
                group.create_task(_connect(broker), name="first connection"),
                group.create_task(dispatch.run(), name="dispatch"),
                group.create_task(_drain(server, stop, options.drain_delay, testing), name="drain"),
            ]
            log.info("listening on %s port %d, saving in %s", options.host, port, store.folder)
            await server.serve(sockets=sockets)
            for task in (testing, *background):
                task.cancel()


async def _connect(broker: Broker) -> None:
    """Meet the broker: a wrong password or an unfit server is named at start; one that is away is waited for."""
    while True:
        try:
            return await broker.connect()
        except BrokerAwayError:
            await asyncio.sleep(CONNECT_SECONDS)


async def _drain(server: Server, stop: asyncio.Event, delay: float | None, canary: asyncio.Task[None]) -> None:
    await stop.wait()
    canary.cancel()  # what ends is not to be waited for, nor a failure to be told of
    await server.drain(DRAIN_DELAY_SECONDS if delay is None else delay)
