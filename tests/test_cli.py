"""The commands that look at a running system, and the quarantine as a person uses it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import System

from safelight import __version__
from safelight.conformance import Server

POISON = """
import os, pathlib, time

def _is_sick(image):
    return len(image) > 1000 and not pathlib.Path("cured").exists()

def aborts(image):
    if _is_sick(image):
        os.abort()
    return {"cured": True}

def raises(image):
    if _is_sick(image):
        raise ValueError("not this one")

def hangs(image):
    while _is_sick(image):
        time.sleep(0.01)
"""
CAUSES = {
    "aborts": "the child was ended by SIGABRT",
    "raises": "ValueError: not this one",
    "hangs": "it was still at work after 0.3 s",
}


def safelight(*words: str, port: int, folder: Path) -> subprocess.CompletedProcess[str]:
    return run(*words, "--port", str(port), folder=folder)


def run(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "safelight", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False, text=True, timeout=60)


def test_version() -> None:
    ended = subprocess.run([sys.executable, "-m", "safelight", "version"], capture_output=True, check=True, text=True)
    assert ended.stdout.strip() == __version__


def test_operations_lists_what_the_living_workers_offer(shared_system: System, tmp_path: Path) -> None:
    ended = safelight("operations", "--json", port=shared_system.port, folder=tmp_path)
    offers = json.loads(ended.stdout)
    assert set(offers) == {"mirror", "size"}
    assert len(offers["mirror"]) == len(shared_system.parts("worker"))
    table = safelight("operations", port=shared_system.port, folder=tmp_path).stdout
    assert "mirror" in table
    assert offers["mirror"][0] in table


def test_without_a_system_it_says_so(tmp_path: Path) -> None:
    ended = safelight("operations", port=1, folder=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "safelight: The broker cannot be reached; is the system running, and on this --port?\n"


def test_a_quarantined_job_is_listed_saved_retried_and_dropped(
    broker: Server, new_system: Callable[..., System], tmp_path: Path, image: bytes
) -> None:
    (tmp_path / "poisoned.py").write_text(POISON)
    begun = datetime.now(UTC).replace(microsecond=0)
    options = ("--workers", "1", "--work-limit", "0.3", "--import", "poisoned")
    system = new_system("--broker", broker.url, *options)

    def quarantine(*words: str) -> subprocess.CompletedProcess[str]:
        return run("quarantine", *words, "--broker", broker.url, folder=tmp_path)

    workers = set()
    for operation in CAUSES:
        answer = system.post(image, f"?operations={operation}")
        assert (answer.status_code, answer.json()["error"]) == (422, "quarantined")
        workers.add(system.post(image).headers["safelight-worker"])
    listed: list[dict[str, Any]] = json.loads(quarantine("list", "--json").stdout)
    records = [each for each in listed if {*each["operations"]} & {*CAUSES}]  # tests that share a broker leave others
    assert {each["operations"][0]: each["cause"] for each in records} == CAUSES
    assert [each["operations"] for each in records] == [[operation] for operation in CAUSES]
    assert {(each["attempts"], each["size"]) for each in records} == {(3, len(image))}
    assert {each["worker"] for each in records} == workers
    assert all(begun <= datetime.fromisoformat(each["at"]) <= datetime.now(UTC) for each in records)

    first, second, third = (each["id"] for each in records)
    assert json.loads(quarantine("show", first).stdout) == records[0]
    assert quarantine("save", first, "--out", "poison.jpg").returncode == 0
    assert (tmp_path / "poison.jpg").read_bytes() == image

    failed = quarantine("retry", second)
    assert (failed.returncode, failed.stderr.partition(":")[0]) == (1, "safelight")
    assert "It stays in quarantine." in failed.stderr
    (tmp_path / "cured").touch()
    assert json.loads(quarantine("retry", first).stdout) == {"status": "SUCCESS", "cured": True}
    assert quarantine("drop", third).returncode == 0
    table = quarantine("list").stdout
    assert [table.count(each) for each in (first, second, third)] == [0, 1, 0]
    assert quarantine("drop", second).returncode == 0


@pytest.mark.parametrize("words", [("show", "nothing"), ("drop", "nothing"), ("retry", "nothing")])
def test_what_is_not_in_quarantine_is_a_sentence(words: tuple[str, ...], shared_system: System, tmp_path: Path) -> None:
    ended = safelight("quarantine", *words, port=shared_system.port, folder=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "There is no job" in ended.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["worker", "--broker", "http://x"], "The broker's URL must begin with one of"),
        (["gateway", "--port", "70000"], "--port"),
        (["up", "--concurrency", "0"], "--concurrency"),
        (["up", "--workers", "-1"], "--workers"),
        (["worker", "--import", "no_such_module"], "There is no module 'no_such_module'"),
    ],
)
def test_what_cannot_work_is_one_sentence(words: list[str], sentence: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "safelight", *words]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, text=True, timeout=60)
    assert ended.returncode not in (0, -9)
    assert sentence in ended.stderr + ended.stdout
    assert "Traceback" not in ended.stderr
