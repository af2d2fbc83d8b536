"""`make demo` shows what it says, notices when it does not, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
import pytest
from conftest import ROOT, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DEMO = [sys.executable, str(ROOT / "examples" / "demo.py")]


@pytest.fixture
def start(tmp_path: Path, runtime_folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the demo with temporary folders below a short one; afterwards no process and no file of it is there."""
    folder = runtime_folder / "demo"
    folder.mkdir()
    started: list[subprocess.Popen[str]] = []
    log = tmp_path / "demo.log"

    def start(**variables: str) -> subprocess.Popen[str]:
        with log.open("w") as output:
            process = subprocess.Popen(
                DEMO, env=os.environ | {"TMPDIR": str(folder)} | variables, stdout=output, stderr=output, text=True
            )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)
    assert not list(folder.iterdir())
    assert not [process.cmdline() for process in psutil.process_iter() if str(folder) in _folders(process)]
    folder.rmdir()


def _folders(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.environ().get("XDG_RUNTIME_DIR", "")
    return ""


def test_every_step_holds(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    code = start().wait(timeout=60)
    text = (tmp_path / "demo.log").read_text()
    assert code == 0, text
    for shown in ('{"status": "SUCCESS", "size": "82kb"}', "kill -9 ", "160 of 160 succeeded", "160 images were saved"):
        assert shown in text


def test_a_step_that_does_not_hold_is_the_exit_code(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    curl = tmp_path / "curl"
    curl.write_text("#!/bin/sh\necho something else\n")
    curl.chmod(0o755)
    code = start(PATH=f"{tmp_path}:{os.environ['PATH']}").wait(timeout=60)
    text = (tmp_path / "demo.log").read_text()
    assert code == 1, text
    assert "The demo failed: curl did not print" in text
    assert "A second worker" not in text


def test_ctrl_c_while_it_starts_ends_it(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    demo = start()
    wait_until(lambda: "safelight up" in (tmp_path / "demo.log").read_text(), 30)
    demo.send_signal(signal.SIGINT)
    assert demo.wait(timeout=60) == 130
    assert "Stopped." in (tmp_path / "demo.log").read_text()
