"""What travels over the broker, and its wire form. No I/O here.

A message is a **header** (UTF-8 JSON with `"v": 1`; unknown members are ignored, so newer senders may add some) and
a **body** (the image's bytes, as they are; empty when there is none). Each broker's file says where it puts the two.
Nothing is ever pickled. A worker in another language needs this page only:

=========== ============================================================================================
message     header
=========== ============================================================================================
Job         `id` (UUID), `operations` ([[name, {parameters}], ...]), `deadline` (Unix milliseconds),
            `reply_to` (an inbox), `starts` (attempts already spent), `pixels` (as the image's header tells them; 0,
            as is an absent one: unknown), `traceparent` (W3C), `canary` (true of one that is not kept in
            quarantine); body: the image
Reply       `id` (the job's), `worker`, `work` (microseconds in the operations), `facts` (members of the answer),
            `notes` (response headers), or `error` (a code of `errors.py`) with `detail`; body: the resulting image
Presence    `worker`, `operations`, `free` and `slots` (jobs held at once: for each child
            one that runs and one that waits), `seen` (Unix milliseconds on the broker's clock)
Quarantined `id`, `cause`, `attempts`, `worker`, `at` (Unix milliseconds), `size` (bytes), `job` (its header, or
            nothing when the message was not a job); body: the image
=========== ============================================================================================
"""

from __future__ import annotations

import os
import time
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from safelight.errors import MalformedMessageError
from safelight.formats import predicted_seconds

__all__ = ["Job", "Presence", "Quarantined", "Reply", "decode", "encode", "new_id", "now_ms"]

HEAVY_SECONDS = 1.0  # what a person who waits for a small picture would notice

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Count = Annotated[int, Meta(ge=0)]


class _Message(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="v", tag=1):
    """What all messages share: the version of the wire form."""


class Job(_Message, frozen=True, kw_only=True):
    """Work for one image. `starts` counts the attempts that were spent before the job was put on the queue again."""

    id: Name
    operations: Annotated[list[tuple[Name, dict[str, Any]]], Meta(min_length=1, max_length=32)]
    deadline: int
    reply_to: Name
    starts: Count = 0
    pixels: Count = 0
    traceparent: str | None = None
    canary: bool = False
    image: bytes = b""

    @property
    def heavy(self) -> bool:
        """Whether it is predicted to take so long that no other job should wait for its end."""
        return self.predicted_seconds > HEAVY_SECONDS

    @property
    def predicted_seconds(self) -> float:
        """About how long a child will work on it, if it mirrors it."""
        return predicted_seconds(self.image, self.pixels)


class Reply(_Message, frozen=True, kw_only=True):
    """The answer to one job: facts, notes and perhaps an image, or an error's code and sentence."""

    id: Name
    worker: str = ""
    work: Count = 0
    facts: dict[str, Any] = {}
    notes: dict[str, str] = {}
    error: str | None = None
    detail: str = ""
    image: bytes = b""


class Presence(_Message, frozen=True, kw_only=True):
    """A worker's sign of life; `seen` is when it came, in milliseconds since 1970, by the clock of whoever took it."""

    worker: Name
    operations: list[str]
    free: int
    slots: int
    seen: int = 0


class Quarantined(_Message, frozen=True, kw_only=True):
    """A job that was kept aside; its image is read apart, since lists of these are shown to people."""

    id: Name
    cause: str
    attempts: Count
    worker: str
    at: int
    size: Count
    job: Job | None = None


Message = Job | Reply | Presence | Quarantined
M = TypeVar("M", Job, Reply, Presence, Quarantined)

_encoder = msgspec.json.Encoder()
_decoders: dict[type[Any], msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in (Job, Reply, Presence, Quarantined)
}


def encode(message: Message) -> tuple[bytes, bytes]:
    """The header and the body of a message."""
    body = getattr(message, "image", b"")
    if body:
        message = msgspec.structs.replace(message, image=b"")
    return _encoder.encode(message), body


def decode(kind: type[M], header: bytes | memoryview, body: bytes = b"") -> M:
    """The message that was encoded. `MalformedMessageError` tells what is wrong with one that is not of `kind`."""
    try:
        message: M = _decoders[kind].decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise MalformedMessageError(f"not a {kind.__name__.lower()}: {exc}") from exc
    return msgspec.structs.replace(message, image=body) if body else message


def now_ms() -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000


def new_id() -> str:
    """A UUID of version 7 (RFC 9562 §5.7): 48 bits of Unix milliseconds, then 74 random bits, so ids sort by time."""
    # uuid.uuid7 exists from Python 3.14 only.
    time, random = f"{now_ms():012x}", os.urandom(10)
    version, variant = random[0] & 0x0F | 0x70, random[1] & 0x3F | 0x80
    return f"{time[:8]}-{time[8:]}-{version:02x}{random[2]:02x}-{variant:02x}{random[3]:02x}-{random[4:].hex()}"
