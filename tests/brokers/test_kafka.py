"""C2 over Kafka: the conformance suite on Apache Kafka in KRaft mode, and what is Kafka's own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from kafka_server import KafkaServer

from safelight.brokers.kafka import HEADER, RETENTION
from safelight.conformance import Conformance, Worker, is_true, until
from safelight.message import new_id


@dataclass
class Topics:
    """Topics of a test's own on the node that all share."""

    node: KafkaServer
    prefix: str
    options: str = ""

    @property
    def url(self) -> str:
        return f"{self.node.url}?prefix={self.prefix}{self.options}"

    def topic(self, name: str) -> str:
        return f"{self.prefix}.{name}"

    def kill(self) -> None:
        self.node.kill()

    def start(self) -> None:
        self.node.start()


class TestKafka(Conformance):
    redelivery = 15.0
    frozen_redelivery = 15.0
    keeps = True

    @pytest.fixture
    def server(self, kafka_node: KafkaServer) -> Topics:
        if kafka_node.process is None:
            kafka_node.start()
        return Topics(kafka_node, new_id())

    @pytest.fixture
    def ordered_server(self, server: Topics) -> Topics:
        server.options = "&partitions=1"
        return server

    async def put_by_hand(self, server: Topics, header: bytes, body: bytes) -> None:
        producer = Producer({"bootstrap.servers": f"127.0.0.1:{server.node.port}"})
        producer.produce(server.topic("jobs"), body, partition=0, headers={HEADER: header})
        assert await asyncio.to_thread(producer.flush, 10) == 0

    async def inboxes(self, server: Topics) -> int:
        """What there is beside the four topics, which are there without gateways too."""
        admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{server.node.port}"})
        topics = (await asyncio.to_thread(admin.list_topics, timeout=10)).topics
        return len({name for name in topics if name.startswith(server.prefix)} - set(map(server.topic, RETENTION)))

    async def joined(self, *workers: Worker) -> None:
        await until(lambda: is_true(all(w.broker._member and w.broker._member._partitions for w in workers)))  # type: ignore[attr-defined]

    async def lose(self, worker: Worker) -> None:
        await worker.broker._member.close()  # type: ignore[attr-defined]
