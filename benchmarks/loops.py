"""Rungs below the whole service: a part of it in a loop, in a process of its own that says when it is warm.

The process prints a line, waits for one, runs its loop, prints what it found as JSON, and waits again until its CPU
time was read. `ready` and `told` are its side, `looped` is the run's.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil
from system import BenchmarkError, Part
from usage import look, peak_megabytes, used

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["looped", "ready", "told"]


def ready() -> None:
    """Say that this process is warm, and wait for the word to go."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()


def told(spent_ns: Sequence[int], begun_ns: int, cpu_begun_ns: int) -> None:
    """Say how long each call took. The CPU time is this process's own, more exactly than others can see it."""
    cpu_us = (time.process_time_ns() - cpu_begun_ns) / len(spent_ns) / 1_000
    percentiles = statistics.quantiles(spent_ns, n=100)
    result = {
        "count": len(spent_ns),
        "seconds": (time.perf_counter_ns() - begun_ns) / 1e9,
        "p50_us": percentiles[49] / 1_000,
        "p99_us": percentiles[98] / 1_000,
        "cpu_us": cpu_us,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    sys.stdin.readline()


def looped(
    part: Part,
    count: int = 1,
    *,
    image_bytes: int,
    also: Callable[[], dict[psutil.Process, str]] = dict,
    broker_url: str | None = None,
) -> dict[str, Any]:
    """What `count` processes of this part found together; CPU and memory of `also` are told with theirs."""
    loops = [_started(part) for _ in range(count)]
    try:
        for loop in loops:
            _heard(loop)
        processes = {each: kind for loop in loops for each, kind in _family(loop, part.kind).items()} | also()
        before = look(processes, broker_url)
        for loop in loops:
            loop.stdin.write("go\n")
            loop.stdin.flush()
        results = [json.loads(_heard(loop)) for loop in loops]
        after = look(processes, broker_url)
        peaks = peak_megabytes(processes)
        for loop in loops:
            loop.communicate("done\n")
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    found = used(before, after, sum(result["count"] for result in results), image_bytes)
    found["cpu_us"][part.kind] = statistics.median(result["cpu_us"] for result in results)
    return found | {
        "rate": sum(result["count"] / result["seconds"] for result in results),
        "p50_us": statistics.median(result["p50_us"] for result in results),
        "p99_us": statistics.median(result["p99_us"] for result in results),
        "peak_mb": peaks,
    }


def _started(part: Part) -> subprocess.Popen[str]:
    return subprocess.Popen(part.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _heard(loop: subprocess.Popen[str]) -> str:
    if not (line := loop.stdout.readline()):
        raise BenchmarkError(f"ended early: {loop.args}")
    return line


def _family(loop: subprocess.Popen[str], kind: str) -> dict[psutil.Process, str]:
    top = psutil.Process(loop.pid)
    return {top: kind} | dict.fromkeys(top.children(recursive=True), "child")
