"""A gateway that watches its own event loop: python watched.py BROKER_URL STORE PORT, from SIGUSR1 until SIGTERM.

It prints a line when it begins. A task of its own runs once in each turn of the loop. What counts is the CPU time from
one turn to the next: waiting for a core that others have is not the gateway's fault. At the end it prints turns and the
longest in milliseconds.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time

import uvloop

from safelight import settings
from safelight.brokers import open_broker
from safelight.gateway.run import run

LEASE_SECONDS = 5.0


class Watch:
    turns = 0
    longest_ms = 0.0

    async def run(self, begin: asyncio.Event) -> None:
        await begin.wait()
        sys.stdout.write("watching\n")
        sys.stdout.flush()
        before = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            self.longest_ms = max(self.longest_ms, (now - before) * 1_000)
            self.turns += 1
            before = now


async def main(url: str, store: str, port: int) -> None:
    begin, stop, watch = asyncio.Event(), asyncio.Event(), Watch()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, begin.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    watching = asyncio.create_task(watch.run(begin))
    options = settings.Gateway(host="127.0.0.1", store=store, drain_delay=0.0)
    await run(open_broker(url, lease=LEASE_SECONDS), options, port=port, lease=LEASE_SECONDS, stop=stop)
    watching.cancel()
    sys.stdout.write(f"{watch.turns} {watch.longest_ms}\n")


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
