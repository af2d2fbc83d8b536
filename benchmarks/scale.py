"""Measures what happens with more workers, gateways, requests and bytes: python benchmarks/scale.py.

Throughput of 1 to 64 worker instances whose operation only waits, beside linear; two gateways on one broker; the
gateway's memory for a request in flight; CPU time by the image's size. Written to `results/scale.json`,
`results/scale.md` and plots. A load in which anything failed ends the run without a result.
"""

from __future__ import annotations

import math
import operator
import statistics
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import plots
import psutil
from images import growing
from load import check, posted, under_load
from output import options_of, run
from scale_report import markdown
from service import BROKERS, Broker, broker_url, counted, gateway_part, is_ready, port_counts, worker_part
from system import STARTED_SECONDS, BenchmarkError, Part, Place, Running, System, free_port, running, wait_until
from usage import look

from safelight.operations.mirror import mirror
from safelight.settings import usable_cores

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from pathlib import Path

INSTANCES = (1, 2, 4, 8, 16, 32, 64)
# By the operation's wait; the longer one shows many instances where the shorter one needs more cores.
WAITS_MS = {20: INSTANCES, 100: (1, 32, 64)}
IN_FLIGHT_EACH = 4  # requests for each instance, so that none of them ever lacks a job
TWO_GATEWAYS_INSTANCES = 8
START_SECONDS_EACH = 5.0  # of each worker that joins, beyond what any system has
MEMORY_SHARE = 0.7  # of what is free, at most, for worker instances
HELD_REQUESTS = 128
MEGABYTE_PICTURE = 4  # of the growing ones
COST_REQUESTS = 12  # at least, of the largest pictures
COST_MOST_SECONDS = 10.0
QUIET_CORES = 0.3  # of CPU in all processes: no child is being started


