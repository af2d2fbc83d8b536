"""What the processes of a running system told the kernel and malloc of themselves."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import wait_until

from safelight.brokers.embedded import server_command
from safelight.process import MALLOC_ENVIRONMENT

if TYPE_CHECKING:
    from conftest import System

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the scheduler's policies are Linux's")


def test_a_child_may_push_others_aside_and_is_not_pushed(shared_system: System) -> None:
    def policies(part: str) -> set[int]:
        return {os.sched_getscheduler(process.pid) for process in shared_system.parts(part)}

    assert policies("gateway") == policies("worker") == policies("valkey-server") == {os.SCHED_BATCH}
    # A child that was started just now has its worker's policy until it is warm.
    wait_until(lambda: policies("safelight.worker.child") == {os.SCHED_OTHER})


def test_the_embedded_broker_keeps_its_memory() -> None:
    command = server_command(Path("unused.sock"), 0)
    prefix = command[: command.index(sys.executable)]
    shown = subprocess.run([*prefix, "env"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert {f"{name}={value}" for name, value in MALLOC_ENVIRONMENT.items()} <= set(shown)


def test_a_frozen_start_is_collected_no_more() -> None:
    script = "import gc; from safelight.process import freeze_start_up as f; f(); print(gc.get_freeze_count())"
    frozen = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(frozen) > len(gc.get_objects(2)) / 100 > 0
