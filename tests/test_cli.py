"""The commands that look at a running system, and the quarantine as a person uses it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import System

from safelight import __version__

POISON = """
import os, pathlib
def poison(image):
    if not image.startswith((b"\\x89PNG", b"\\xff\\xd8")) or not pathlib.Path("cured").exists():
        if len(image) > 1000:
            os.abort()
    return {"cured": True}
"""


def safelight(*words: str, port: int, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "safelight", *words, "--port", str(port)]
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
    new_system: Callable[..., System], tmp_path: Path, image: bytes
) -> None:
    (tmp_path / "poisoned.py").write_text(POISON)
    system = new_system("--workers", "1", "--import", "poisoned")

    def quarantine(*words: str) -> subprocess.CompletedProcess[str]:
        return safelight("quarantine", *words, port=system.port, folder=tmp_path)

    answers = [system.post(image, "?operations=poison") for _ in range(2)]
    assert [(answer.status_code, answer.json()["error"]) for answer in answers] == [(422, "quarantined")] * 2
    first, second = json.loads(quarantine("list", "--json").stdout)
    assert first["cause"] == "the child was ended by SIGABRT"
    assert (first["attempts"], first["size"], first["operations"]) == (3, len(image), ["poison"])
    assert first["id"] in quarantine("list").stdout
    assert json.loads(quarantine("show", first["id"]).stdout) == first

    assert quarantine("save", first["id"], "--out", "poison.jpg").returncode == 0
    assert (tmp_path / "poison.jpg").read_bytes() == image

    failed = quarantine("retry", first["id"])
    assert (failed.returncode, failed.stderr.partition(":")[0]) == (1, "safelight")
    assert "It stays in quarantine." in failed.stderr
    assert len(json.loads(quarantine("list", "--json").stdout)) == 2

    (tmp_path / "cured").touch()
    cured = quarantine("retry", first["id"])
    assert json.loads(cured.stdout) == {"status": "SUCCESS", "cured": True}
    assert [record["id"] for record in json.loads(quarantine("list", "--json").stdout)] == [second["id"]]

    assert quarantine("drop", second["id"]).returncode == 0
    assert quarantine("list").stdout == "The quarantine is empty.\n"
    for words in (("show", first["id"]), ("drop", second["id"]), ("retry", "nothing")):
        ended = quarantine(*words)
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
