"""C2: what Safelight asks of a broker, on one screen, and the table from a URL's scheme to the file that speaks to it.

A broker file implements `Broker` and nothing else; neither gateway nor worker knows which one it talks to. All
methods raise `BrokerAwayError` while the broker cannot be reached or will not take commands; callers try again. The
connection comes back by itself. A delivery belongs to the worker that holds it until its lease ends unrenewed.
"""

from __future__ import annotations

import asyncio
import importlib
import re
import socket
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct

from safelight.errors import ConfigurationError
from safelight.message import Job  # noqa: TC001 - msgspec reads the annotations

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from safelight.message import Presence, Quarantined, Reply

__all__ = ["Broker", "Delivery", "Renewed", "each_host", "look_up", "open_broker"]


class Delivery(Struct, frozen=True, eq=False):
    """A job under lease, the attempts that were spent on it, and the broker's own handle of it."""

    job: Job
    starts: int
    handle: Any


class Renewed:
    """Comes out of `replies` when the inbox is there, at first and when it was made anew: send what is unanswered."""


class Broker(Protocol):
    """One end's connection to a broker; a gateway and a worker use their own instances."""

    # Both ends.
    async def connect(self) -> None:
        """Connect once, so that a wrong URL or password is a `ConfigurationError` at start."""

    async def close(self) -> None:
        """Close; a worker's presence is taken back, a gateway's inbox deleted."""

    # The gateway's.
    async def send(self, job: Job) -> None:
        """Put a job on the queue; done when the broker has it. `BrokerFullError` when it has no room."""

    async def withdraw(self, job: Job) -> None:
        """Take back what `send` put on the queue; who holds it learns by its beat. Best effort."""

    def replies(self, inbox: str) -> AsyncIterator[Reply | Renewed]:
        """Replies to this inbox, for ever; the inbox is made, kept from ageing and made anew when it is lost."""

    async def presence(self) -> list[Presence]:
        """The workers that gave a sign of life within the last two leases; with each, `seen` is newer."""

    async def backlog(self) -> int:
        """Jobs that wait or are worked on."""

    # The worker's.
    def jobs(self, worker: str, stopping: Callable[[], bool]) -> AsyncIterator[Delivery]:
        """Jobs for this worker, those whose lease ended first; each `anext` takes at most one. Ends when `stopping`."""

    async def start(self, delivery: Delivery, starts: int) -> None:
        """Write down that attempt number `starts` begins; once it returned, a SIGKILL does not undo it."""

    async def beat(self, held: Sequence[Delivery], presence: Presence) -> list[Delivery]:
        """Renew the leases of `held`, announce `presence`; returns those that are no longer this worker's to do."""

    async def reply(self, delivery: Delivery, reply: Reply) -> None:
        """Reply, acknowledge and delete, in one transaction where the broker can."""

    async def give_back(self, delivery: Delivery, starts: int) -> None:
        """Put a job back on the queue for another worker, with the `starts` that were spent on it so far."""

    async def hand_over(self, delivery: Delivery) -> bool:
        """Give back a job that was not started here, if others begin it before what waits; false: it stays here."""

    async def quarantine(self, delivery: Delivery, record: Quarantined, reply: Reply) -> None:
        """Keep the job aside (bounded in number, bytes and age), reply, acknowledge and delete."""

    # A person's.
    async def quarantined(self) -> list[Quarantined]:
        """What is in quarantine, the oldest first, without images."""

    async def take_out(self, job_id: str) -> tuple[Quarantined, bytes] | None:
        """One quarantined job and its image; it stays until it is dropped."""

    async def drop(self, job_id: str) -> bool:
        """Delete one from quarantine; false if there was none."""


# scheme -> (module, class, extra to install for its driver; "" when it comes with Safelight)
SCHEMES = {
    "redis": ("redis", "RedisBroker", ""),
    "rediss": ("redis", "RedisBroker", ""),
    "valkey": ("redis", "RedisBroker", ""),
    "valkeys": ("redis", "RedisBroker", ""),
    "unix": ("redis", "RedisBroker", ""),
    "amqp": ("rabbitmq", "RabbitBroker", "rabbitmq"),
    "amqps": ("rabbitmq", "RabbitBroker", "rabbitmq"),
    "kafka": ("kafka", "KafkaBroker", "kafka"),
    "kafkas": ("kafka", "KafkaBroker", "kafka"),
}


def each_host(url: str) -> list[str]:
    """A URL for each of the hosts that commas tell apart; by hand, since urllib refuses `a:1,[::1]:2`."""
    found = re.fullmatch(r"(\w+://(?:[^/?#]*@)?)([^/?#]*)(.*)", url, re.DOTALL)
    return [found[1] + host + found[3] for host in found[2].split(",")] if found else [url]


async def look_up(host: str) -> None:
    """Return when `host` is known to have an address; `OSError` if it has none.

    For before a driver connects: uvloop's `create_connection`, when it is cancelled, leaves its own look-up behind,
    whose failure nobody takes and the log shows as a traceback.
    """
    await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)


def open_broker(url: str, *, lease: float) -> Broker:
    """The broker that a URL names, not connected yet; `lease` in seconds."""
    scheme, told, _ = url.partition("://")
    scheme = scheme.lower()
    if not told or scheme not in SCHEMES:
        raise ConfigurationError(f"The broker's URL must begin with one of {', '.join(f'{s}://' for s in SCHEMES)}.")
    module, name, extra = SCHEMES[scheme]
    try:
        broker: Broker = getattr(importlib.import_module(f"safelight.brokers.{module}"), name)(url, lease=lease)
    except ModuleNotFoundError as exc:
        raise ConfigurationError(f"{scheme}:// needs a driver: pip install 'safelight[{extra}]' ({exc}).") from exc
    return broker
