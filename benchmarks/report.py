"""What a run of `bench.py` found, as Markdown."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["markdown"]

COLUMNS = ("gateway", "broker", "worker", "child", "supervisor", "wrk")


def median(results: list[dict[str, Any]], key: str) -> float:
    return statistics.median(result[key] for result in results)


def spread(results: list[dict[str, Any]], key: str) -> str:
    values = [result[key] for result in results]
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def median_by_kind(results: list[dict[str, Any]], key: str) -> dict[str, float]:
    kinds = {kind for result in results for kind in result[key]}
    return {kind: statistics.median(result[key].get(kind, 0.0) for result in results) for kind in kinds}


def of(entry: dict[str, Any], connections: int) -> list[dict[str, Any]]:
    return [result for result in entry["service"] if result["connections"] == connections]


def loads(entry: dict[str, Any]) -> list[int]:
    return sorted({result["connections"] for result in entry["service"]})


def speed_rows(results: dict[str, Any]) -> Iterator[str]:
    yield "| image | load | images/s, median (all rounds) | of the codec | p50 ms | p99 ms | errors |"
    yield "|---|---|--:|--:|--:|--:|--:|"
    for name, entry in results.items():
        bare = median(entry["codec"], "rate")
        yield f"| {name}, {entry['mirror']} | the codec alone | {spread(entry['codec'], 'rate')} | 100 % | | | |"
        for connections in loads(entry):
            found = of(entry, connections)
            latencies = f"{median(found, 'p50_us') / 1e3:.2f} | {median(found, 'p99_us') / 1e3:.2f}"
            share = f"{median(found, 'rate') / bare:.0%}".replace("%", " %")
            errors = sum(result["errors"] for result in found)
            load = f"{connections} connection{'s' * (connections > 1)}"
            yield f"| | {load} | {spread(found, 'rate')} | {share} | {latencies} | {errors} |"


def cpu_rows(results: dict[str, Any]) -> Iterator[str]:
    yield f"| image | connections | {' | '.join(COLUMNS)} | all but wrk | the codec |"
    yield "|---|--:|" + "--:|" * (len(COLUMNS) + 2)
    for name, entry in results.items():
        for connections in loads(entry):
            spent = median_by_kind(of(entry, connections), "cpu_us")
            cells = " | ".join(f"{spent.get(kind, 0):,.0f}" for kind in COLUMNS)
            ours = sum(value for kind, value in spent.items() if kind != "wrk")
            yield f"| {name} | {connections} | {cells} | {ours:,.0f} | {median(entry['codec'], 'cpu_us'):,.0f} |"


def memory_rows(results: dict[str, Any]) -> Iterator[str]:
    yield "| kind | largest resident set of one process, MB |"
    yield "|---|--:|"
    peaks: dict[str, float] = defaultdict(float)
    for entry in results.values():
        for result in entry["service"]:
            for kind, peak in result["peak_mb"].items():
                peaks[kind] = max(peaks[kind], peak)
    yield from (f"| {kind} | {peaks[kind]:.0f} |" for kind in COLUMNS if kind in peaks)


def single_lines(results: dict[str, Any]) -> Iterator[str]:
    for name, entry in results.items():
        whole, alone = median(of(entry, 1), "p50_us"), median(entry["solo"], "median_us")
        yield f"- {name}: one connection's median is {whole - alone:,.0f} µs over the codec's own {alone:,.0f} µs."
    starts = [result["start_seconds"] for entry in results.values() for result in entry["service"]]
    disturbed = [result["others"] for entry in results.values() for result in entry["service"] + entry["codec"]]
    median_share, most = f"{statistics.median(disturbed) * 100:.0f} %", f"{max(disturbed) * 100:.0f} %"
    yield f"- Other processes and the kernel took {median_share} of the cores (median; at most {most})."
    yield f"- From the command to a ready gateway: {statistics.median(starts):.2f} s (median of {len(starts)} starts)."


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = {name: "\n".join(make(report["results"])) for name, make in TABLES.items()}
    here = report["machine"]
    place = f"{here['cores']} cores of {here['cpu']}, {here['memory_gb']} GB, Linux {here['kernel']}"
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    return f"""# The whole path beside the bare codec

{here["date"]}, commit {here["commit"]}. {place}; saved on {here["store"]}.
Python {here["python"]}, {here["jpeg"]}, {versions}, {here["wrk"]}.
Service, broker and load generator share the cores. {report["rounds"]} rounds of {report["seconds"]} s a case.
Again: `{report["command"]}`.

{rows["speed"]}

Latencies are wrk's, of a closed loop: a connection posts again when it was answered. An error is anything but 200. The
saved images were counted: as many as successes.

CPU time of one request in µs, by kind of process (medians of the rounds); the codec's is that of one call in its loop:

{rows["cpu"]}

{rows["lines"]}

{rows["memory"]}
"""


TABLES = {"speed": speed_rows, "cpu": cpu_rows, "lines": single_lines, "memory": memory_rows}
