"""What a run of `bench.py` found, as Markdown.

A ratio is of two results of one round; a ratio's median is over the rounds.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from output import described

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["COLUMNS", "Target", "by_column", "markdown", "median", "of", "table", "target_rows"]

Results = list[dict[str, Any]]
COLUMNS = ("gateway", "broker", "worker", "child")
COLUMN_OF = {"codec": "child", "operation": "child", "stub": "worker"}  # what stands in a process's place on a rung
MAIN = {"picture": "1024x688"}
MIRROR_RUNGS = ("codec", "operation", "pool", "skeleton", "service", "baseline")  # whose rate is beside the codec's
USUAL = {"rung": "service", "operations": "size,mirror", "broker": "embedded"}


def of(results: Results, **facts: Any) -> Results:
    """Those results that are of this."""
    return [result for result in results if all(result.get(name) == value for name, value in facts.items())]


def median(results: Results, key: str) -> float:
    return statistics.median(result[key] for result in results)


def by_column(results: Results, key: str) -> dict[str, float]:
    """Medians of what is told by kind of process, each kind in its column; wrk's is left out."""
    found: dict[str, float] = {}
    for kind in {kind for result in results for kind in result.get(key, ())} - {"wrk"}:
        column = COLUMN_OF.get(kind, kind)
        found[column] = found.get(column, 0.0) + statistics.median(result[key].get(kind, 0.0) for result in results)
    return found


def spent_us(result: dict[str, Any]) -> float:
    return sum(value for kind, value in result["cpu_us"].items() if kind != "wrk")


# Targets.


@dataclass(frozen=True)
class Target:
    """A bound and a goal beyond it: at least these, or at most (`is_most`)."""

    name: str
    bound: float
    goal: float
    seen: float | None
    unit: str
    is_most: bool = False

    def row(self) -> list[str]:
        word, sign = ("at most", -1) if self.is_most else ("at least", 1)
        met = "goal" if sign * (self.seen - self.goal) >= 0 else "yes" if sign * (self.seen - self.bound) >= 0 else "no"
        return [self.name, f"{word} {self._told(self.bound)}", self._told(self.goal), self._told(self.seen), met]

    def _told(self, value: float) -> str:
        return f"{value * 100:.0f} %" if self.unit == "%" else f"{value:.2f} {self.unit}".strip()


def target_rows(targets: Iterable[Target]) -> list[str]:
    """Those that were measured."""
    rows = [target.row() for target in targets if target.seen is not None]
    return table(["case", "target", "goal", "seen", "met"], rows)


def paired(one: Results, other: Results, compare: Callable[[dict[str, Any], Results], float]) -> float | None:
    """The median over the rounds of what two results of one round are to each other."""
    rounds = [(result, of(other, round=result["round"])) for result in one]
    return statistics.median([compare(*both) for both in rounds if both[1]] or [0.0]) or None


def _times_best(result: dict[str, Any], others: Results) -> float:
    return result["rate"] / max(other["rate"] for other in others)


def _targets(results: Results) -> Iterator[Target]:
    codec = of(results, rung="codec", **MAIN)
    baselines = of(results, rung="baseline", **MAIN)
    for count in (16, 64):
        served, load = of(results, connections=count, **USUAL, **MAIN), f"1024x688, {count} connections"
        beside = of(baselines, connections=count)
        celery = [result for result in beside if "celery" in result["broker"].lower()]
        yield Target(f"{load}, of the codec on all cores", 0.65, 0.75, paired(served, codec, _times_best), "%")
        for name, bound, goal, others in (
            ("the best with a broker", 2.7, 3.0, of(beside, needs_redis=True)),
            ("Flask + Celery", 5.0, 5.5, celery),
            ("the best without a broker", 2.5, 2.8, of(beside, needs_redis=False)),
        ):
            yield Target(f"{load}, beside {name}", bound, goal, paired(served, others, _times_best), "x")
    yield from _other_targets(results, codec)