@dataclass(frozen=True)
class Scaled:
    """A running system of one broker, two gateways and some workers; `folder` is the run's."""

    now: Running
    broker: Broker
    ports: tuple[int, int]
    folder: Path

    def successes(self) -> float:
        return self.counts()["success"]

    def counts(self) -> Counter[str]:
        """Of both gateways together."""
        return sum((Counter(port_counts(port)) for port in self.ports), Counter())

    def load(self, image: bytes, operation: str, connections: int, seconds: float, gateways: int = 1) -> dict[str, Any]:
        """So many connections in all, spread over the gateways."""
        self.settle()
        load = posted(self.folder, image, query=f"?operations={operation}")(connections // gateways, seconds)
        before = self.counts()
        found = under_load(
            self.now.parts.processes,
            lambda: [load.wrk(f"http://127.0.0.1:{port}/query") for port in self.ports[:gateways]],
            self.successes,
            seconds=seconds,
            image_bytes=len(image),
            url=broker_url(self.now.place),
        )
        wait_until(lambda: not self.counts()["in_flight_jobs"])
        check(found["requests"], before, self.counts(), connections)
        return found | {"connections": connections}

    def settle(self) -> None:
        """Wait until no child is being started: one whose job's client has left may have been killed."""

        def is_quiet() -> bool:
            before = look(self.now.parts.processes())
            time.sleep(0.3)
            after = look(self.now.parts.processes())
            return (after.cpu - before.cpu).total() / (after.at - before.at) < QUIET_CORES

        wait_until(is_quiet)


@contextmanager
def scaled(broker: Broker, folder: Path, workers: int) -> Iterator[Scaled]:
    second = free_port()

    def parts(place: Place) -> list[Part]:
        gateways = [gateway_part(broker, place, port) for port in (place.port, second)]
        return [*broker.parts(place), *gateways, *(worker_part(broker, place, module="waits") for _ in range(workers))]

    system = System("safelight", broker.needs_redis, parts, counts=counted)
    with running(system, folder, probe=is_ready, workers=workers) as now:
        yield Scaled(now, broker, (now.place.port, second), folder)


def scaling(
    broker: Broker, folder: Path, image: bytes, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Throughput by worker instances, more of them joining from step to step; and at one step by gateways."""
    rows, gateways = [], []
    with scaled(broker, folder, 1) as system:
        room, processes, slots = _room(system), 1, 1
        for count in (count for count in INSTANCES if count <= options.most):
            added, concurrency = _fitting(count - slots, room - processes)
            for _ in range(added):
                part = worker_part(broker, system.now.place, module="waits", concurrency=concurrency)
                system.now.parts.start(part)
            processes, slots = processes + added, count
            wait_until(
                lambda there=processes: counted(system.now.place)["workers"] == there,
                STARTED_SECONDS + added * START_SECONDS_EACH,
            )
            for wait_ms in (wait_ms for wait_ms, counts in WAITS_MS.items() if count in counts):
                found = system.load(image, f"wait{wait_ms}", count * IN_FLIGHT_EACH, options.seconds)
                linear = found["steady_rate"] / (count * 1_000 / wait_ms)
                told = {"broker": broker.name, "instances": count, "processes": processes, "wait_ms": wait_ms}
                rows.append(told | {"linear": linear} | found)
                print(f"{broker.name:10} {count:3} x {wait_ms} ms {linear:8.1%} of linear", flush=True)
            if count == TWO_GATEWAYS_INSTANCES:
                gateways = _by_gateways(system, image, options.seconds, options.rounds)
    return rows, gateways


def _room(system: Scaled) -> int:
    """Worker processes that fit into the free memory, by what one with its child has for itself."""
    worker = [process for process, kind in system.now.parts.processes().items() if kind in ("worker", "child")]
    own_bytes = sum(process.memory_full_info().uss for process in worker)
    return int(psutil.virtual_memory().available * MEMORY_SHARE / own_bytes)


def _fitting(more: int, room: int) -> tuple[int, int]:
    """So many children more: as processes of one each, or of more each if only so many processes fit."""
    if more == 0:
        return 0, 1
    if room < 1:
        raise BenchmarkError("there is no memory for more workers")
    processes = min(more, 2 ** int(math.log2(room)))
    return processes, more // processes


def _by_gateways(system: Scaled, image: bytes, seconds: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    connections = TWO_GATEWAYS_INSTANCES * IN_FLIGHT_EACH
    for number in range(1, rounds + 1):
        for count in (1, 2):
            found = system.load(image, "wait20", connections, seconds, gateways=count)
            rows.append({"broker": system.broker.name, "round": number, "gateways": count} | found)
    return rows


def memory(system: Scaled, image: bytes, seconds: int) -> dict[str, Any]:
    """How much the gateway's largest resident set grew for each byte in flight."""
    [gateway, _] = [process for process, kind in system.now.parts.processes().items() if kind == "gateway"]
    system.load(image, "wait100", 1, 1)
    idle_bytes = gateway.memory_info().rss
    found = system.load(image, "wait100", HELD_REQUESTS, seconds)
    grown = found["peak_mb"]["gateway"] * 1024 * 1024 - idle_bytes
    return {
        "requests": HELD_REQUESTS,
        "bytes": len(image),
        "idle_mb": idle_bytes / 1024 / 1024,
        "peak_mb": found["peak_mb"]["gateway"],
        "times": grown / (HELD_REQUESTS * len(image)),
    }


def cost(system: Scaled, pictures: list[bytes], seconds: int) -> list[dict[str, Any]]:
    """CPU of a request in all processes, by the image's size."""
    rows = []
    for image in pictures:
        begun = time.perf_counter()
        mirror(image)
        call_seconds = time.perf_counter() - begun
        for operations in ("size", "mirror"):
            enough = math.ceil(COST_REQUESTS * call_seconds / usable_cores()) if operations == "mirror" else 0
            load_seconds = min(max(seconds, enough), COST_MOST_SECONDS)
            found = system.load(image, operations, usable_cores(), load_seconds)
            request_us = sum(value for kind, value in found["cpu_us"].items() if kind != "wrk")
            rows.append({"operations": operations, "bytes": len(image), "request_us": request_us} | found)
            print(f"{operations:10} {len(image):10,} bytes {request_us:12,.0f} us", flush=True)
    return rows


def fitted(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The straight line through the costs that is least wrong in proportion, and how far from it they are."""
    sizes, costs = [row["bytes"] for row in rows], [row["request_us"] for row in rows]
    # Least squares of (a_request + a_byte * size) / cost - 1, so that a small picture counts as much as a large one.
    ones, shares = [1 / cost for cost in costs], [size / cost for size, cost in zip(sizes, costs, strict=True)]
    both = sum(map(operator.mul, ones, shares))
    squares = sum(one**2 for one in ones), sum(share**2 for share in shares)
    determinant = squares[0] * squares[1] - both**2
    a_request = (sum(ones) * squares[1] - sum(shares) * both) / determinant
    a_byte = (sum(shares) * squares[0] - sum(ones) * both) / determinant
    line = [a_request + a_byte * size for size in sizes]
    residual = sum((cost - told) ** 2 for cost, told in zip(costs, line, strict=True))
    return {
        "us_a_request": a_request,
        "us_a_byte": a_byte,
        "r_squared": 1 - residual / (statistics.pvariance(costs) * len(costs)),
        "farthest": max(abs(cost / told - 1) for cost, told in zip(costs, line, strict=True)),
    }


def measured(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    pictures = growing()
    scaling_rows, gateways = [], []
    for broker in BROKERS.values():
        rows, more = scaling(broker, folder, pictures[0], options)
        scaling_rows += rows
        gateways += more
    with scaled(BROKERS["embedded"], folder, usable_cores()) as system:
        held = memory(system, pictures[MEGABYTE_PICTURE], options.seconds)
        costs = cost(system, pictures, options.seconds)
    fits = {name: fitted([row for row in costs if row["operations"] == name]) for name in ("size", "mirror")}
    return {"scaling": scaling_rows, "gateways": gateways, "memory": held, "cost": costs, "fits": fits}


def main() -> None:
    parser = options_of(__doc__, seconds=2, rounds=3)
    parser.add_argument("--most", type=int, default=INSTANCES[-1], help="worker instances")
    options = parser.parse_args()
    run(
        "scale",
        options,
        lambda folder: measured(folder, options),
        name="scale",
        markdown=markdown,
        plot=plots.scale,
    )


if __name__ == "__main__":
    main()
