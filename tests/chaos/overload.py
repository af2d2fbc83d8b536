"""Ten times the capacity for a minute, then big and small images together: what stays as promised, as a table.

    PYTHONPATH=tests python -m chaos.overload [--broker URL] [--seconds 60] [--factor 10] [--megapixels 12]
                                              [--only small|photograph|mix]   (`make overload`: all)

It starts a whole system by `safelight up` and finds its peak with 16 clients that wait for each answer, twice: as
those that come in overload (a connection for each request, a body when it is asked for), which is what their goodput
is judged by, and on connections that stay. Then come ten times as many clients as may be in flight, which heed
`Retry-After`; then ten times the peak from clients that heed nothing, with the test image (told, not judged: refusing
so many takes a part of two cores that the generator shares) and with a photograph of so many megapixels. Each request
has a connection of its own, sends its head with `Expect: 100-continue` and waits: what is refused never sends a body.
Generator and system share the cores, so each one's share is told. It exits with 1 when a bound is broken.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
from conftest import TEST_IMAGE, System, start_system
from PIL import Image

from chaos.load import Load, Picture, crowd, offer, repeat
from safelight.settings import Gateway

MEGABYTE = 1024 * 1024
PEAK_CONNECTIONS = 16
MOST_OPEN = 4_000
TIMEOUT_SECONDS = 20  # of each request in overload
BIG_SIDE = 7_072  # 50 megapixels
CONNECTION_BYTES = 64 * 1024  # of a gateway for each client that is connected
SLACK = 64 * MEGABYTE  # what an allocator keeps, and code that is read in when it is needed first


@dataclass(frozen=True)
class Row:
    """One line of the table; `ok` is None where nothing was promised."""

    what: str
    found: str
    bound: str = ""
    ok: bool | None = None


@dataclass(frozen=True)
class Crowd:
    """Who comes: `factor` times the peak, or times what may be in flight if they heed `Retry-After`."""

    factor: float
    heeds: bool
    strict: bool = True


def percentile(values: list[float], hundredth: int) -> float:
    """The smallest of them that so many hundredths are not above."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * hundredth // 100) - 1)] if ordered else 0.0


@dataclass(frozen=True)
class Rates:
    """Answers a second at the peak: of clients as they come in overload, and of those whose connections stay."""

    alike: float
    staying: float

    def __str__(self) -> str:
        return f"{self.alike:.0f}/s, on connections that stay {self.staying:.0f}/s"


def judged(peak: Rates, load: Load, until: float, seconds: float, *, strict: bool) -> list[Row]:
    """An overload beside what is promised; not `strict`: some is told, not judged."""
    good = [answer for answer in load.with_status(200) if answer.at <= until]
    refused = load.with_status(503)
    others = {status: count for status, count in load.statuses.items() if status not in (200, 503)}
    latencies = [answer.seconds for answer in refused]
    goodput, median = len(good) / seconds, percentile(latencies, 50)
    early = sum(not answer.was_asked for answer in refused)
    told = Counter(answer.retry_after for answer in refused)
    slowest = max((answer.admitted_seconds for answer in load.with_status(200)), default=0.0)
    offered = len(load.answers) / seconds
    return [
        Row(
            "requests",
            f"{offered:.0f}/s, {offered / peak.alike:.1f} x the peak; {load.not_offered} more had no connection",
        ),
        Row("open at once", f"{load.most_open} connections"),
        Row(
            "goodput",
            f"{goodput:.0f}/s, {goodput / peak.alike:.0%} of the peak ({goodput / peak.staying:.0%} of the other one)",
            ">= 90 %",
            goodput >= 0.9 * peak.alike if strict else None,
        ),
        Row("refused", f"{len(refused)}", "some", bool(refused)),
        Row(
            "median of a refusal",
            f"{median * 1e3:.1f} ms, 99th percentile {percentile(latencies, 99) * 1e3:.0f} ms",
            "<= 50 ms",
            median <= 0.05 if strict else None,
        ),
        Row("refused before the body", f"{early} of {len(refused)}", "all", early == len(refused)),
        Row("Retry-After", _distribution(told), "on each, 1 to 30", _are_told(told)),
        Row("slowest admitted", f"{slowest:.2f} s", f"<= {TIMEOUT_SECONDS} s", slowest <= TIMEOUT_SECONDS),
        Row("neither answered nor refused", f"{others or 'none'}", "none", not others),
    ]


