"""Safelight as systems: all of it, a gateway with a stub for its workers, parts to put together.

A further broker is one line of `BROKERS`.
"""

from __future__ import annotations

import re
import sys
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from system import Part, Place, System, fetch, free_port

from safelight.brokers import embedded
from safelight.supervisor import LIFELINE

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "BROKERS",
    "Broker",
    "broker_url",
    "counted",
    "gateway_alone",
    "gateway_part",
    "is_ready",
    "port_counts",
    "whole",
    "worker_part",
]

HERE = Path(__file__).parent
SAFELIGHT = [sys.executable, "-m", "safelight"]
RABBITMQ_SERVER = "/usr/lib/rabbitmq/bin/rabbitmq-server"
KAFKA_JARS = Path.home() / ".cache/safelight/kafka"  # where .ci/run puts them
KAFKA_PROPERTIES = """
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
log.dirs={folder}
offsets.topic.replication.factor=1
group.initial.rebalance.delay.ms=0
"""
ENDS_WITH_RUN = {LIFELINE: "0"}  # its standard input, which closes with the run, however that ends
SERIES = re.compile(r'^safelight_(?:requests_total{outcome="(\w+)"}|(in_flight_jobs|workers)) (\S+)', re.MULTILINE)


@dataclass(frozen=True)
class Broker:
    """Where it is, and what starts it; a Redis is started by the run, the embedded one by `safelight up`."""

    name: str
    url: Callable[[Place], str]
    needs_redis: bool = False
    parts: Callable[[Place], list[Part]] = lambda _: []


def _embedded_server(place: Place) -> list[Part]:
    """What `safelight up` runs."""
    return [Part("broker", embedded.server_command(embedded.socket_path(place.port), int(ENDS_WITH_RUN[LIFELINE])))]


@cache
def _rabbit_ports(port: int) -> tuple[int, int, int]:
    """Of AMQP, of Erlang's port mapper, of the node."""
    return free_port(), free_port(), free_port()


def _rabbit_server(place: Place) -> list[Part]:
    """Debian's, with a name, ports and files of its own."""
    port, mapper, node = map(str, _rabbit_ports(place.port))
    environment = {
        "HOME": str(place.folder),  # Erlang's cookie
        "ERL_EPMD_PORT": mapper,
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": f"bench-{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": port,
        "RABBITMQ_DIST_PORT": node,
        "RABBITMQ_MNESIA_BASE": str(place.folder / "rabbitmq"),
        "RABBITMQ_LOG_BASE": str(place.folder / "rabbitmq"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(place.folder / "no-plugins"),
    }
    return [Part("broker", ["epmd"], environment), Part("broker", [RABBITMQ_SERVER], environment)]


@cache
def _kafka_ports(port: int) -> tuple[int, int]:
    """The broker's, and its controller's."""
    return free_port(), free_port()


def _kafka_server(place: Place) -> list[Part]:
    """One node, formatted and started."""
    port, controller = _kafka_ports(place.port)
    properties = place.folder / "kafka.properties"
    properties.write_text(KAFKA_PROPERTIES.format(port=port, controller=controller, folder=place.folder / "kafka"))
    script = (
        'java -cp "$0" kafka.tools.StorageTool format --standalone -t "$2" -c "$1" '
        '&& exec java -Xms512m -Xmx512m -cp "$0" kafka.Kafka "$1"'
    )
    return [Part("broker", ["sh", "-c", script, f"{KAFKA_JARS}/*", str(properties), str(uuid.uuid4())])]


BROKERS = {
    "embedded": Broker("embedded", lambda place: embedded.url(place.port), parts=_embedded_server),
    "redis": Broker("redis", lambda place: place.redis_url, needs_redis=True),
    "rabbitmq": Broker(
        "rabbitmq", lambda place: f"amqp://127.0.0.1:{_rabbit_ports(place.port)[0]}/", parts=_rabbit_server
    ),
    "kafka": Broker("kafka", lambda place: f"kafka://127.0.0.1:{_kafka_ports(place.port)[0]}", parts=_kafka_server),
}


def broker_url(place: Place) -> str | None:
    """The Redis or Valkey of a running system, ours or another; None if it has none."""
    return place.redis_url or (embedded.url(place.port) if embedded.socket_path(place.port).exists() else None)


def whole(broker: Broker) -> System:
    """`safelight up`, a worker for each core."""

    def parts(place: Place) -> list[Part]:
        command = [*SAFELIGHT, "up", "--port", str(place.port), "--store", str(place.store)]
        command += ["--workers", str(place.workers)]
        if broker is not BROKERS["embedded"]:  # that one it starts itself
            command += ["--broker", broker.url(place)]
            return [*broker.parts(place), Part("supervisor", command, ENDS_WITH_RUN)]
        return [Part("supervisor", command, ENDS_WITH_RUN)]

    return System("safelight", broker.needs_redis, parts, counts=counted)


def gateway_alone(broker: Broker, mirrored: Path) -> System:
    """A gateway, and one process in the workers' place that answers each job at once with a ready-made image."""

    def parts(place: Place) -> list[Part]:
        stub = [sys.executable, str(HERE / "inside.py"), "worker", broker.url(place), str(mirrored)]
        return [*broker.parts(place), Part("stub", stub), gateway_part(broker, place, place.port)]

    return System("gateway", broker.needs_redis, parts, counts=counted)


def gateway_part(broker: Broker, place: Place, port: int) -> Part:
    command = [*SAFELIGHT, "gateway", "--port", str(port), "--store", str(place.store), "--drain-delay", "0"]
    return Part("gateway", [*command, "--broker", broker.url(place)], ENDS_WITH_RUN)


def worker_part(broker: Broker, place: Place, *, module: str, concurrency: int = 1) -> Part:
    command = [*SAFELIGHT, "worker", "--broker", broker.url(place), "--concurrency", str(concurrency)]
    return Part("worker", [*command, "--import", module], ENDS_WITH_RUN | {"PYTHONPATH": str(HERE)})


def counted(place: Place) -> dict[str, float]:
    """Requests by outcome, what is in flight, and living workers, as its gateway counts them."""
    return port_counts(place.port)


def port_counts(port: int) -> dict[str, float]:
    """The same of the gateway on this port."""
    text = fetch(port, "/metrics")[1].decode()
    return {outcome or gauge: float(value) for outcome, gauge, value in SERIES.findall(text)}


def is_ready(place: Place) -> bool:
    """Its gateway says so, and all of its workers have shown themselves."""
    return fetch(place.port, "/readyz")[0] == 200 and counted(place).get("workers") == place.workers
