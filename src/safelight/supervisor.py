"""What `safelight up` is: broker, gateway and workers as processes of one machine, started again when they die.

Each process has a session of its own, so that Ctrl-C reaches the supervisor alone and the parts end in their order:
the gateway drains, then the workers, then the broker goes. Each holds one end of a pair of sockets, its lifeline: it
ends when the supervisor's end closes, so that nothing is left behind even by a supervisor that was killed; and the
supervisor sees by its own end that the last process of a part is gone (the broker has one that watches over it).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from safelight.brokers import embedded
from safelight.errors import ConfigurationError
from safelight.gateway.listen import listen
from safelight.settings import environment

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from safelight import settings

__all__ = ["LIFELINE", "Supervisor"]

log = logging.getLogger(__name__)

LIFELINE = "SAFELIGHT_LIFELINE"  # the variable with the number of a process's end of its lifeline
CONFIGURATION_EXIT = 2  # a part that cannot work as it is set up; it has said why
RESTART_SECONDS = 0.5
LONGEST_RESTART_SECONDS = 10.0
DEATHS = 5
DEATHS_SECONDS = 60.0
GRACE_SECONDS = 30.0  # from SIGTERM to SIGKILL
GONE_SECONDS = 5.0  # from a process's end to that of the last one that it left
READY_SECONDS = 0.05


@dataclass(eq=False)
class Part:
    """One process that is kept alive: its name, and the command and variables of each start."""

    name: str
    command: Callable[[int], list[str]]
    variables: dict[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    ending: bool = False
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=DEATHS))

    async def keep(self) -> None:
        """Run it, again and again, until `end`; `ConfigurationError` when that is of no use."""
        delay = 0.0
        while not self.ending:
            started = time.monotonic()
            ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    lifeline = theirs.fileno()
                    self.process = await asyncio.create_subprocess_exec(
                        *self.command(lifeline),
                        stdin=asyncio.subprocess.DEVNULL,
                        env=os.environ | self.variables | {LIFELINE: str(lifeline)},
                        pass_fds=(lifeline,),
                        start_new_session=True,
                    )
                if self.ending:  # `end` was called while it started
                    self.process.terminate()
                code = await self.process.wait()
                await _closed_by_all(ours)
            if self.ending:
                return
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            if code == CONFIGURATION_EXIT:
                raise ConfigurationError(f"The {self.name} cannot run as it is set up; its reason stands above.")
            self.deaths.append(started)
            if len(self.deaths) == DEATHS and time.monotonic() - self.deaths[0] < DEATHS_SECONDS:
                raise ConfigurationError(f"The {self.name} died {DEATHS} times within a minute ({how}).")
            if time.monotonic() - started > DEATHS_SECONDS:
                delay = 0.0
            log.warning("the %s died (%s); starting it again", self.name, how)
            await asyncio.sleep(delay)
            delay = min(max(RESTART_SECONDS, 2 * delay), LONGEST_RESTART_SECONDS)

    async def end(self) -> None:
        """SIGTERM, and SIGKILL to what is still there after `GRACE_SECONDS`."""
        self.ending = True
        if self.process is None or self.process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            self.process.terminate()
        try:
            async with asyncio.timeout(GRACE_SECONDS):
                await self.process.wait()
        except TimeoutError:
            log.warning("the %s did not end in %.0f s; it is killed", self.name, GRACE_SECONDS)
            with suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()


async def _closed_by_all(lifeline: socket.socket) -> None:
    """Close our direction, and wait until no process holds the other end any more."""
    lifeline.setblocking(False)
    with suppress(TimeoutError, OSError):
        lifeline.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(GONE_SECONDS):
            await asyncio.get_running_loop().sock_recv(lifeline, 1)


class Supervisor:
    """The parts of one system. `run` returns when `stop` is set and all of them have ended."""

    def __init__(
        self, broker: settings.Broker, gateway: settings.Gateway, worker: settings.Worker, up: settings.Up
    ) -> None:
        self._broker, self._gateway = broker, gateway
        self._socket: Path | None = None
        variables = environment(broker, gateway, worker)
        if broker.broker is None:
            self._socket = embedded.socket_path(broker.port)
            variables["SAFELIGHT_BROKER"] = embedded.url(broker.port)
        if gateway.drain_delay is None:
            variables["SAFELIGHT_DRAIN_DELAY"] = "0"
        command = [sys.executable, "-m", "safelight"]
        self._stages = [
            [Part("gateway", lambda _: [*command, "gateway"], variables)],
            [Part(f"worker {n}", lambda _: [*command, "worker"], variables) for n in range(1, up.workers + 1)],
        ]
        if self._socket is not None:
            path = self._socket
            self._stages.append([Part("broker", lambda lifeline: embedded.server_command(path, lifeline))])

    async def run(self, stop: asyncio.Event, ready: Callable[[float], None]) -> None:
        """Keep the parts alive until `stop`; `ready` is called once with the seconds that it took."""
        for listening in listen(self._gateway.host, self._broker.port):  # one sentence now, not five deaths
            listening.close()
        failed: ConfigurationError | None = None
        announcing = asyncio.create_task(self._announce(ready), name="readiness")
        keeping = [asyncio.create_task(part.keep(), name=part.name) for stage in self._stages for part in stage]
        stopping = asyncio.create_task(stop.wait(), name="stop")
        await asyncio.wait([stopping, *keeping], return_when=asyncio.FIRST_COMPLETED)
        announcing.cancel()
        stopping.cancel()
        for stage in self._stages:
            await asyncio.gather(*(part.end() for part in stage))
        for result in await asyncio.gather(*keeping, return_exceptions=True):
            if isinstance(result, ConfigurationError):
                failed = failed or result
            elif isinstance(result, BaseException):
                raise result
        if failed:
            raise failed
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)  # a broker that was killed left it
            embedded.log_path(self._socket).unlink(missing_ok=True)

    async def _announce(self, ready: Callable[[float], None]) -> None:
        begun = time.monotonic()
        while not await self._is_ready():  # noqa: ASYNC110 - another process's readiness sets no event
            await asyncio.sleep(READY_SECONDS)
        ready(time.monotonic() - begun)

    async def _is_ready(self) -> bool:
        host = {"localhost": "127.0.0.1", "*": "127.0.0.1"}.get(self._gateway.host, self._gateway.host)
        try:
            reader, writer = await asyncio.open_connection(host, self._broker.port)
        except OSError:
            return False
        try:
            writer.write(b"GET /readyz HTTP/1.0\r\n\r\n")
            return b" 200 " in await reader.readline()
        except OSError:
            return False
        finally:
            writer.close()