def _distribution(told: Counter[str]) -> str:
    return ", ".join(
        f"{value or 'none'}: {count}" for value, count in sorted(told.items(), key=lambda t: t[0].zfill(3))
    )


def _are_told(told: Counter[str]) -> bool:
    return all(value.isdigit() and 1 <= int(value) <= 30 for value in told)


def memory(system: System, base: dict[str, float], held: int, connections: int, pixels: int) -> list[Row]:
    """The most memory that each kind of process ever had, beside its bound; `held` bytes of images at once."""
    bounds = {
        "gateway": (2 * held + connections * CONNECTION_BYTES, f"2 x {held / MEGABYTE:.0f} held + connections"),
        "worker": (4 * held, f"4 x {held / MEGABYTE:.0f}"),
        "safelight.worker.child": (8 * pixels, f"8 bytes x {pixels / 1e6:.1f} megapixels"),
        "valkey-server": (4 * held, f"4 x {held / MEGABYTE:.0f}"),
    }
    rows = []
    for kind, found in peaks(system).items():
        more, told = bounds[kind]
        bound = base[kind] + more + SLACK
        rows.append(
            Row(
                f"memory of {kind}",
                f"{found / MEGABYTE:.0f} MB",
                f"<= {bound / MEGABYTE:.0f} MB: {base[kind] / MEGABYTE:.0f} at first + {told} + {SLACK // MEGABYTE}",
                found <= bound,
            )
        )
    return rows


def peaks(system: System) -> dict[str, float]:
    """The largest peak of resident bytes among the processes of each kind."""
    found = {}
    for kind in ("gateway", "worker", "safelight.worker.child", "valkey-server"):
        statuses = [Path(f"/proc/{part.pid}/status").read_text() for part in system.parts(kind)]
        if statuses:
            found[kind] = max(int(status.partition("VmHWM:")[2].split()[0]) * 1024 for status in statuses)
    return found


def cpu(system: System) -> Counter[str]:
    """Seconds of CPU so far, by kind of process."""
    found: Counter[str] = Counter({"generator": sum(resource.getrusage(resource.RUSAGE_SELF)[:2])})
    for kind in ("gateway", "worker", "safelight.worker.child", "valkey-server"):
        found[kind] = sum(sum(part.cpu_times()[:2]) for part in system.parts(kind))
    return found


def _shares(before: Counter[str], after: Counter[str], seconds: float) -> str:
    return ", ".join(f"{kind.rpartition('.')[2]} {(after[kind] - before[kind]) / seconds:.2f}" for kind in after)


class Peak:
    """The most that the system answers in a second, looked for again after each overload."""

    def __init__(self, system: System, seconds: float, image: bytes) -> None:
        self._system = system
        self.seconds = seconds
        self._image = image
        self.last: Rates | None = None

    def again(self) -> Rates:
        """The mean of this time and the last."""
        now = Rates(self._found(stays=False), self._found(stays=True))
        before, self.last = self.last or now, now
        return Rates(
            statistics.mean([before.alike, now.alike]),
            statistics.mean([before.staying, now.staying]),
        )

    def _found(self, *, stays: bool) -> float:
        picture = Picture(self._image, asks=not stays)
        load = repeat(self._system.port, {picture: PEAK_CONNECTIONS}, seconds=self.seconds / 2, stays=stays)[picture]
        return len(load.with_status(200)) / (self.seconds / 2)


def overload(system: System, image: bytes, crowds: list[Crowd], seconds: float) -> bool:
    """One crowd after the other, all with the same image; whether no bound is broken."""
    picture = Picture(image, target=f"/query?timeout={TIMEOUT_SECONDS}")
    peak = Peak(system, max(6, seconds / 2), image)
    peak.again()  # warm
    base, before = peaks(system), cpu(system)
    rates = peak.again()
    fine, connections = True, 0
    shares = _shares(before, cpu(system), peak.seconds)
    width, height = Image.open(io.BytesIO(image)).size
    what = f"{width * height / 1e6:.1f} megapixels, {len(image) / MEGABYTE:.1f} MB"
    print(f"\n{what}: peak {peak.last} ({PEAK_CONNECTIONS} clients); cores: {shares}")
    for each in crowds:
        before, begun = cpu(system), time.perf_counter()
        if each.heeds:
            clients = round(each.factor * Gateway.max_jobs)
            title = f"{clients} clients that heed Retry-After: {each.factor:g} times what may be in flight"
            load = crowd(system.port, picture, clients=clients, seconds=seconds, rush=seconds / 6)
        else:
            title = f"{each.factor:g} times the peak, each on a new connection, heeding nothing"
            load = offer(system.port, [picture], rate=each.factor * rates.alike, seconds=seconds, most_open=MOST_OPEN)
        used = Row("cores", _shares(before, cpu(system), time.perf_counter() - begun))
        rates = peak.again()
        rows = judged(rates, load, begun + seconds, seconds, strict=each.strict)
        connections = max(connections, load.most_open)
        fine &= printed(title, [Row("peak afterwards", f"{peak.last}"), used, *rows])
    held = min(Gateway.max_bytes, Gateway.max_jobs * len(image))
    return fine & printed("memory", memory(system, base, held, connections, width * height))


