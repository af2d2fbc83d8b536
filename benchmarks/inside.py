"""Safelight's parts, each driven alone from the inside: python benchmarks/inside.py PART ARGUMENT ...

pool FILE SECONDS           jobs for the worker's children, one child for each core, without a broker
gateway URL FILE SECONDS    the gateway's end of the broker: jobs sent, replies received
worker URL FILE             the worker's end: each job answered at once, with the file's image if it asks for "mirror"
store FOLDER                a result of 89 KB saved again and again, each time under a new name

All that the benchmarks know of the package's insides is here; an empty FILE stands for no image.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop
from loops import ready, told

from safelight.brokers import Renewed, open_broker
from safelight.errors import BrokerAwayError
from safelight.gateway.store import FolderStore
from safelight.message import Job, Presence, Reply, new_id, now_ms
from safelight.process import keep_freed_memory
from safelight.settings import Worker, usable_cores
from safelight.worker.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from safelight.brokers import Broker, Delivery

IN_FLIGHT = 16
WARM_UP_CALLS = 50
LEASE_SECONDS = 5.0
BEAT_SECONDS = 1.0
RETRY_SECONDS = 0.05
JOB_SECONDS = 60.0
SAVED_BYTES = 89 * 1024
SAVE_SECONDS = 0.2  # about 2,000 files


async def loop(call: Callable[[], Awaitable[None]], at_once: int, seconds: float) -> None:
    """`call` again and again, so many at a time; warmed before, told after."""
    for _ in range(WARM_UP_CALLS):
        await call()
    ready()
    spent: list[int] = []
    cpu_begun, begun = time.process_time_ns(), time.perf_counter_ns()

    async def caller() -> None:
        before = begun
        while before - begun < seconds * 1e9:
            await call()
            now = time.perf_counter_ns()
            spent.append(now - before)
            before = now

    await asyncio.gather(*(caller() for _ in range(at_once)))
    told(spent, begun, cpu_begun)


def image_of(path: str) -> bytes:
    return Path(path).read_bytes()


def job(operation: str, image: bytes, inbox: str) -> Job:
    deadline = now_ms() + round(JOB_SECONDS * 1_000)
    return Job(id=new_id(), operations=[(operation, {})], deadline=deadline, reply_to=inbox, image=image)


async def connected(url: str) -> Broker:
    """Our end of a broker that may still be starting."""
    broker = open_broker(url, lease=LEASE_SECONDS)
    while True:
        try:
            await broker.connect()
        except BrokerAwayError:
            await asyncio.sleep(RETRY_SECONDS)
        else:
            return broker


async def pool(path: str, seconds: str) -> None:
    image, options = image_of(path), Worker()
    recycling = {"jobs": options.child_jobs, "resident": options.child_resident}
    async with Pool(usable_cores(), (), options.child_memory, **recycling) as children:

        async def call() -> None:
            async with children.child() as child:
                outcome, mirrored = await child.run(job("mirror", image, "none"), options.work_limit)
            assert outcome.error is None, outcome
            assert mirrored

        await loop(call, 2 * usable_cores(), float(seconds))


async def gateway(url: str, path: str, seconds: str) -> None:
    keep_freed_memory()
    image = image_of(path)
    broker, inbox = await connected(url), new_id()
    waiting: dict[str, asyncio.Future[Reply]] = {}
    listening = asyncio.Event()

    async def listen() -> None:
        async for item in broker.replies(inbox):
            if isinstance(item, Renewed):
                listening.set()
            else:
                waiting.pop(item.id).set_result(item)

    async def call() -> None:
        sent = job("mirror" if image else "size", image, inbox)
        answered = waiting[sent.id] = asyncio.get_running_loop().create_future()
        await broker.send(sent)
        assert len((await answered).image) == len(image)

    task = asyncio.create_task(listen())
    await listening.wait()
    await loop(call, IN_FLIGHT, float(seconds))
    task.cancel()
    await broker.close()


async def worker(url: str, path: str) -> None:
    image, name = image_of(path), "benchmark"
    broker = await connected(url)
    async with asyncio.TaskGroup() as group:
        group.create_task(beat(broker, name))
        async for delivery in broker.jobs(name, lambda: False):
            await broker.start(delivery, 1)
            group.create_task(answer(broker, delivery, name, image))


async def answer(broker: Broker, delivery: Delivery, name: str, image: bytes) -> None:
    asked = [operation for operation, _ in delivery.job.operations]
    mirrored = image if "mirror" in asked else b""
    await broker.reply(delivery, Reply(id=delivery.job.id, worker=name, facts={"size": "82kb"}, image=mirrored))


async def beat(broker: Broker, name: str) -> None:
    while True:
        await broker.beat([], Presence(worker=name, operations=["mirror", "size"], free=1, slots=1))
        await asyncio.sleep(BEAT_SECONDS)


async def store(folder: str) -> None:
    saving, result = FolderStore(folder), os.urandom(SAVED_BYTES)
    await loop(lambda: saving.save(f"{new_id()}.jpg", result), 1, SAVE_SECONDS)


if __name__ == "__main__":
    parts = {"pool": pool, "gateway": gateway, "worker": worker, "store": store}
    uvloop.run(parts[sys.argv[1]](*sys.argv[2:]))
