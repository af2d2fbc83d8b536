"""Debian's rabbitmq-server for the tests, one for all: it takes seconds to start, and queues are soon deleted; or a
cluster of such nodes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from conftest import certify, free_port, wait_until

PROGRAMS = Path("/usr/lib/rabbitmq/bin")
STARTED_SECONDS = 60.0
CONFIGURATION = """
listeners.tcp.1 = 127.0.0.1:{port}
listeners.ssl.1 = 127.0.0.1:{tls_port}
ssl_options.certfile = {folder}/certificate.pem
ssl_options.keyfile = {folder}/key.pem
log.file.level = warning
disk_free_limit.absolute = 50MB
"""


@dataclass
class RabbitServer:
    """One node, with a name, ports and files of its own."""

    folder: Path
    first: RabbitServer | None = None  # of the cluster that this one joins when it starts
    port: int = field(default_factory=free_port)
    tls_port: int = field(default_factory=free_port)
    lookup_port: int = field(default_factory=free_port)
    node_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    lookup: subprocess.Popen[bytes] | None = None  # Erlang's names of nodes; else the node leaves one of its own behind

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def url_apart(self, name: str) -> str:
        """With a virtual host of its own."""
        self.control("add_vhost", name)
        self.control("set_permissions", "--vhost", name, "guest", ".*", ".*", ".*")
        return self.url + name

    @property
    def tls_url(self) -> str:
        return f"amqps://guest:guest@127.0.0.1:{self.tls_port}/?cafile={self.folder}/certificate.pem"

    @property
    def name(self) -> str:
        return f"tests-{self.port}@localhost"

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "HOME": str((self.first or self).folder),  # Erlang's cookie
            "ERL_EPMD_PORT": str((self.first or self).lookup_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_DIST_PORT": str(self.node_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none",
        }

    def start(self) -> None:
        if not (self.folder / "key.pem").exists():
            certify(self.folder)
        text = CONFIGURATION.format(port=self.port, tls_port=self.tls_port, folder=self.folder)
        if self.first is not None:
            text += f"cluster_formation.classic_config.nodes.1 = {self.first.name}\n"
        (self.folder / "rabbitmq.conf").write_text(text)
        (self.folder / "plugins").write_text("[].")
        if self.lookup is None and self.first is None:
            self.lookup = subprocess.Popen(["epmd"], env=self.environment, stdin=subprocess.DEVNULL)
            wait_until(self.looks_up)
        self.process = subprocess.Popen(
            [PROGRAMS / "rabbitmq-server"],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        wait_until(self.answers, STARTED_SECONDS)

    def looks_up(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.lookup_port)) == 0

    def answers(self) -> bool:
        """Whether it speaks AMQP: an unknown version of the protocol is answered with the known one."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"AMQP\x00\x00\x00\x00")
                return connection.recv(8).startswith(b"AMQP")
        except OSError:
            return False

    def control(self, *words: str) -> str:
        """What `rabbitmqctl` says."""
        command = [PROGRAMS / "rabbitmqctl", "--quiet", *words]
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout

    def kill(self) -> None:
        """SIGKILL to all of the node's processes."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def freeze(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        if self.process is not None:
            self.kill()
        if self.lookup is not None:
            self.lookup.terminate()
            self.lookup.wait()
