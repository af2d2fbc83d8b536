"""The plots of a report, as SVG; the same results give the same bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from report import COLUMNS, by_column, median, of

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

__all__ = ["ladder", "scale"]

COLOURS = {"gateway": "#c0392b", "broker": "#e59866", "worker": "#5d6d7e", "child": "#aab7b8", "supervisor": "#eaeded"}
USUAL = {"rung": "service", "picture": "1024x688", "broker": "embedded"}


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = [figure.add_subplot(1, columns, number + 1) for number in range(columns)]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    with mpl.rc_context({"svg.hashsalt": "safelight", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def ladder(report: dict[str, Any], folder: Path) -> None:
    """`bench.py`'s; each only if what it shows was measured."""
    results = report["results"]
    rungs = [result for result in results if result["rung"] not in ("service", "baseline", "solo")]
    rungs = [result for result in rungs if result["picture"] in ("", "empty", "1024x688")]
    rungs += [result for result in of(results, operations="size,mirror", **USUAL) if result["connections"] in (1, 16)]
    if rungs:
        _bars(rungs, folder / "ladder.svg")
    if of(results, rung="baseline", picture="1024x688"):
        _beside(results, folder / "baselines.svg")
    if of(results, **USUAL):
        _loads(of(results, **USUAL), folder / "load.svg")


def _bars(rungs: list[dict[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(result["name"] for result in rungs))
    figure, [axes] = _figure(9, 0.6 + 0.34 * len(names))
    spent = [by_column(of(rungs, name=name), "cpu_us") for name in names]
    left = [0.0] * len(names)
    for kind in COLUMNS:
        widths = [found.get(kind, 0.0) for found in spent]
        axes.barh(names, widths, left=left, label=kind, color=COLOURS[kind])
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("CPU of a request, µs")
    axes.legend(frameon=False)
    _save(figure, path)


def _beside(results: list[dict[str, Any]], path: Path) -> None:
    baselines = of(results, rung="baseline", picture="1024x688")
    counts = sorted({result["connections"] for result in baselines})
    figure, axes = _figure(5.5 * len(counts), 3.2, columns=len(counts))
    for each, count in zip(axes, counts, strict=True):
        chosen = of(results, picture="1024x688", operations="size,mirror", connections=count)
        names = ["safelight", *dict.fromkeys(result["broker"] for result in of(chosen, rung="baseline"))]
        found = {name: of(chosen, rung="baseline", broker=name) for name in names}
        found["safelight"] = of(chosen, **USUAL)
        found = {name: rows for name, rows in found.items() if rows}
        each.barh(list(found), [median(rows, "rate") for rows in found.values()], color=COLOURS["gateway"])
        if codec := of(results, rung="codec", picture="1024x688"):
            each.axvline(median(codec, "rate"), color="black", linestyle=":", label="the codec alone")
            each.legend(frameon=False, loc="lower right")
        each.invert_yaxis()
        each.set_xlabel(f"images/s, {count} connections")
    _save(figure, path)


def _ticks(axes: Axes, counts: list[int]) -> None:
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()


def _loads(results: list[dict[str, Any]], path: Path) -> None:
    figure, [rates, latencies] = _figure(11, 3.6, columns=2)
    for operations, colour in (("size,mirror", COLOURS["gateway"]), ("size", COLOURS["worker"])):
        chosen = of(results, operations=operations)
        counts = sorted({result["connections"] for result in chosen})
        found = [of(chosen, connections=count) for count in counts]
        rates.plot(counts, [median(rows, "rate") for rows in found], "o-", color=colour, label=operations)
        for key, style in (("p50_us", "o-"), ("p99_us", "o:")):
            values = [median(rows, key) / 1e3 for rows in found]
            latencies.plot(counts, values, style, color=colour, label=f"{operations}, {key.removesuffix('_us')}")
    rates.set(xscale="log", xlabel="connections", ylabel="requests/s", ylim=(0, None))
    latencies.set(xscale="log", yscale="log", xlabel="connections", ylabel="ms")
    for each in (rates, latencies):
        _ticks(each, sorted({result["connections"] for result in results}))
        each.legend(frameon=False)
    _save(figure, path)


def scale(report: dict[str, Any], folder: Path) -> None:
    """`scale.py`'s."""
    if scaling := report["scaling"]:
        figure, [rates, shares] = _figure(11, 3.6, columns=2)
        for broker in dict.fromkeys(result["broker"] for result in scaling):
            for wait_ms in sorted({result["wait_ms"] for result in scaling}):
                found = of(scaling, broker=broker, wait_ms=wait_ms)
                counts = [result["instances"] for result in found]
                label = f"{broker}, {wait_ms} ms"
                rates.plot(counts, [result["rate"] for result in found], "o-", label=label)
                shares.plot(counts, [result["linear"] * 100 for result in found], "o-", label=label)
        rates.set(xscale="log", yscale="log", xlabel="worker instances", ylabel="requests/s")
        shares.axhline(95, color="black", linestyle=":")
        shares.set(xscale="log", xlabel="worker instances", ylabel="% of linear", ylim=(0, 105))
        counts = sorted({result["instances"] for result in scaling})
        for each in (rates, shares):
            _ticks(each, counts)
        rates.legend(frameon=False)
        _save(figure, folder / "scaling.svg")
    if cost := report["cost"]:
        figure, [axes] = _figure(7, 4)
        for operations, fit in report["fits"].items():
            found = of(cost, operations=operations)
            sizes = [result["bytes"] for result in found]
            [points] = axes.plot(sizes, [result["request_us"] for result in found], "o", label=operations)
            line = [fit["us_a_byte"] * size + fit["us_a_request"] for size in sizes]
            axes.plot(sizes, line, color=points.get_color())
        axes.set(xlabel="bytes of the image", ylabel="CPU of a request, µs", xscale="log", yscale="log")
        axes.legend(frameon=False)
        _save(figure, folder / "cost.svg")
