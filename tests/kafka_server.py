"""Apache Kafka in KRaft mode for the tests, one node for all: it takes seconds to start."""

from __future__ import annotations

import re
import socket
import subprocess
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from conftest import OneProcess, certify, free_port, wait_until

JARS = Path.home() / ".cache/safelight/kafka"  # where .ci/run puts them
STARTED_SECONDS = 60.0
MEMORY = ("-Xms256m", "-Xmx768m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto")
PROPERTIES = """
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},SASL_SSL://127.0.0.1:{tls_port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},SASL_SSL://127.0.0.1:{tls_port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL,CONTROLLER:PLAINTEXT
sasl.enabled.mechanisms=PLAIN
listener.name.sasl_ssl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \\
  user_tester="se/cret";
ssl.keystore.type=PEM
ssl.keystore.location={folder}/server.pem
controller.listener.names=CONTROLLER
log.dirs={folder}/data
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
"""


@dataclass
class KafkaServer(OneProcess):
    """One node that is broker and controller, with ports and files of its own."""

    folder: Path
    port: int = field(default_factory=free_port)
    tls_port: int = field(default_factory=free_port)
    controller_port: int = field(default_factory=free_port)
    proxied: dict[int, int] = field(default_factory=dict)  # further ports, and the ports that clients come through
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"kafka://127.0.0.1:{self.port}"

    def url_apart(self, name: str) -> str:
        """With topics and a group of its own."""
        return f"{self.url}?prefix={name}"

    @property
    def tls_url(self) -> str:
        """With a password, whose slash is quoted."""
        return f"kafkas://tester:se%2Fcret@127.0.0.1:{self.tls_port}?ssl.ca.location={self.folder}/certificate.pem"

    @property
    def _properties(self) -> Path:
        return self.folder / "server.properties"

    def _java(self, *words: str | Path) -> list[str | Path]:
        return ["java", *MEMORY, "-cp", f"{JARS}/*", *words]

    def start(self) -> None:
        if not self._properties.exists():
            certify(self.folder)
            text = PROPERTIES.format(
                port=self.port, tls_port=self.tls_port, controller=self.controller_port, folder=self.folder
            )
            for number, (port, seen) in enumerate(self.proxied.items()):
                text = re.sub(r"(?m)^(listeners=.*)", rf"\1,PROXIED{number}://127.0.0.1:{port}", text)
                text = re.sub(r"(?m)^(advertised.listeners=.*)", rf"\1,PROXIED{number}://127.0.0.1:{seen}", text)
                text = re.sub(r"(?m)^(listener.security.*)", rf"\1,PROXIED{number}:PLAINTEXT", text)
            self._properties.write_text(text)
            command = self._java("kafka.tools.StorageTool", "format", "--standalone", "-t", str(uuid.uuid4()))
            subprocess.run([*command, "-c", self._properties], check=True, capture_output=True)
        with (self.folder / "log").open("ab") as log:
            command = self._java("kafka.Kafka", self._properties)
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(self.answers, STARTED_SECONDS)

    def answers(self) -> bool:
        """Whether it listens, which it does once it is no longer fenced by its controller."""
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
