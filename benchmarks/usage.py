"""What processes used, by kind: CPU time, calls and bytes at the kernel's border, peak memory; and what a broker did.

Bytes that crossed are those of read and write calls as /proc/PID/io counts them, for files, pipes and sockets. Each is
one copy of the kernel's. What goes through recv(2) and send(2) is not among them: event loops in C (uvloop, Redis)
read and write, a socket that Python itself reads does not count.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import redis
from system import BenchmarkError

from safelight.settings import usable_cores

__all__ = ["Usage", "look", "peak_megabytes", "used"]

Processes = dict[psutil.Process, str]
SERVER_COUNTERS = {
    "commands": "total_commands_processed",
    "reads": "total_reads_processed",
    "writes": "total_writes_processed",
}


@dataclass(frozen=True)
class Usage:
    """Sums since the processes' start, at one moment."""

    at: float
    busy: float
    cpu: Counter[str]
    calls: Counter[str]
    crossed: Counter[str]
    broker: Counter[str]


def look(processes: Processes, broker_url: str | None = None) -> Usage:
    cpu: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    crossed: Counter[str] = Counter()
    for process, kind in processes.items():
        try:
            times = process.cpu_times()
            cpu[kind] += times.user + times.system
            if hasattr(process, "io_counters"):  # Linux
                io = process.io_counters()
                calls[kind] += io.read_count + io.write_count
                crossed[kind] += io.read_chars + io.write_chars
        except psutil.NoSuchProcess:
            raise BenchmarkError(f"a process ({kind}) has ended while it was watched") from None
    return Usage(time.monotonic(), _busy_seconds(), cpu, calls, crossed, _broker_counters(broker_url))


def _busy_seconds() -> float:
    """CPU time of the whole machine so far: what is not ours in it disturbed us."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0) - getattr(times, "guest", 0)


def _broker_counters(url: str | None) -> Counter[str]:
    """What a Redis or Valkey did so far: commands, and reads and writes of its clients' sockets."""
    if url is None:
        return Counter()
    with redis.Redis.from_url(url, protocol=2) as server:
        info = server.info()
    return Counter({name: info[key] for name, key in SERVER_COUNTERS.items() if key in info})


def used(before: Usage, after: Usage, requests: float, image_bytes: int) -> dict[str, Any]:
    """Per request: CPU by kind in microseconds, calls, crossings of the image's bytes; shares of all cores."""
    seconds, cores = after.at - before.at, usable_cores()
    cpu = after.cpu - before.cpu
    busy = after.busy - before.busy
    result: dict[str, Any] = {
        "cpu_us": {kind: cpu[kind] / requests * 1e6 for kind in after.cpu},
        "calls": _each(after.calls - before.calls, requests),
        "server": _each(after.broker - before.broker, requests),
        "others": (busy - cpu.total()) / seconds / cores,
        "busy": busy / seconds / cores,
    }
    if image_bytes:
        result["crossings"] = _each(after.crossed - before.crossed, requests * image_bytes)
    return result


def _each(counted: Counter[str], requests: float) -> dict[str, float]:
    return {name: count / requests for name, count in counted.items()}


def peak_megabytes(processes: Processes) -> dict[str, float]:
    """The largest resident set of any process of a kind since its start (beyond Linux: the present one)."""
    peaks: dict[str, float] = {}
    for process, kind in processes.items():
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
        except OSError:
            peak = process.memory_info().rss / 1024 / 1024
        peaks[kind] = max(peaks.get(kind, 0.0), peak)
    return peaks
