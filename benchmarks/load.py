"""A system under wrk: warmed, loaded, watched in the middle, checked. A failure of any kind is no result.

The middle, because a load's end is not like it: wrk leaves without waiting for its last answers, and a worker that is
at work on a request whose client has left kills its child.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from codec import is_mirrored
from service import broker_url, is_ready
from system import BenchmarkError, Place, Running, System, fetch, running, wait_until
from usage import look, peak_megabytes, used

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Load", "posted", "request_of", "run", "under_load"]

POST = Path(__file__).parent / "post.lua"
BOUNDARY = "safelight-benchmark-boundary"
MEDIA_TYPES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PN": "image/png", b"RIF": "image/webp"}
WARM_UP_REQUESTS = 20
WARM_UP_SECONDS = 1.5
EDGES = 0.15  # of a case's time at each end, in which nothing is counted
IDLE_SECONDS = 0.3
NO_FAILURES = {"success", "client_left", "workers", "in_flight_jobs"}  # of what a system counts


@dataclass(frozen=True)
class Load:
    """What is posted, and by how many connections for how long."""

    body: Path
    media_type: str
    connections: int
    seconds: float
    query: str = ""

    def post(self, port: int, path: str) -> int:
        """The status of one such request."""
        return fetch(port, path + self.query, self.body.read_bytes(), self.media_type)[0]

    def wrk(self, url: str) -> subprocess.Popen[str]:
        flags = ["-t1", f"-c{self.connections}", f"-d{round(self.seconds)}s", "--timeout", "60s"]
        command = ["wrk", *flags, "-s", str(POST), url + self.query, "--", str(self.body), self.media_type]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def request_of(image: bytes, *, raw: bool) -> tuple[bytes, str]:
    """The body that posts this image, and its media type: the image itself, or a form with its part `image`."""
    media_type = MEDIA_TYPES[image[:3]]
    if raw:
        return image, media_type
    lines = [
        f"--{BOUNDARY}",
        'Content-Disposition: form-data; name="image"; filename="image"',
        f"Content-Type: {media_type}\r\n\r\n",
    ]
    body = b"".join(["\r\n".join(lines).encode(), image, f"\r\n--{BOUNDARY}--\r\n".encode()])
    return body, f"multipart/form-data; boundary={BOUNDARY}"


def posted(folder: Path, image: bytes, *, raw: bool = False, query: str = "") -> Callable[[int, float], Load]:
    """A `Load` of this image, for so many connections and seconds."""
    body, media_type = request_of(image, raw=raw)
    descriptor, path = tempfile.mkstemp(dir=folder, prefix="body-")
    with os.fdopen(descriptor, "wb") as file:
        file.write(body)
    return lambda connections, seconds: Load(Path(path), media_type, connections, seconds, query)


def run(
    system: System, folder: Path, load: Load, image: bytes, mirrored: bytes | None, *, workers: int = 0
) -> dict[str, Any]:
    """One case: the system started anew, warmed, loaded, checked. `mirrored` is None if nothing is to be saved."""

    def probe(place: Place) -> bool:
        if system.counts is not None:
            return is_ready(place)
        return load.post(place.port, system.path) == 200

    with running(system, folder, probe=probe, workers=workers) as now:
        warm(now, load)
        before = now.counts()
        used_there = under_load(
            now.parts.processes,
            lambda: [load.wrk(now.url)],
            lambda: now.counts()["success"],
            seconds=load.seconds,
            image_bytes=len(image),
            url=broker_url(now.place),
        )
        wait_until(lambda: _is_idle(now))
        after = now.counts()
        check(used_there["requests"], before, after, load.connections)
        check_store(now.place.store, image, mirrored, int(after["success"]), exact=system.counts is not None)
        return used_there | {"saved": int(after["success"]) if mirrored else 0, "start_seconds": now.start_seconds}


def warm(now: Running, load: Load) -> None:
    """Some requests one after the other, fewer if they take long: each worker has worked."""
    until = time.monotonic() + WARM_UP_SECONDS
    for number in range(WARM_UP_REQUESTS):
        if load.post(now.place.port, now.system.path) != 200:
            raise BenchmarkError(f"{now.system.name} does not answer a single request with 200")
        if time.monotonic() > until and number >= 2 * now.place.workers:
            return


def under_load(
    processes: Callable[[], dict[psutil.Process, str]],
    start: Callable[[], Sequence[subprocess.Popen[str]]],
    successes: Callable[[], float],
    *,
    seconds: float,
    image_bytes: int,
    url: str | None,
) -> dict[str, Any]:
    """What wrk saw, and what each request used, by kind of process, in the middle of the load."""
    watched = processes()
    wrks, begun = start(), time.monotonic()
    time.sleep(seconds * EDGES)
    loaders = {psutil.Process(wrk.pid): "wrk" for wrk in wrks}
    answered, before = successes(), look(watched | loaders, url)
    time.sleep(max(0.0, begun + seconds * (1 - EDGES) - time.monotonic()))
    requests, after = successes() - answered, look(watched | loaders, url)
    if (there := processes()) != watched:
        raise BenchmarkError(f"processes were {sorted(watched.values())}, then {sorted(there.values())}")
    found = used(before, after, max(requests, 1), image_bytes) | {"peak_mb": peak_megabytes(watched)}
    seen = [json.loads(wrk.communicate()[0].splitlines()[-1]) for wrk in wrks]
    errors = [saw["errors"] for saw in seen if any(saw["errors"].values())]
    if errors or requests <= 0:
        raise BenchmarkError(f"wrk saw errors, or no answer in {after.at - before.at:.1f} s: {errors}")
    return found | {
        "requests": sum(saw["requests"] for saw in seen),
        "steady_rate": requests / (after.at - before.at),
        "rate": sum(saw["requests"] / saw["microseconds"] for saw in seen) * 1e6,
        "p50_us": max(saw["p50_us"] for saw in seen),
        "p99_us": max(saw["p99_us"] for saw in seen),
    }


def _is_idle(now: Running) -> bool:
    before = now.counts()
    time.sleep(IDLE_SECONDS)
    return before == now.counts() and not before.get("in_flight_jobs")


def check(read: int, before: dict[str, float], after: dict[str, float], connections: int) -> None:
    """Every request was a success. wrk leaves at its end: each connection may have one that it did not wait for."""
    if failed := {name: count for name, count in after.items() if count and name not in NO_FAILURES}:
        raise BenchmarkError(f"the gateway counted failures: {failed}")
    ended, begun = (counts["success"] + counts.get("client_left", 0) for counts in (after, before))
    unread = ended - begun - read
    if not 0 <= unread <= connections:
        raise BenchmarkError(f"wrk read {read} answers, {unread:+.0f} of the successes")


def check_store(store: Path, image: bytes, mirrored: bytes | None, successes: int, *, exact: bool) -> None:
    """As many files as successes; ours are as long as the mirrored image, and one of them is it, or looks like it."""
    with os.scandir(store) as entries:
        sizes = [(entry.stat().st_size, entry.path) for entry in entries]
    if len(sizes) != (successes if mirrored else 0):
        raise BenchmarkError(f"{successes} successes, but {len(sizes)} files in the store")
    if not mirrored:
        return
    last = Path(sizes[-1][1]).read_bytes()
    if exact and (last != mirrored or any(size != len(mirrored) for size, _ in sizes)):
        raise BenchmarkError("a saved image is not the mirrored one")
    if not is_mirrored(image, last):
        raise BenchmarkError("a saved image is not the mirror of the one that was posted")
