"""The gateway's event loop is never busy for long with one thing: whoever comes next is heard within milliseconds."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest
import uvloop
from conftest import free_port, wait_until

from safelight import settings
from safelight.brokers import embedded, open_broker
from safelight.gateway.run import run

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import System

MOST_MS = 5.0
REQUESTS = 120


class Watched:
    """A gateway on the broker of a running system, in a thread of this process, and how long its loop was busy.

    A task of its own runs once in each turn of the loop. What counts is the thread's CPU time from one turn to the
    next: waiting for a core that others have is not the gateway's fault.
    """

    def __init__(self, store: Path, broker_url: str) -> None:
        self.port = free_port()
        self.longest_ms = 0.0
        self.turns = 0
        self._options = settings.Gateway(host="127.0.0.1", store=str(store), drain_delay=0.0)
        self._broker_url = broker_url
        self._thread = threading.Thread(target=lambda: uvloop.run(self._run()))

    def __enter__(self) -> Watched:
        self._thread.start()
        wait_until(lambda: self.status() == 200)
        self.longest_ms = 0.0  # what came before is the start
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    def status(self) -> int:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/readyz").status_code
        except httpx.TransportError:
            return 0

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        watch = asyncio.create_task(self._watch())
        broker = open_broker(self._broker_url, lease=5.0)
        await run(broker, self._options, port=self.port, lease=5.0, stop=self._stop)
        watch.cancel()

    async def _watch(self) -> None:
        before = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            self.longest_ms = max(self.longest_ms, (now - before) * 1_000)
            self.turns += 1
            before = now


@pytest.mark.parametrize("length", [82_000, 3_000_000], ids=["82 KB", "3 MB"])
def test_the_event_loop_is_never_busy_for_five_milliseconds(
    length: int, shared_system: System, image: bytes, tmp_path: Path
) -> None:
    picture = image + os.urandom(length - len(image)) if length > len(image) else image
    with Watched(tmp_path / "store", embedded.url(shared_system.port)) as gateway:

        def post(_: int) -> int:
            url = f"http://127.0.0.1:{gateway.port}/query"
            return httpx.post(url, files={"image": picture}, timeout=60).status_code

        with ThreadPoolExecutor(8) as clients:
            assert set(clients.map(post, range(REQUESTS))) == {200}
    assert gateway.turns > REQUESTS
    assert gateway.longest_ms < MOST_MS
