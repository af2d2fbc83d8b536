"""Where a gateway listens, and what cannot be listened on."""

from __future__ import annotations

import subprocess
import sys

import pytest

from safelight.errors import ConfigurationError
from safelight.gateway.listen import listen


def test_localhost_is_both_loopbacks() -> None:
    first = listen("127.0.0.1", 0)
    port = first[0].getsockname()[1]
    with pytest.raises(ConfigurationError, match=f"Port {port} cannot be used"):
        listen("localhost", port)
    first[0].close()
    sockets = listen("localhost", port)
    assert {found.getsockname()[0] for found in sockets} <= {"127.0.0.1", "::1"}
    assert sockets[0].getsockname()[:2] == ("127.0.0.1", port)
    for opened in sockets:
        opened.close()


def test_a_host_that_is_none() -> None:
    with pytest.raises(ConfigurationError):
        listen("no.such.host.invalid", 0)


def test_the_supervisor_starts_without_a_web_server() -> None:
    script = "import sys, safelight.supervisor; print('uvicorn' in sys.modules or 'starlette' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout == b"False\n"
