"""What the brokers of both kinds of driver share: how they look up a host."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from safelight.brokers import open_broker
from safelight.conformance import LEASE


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
@pytest.mark.parametrize("url", ["redis://nobody.invalid:6379/0", "amqp://guest:guest@nobody.invalid/"])
async def test_stopping_while_the_host_is_looked_up_leaves_no_error_behind(url: str) -> None:
    loop, left_behind = asyncio.get_running_loop(), list[Any]()
    loop.set_exception_handler(lambda _, context: left_behind.append(context))
    broker = open_broker(url, lease=LEASE)
    for turns in range(5):  # of the event loop, so that it is met at each point of its way
        connecting = asyncio.create_task(broker.connect())
        for _ in range(turns):
            await asyncio.sleep(0)
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)  # the look-up may have been quicker
    after = (loop.getaddrinfo(f"{number}.invalid", 0) for number in range(4))
    await asyncio.gather(*after, return_exceptions=True)  # as many as there are threads for it: those before have ended
    await broker.close()
    gc.collect()
    assert left_behind == []
