"""What a run of `scale.py` found, as Markdown."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from output import described
from report import Target, median, of, paired, table, target_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["markdown"]

CPU_BOUND = 0.9  # of all cores: more instances would give no more


def _targets(report: dict[str, Any]) -> Iterator[Target]:
    for broker in dict.fromkeys(result["broker"] for result in report["scaling"]):
        unbound = [row for row in of(report["scaling"], broker=broker) if row["busy"] < CPU_BOUND]
        if unbound:
            name = f"{broker}, up to {max(row['instances'] for row in unbound)} instances, of linear at the least"
            yield Target(name, 0.95, 0.95, min(row["linear"] for row in unbound), "%")
        for key, text, bound in (("steady_rate", "throughput", 0.95), ("p50_us", "median", 1.05)):
            one, two = (of(report["gateways"], broker=broker, gateways=count) for count in (1, 2))
            seen = paired(two, one, lambda a, b, key=key: a[key] / b[0][key])
            yield Target(f"{broker}, two gateways beside one, {text}", bound, 1.0, seen, "x", is_most=key == "p50_us")
    yield Target("gateway's memory for a byte in flight", 3, 3, report["memory"]["times"], "bytes", is_most=True)
    for operations, fit in report["fits"].items():
        yield Target(f"cost of `{operations}` by bytes, R² of a line", 0.98, 0.99, fit["r_squared"], "")


def _scaling(rows: list[dict[str, Any]]) -> list[str]:
    one = {(row["broker"], row["wait_ms"]): row["steady_rate"] for row in of(rows, instances=1)}
    cells = [
        [
            row["broker"],
            f"{row['wait_ms']}",
            f"{row['instances']}"
            + (f" ({row['processes']} processes)" if row["processes"] != row["instances"] else ""),
            f"{row['steady_rate']:,.0f}",
            f"{row['linear'] * 100:.1f} %",
            f"{row['steady_rate'] / row['instances'] / one[row['broker'], row['wait_ms']] * 100:.1f} %",
            f"{row['p50_us'] / 1e3:,.1f}",
            f"{row['busy'] * 100:.0f} %" + (", CPU-bound" if row["busy"] >= CPU_BOUND else ""),
        ]
        for row in rows
    ]
    told = [
        "broker",
        "waits ms",
        "instances",
        "requests/s",
        "of linear",
        "of as many times one",
        "p50 ms",
        "cores busy",
    ]
    return table(told, cells)


def _gateways(rows: list[dict[str, Any]]) -> list[str]:
    cells = []
    for broker in dict.fromkeys(row["broker"] for row in rows):
        for count in (1, 2):
            found = of(rows, broker=broker, gateways=count)
            cpu = statistics.median(row["cpu_us"]["gateway"] for row in found)
            rates = [f"{median(found, 'steady_rate'):,.0f}", f"{median(found, 'p50_us') / 1e3:.1f}", f"{cpu:,.0f}"]
            cells.append([broker, str(count), *rates])
    return table(["broker", "gateways", "requests/s", "p50 ms", "gateways' CPU µs"], cells)


def _cost(rows: list[dict[str, Any]]) -> list[str]:
    cells = []
    for row in rows:
        kinds = [f"{row['cpu_us'].get(kind, 0):,.0f}" for kind in ("gateway", "broker", "worker", "child")]
        each = f"{row['request_us'] / row['bytes'] * 1e3:,.1f}"
        cells.append([row["operations"], f"{row['bytes']:,}", *kinds, f"{row['request_us']:,.0f}", each])
    return table(["operations", "bytes", "gateway", "broker", "worker", "child", "all, µs", "ns a byte"], cells)


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    held = report["memory"]
    fits = [
        f"- `{name}`: {fit['us_a_request']:,.0f} µs a request and {fit['us_a_byte'] * 1e3:.2f} ns a byte; R² of that "
        f"line {fit['r_squared']:.4f}, the farthest point {fit['farthest'] * 100:.0f} % from it."
        for name, fit in report["fits"].items()
    ]
    parts = {
        "targets": target_rows(_targets(report)),
        "scaling": _scaling(report["scaling"]),
        "gateways": _gateways(report["gateways"]),
        "cost": _cost(report["cost"]),
        "fits": fits,
    }
    filled = {name: "\n".join(lines) for name, lines in parts.items()}
    memory = (
        f"{held['requests']} requests of {held['bytes']:,} bytes in flight: from {held['idle_mb']:.0f} MB idle to "
        f"{held['peak_mb']:.0f} MB at the most, {held['times']:.2f} bytes for each byte in flight."
    )
    about = {"described": described(report["machine"]), "command": report["command"], "memory": memory}
    return TEXT.format(**filled, **about, seconds=report["seconds"])


TEXT = """# Scale: more workers, gateways, requests, bytes

{described}
Service, broker and load generator share the cores. {seconds} s of load a case.
Again: `{command}`.

{targets}

## Worker instances

Processes of one child each, whose operation only waits, on the smallest picture. Linear is a wait after the other in
each. Where all cores are busy, more instances give no more, here or anywhere: such a row says what a request costs, and
the longer wait shows as many instances without that bound.

![Throughput by worker instances](scaling.svg)

{scaling}

## Two gateways on one broker

The same number of connections in all, over one gateway or over two; eight instances that wait 20 ms.

{gateways}

## Memory of a request in flight

{memory}

## Cost by bytes

CPU of a request in µs by kind of process, without the load generator's. JPEGs of one texture, mirrored in the DCT
domain.

![CPU time by the image's bytes](cost.svg)

{fits}

{cost}
"""
