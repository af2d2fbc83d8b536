"""C3: one worker process, from its settings to its end."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safelight.brokers.embedded import runtime_folder
from safelight.errors import BrokerAwayError, ConfigurationError
from safelight.process import freeze_start_up, keep_freed_memory, work_in_batches
from safelight.worker.consumer import Consumer
from safelight.worker.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Callable

    from safelight import settings
    from safelight.brokers import Broker

__all__ = ["run"]

log = logging.getLogger(__name__)

CONNECT_SECONDS = 0.2
SLOTS = 1_000


async def run(broker: Broker, options: settings.Worker, *, lease: float, stop: asyncio.Event) -> None:
    """Work until `stop` is set, then finish or give back what is held. `ConfigurationError` for what cannot work."""
    keep_freed_memory()
    work_in_batches()
    async with AsyncExitStack() as stack:
        name, lock = worker_name()
        if lock >= 0:
            stack.callback(os.close, lock)
        stack.push_async_callback(broker.close)
        alive = _sign_of_life(options.beat_file)
        recycling = {"jobs": options.child_jobs, "resident": options.child_resident}
        children = Pool(options.concurrency, options.imports, options.child_memory, **recycling)
        pool = await stack.enter_async_context(children)
        if not await _connect(broker, stop, alive):
            return
        consumer = Consumer(broker, pool, name, options, lease=lease, alive=alive)
        freeze_start_up()
        log.info("%s offers %s", name, ", ".join(pool.operations))
        async with asyncio.TaskGroup() as group:
            stopping = group.create_task(_stop(consumer, stop), name="stop")
            await consumer.run()
            stopping.cancel()
        log.info("%s has ended", name)


async def _stop(consumer: Consumer, stop: asyncio.Event) -> None:
    await stop.wait()
    consumer.stop()


def _sign_of_life(beat_file: str | None) -> Callable[[], None]:
    """What touches the file. A worker that waits for its broker is alive: starting it anew would not help it."""
    if beat_file is None:
        return lambda: None
    path = Path(beat_file)
    try:
        path.touch()
    except OSError as exc:
        raise ConfigurationError(f"The beat file {path} cannot be written: {exc.strerror}.") from exc

    def alive() -> None:
        with suppress(OSError):  # then it ages, and whoever looks at it sees that
            path.touch()

    return alive


async def _connect(broker: Broker, stop: asyncio.Event, alive: Callable[[], None]) -> bool:
    """Wait for the broker; false if told to stop first."""
    told = False
    while not stop.is_set():
        alive()
        try:
            await broker.connect()
        except BrokerAwayError:
            if not told:
                log.warning("waiting for the broker; is the system running (`make up`), and on this --port?")
                told = True
            with suppress(TimeoutError):
                async with asyncio.timeout(CONNECT_SECONDS):
                    await stop.wait()
        else:
            return True
    return False


def worker_name() -> tuple[str, int]:
    """A name that the next worker in this place has again (host and slot), and the lock that holds the slot.

    A broker may remember a dead worker's name for a while; with new names at each start a list of them would grow.
    """
    host = socket.gethostname()
    with suppress(ConfigurationError, OSError):
        folder = runtime_folder()
        for slot in range(SLOTS):
            lock = os.open(folder / f"worker-{slot}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
            else:
                return f"{host}-{slot}", lock
    return f"{host}-pid{os.getpid()}", -1
