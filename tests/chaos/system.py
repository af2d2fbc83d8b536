"""The parts of one run: gateways and workers as processes of the command line, kept alive as a supervisor would."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
from conftest import free_port

from chaos import ledger, skew
from chaos.proxy import Proxy
from chaos.servers import Server
from safelight.supervisor import LIFELINE

STARTED_SECONDS = 60.0
END_SECONDS = 30.0
GATEWAYS, WORKERS, CHILDREN = 2, 3, 2
STORE_BYTES = "4g"
SKEWS = {"worker 1": "+1.5", "worker 2": "-1.5"}  # seconds; less than --max-clock-skew
FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))


class Part:
    """One process, started again whenever it dies; a death that nobody asked for is remembered."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.name = name
        self.process: asyncio.subprocess.Process | None = None
        self.unasked: list[str] = []
        self.killed_at: list[float] = []
        self._command = command
        self._environment = environment
        self._log = log
        self._asked = False
        self._ending = False
        self._keeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._keeper = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        theirs, ours = os.pipe()  # a run that is killed leaves nothing behind: the part ends when this closes
        try:
            await self._again_and_again(theirs)
        finally:
            os.close(theirs)
            os.close(ours)

    async def _again_and_again(self, lifeline: int) -> None:
        while not self._ending:
            with self._log.open("ab") as log:
                self.process = await asyncio.create_subprocess_exec(
                    *self._command,
                    env=os.environ | self._environment | {LIFELINE: str(lifeline)},
                    pass_fds=(lifeline,),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self._asked = False
            code = await self.process.wait()
            if not self._asked:
                self.unasked.append(f"{self.name} ended with {code}")
                await asyncio.sleep(0.5)

    @property
    def running(self) -> psutil.Process | None:
        """The part's own process, while it runs."""
        if self.process is None or self.process.returncode is not None:
            return None
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.process.pid)
        return None

    def family(self) -> list[psutil.Process]:
        """The process and its children."""
        own = self.running
        return [own, *own.children(recursive=True)] if own else []

    def signal(self, number: int, *, family: bool) -> None:
        """Send a signal to the process, or to all of its family at once."""
        if number in {signal.SIGKILL, signal.SIGTERM}:
            self._asked = True
            self.killed_at.append(asyncio.get_running_loop().time())
        own = self.running
        for process in self.family() if family else [own] if own else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    async def end(self) -> str:
        """SIGTERM; what was wrong with its end."""
        self._ending = True
        family = self.family()
        self.signal(signal.SIGTERM, family=False)
        assert self._keeper is not None
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._keeper
        except TimeoutError:
            self.signal(signal.SIGKILL, family=True)
            return f"{self.name} did not end within {END_SECONDS:.0f} s of SIGTERM"
        _, left = await asyncio.to_thread(psutil.wait_procs, family, 5)
        assert self.process is not None
        if left or self.process.returncode != 0:
            return f"{self.name} ended with {self.process.returncode} and left {len(left)} processes"
        return ""


