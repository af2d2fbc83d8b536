"""The command line: the only place that joins the parts."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Column, Table

from safelight import __version__
from safelight.brokers import embedded, open_broker
from safelight.errors import BrokerAwayError, ConfigurationError, SafelightError
from safelight.settings import Broker, Gateway, Query, Up, Worker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from safelight.brokers import Broker as BrokerEnd
    from safelight.message import Quarantined

__all__ = ["main"]

app = App(name="safelight", help="Image work behind a REST API and a message broker.", version=__version__)
quarantine = App(name="quarantine", help="Jobs that were kept aside because every attempt failed.")
app.command(quarantine)

FAILED = 1
CONFIGURATION_EXIT = 2
CONNECT_SECONDS = 3.0

out = Console(soft_wrap=True, highlight=False)


def main() -> None:
    """Run one command; what cannot work is one sentence and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line when it is printed
    logging.basicConfig(format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", level=logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        app()
    except ConfigurationError as exc:
        _fail(exc.detail, CONFIGURATION_EXIT)
    except BaseExceptionGroup as group:
        configuration, rest = group.split(ConfigurationError)
        if rest is not None or configuration is None:
            raise
        _fail(str(_first(configuration)), CONFIGURATION_EXIT)


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _fail(sentence: str, code: int) -> None:
    sys.stderr.write(f"safelight: {sentence}\n")
    raise SystemExit(code)


def _run(work: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run `work` with an event that SIGTERM, Ctrl-C or the end of the supervisor sets; a second Ctrl-C ends at once."""

    async def running() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()

        def told() -> None:
            stop.set()
            loop.remove_signal_handler(signal.SIGINT)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, told)
        if lifeline := os.environ.pop("SAFELIGHT_LIFELINE", None):
            descriptor = int(lifeline)

            def closed() -> None:
                loop.remove_reader(descriptor)
                stop.set()

            loop.add_reader(descriptor, closed)
        await work(stop)

    import uvloop  # noqa: PLC0415 - `query` and `version` start without it

    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(running())


def _broker(broker: Broker) -> BrokerEnd:
    return open_broker(broker.broker or embedded.url(broker.port), lease=broker.lease)


@app.command
def up(
    *,
    broker: Broker = Broker(),
    gateway: Gateway = Gateway(),
    worker: Worker = Worker(),
    up: Up = Up(),
) -> None:
    """Run the whole system on this machine: broker, gateway and workers, started again when they die."""
    from safelight.operations.mirror import turbojpeg  # noqa: PLC0415
    from safelight.supervisor import Supervisor  # noqa: PLC0415

    supervisor = Supervisor(broker, gateway, worker, up)
    out.print(f"JPEGs    {turbojpeg.describe()}")
    out.print(f"broker   {_without_password(broker.broker) if broker.broker else 'embedded Valkey'}")
    out.print(f"images   {Path(gateway.store).absolute()}")

    def ready(seconds: float) -> None:
        out.print(f"ready    after {seconds:.1f} s; {up.workers} worker(s). Try it:\n")
        out.print(f'  curl -F "image=@./test_image.jpg" localhost:{broker.port}/query\n')
        port = "" if broker.port == 8080 else f"PORT={broker.port} "
        out.print(f"Another worker, in a second terminal: {port}make worker. Ctrl-C ends this.")

    _run(lambda stop: supervisor.run(stop, ready))


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


@app.command
def gateway(*, broker: Broker = Broker(), gateway: Gateway = Gateway()) -> None:
    """Run one gateway (C1)."""
    from safelight.gateway.run import run  # noqa: PLC0415 - a worker starts without a web library

    _run(lambda stop: run(_broker(broker), gateway, port=broker.port, lease=broker.lease, stop=stop))


@app.command
def worker(*, broker: Broker = Broker(), worker: Worker = Worker()) -> None:
    """Run one worker (C3); without --broker it joins the system of --port on this machine."""
    from safelight.worker.run import run  # noqa: PLC0415 - a gateway starts without an image library

    _run(lambda stop: run(_broker(broker), worker, lease=broker.lease, stop=stop))


@app.command
def query(
    paths: Annotated[list[str], Parameter(allow_leading_hyphen=True)],
    /,
    *,
    options: Query = Query(),
) -> None:
    """Post images to a gateway, many at a time: files, folders with all below them, - for standard input."""
    from safelight.batch import query as post_all  # noqa: PLC0415 - servers start without an HTTP client

    logging.getLogger("httpx").setLevel(logging.WARNING)
    sys.exit(asyncio.run(post_all(options, paths, out, Console(stderr=True))))


@app.command
def version() -> None:
    """Print the version."""
    out.print(__version__)


def _with_broker(broker: Broker, use: Callable[[BrokerEnd], Awaitable[None]]) -> None:
    """Connect for one command and use it."""

    async def using() -> None:
        end = _broker(broker)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await end.connect()
            await use(end)
        except (TimeoutError, BrokerAwayError):
            raise ConfigurationError(
                "The broker cannot be reached; is the system running, and on this --port?"
            ) from None
        finally:
            await end.close()

    asyncio.run(using())


@app.command
def operations(*, broker: Broker = Broker(), json_: Annotated[bool, Parameter("--json", negative="")] = False) -> None:
    """List what the living workers offer."""

    async def show(end: BrokerEnd) -> None:
        offers: dict[str, list[str]] = {}
        for presence in await end.presence():
            for name in presence.operations:
                offers.setdefault(name, []).append(presence.worker)
        if json_:
            out.print_json(json.dumps(offers))
            return
        table = Table("operation", "workers")
        for name, workers in sorted(offers.items()):
            table.add_row(name, ", ".join(sorted(workers)))
        out.print(table if offers else "No worker is running.")

    _with_broker(broker, show)


@quarantine.command(name="list")
def list_(*, broker: Broker = Broker(), json_: Annotated[bool, Parameter("--json", negative="")] = False) -> None:
    """List the jobs in quarantine, the oldest first."""

    async def show(end: BrokerEnd) -> None:
        records = await end.quarantined()
        if json_:
            out.print_json(json.dumps([_plain(record) for record in records]))
            return
        table = Table(Column("id", no_wrap=True), "when (UTC)", "bytes", "attempts", "worker", "cause")
        for record in records:
            shown = _plain(record)
            table.add_row(record.id, shown["at"], str(record.size), str(record.attempts), record.worker, record.cause)
        out.print(table if records else "The quarantine is empty.")

    _with_broker(broker, show)


def _plain(record: Quarantined) -> dict[str, Any]:
    from datetime import UTC, datetime  # noqa: PLC0415

    return {
        "id": record.id,
        "at": datetime.fromtimestamp(record.at / 1_000, UTC).isoformat(timespec="seconds"),
        "cause": record.cause,
        "attempts": record.attempts,
        "worker": record.worker,
        "size": record.size,
        "operations": [name for name, _ in record.job.operations] if record.job else [],
    }


async def _taken(end: BrokerEnd, job_id: str) -> tuple[Quarantined, bytes]:
    taken = await end.take_out(job_id)
    if taken is None:
        raise ConfigurationError(f"There is no job {job_id} in quarantine.")
    return taken


@quarantine.command
def show(job_id: str, /, *, broker: Broker = Broker()) -> None:
    """Show one job as JSON: its cause, its operations, its size."""

    async def shown(end: BrokerEnd) -> None:
        out.print_json(json.dumps(_plain((await _taken(end, job_id))[0])))

    _with_broker(broker, shown)


@quarantine.command
def save(job_id: str, /, *, out_: Annotated[Path, Parameter("--out")], broker: Broker = Broker()) -> None:
    """Write one job's image to a file."""

    async def saved(end: BrokerEnd) -> None:
        _, image = await _taken(end, job_id)
        out_.write_bytes(image)
        out.print(f"{len(image)} bytes in {out_}")

    _with_broker(broker, saved)


@quarantine.command
def retry(
    job_id: str,
    /,
    *,
    out_: Annotated[Path | None, Parameter("--out")] = None,
    timeout: float = 60.0,
    broker: Broker = Broker(),
) -> None:
    """Send one job anew, wait for it, print its answer; on success it leaves the quarantine."""

    async def retried(end: BrokerEnd) -> None:
        from safelight.gateway.retry import retry as send_anew  # noqa: PLC0415

        record, image = await _taken(end, job_id)
        if record.job is None:
            raise ConfigurationError(f"{job_id} was never a job: {record.cause}. Save its bytes to look at them.")
        try:
            reply = await send_anew(end, record.job, image, timeout=timeout, lease=broker.lease)
        except SafelightError as exc:
            _fail(f"{exc.code}: {exc.detail} It stays in quarantine.", FAILED)
            return
        if out_ is not None and reply.image:
            out_.write_bytes(reply.image)
        await end.drop(job_id)
        out.print_json(json.dumps({"status": "SUCCESS"} | reply.facts))

    _with_broker(broker, retried)


@quarantine.command
def drop(job_id: str, /, *, broker: Broker = Broker()) -> None:
    """Delete one job from quarantine."""

    async def dropped(end: BrokerEnd) -> None:
        if not await end.drop(job_id):
            raise ConfigurationError(f"There is no job {job_id} in quarantine.")

    _with_broker(broker, dropped)
