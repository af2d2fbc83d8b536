"""Baseline: FastAPI and FastStream's RPC over Redis; the endpoint waits for the reply, then saves it.

Requests go over a list, which each worker takes from in turn (a channel would hand every worker every image), replies
over Pub/Sub as FastStream has it. The subscriber is synchronous, so it runs in a thread; bytes travel as they are.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, UploadFile
from fastapi.concurrency import run_in_threadpool
from faststream import FastStream
from faststream.redis import RedisBroker
from pillow_mirror import answer, mirrored, save

TIMEOUT_SECONDS = 60
CONNECTIONS = 1_000  # each request waits on one of its own; redis-py's pool refuses more than 100 by default

broker = RedisBroker(os.environ["REDIS_URL"], max_connections=CONNECTIONS)
worker = FastStream(broker)


@broker.subscriber(list="images")
def mirror(image: bytes) -> bytes:
    return mirrored(image)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    await broker.connect()  # `start` would consume images as well
    yield
    await broker.stop()


app = FastAPI(lifespan=lifespan)


@app.post("/query")
async def query(image: UploadFile) -> dict[str, str]:
    data = await image.read()
    reply = await broker.request(data, list="images", timeout=TIMEOUT_SECONDS)
    await run_in_threadpool(save, await reply.decode())
    return answer(data)
