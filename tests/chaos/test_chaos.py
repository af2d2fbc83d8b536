"""A short seeded run on each broker; `make chaos` is the long one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from tempfile import mkdtemp

import pytest
from conftest import absent, need_judges, needed
from kafka_server import JARS

from chaos import __main__ as chaos

# What is quick to recover from, and each broker's own.
RUNS = {
    "valkey": "kill_worker,kill_child,kill_gateway,restart_broker,full_memory,killed_connections",
    "rabbitmq": "kill_worker,kill_child,cut_gateways,restart_broker,killed_connections,deleted_queue",
    "kafka": "kill_worker,kill_child,silent_to_workers,restart_broker,deleted_topics",
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("broker", RUNS)
def test_nothing_is_lost(broker: str, runtime_folder: Path) -> None:
    need_judges()
    if broker == "rabbitmq":
        needed("rabbitmq-server", "rabbitmq-server")
    if broker == "kafka" and not JARS.is_dir():
        absent(f"Apache Kafka is not at {JARS}", "see .ci/run")
    # What others do on this machine makes recovery slower than its bound; the long run holds it.
    options = chaos.arguments(["--broker", broker, "--requests", "150", "--rate", "8", "--only", RUNS[broker]])
    found = asyncio.run(chaos.run(options, Path(mkdtemp(dir=runtime_folder))))
    print(found.table())
    assert [sentence for sentence in found.sentences if not sentence.startswith("slow:")] == []
    assert found.counts["answered SUCCESS"] >= 100
    assert set(found.faults) == set(RUNS[broker].split(","))
