"""C1: the listening sockets. Without uvicorn, whose import would delay the supervisor, which only tries the port."""

from __future__ import annotations

import errno
import socket

from safelight.errors import ConfigurationError

__all__ = ["BACKLOG", "listen"]

BACKLOG = 4096  # a crowd that comes at once; those beyond are reset unanswered (Linux allows `net.core.somaxconn`)
NO_IPV6 = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets: both loopbacks for "localhost", all addresses for "*"; one sentence if the port is taken."""
    addresses: dict[str, tuple[str, ...]] = {"localhost": ("127.0.0.1", "::1"), "*": ("0.0.0.0", "::")}  # noqa: S104
    sockets: list[socket.socket] = []
    for address in addresses.get(host, (host,)):
        try:
            sockets.append(_listen(address, port))
        except OSError as exc:
            if sockets and exc.errno in NO_IPV6:
                continue
            for opened in sockets:
                opened.close()
            raise ConfigurationError(
                f"Port {port} cannot be used ({exc.strerror}); stop what uses it, or choose another: PORT=9000 make up"
            ) from exc
    return sockets


def _listen(address: str, port: int) -> socket.socket:
    [(family, kind, protocol, _, name), *_] = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(name)
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    listening.setblocking(False)
    return listening
