"""Baseline: FastAPI and a Taskiq task over Redis; the endpoint waits for the result, then saves it.

The broker is the one that taskiq-redis puts first: streams, with acknowledgement. (A worker on its lists fails once it
was idle for the 5 s of redis-py's `socket_timeout`.) The task is synchronous and CPU-bound, so it runs in a process
pool, by the rule of thumb in Taskiq's guide ("CLI"). Messages and results are dumped as JSON, so bytes go as Base64.
"""

import os
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, UploadFile
from fastapi.concurrency import run_in_threadpool
from pillow_mirror import answer, mirrored, save
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

TIMEOUT_SECONDS = 60
CHECK_SECONDS = 0.05  # results are polled for; the default of 0.2 s would be most of a request's time
STREAM_ENTRIES = 1_000  # acknowledged ones stay in the stream until it is trimmed to about this

results = RedisAsyncResultBackend(os.environ["REDIS_URL"], keep_results=False, result_ex_time=TIMEOUT_SECONDS)
broker = RedisStreamBroker(os.environ["REDIS_URL"], maxlen=STREAM_ENTRIES).with_result_backend(results)


@broker.task
def mirror(image: str) -> str:
    return b64encode(mirrored(b64decode(image))).decode()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    await broker.startup()
    yield
    await broker.shutdown()


app = FastAPI(lifespan=lifespan)


@app.post("/query")
async def query(image: UploadFile) -> dict[str, str]:
    data = await image.read()
    task = await mirror.kiq(b64encode(data).decode())
    result = await task.wait_result(check_interval=CHECK_SECONDS, timeout=TIMEOUT_SECONDS)
    result.raise_for_error()
    await run_in_threadpool(save, b64decode(result.return_value))
    return answer(data)
