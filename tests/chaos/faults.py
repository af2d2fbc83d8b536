"""What a run does to a system, whichever broker it has; the brokers' own faults are in `servers.py`."""

from __future__ import annotations

import asyncio
import random
import signal
from dataclasses import dataclass

import psutil

from chaos.servers import HOLD_SECONDS, Fault
from chaos.system import Part, System

RESTART_SECONDS = 0.5
FREEZE_LEASES = 1.6  # a worker is frozen for longer than its lease
REBALANCE_SECONDS = 4.0
SLOW_SECONDS = 0.05  # for each piece of 64 KB


@dataclass
class Faults:
    """Faults that every broker must stand. Each ends when its cause is undone; the run then waits for recovery."""

    system: System
    dice: random.Random
    frozen: float  # seconds

    def _worker(self) -> Part:
        running = [worker for worker in self.system.workers if len(worker.family()) > 1]
        return self.dice.choice(running or self.system.workers)

    async def kill_consumer(self) -> None:
        """SIGKILL of a worker's own process; its children must end with it."""
        worker = self._worker()
        children = worker.family()[1:]
        worker.signal(signal.SIGKILL, family=False)
        _, left = await asyncio.to_thread(psutil.wait_procs, children, 10)
        assert not left, f"children that outlive their worker: {left}"

    async def kill_child(self) -> None:
        """SIGKILL of a child process."""
        children = self._worker().family()[1:]
        if children:
            self.dice.choice(children).kill()

    async def kill_worker(self) -> None:
        """SIGKILL of a worker and its children at once, as when memory runs out or a container is killed."""
        self._worker().signal(signal.SIGKILL, family=True)

    async def freeze_worker(self) -> None:
        """SIGSTOP for longer than a lease; then it goes on, and its late replies must do no harm."""
        worker = self._worker()
        worker.signal(signal.SIGSTOP, family=True)
        await asyncio.sleep(self.frozen)
        worker.signal(signal.SIGCONT, family=True)

    async def end_worker(self) -> None:
        """SIGTERM of a worker, and another one starts."""
        self._worker().signal(signal.SIGTERM, family=False)

    async def come_and_go(self) -> None:
        """A further worker comes and leaves in mid-work: on Kafka two rebalances."""
        further = self.system.worker("further worker")
        further.start()
        await asyncio.sleep(REBALANCE_SECONDS)
        wrong = await further.end()
        assert not wrong, wrong

    async def kill_gateway(self) -> None:
        """SIGKILL of a gateway: its clients see a closed connection, the others see nothing."""
        self.dice.choice(self.system.gateways).signal(signal.SIGKILL, family=True)

    async def restart_broker(self) -> None:
        """SIGKILL of the broker, and it starts again; Redis and Valkey have lost everything."""
        server = self.system.server.server
        await asyncio.to_thread(server.kill)
        await asyncio.sleep(RESTART_SECONDS)
        await asyncio.to_thread(server.start)

    async def cut_gateways(self) -> None:
        """No way between gateways and broker: connections are reset and refused."""
        await self._cut("gateways")

    async def cut_workers(self) -> None:
        """The same between workers and broker."""
        await self._cut("workers")

    async def _cut(self, side: str) -> None:
        proxy = self.system.proxies[side]
        await proxy.cut()
        await asyncio.sleep(HOLD_SECONDS)
        await proxy.open()

    async def silent_to_gateways(self) -> None:
        """A partition between gateways and broker: nothing is answered and nothing is closed, half-open for ever."""
        await self._silence("gateways")

    async def silent_to_workers(self) -> None:
        """The same between workers and broker."""
        await self._silence("workers")

    async def _silence(self, side: str) -> None:
        proxy = self.system.proxies[side]
        proxy.silence()
        await asyncio.sleep(HOLD_SECONDS)
        proxy.speak()

    async def slow_broker(self) -> None:
        """Each piece of what goes to the broker and comes from it takes its time."""
        for proxy in self.system.proxies.values():
            proxy.delay = SLOW_SECONDS
        await asyncio.sleep(HOLD_SECONDS)
        for proxy in self.system.proxies.values():
            proxy.delay = 0.0

    async def full_store(self) -> None:
        """The disk that one gateway saves on is full: 507, and nothing half-written."""
        self.system.fill_store()
        await asyncio.sleep(HOLD_SECONDS)
        self.system.empty_store()

    @property
    def all(self) -> list[Fault]:
        """Each of them once."""
        found = [
            self.kill_consumer,
            self.kill_child,
            self.kill_worker,
            self.freeze_worker,
            self.end_worker,
            self.come_and_go,
            self.kill_gateway,
            self.restart_broker,
            self.cut_gateways,
            self.cut_workers,
            self.silent_to_gateways,
            self.silent_to_workers,
            self.slow_broker,
        ]
        if self.system.mounted:
            found.append(self.full_store)
        return [*found, *self.system.server.faults]
