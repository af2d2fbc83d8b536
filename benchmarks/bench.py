"""Measures where each microsecond of a request goes, on this machine, in one run: python benchmarks/bench.py.

The ladder: the codec in a bare loop on every core, the operation, the worker's child, a round trip over the broker,
the gateway alone, the whole service started anew for each case; and beside it what others would write (`baselines/`).
Cases have their turn round by round. Load generator and service share the cores. A case in which anything failed ends
the run without a result. Written to `results/ladder.json`, `results/ladder.md` and plots.

Saved images are deleted at the end of the run alone. Leave five minutes between two runs on one ext4: until then it
searches around the inodes that were deleted (`recently_deleted` in fs/ext4/ialloc.c), which each new file pays for.
"""

from __future__ import annotations

import fnmatch
import shutil
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import baselines
import plots
from cases import cases
from measure import Case, Ground, prepared
from output import options_of, run
from report import markdown

if TYPE_CHECKING:
    import argparse
    from pathlib import Path


def measured(ground: Ground, chosen: list[Case], rounds: int) -> list[dict[str, Any]]:
    """All results, each with its case's name, facts and round."""
    results = []
    for number in range(1, rounds + 1):
        for case in chosen:
            if case.every_round or number == 1:
                found = case.run(ground)
                results.append({"round": number} | _facts(case) | found)
                print(
                    f"round {number}  {case.name:44} {found['rate']:8.0f}/s  {found['p50_us'] / 1e3:8.2f} ms",
                    flush=True,
                )
    return results


def _facts(case: Case) -> dict[str, Any]:
    names = [field.name for field in fields(Case) if field.name not in ("run", "every_round")]
    return {name: getattr(case, name) for name in names}


def ladder(folder: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """All that was asked for, or None if it was the list of cases."""
    ground = Ground(folder, prepared(folder), options.seconds)
    table = list(cases(ground.pictures, full=options.full))
    chosen = [case for case in table if not options.only or any(fnmatch.fnmatch(case.name, o) for o in options.only)]
    if options.list:
        print(*(case.name for case in chosen), sep="\n")
        return None
    if any(case.rung == "baseline" for case in chosen) and not baselines.ready():
        baselines.install()
    pictures = {name: {"bytes": len(picture.image), "way": picture.way} for name, picture in ground.pictures.items()}
    return {"pictures": pictures, "results": measured(ground, chosen, options.rounds)}


def main() -> None:
    parser = options_of(__doc__, seconds=2, rounds=3)
    parser.add_argument("--full", action="store_true", help="every picture, operation, load and broker with each other")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="cases by name, as in service/*/16/*"
    )
    parser.add_argument("--list", action="store_true", help="print the cases' names")
    options = parser.parse_args()
    for program in ("wrk", "redis-server"):
        if shutil.which(program) is None:
            raise SystemExit(f"bench: {program} is needed: apt-get install wrk redis-server, or brew install wrk redis")
    run(
        "bench",
        options,
        lambda folder: ladder(folder, options),
        name="ladder",
        markdown=markdown,
        plot=plots.ladder,
    )


if __name__ == "__main__":
    main()
