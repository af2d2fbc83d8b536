"""A TCP port before a broker, which can be cut off, fall silent, or be slow; one for each side of the broker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
PIECE = 64 * 1024


class Proxy:
    """`connect` opens a connection to the broker."""

    def __init__(self, port: int, connect: Callable[[], Awaitable[Streams]]) -> None:
        self.port = port
        self.delay = 0.0  # seconds for each piece
        self._connect = connect
        self._server: asyncio.Server | None = None
        self._silences: set[asyncio.Event] = set()
        self._silent = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def cut(self) -> None:
        """Refuse new connections and reset those that there are, until `open`."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def silence(self) -> None:
        """Take and give nothing more, and close nothing: what is connected now stays half open for ever."""
        self._silent = True
        for silence in self._silences:
            silence.set()

    def speak(self) -> None:
        """Let new connections through again."""
        self._silent = False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        silence = asyncio.Event()
        self._silences.add(silence)
        if self._silent:
            silence.set()
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):  # no broker is there; or it was cut off
                await self._through(reader, writer, silence)
                writer.close()
        finally:
            self._silences.discard(silence)
            self._tasks.discard(task)
            if not writer.is_closing():
                writer.transport.abort()

    async def _through(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, silence: asyncio.Event
    ) -> None:
        if silence.is_set():
            await asyncio.Event().wait()
        up_reader, up_writer = await self._connect()
        try:
            pumps = [
                asyncio.create_task(self._pump(reader, up_writer, silence)),
                asyncio.create_task(self._pump(up_reader, writer, silence)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except asyncio.CancelledError:
            up_writer.transport.abort()
            raise
        up_writer.close()  # what was taken before the end still arrives

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, silence: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(PIECE):
                if silence.is_set():
                    break
                if self.delay:
                    await asyncio.sleep(self.delay)
                target.write(data)
                await target.drain()
        if silence.is_set():
            await asyncio.Event().wait()
