"""The supervisor's part: started again when it dies, given up when that is of no use."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from conftest import wait_until

from safelight import supervisor
from safelight.errors import ConfigurationError
from safelight.supervisor import Part


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RESTART_SECONDS", 0.001)


def _part(folder: Path, end: str, begin: str = "pass") -> Part:
    """A part whose every start writes a line between its beginning and its end."""
    script = f"{begin}; open({str(folder / 'starts')!r}, 'a').write('.\\n'); {end}"
    return Part("part", lambda _: [sys.executable, "-c", script])


def _starts(folder: Path) -> int:
    path = folder / "starts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_five_deaths_within_a_minute_end_it_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"The part died 5 times within a minute \(exit code 7\)"):
        asyncio.run(_part(tmp_path, "raise SystemExit(7)").keep())
    assert _starts(tmp_path) == 5


def test_what_cannot_work_as_it_is_set_up_is_not_started_again(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="The part cannot run as it is set up"):
        asyncio.run(_part(tmp_path, "raise SystemExit(2)").keep())
    assert _starts(tmp_path) == 1


def test_deaths_far_apart_are_borne(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "DEATHS_SECONDS", 0.0)

    async def live() -> None:
        part = _part(tmp_path, "raise SystemExit(7)")
        keeping = asyncio.create_task(part.keep())
        await asyncio.to_thread(wait_until, lambda: _starts(tmp_path) > 7)
        await part.end()
        await keeping

    asyncio.run(live())


def test_a_part_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 0.2)

    async def live() -> int | None:
        deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
        part = _part(tmp_path, "import time; time.sleep(60)", deaf)
        keeping = asyncio.create_task(part.keep())
        await asyncio.to_thread(wait_until, lambda: _starts(tmp_path) == 1)
        await part.end()
        await keeping
        return part.process.returncode if part.process else None

    assert asyncio.run(live()) == -9


def test_a_part_has_ended_when_the_last_process_that_it_left_has(tmp_path: Path) -> None:
    script = f"""
import os, pathlib, sys, time
folder, lifeline = pathlib.Path({str(tmp_path)!r}), int(sys.argv[1])
if os.fork() == 0:
    (folder / "starts").write_text(".")
    os.read(lifeline, 1)
    time.sleep(0.3)
    (folder / "gone").write_text(".")
    os._exit(0)
os.close(lifeline)
time.sleep(60)
"""

    async def live() -> None:
        part = Part("part", lambda lifeline: [sys.executable, "-c", script, str(lifeline)])
        keeping = asyncio.create_task(part.keep())
        await asyncio.to_thread(wait_until, lambda: _starts(tmp_path) == 1)
        await part.end()
        await keeping

    asyncio.run(live())
    assert (tmp_path / "gone").exists()