def photograph(megapixels: int) -> bytes:
    """Four by three, its sides whole numbers of blocks."""
    unit = round((megapixels * 1e6 / 12) ** 0.5 / 16) * 16
    out = io.BytesIO()
    Image.open(TEST_IMAGE).resize((4 * unit, 3 * unit)).save(out, "JPEG", quality=90)
    return out.getvalue()


def big_png() -> bytes:
    """A photograph of 50 megapixels, as hard to unpack as one that was scanned."""
    out = io.BytesIO()
    Image.open(TEST_IMAGE).resize((BIG_SIDE, BIG_SIDE)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def mix(system: System, seconds: float) -> list[Row]:
    small = Picture(TEST_IMAGE.read_bytes(), asks=False)
    big = Picture(big_png(), target="/query?timeout=120", asks=False)
    alone = repeat(system.port, {small: 4}, seconds=seconds / 4)[small]
    both = repeat(system.port, {small: 4, big: 4}, seconds=seconds)
    rows = []
    found = {"alone": alone, "beside big ones": both[small]}
    for name, load in found.items():
        times = [answer.seconds for answer in load.with_status(200)]
        told = f"median {percentile(times, 50) * 1e3:.0f} ms, 99th percentile {percentile(times, 99) * 1e3:.0f} ms"
        rows.append(Row(f"small ones {name}", f"{told}, {dict(load.statuses)}", "all 200", set(load.statuses) == {200}))
    times = [answer.seconds for answer in both[big].with_status(200)]
    rows.append(
        Row(
            "big ones",
            f"{len(big.image) / MEGABYTE:.0f} MB, median {percentile(times, 50):.1f} s, {dict(both[big].statuses)}",
            "all 200",
            set(both[big].statuses) == {200},
        )
    )
    late = percentile([answer.seconds for answer in both[small].answers], 99)
    rows.append(Row("a small one beside big ones, 99th", f"{late * 1e3:.0f} ms", "< 1 s", late < 1))
    return rows


def printed(title: str, rows: list[Row]) -> bool:
    """Show a table; whether no bound is broken."""
    print(f"\n{title}\n")
    width = max(len(row.what) for row in rows)
    for row in rows:
        sign = {None: " ", True: "+", False: "!"}[row.ok]
        print(f"{sign} {row.what:{width}}  {row.found}{f'   [{row.bound}]' if row.bound else ''}", flush=True)
    return all(row.ok is not False for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--broker", help="URL; without: the embedded one")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--factor", type=float, default=10)
    parser.add_argument("--megapixels", type=int, default=12, help="of the photograph")
    parser.add_argument("--only", choices=["small", "photograph", "mix"])
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    os.environ["SAFELIGHT_WORK_LIMIT"] = "60"  # a big picture takes several seconds, on a busy machine more
    factor, seconds = options.factor, options.seconds
    print(f"{psutil.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before anything was started")
    fine = True
    with tempfile.TemporaryDirectory(prefix="sl-", dir="/tmp") as folder:
        system = start_system(Path(folder), *(["--broker", options.broker] if options.broker else []))
        try:
            if options.only in (None, "small"):
                crowds = [Crowd(factor, heeds=True), Crowd(factor, heeds=False, strict=False)]
                fine &= overload(system, TEST_IMAGE.read_bytes(), crowds, seconds)
            if options.only in (None, "photograph"):
                image = photograph(options.megapixels)
                fine &= overload(system, image, [Crowd(factor, heeds=False)], seconds)
            if options.only in (None, "mix"):
                fine &= printed("Big and small together", mix(system, seconds))
        finally:
            system.stop()
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
