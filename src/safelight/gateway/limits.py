"""C1: what a client may send before there is a request, and how long each wait for it may last."""

__all__ = [
    "BUFFERED_BODY_BYTES",
    "DISCARD_BYTES",
    "DISCARD_SECONDS",
    "HEADER_SECONDS",
    "KEEP_ALIVE_SECONDS",
    "LINGER_SECONDS",
    "MAX_HEADER_BYTES",
    "STALLED_SECONDS",
]

MAX_HEADER_BYTES = 32 * 1024
HEADER_SECONDS = 10.0
DISCARD_BYTES = 64 * 1024 * 1024  # of a refused body that is read over, so that its sender gets to read the refusal
DISCARD_SECONDS = 60.0
LINGER_SECONDS = 5.0  # RFC 9112, 9.6: closing on unread bytes resets the connection, and the answer may be lost
BUFFERED_BODY_BYTES = 256 * 1024  # uvicorn's 64 KB stop and start reading for most photos, two system calls each time
STALLED_SECONDS = 30.0  # without a byte taken by a client that is sent an answer
KEEP_ALIVE_SECONDS = 65  # above the 60 s of common load balancers, so that they close first
