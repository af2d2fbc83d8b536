"""Every option once: its name, default, unit and help. Flags and `SAFELIGHT_*` variables come from here.

A field named `work_limit` is the flag `--work-limit` and the variable `SAFELIGHT_WORK_LIMIT`. `environment` is how the
supervisor hands settings to the processes that it starts (variables, so that a broker's password never shows in a
list of processes).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from cyclopts import Parameter
from cyclopts.validators import Number

__all__ = ["Broker", "Gateway", "Query", "Up", "Worker", "environment", "usable_cores"]

MEGABYTE = 1024 * 1024

S = TypeVar("S")


def option(
    default: Any,
    help: str,  # noqa: A002 - the word that users know
    *,
    unit: str = "",
    least: float | None = None,
    most: float | None = None,
    name: str = "",
    also: str = "",
) -> Any:
    """A field with its help, its unit and its bounds; a `name` that Python does not allow; a variable `also`."""
    told = {"help": help, "unit": unit, "bounds": Number(gte=least, lte=most), "name": name, "also": also}
    return dataclasses.field(default=default, metadata=told)


def _flags(section: type[S]) -> type[S]:
    """Let the command line read a dataclass's fields as flags and variables."""
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        told = field.metadata
        parameter = Parameter(
            name=f"--{_name(field)}".replace("_", "-"),
            help=f"{told['help']} [{told['unit']}]" if told["unit"] else told["help"],
            env_var=tuple(filter(None, (_variable(field), told["also"]))),
            negative="",
            validator=told["bounds"] if hints[field.name] in (int, float, float | None) else None,
        )
        section.__annotations__[field.name] = Annotated[hints[field.name], parameter]
    return Parameter(name="*")(section)


def _name(field: dataclasses.Field[Any]) -> str:
    return field.metadata["name"] or field.name


def _variable(field: dataclasses.Field[Any]) -> str:
    return f"SAFELIGHT_{_name(field).upper()}"


def usable_cores() -> int:
    """Cores that this process may use: its affinity and its cgroup's CPU quota, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, round(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2 here, or no quota in it
    return max(1, cores)


@_flags
@dataclasses.dataclass(frozen=True)
class Broker:
    """Where the broker is; gateway and workers that agree on this belong together."""

    broker: str | None = option(
        None,
        "URL of the broker (redis://, rediss://, valkey://, unix://, amqp://, amqps://, kafka://, kafkas://). "
        "Without it: the embedded one of --port's system.",
    )
    port: int = option(
        8080, "Port of the gateway; it also names the embedded broker's socket.", least=1, most=65_535, also="PORT"
    )
    lease: float = option(
        5.0, "A job comes back to the queue when its worker gave no sign for this long.", unit="s", least=0.1
    )


@_flags
@dataclasses.dataclass(frozen=True)
class Gateway:
    """C1."""

    host: str = option("localhost", 'Address to listen on; "localhost" is both loopbacks, "*" is every address.')
    store: str = option("./mirrored", "Folder in which resulting images are saved.")
    max_upload: int = option(32 * MEGABYTE, "Largest image that is taken.", unit="bytes", least=1)
    max_jobs: int = option(512, "Requests in flight; more are refused with 503.", least=1)
    max_bytes: int = option(256 * MEGABYTE, "Image bytes in flight; more are refused with 503.", unit="bytes", least=1)
    max_pixels: int = option(
        4_000_000_000,
        "Pixels in flight, as the images' headers tell them; more are refused with 503.",
        unit="pixels",
        least=1,
    )
    body_timeout: float = option(
        10.0,
        "Time that a request's body may take, besides one second for each 64 KB that arrived.",
        unit="s",
        least=0.1,
    )
    drain_delay: float | None = option(
        None,
        "On SIGTERM, go on accepting for this long after /readyz turned 503. [default: 5, in `up` 0]",
        unit="s",
        least=0,
    )
    canary_interval: float = option(
        10.0,
        "Time from one canary to the next: a tiny job through broker and worker, which shows in /metrics alone "
        "(0: none).",
        unit="s",
        least=0,
    )


@_flags
@dataclasses.dataclass(frozen=True)
class Worker:
    """C3."""

    concurrency: int = option(1, "Child processes of each worker, so many images at a time.", least=1)
    imports: tuple[str, ...] = option(
        (), "Module whose public functions become operations; may be given again.", name="import"
    )
    attempts: int = option(3, "Starts of a job before it is quarantined.", least=1)
    work_limit: float = option(10.0, "Time that one job may take in the child.", unit="s", least=0.1)
    max_clock_skew: float = option(
        2.0, "A job is called late only this long after its deadline, for clocks that disagree.", unit="s", least=0
    )
    child_memory: int = option(
        2048 * MEGABYTE, "Address space of a child process (0: no limit).", unit="bytes", least=0
    )
    child_jobs: int = option(50_000, "Jobs after which a child process is recycled (0: never).", least=0)
    child_resident: int = option(
        512 * MEGABYTE,  # a child in good health kept 337 MB at most, and the largest picture needs 1.3 GB beside it
        "Resident memory of a child process after a job, above which it is recycled (0: no bound; Linux only).",
        unit="bytes",
        least=0,
    )
    beat_file: str | None = option(
        None, "File that a living worker touches about once a second, for a health check by its age."
    )


@_flags
@dataclasses.dataclass(frozen=True)
class Up:
    """The whole system on one machine."""

    workers: int = option(min(usable_cores(), 8), "Worker processes. [default: usable cores, at most 8]", least=0)


@_flags
@dataclasses.dataclass(frozen=True)
class Query:
    """Images posted from the command line."""

    url: str | None = option(None, "Address of the gateway. [default: http://localhost:PORT]")
    port: int = option(
        Broker.port, "Port of a gateway on this machine, when no --url is given.", least=1, most=65535, also="PORT"
    )
    operations: str | None = option(None, "Operations in order, with commas between them. [default: the gateway's]")
    timeout: float = option(60.0, "Time for each image, with all its tries.", unit="s", least=0.01)
    at_once: int = option(8, "Requests in flight.", least=1)
    out: str | None = option(None, "Folder for the resulting images, named as the given ones; no file is overwritten.")
    json: bool = option(default=False, help="Print a line of JSON for each image as it ends, instead of a table.")


def environment(*settings: Any) -> dict[str, str]:
    """The `SAFELIGHT_*` variables that make the same settings again in a process that is started with them."""
    result: dict[str, str] = {}
    for section in settings:
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if value is not None and value != ():
                result[_variable(field)] = " ".join(value) if isinstance(value, tuple) else str(value)
    return result
