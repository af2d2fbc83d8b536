"""One worker as a process: the file by whose age others see that it lives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest
from conftest import BrokerServer, wait_until


@pytest.fixture
def server(runtime_folder: Path) -> Iterator[BrokerServer]:
    started = BrokerServer("embedded", Path(mkdtemp(dir=runtime_folder)))
    yield started
    started.stop()


def _worker(server: BrokerServer, beat_file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "safelight", "worker", "--broker", server.url, "--beat-file", str(beat_file)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def _is_touched(beat_file: Path) -> None:
    """Wait until it is younger than it is now."""
    os.utime(beat_file, (1, 1))
    wait_until(lambda: beat_file.stat().st_mtime > 1)


def test_a_living_worker_touches_its_beat_file(server: BrokerServer, tmp_path: Path) -> None:
    beat_file = tmp_path / "beat"
    with _worker(server, beat_file) as worker:
        try:
            wait_until(beat_file.exists)
            _is_touched(beat_file)  # it waits for a broker that was never there
            server.start()
            wait_until(lambda: server.command("HLEN", "{safelight}:workers") == b":1")
            _is_touched(beat_file)
            server.kill()
            _is_touched(beat_file)
        finally:
            worker.terminate()
        assert worker.wait(timeout=20) == 0


def test_a_file_that_cannot_be_written_is_told_at_start(server: BrokerServer, tmp_path: Path) -> None:
    with _worker(server, tmp_path / "absent" / "beat") as worker:
        assert worker.wait(timeout=20) == 2
        assert worker.stderr is not None
        assert "beat cannot be written: No such file or directory." in worker.stderr.read()
