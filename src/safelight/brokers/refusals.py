"""C2: what does not go over a broker: messages that are too large for it or its room, and such as are not jobs."""

from __future__ import annotations

from safelight.errors import BrokerFullError, ImageError, MalformedMessageError, TooLargeError
from safelight.message import Quarantined, Reply, new_id, now_ms

__all__ = ["check_size", "no_room", "not_a_job", "result_too_large", "too_large"]


def too_large(largest: int | None) -> TooLargeError:
    """For a message that the broker does not take; `largest` in bytes, where that is known."""
    size = "of this size" if largest is None else f"of more than {largest:,} bytes"
    return TooLargeError(f"The broker takes no message {size}.")


def check_size(body: bytes, largest: int | None) -> None:
    """`TooLargeError` for what is known to be too large, before it costs a connection or a channel."""
    if largest is not None and len(body) > largest:
        raise too_large(largest)


def result_too_large(reply: Reply, error: TooLargeError) -> Reply:
    """What goes to the gateway in place of a reply that the broker does not take."""
    detail = f"The result is too large. {error.detail}"
    return Reply(id=reply.id, worker=reply.worker, error=ImageError.code, detail=detail)


def no_room(reply: Reply) -> Reply:
    """What goes to the gateway in place of a reply that the broker has no room for."""
    error = BrokerFullError("The message broker has no room for the result; send the request again in a moment.")
    return Reply(id=reply.id, worker=reply.worker, error=error.code, detail=error.detail)


def not_a_job(error: MalformedMessageError, body: bytes, name: str | None = None) -> Quarantined:
    """The record of a message that is kept aside, since it cannot be read; `name` where the broker has one for it."""
    return Quarantined(id=name or new_id(), cause=error.detail, attempts=0, worker="", at=now_ms(), size=len(body))