def _other_targets(results: Results, codec: Results) -> Iterator[Target]:
    for picture, bound, goal in (("unaligned", 0.8, 0.86), ("small", 0.33, 0.45)):
        served = of(results, picture=picture, connections=16, **USUAL)
        bare = of(results, picture=picture, rung="codec")
        yield Target(f"{picture}, 16 connections, of the codec", bound, goal, paired(served, bare, _times_best), "%")
    mosec = [result for result in of(results, rung="baseline", picture="small") if "mosec" in result["broker"]]
    yield Target("small, 16 connections, beside mosec", 2, 2, paired(served, mosec, _times_best), "x")
    one, many = (of(results, connections=count, **USUAL, **MAIN) for count in (1, 16))
    above = paired(one, of(results, rung="solo"), lambda a, b: (a["p50_us"] - b[0]["p50_us"]) / 1e3)
    yield Target("one connection, median above the codec's", 1.2, 0.8, above, "ms", is_most=True)
    tail = paired(many, many, lambda a, _: a["p99_us"] / a["p50_us"])
    yield Target("16 connections, p99 by p50", 2.5, 2, tail, "x", is_most=True)
    beyond = paired(many, codec, lambda a, b: (spent_us(a) - spent_us(b[0])) / 1e3)
    yield Target("CPU beyond the codec, 16 connections", 0.65, 0.45, beyond, "ms", is_most=True)
    saving = of(results, rung="store")
    yield Target("saving 89 KB, CPU", 100, 60, paired(saving, saving, lambda a, _: spent_us(a)), "µs", is_most=True)


# Tables.


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Lines of Markdown; all but the first column stand right."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] + ["--:"] * (len(header) - 1), *rows)]


def _spread(results: Results, key: str) -> str:
    values = [result[key] for result in results]
    told = f"{statistics.median(values):,.0f}"
    return f"{told} ({min(values):,.0f} to {max(values):,.0f})" if len(values) > 1 else told


def _cells(results: Results, key: str, digits: int) -> list[str]:
    found = by_column(results, key)
    cells = [f"{found[name]:,.{digits}f}" if name in found else "" for name in COLUMNS]
    return [*cells, f"{sum(found.values()):,.{digits}f}" if found else ""]


def _by_case(results: Results) -> Iterator[tuple[str, Results]]:
    for name in dict.fromkeys(result["name"] for result in results):
        yield name, of(results, name=name)


def _speed(results: Results, chosen: Results) -> list[str]:
    rows = []
    for name, found in _by_case(chosen):
        is_mirror = found[0]["rung"] in MIRROR_RUNGS and found[0]["operations"] != "size"
        codec = of(results, rung="codec", picture=found[0]["picture"]) if is_mirror else []
        share = paired(found, codec, _times_best)
        latencies = [f"{median(found, key) / 1e3:,.2f}" for key in ("p50_us", "p99_us")]
        told = f"{share * 100:.0f} %" if share else ""
        rows.append([name, _spread(found, "rate"), told, *latencies, *_cells(found, "cpu_us", 0)])
    return table(["case", "images/s (all rounds)", "of the codec", "p50 ms", "p99 ms", *COLUMNS, "all"], rows)


def _border(chosen: Results) -> list[str]:
    rows = []
    for name, found in _by_case(chosen):
        broker = by_column(found, "server")
        counted = [f"{broker[key]:.1f}" if key in broker else "" for key in ("commands", "reads", "writes")]
        rows.append([name, *_cells(found, "crossings", 1), *_cells(found, "calls", 1), *counted])
    header = [*(f"copies: {name}" for name in (*COLUMNS, "all")), *(f"calls: {name}" for name in (*COLUMNS, "all"))]
    return table(["case", *header, "broker: commands", "reads", "writes"], rows)


def _memory(chosen: Results) -> list[str]:
    rows = [[name, *_cells(found, "peak_mb", 0)[:-1]] for name, found in _by_case(chosen)]
    return table(["case", *COLUMNS], rows)


