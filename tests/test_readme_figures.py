"""The README's figures are those of the results that are committed."""

from __future__ import annotations

import json
import re
import statistics

from conftest import ROOT

NAMES = {
    "libjpeg-turbo": ("codec", ""),
    "**Safelight**": ("service", "embedded"),
    "FastAPI, Pillow in threads": ("baseline", "FastAPI + threads, no broker"),
    "mosec": ("baseline", "mosec"),
    "FastAPI, FastStream": ("baseline", "FastAPI + FastStream + Redis"),
    "Flask, Celery": ("baseline", "Flask + Celery + Redis"),
    "FastAPI, Taskiq": ("baseline", "FastAPI + Taskiq + Redis"),
}


def _median_rate(results: list[dict[str, object]], rung: str, broker: str, connections: int) -> int:
    chosen = [
        float(str(result["rate"]))
        for result in results
        if (result["rung"], result["picture"], result["broker"]) == (rung, "1024x688", broker)
        and result["connections"] in (0, connections)
        and result["operations"] in ("", "size,mirror")
    ]
    return round(statistics.median(chosen))


def test_the_table_of_speed() -> None:
    results = json.loads((ROOT / "benchmarks/results/ladder.json").read_text())["results"]
    text = (ROOT / "README.md").read_text().partition("## How fast")[2].partition("## ")[0]
    rows = [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if re.search(r"\d+\** \|$", line)]
    told = {next(name for name in NAMES if row[0].startswith(name)): row[1:] for row in rows}
    assert told.keys() == NAMES.keys()
    for name, (rung, broker) in NAMES.items():
        seen = [_median_rate(results, rung, broker, connections) for connections in (16, 64)]
        assert [int(cell.strip("*")) for cell in told[name]] == seen