class System:
    """A broker, two gateways and three workers; each side of the broker is behind a proxy of its own."""

    def __init__(self, server: Server, folder: Path, lease: float) -> None:
        self.server = server
        self.folder = folder
        self.proxies = {
            side: Proxy(port, lambda side=side: server.connect(side))  # type: ignore[misc]
            for side, port in server.ports.items()
        }
        module = folder / "operations"
        module.mkdir()
        shutil.copy(ledger.__file__, module / "ledger.py")
        shutil.copy(skew.__file__, module / "sitecustomize.py")
        self.starts = module / "starts"
        self.starts.touch()
        self.gateway_ports = [free_port() for _ in range(GATEWAYS)]
        self.stores = [folder / f"mirrored-{port}" for port in self.gateway_ports]
        self.mounted = self._mount(self.stores[0])
        self._environment = {"PYTHONPATH": str(module), "SAFELIGHT_LEASE": str(lease)}
        self.gateways = [
            self._part(f"gateway {port}", "gateways", ["gateway", "--port", str(port), "--store", str(store)])
            for port, store in zip(self.gateway_ports, self.stores, strict=True)
        ]
        self.workers = [self.worker(f"worker {number}") for number in range(1, WORKERS + 1)]

    @staticmethod
    def _mount(store: Path) -> bool:
        """Give a gateway a disk of its own, which can be full; it takes root."""
        store.mkdir()
        if os.getuid() != 0:
            return False
        command = ["mount", "-t", "tmpfs", "-o", f"size={STORE_BYTES}", "chaos", str(store)]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    def fill_store(self) -> None:
        """Leave no room on the first gateway's disk, but for an image or two that are being saved."""
        used = psutil.disk_usage(str(self.stores[0])).used
        self._resize(str(used + 256 * 1024))

    def empty_store(self) -> None:
        """Undo `fill_store`."""
        self._resize(STORE_BYTES)

    def _resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.stores[0])], check=True)

    def worker(self, name: str) -> Part:
        """One more worker, not started yet."""
        options = ["--concurrency", str(CHILDREN), "--import", "ledger", "--work-limit", "1.5"]
        options += ["--child-memory", str(1 << 30), "--child-jobs", "300"]
        return self._part(name, "workers", ["worker", *options])

    def _part(self, name: str, side: str, words: list[str]) -> Part:
        command = [sys.executable, "-m", "safelight", *words]
        environment = self._environment | {"SAFELIGHT_BROKER": self.server.url(side)}
        if name in SKEWS and FAKETIME and self.server.takes_faketime:
            environment |= {"LD_PRELOAD": str(FAKETIME[0]), "FAKETIME": SKEWS[name], "FAKETIME_DISABLE_SHM": "1"}
            environment |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        elif name in SKEWS:
            environment[skew.VARIABLE] = SKEWS[name]
        return Part(name, command, environment, self.folder / f"{name.replace(' ', '-')}.log")

    async def start(self) -> None:
        await asyncio.to_thread(self.server.server.start)
        for proxy in self.proxies.values():
            await proxy.open()
        for part in [*self.gateways, *self.workers]:
            part.start()
        async with asyncio.timeout(STARTED_SECONDS), httpx.AsyncClient() as client:
            for port in self.gateway_ports:
                while not await self._is_ready(client, port):
                    await asyncio.sleep(0.05)

    @staticmethod
    async def _is_ready(client: httpx.AsyncClient, port: int) -> bool:
        try:
            text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
        except httpx.TransportError:
            return False
        return f"safelight_workers {WORKERS}.0" in text

    async def backlog(self) -> float:
        """What the gateways say that is left on the broker; the largest."""
        async with httpx.AsyncClient() as client:
            texts = [(await client.get(f"http://127.0.0.1:{port}/metrics")).text for port in self.gateway_ports]
        lines = [line for text in texts for line in text.splitlines() if line.startswith("safelight_backlog ")]
        return max(float(line.split()[1]) for line in lines)

    async def end(self) -> list[str]:
        """End the parts in order and the broker last; what was wrong, and what is left."""
        wrong = [await part.end() for part in [*self.gateways, *self.workers]]
        wrong += [found for part in [*self.gateways, *self.workers] for found in part.unasked]
        wrong += await asyncio.to_thread(self.server.leftovers)
        return [sentence for sentence in wrong if sentence]

    async def clear(self) -> None:
        """End whatever still runs, however the run ended."""
        for part in [*self.gateways, *self.workers]:
            part.signal(signal.SIGKILL, family=True)
        for proxy in self.proxies.values():
            await proxy.cut()
        await asyncio.to_thread(self.server.server.stop)
        if self.mounted:
            await asyncio.to_thread(subprocess.run, ["umount", str(self.stores[0])], check=False)
