"""`python -m chaos` (`make chaos`): one run. Prints the table; exits with 1 if anything was lost, wrong or late."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chaos import servers, verdict
from chaos.clients import Load
from chaos.faults import FREEZE_LEASES, Faults
from chaos.images import TAG_BYTES
from chaos.servers import Fault
from chaos.system import System
from chaos.verdict import Injected, Verdict

LEASE = 5.0
FREEZE_SECONDS = {"rabbitmq": 20.0, "kafka": 20.0}  # longer than what these two call a lease
FULL = {"kill_consumer": 10, "kill_worker": 10, "kill_child": 20, "restart_broker": 3, "freeze_worker": 2}
PAUSE_SECONDS = (0.3, 1.5)  # between recovery from one fault and the next
RECOVERY_SECONDS = 75.0
EMPTY_SECONDS = 20.0


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--broker", choices=servers.KINDS, default="valkey")
    parser.add_argument("--requests", type=int, default=10_000, help="images, at least")
    parser.add_argument("--rate", type=float, default=20.0, help="images a second")
    parser.add_argument("--seed", type=int, default=1, help="of the faults, their order and their victims")
    parser.add_argument("--once", action="store_true", help="each fault once, not the numbers of a full run")
    parser.add_argument("--only", default="", help="faults by name, with commas between them, each once")
    parser.add_argument("--write", type=Path, help="the same as JSON")
    parser.add_argument("--logs", type=Path, help="folder for the logs of the parts")
    return parser.parse_args(words)


def schedule(faults: Faults, dice: random.Random, *, once: bool, only: str) -> list[Fault]:
    """The faults in their order."""
    known = {fault.__name__: fault for fault in faults.all}
    all_of_them = [name for name in known for _ in range(1 if once else FULL.get(name, 1))]
    chosen = [known[name] for name in only.split(",")] if only else [known[name] for name in all_of_them]
    dice.shuffle(chosen)
    return chosen


async def inject(fault: Fault, load: Load, dice: random.Random) -> Injected:
    """Do one fault, and wait until what was under way has been answered."""
    clock = asyncio.get_running_loop().time
    begun, under_way = clock(), load.waiting
    print(f"{fault.__name__} ...", file=sys.stderr)
    await fault()
    undone = clock()
    while any(not post.ended for post in under_way) and clock() - undone < RECOVERY_SECONDS:
        await asyncio.sleep(0.05)
    done = Injected(fault.__name__, begun, undone, under_way)
    note = f"{len(under_way)} were under way and answered {clock() - undone:.1f} s after its end"
    recovery = verdict.recoveries([done], verdict.starts_of(load.system.starts.read_text())).get(done.name)
    note += "" if recovery is None else f", started within {recovery:.1f} s"
    print(f"  done after {undone - begun:.1f} s: {note}; refused so far: {dict(load.refused)}", file=sys.stderr)
    await asyncio.sleep(dice.uniform(*PAUSE_SECONDS))
    return done


def quarantined(server: servers.Server) -> tuple[list[dict[str, Any]], Any]:
    """What `safelight quarantine list` tells, and a function that reads the tag of one job's image."""

    def command(*words: str) -> str:
        line = [sys.executable, "-m", "safelight", "quarantine", *words, "--broker", server.url("gateways")]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout

    def asked(job: str) -> str:
        with tempfile.NamedTemporaryFile() as file:
            command("save", job, "--out", file.name)
            image = Path(file.name).read_bytes()
        at = image.index(b"safelight-chaos ")
        return image[at : at + TAG_BYTES][-4:].decode()

    return json.loads(command("list", "--json")), asked


async def run(options: argparse.Namespace, folder: Path) -> Verdict:
    """One run, from start to verdict."""
    dice = random.Random(options.seed)
    server = servers.make(options.broker, folder)
    system = System(server, folder, LEASE)
    load = Load(system, options.rate, random.Random(options.seed + 1))
    injected: list[Injected] = []
    try:
        await system.start()
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run())
            while not any(post.outcome == "200" for post in load.posts):
                await asyncio.sleep(0.05)
            faults = Faults(system, dice, FREEZE_SECONDS.get(options.broker, FREEZE_LEASES * LEASE))
            for fault in schedule(faults, dice, once=options.once, only=options.only):
                injected.append(await inject(fault, load, dice))  # noqa: PERF401 - what was done before one fails counts
            while load.images < options.requests:
                await asyncio.sleep(0.1)
            load.stop()
        sentences = await leftovers(system)
        records, asked = await asyncio.to_thread(quarantined, server)
        known = {post.job for post in load.posts}
        marks = {r["id"]: await asyncio.to_thread(asked, r["id"]) for r in records if r["id"] not in known}
        sentences += await system.end()
        sentences += verdict.on_disk(system.stores, load.posts)
    finally:
        if options.logs:
            await asyncio.to_thread(copy_logs, folder, options.logs)
        await system.clear()
    deaths = {number: gateway.killed_at for number, gateway in enumerate(system.gateways)}
    starts = verdict.starts_of(system.starts.read_text())
    found = verdict.judge(load.posts, injected, starts, deaths, server.recovery)
    found.sentences += sentences + verdict.in_quarantine(records, load.posts, injected, marks)
    return found


def copy_logs(folder: Path, target: Path) -> None:
    """Keep what the parts said."""
    target.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("*.log"):
        shutil.copy(log, target)


async def leftovers(system: System) -> list[str]:
    """Jobs that are still on the broker although every client was answered."""
    until = time.monotonic() + EMPTY_SECONDS
    jobs = system.server.jobs
    while (backlog := await system.backlog() or await asyncio.to_thread(jobs)) and time.monotonic() < until:
        await asyncio.sleep(0.2)
    return [f"{backlog:.0f} jobs are left on the broker"] if backlog else []


def main() -> None:
    """Run, print, write, and exit."""
    options = arguments()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="safelight-chaos-") as folder:
        found = asyncio.run(run(options, Path(folder)))
    print(f"{options.broker}, seed {options.seed}, {time.monotonic() - begun:.0f} s\n\n{found.table()}")
    if options.write:
        told = {"broker": options.broker, "seed": options.seed} | found.plain()
        options.write.write_text(json.dumps(told, indent=1) + "\n")
    sys.exit(1 if found.sentences else 0)


if __name__ == "__main__":
    main()