def _single_lines(results: Results) -> Iterator[str]:
    for name in dict.fromkeys(result["name"] for result in of(results, rung="operation")):
        found = of(results, name=name)
        bare = of(results, rung="codec", picture=found[0]["picture"])
        more = paired(found, bare, lambda a, b: spent_us(a) - spent_us(b[0]))
        if more is not None:
            yield f"- {name}: {more:,.0f} µs of CPU over the codec's own {statistics.median(map(spent_us, bare)):,.0f}."
    disturbed = [result["others"] for result in results]
    yield (
        f"- Other processes and the kernel took {statistics.median(disturbed) * 100:.0f} % of the cores "
        f"(median; at most {max(disturbed) * 100:.0f} %)."
    )
    if starts := [result["start_seconds"] for result in of(results, rung="service")]:
        yield f"- From the command to a ready system: {statistics.median(starts):.2f} s (median of {len(starts)})."


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    results: Results = report["results"]
    rungs = [
        result
        for result in results
        if result["rung"] not in ("service", "baseline") and result["picture"] in ("", "empty", "1024x688")
    ]
    rungs += [result for result in of(results, **USUAL, **MAIN) if result["connections"] in (1, 16)]
    served, others = of(results, rung="service"), of(results, rung="baseline")
    bare = [result for result in results if result["rung"] in ("codec", "operation") and result not in rungs]
    pictures = ", ".join(
        f"{name} ({told['bytes']:,} bytes, {told['way']})" for name, told in report["pictures"].items()
    )
    parts = {
        "targets": target_rows(_targets(results)),
        "rungs": _speed(results, rungs),
        "served": _speed(results, [*served, *bare]),
        "others": _speed(results, others),
        "border": _border([result for result in [*rungs, *of(served, picture="1024x688")] if result["calls"]]),
        "memory": _memory([*served, *others]),
        "lines": list(_single_lines(results)),
    }
    filled = {name: "\n".join(lines) for name, lines in parts.items()}
    about = {"described": described(report["machine"]), "pictures": pictures, "command": report["command"]}
    return TEXT.format(**filled, **about, rounds=report["rounds"], seconds=report["seconds"])


TEXT = """# The ladder: where the time of a request goes

{described}
Service, broker and load generator share the cores. Rounds: {rounds}; {seconds} s of load a case, more for slow
pictures. What no target needs was measured in the first round alone, unless the command says `--full`.
Again: `{command}`.

Pictures: {pictures}.

## Targets

Each is a ratio or a difference within one round; the median of the rounds is told.

{targets}

## The ladder

`codec`: the bare codec on every core (`solo`: in one process); `operation`: all of `mirror`; `pool`: in the worker's
children, without a broker; `trip`: the broker's two ends alone, 16 in flight; `gateway`: a stub answers in the workers'
place, 16 connections; `store`: saving 89 KB; `skeleton`: the least Python that goes the whole way, without one of the
promises (`skeleton.py`), at 1 and 16 connections: what this machine leaves of the codec; `service`: all of it. CPU in
µs of a request, by kind of process, without the load generator's; the codec stands in the child's column, the stub in
the worker's.

![CPU time of a request on each rung](ladder.svg)

{rungs}

{lines}

## The whole service

Picture, operations, connections, broker. Latencies are wrk's, of a closed loop: a connection posts again when it was
answered. Every answer was 200, no process was lost, and as many images were saved as answers given: else there would
be no report. After the service stands the bare codec with the same pictures.

![Throughput and latency](load.svg)

{served}

## What others would write

![Images/s of the service and of the baselines](baselines.svg)

{others}

## At the kernel's border

Copies: how many times each byte of the image crossed it by reads and writes of a kind of process; calls: those reads
and writes. The broker's own count: commands, and reads and writes of its sockets; where messages are small a read is
a round trip, else it takes several for one.

{border}

## Memory

Largest resident set of one process, MB.

{memory}
"""
