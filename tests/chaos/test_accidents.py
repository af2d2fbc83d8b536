"""What users of other systems met, each with where it was told: here it must not happen, on any broker."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import SUCCESS, BrokerServer, System, admitted_answer, wait_until

from safelight.conformance import Server

OPERATIONS = '''
import os, pathlib, time

FOLDER = pathlib.Path(__file__).parent

def gated(image):
    """Write down the worker that starts it, and be at work until there is a file `go`."""
    if len(image) > 10_000:
        with (FOLDER / "starts").open("a") as file:
            file.write(f"{os.getppid()}\\n")
        while not (FOLDER / "go").exists():
            time.sleep(0.01)
    return {}
'''


@pytest.fixture
def at_work(broker: Server, new_system: Callable[..., System], tmp_path: Path) -> System:
    """Two workers, and an operation that ends when it is told to."""
    (tmp_path / "gate.py").write_text(OPERATIONS)
    return new_system(
        "--broker", broker.url, "--workers", "2", "--lease", "1", "--import", "gate", "--work-limit", "60"
    )


def _starts(folder: Path) -> list[int]:
    file = folder / "starts"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def test_a_job_that_is_pending_for_hours_after_a_killed_worker(at_work: System, tmp_path: Path, image: bytes) -> None:
    """https://github.com/taskiq-python/taskiq-redis/issues/131: the lock around recovery was the dead worker's."""
    with ThreadPoolExecutor() as client:
        answer = client.submit(at_work.post, image, "?operations=gated,size,mirror")
        [worker] = wait_until(lambda: _starts(tmp_path))
        [process] = [part for part in at_work.parts("worker") if part.pid == worker]
        process.kill()
        wait_until(lambda: len(_starts(tmp_path)) == 2, 40)
        (tmp_path / "go").touch()
        assert answer.result().text == SUCCESS
    assert len(set(_starts(tmp_path))) == 2


def test_a_request_that_waits_for_ever_after_a_broker_restart(
    broker: Server, at_work: System, tmp_path: Path, image: bytes
) -> None:
    """https://github.com/celery/celery/issues/6912, https://github.com/pardahlman/RawRabbit/issues/272."""
    with ThreadPoolExecutor() as client:
        answer = client.submit(at_work.post, image, "?operations=gated,size,mirror")
        wait_until(lambda: _starts(tmp_path))
        broker.kill()
        broker.start()
        (tmp_path / "go").touch()
        assert answer.result().text == SUCCESS


def test_a_worker_that_never_comes_back_after_a_broker_restart(
    broker: Server, new_system: Callable[..., System], image: bytes
) -> None:
    """https://github.com/celery/celery/issues/9054: it was connected again, and consumed nothing."""
    system = new_system("--broker", broker.url, "--workers", "1")
    before = system.part("worker").pid
    assert system.post(image).text == SUCCESS
    broker.kill()
    broker.start()
    assert admitted_answer(system, image) == SUCCESS
    assert system.part("worker").pid == before


def test_a_request_that_deadlocks_on_a_second_reply(
    broker_server: BrokerServer, new_system: Callable[..., System], tmp_path: Path, image: bytes
) -> None:
    """A worker that was frozen for longer than its lease replies, too. On others the conformance suite does this."""
    (tmp_path / "gate.py").write_text(OPERATIONS)
    system = new_system("--broker", broker_server.url, "--workers", "2", "--lease", "1", "--import", "gate")
    with ThreadPoolExecutor() as client:
        answer = client.submit(system.post, image, "?operations=gated,size,mirror")
        [worker] = wait_until(lambda: _starts(tmp_path))
        [frozen] = [part for part in system.parts("worker") if part.pid == worker]
        frozen.suspend()
        wait_until(lambda: len(_starts(tmp_path)) == 2)
        (tmp_path / "go").touch()  # for both: the child of the frozen one is not frozen
        assert answer.result().text == SUCCESS
        frozen.resume()
    seen: set[str] = set()

    def both_have_answered() -> bool:
        response = system.post(image)
        assert response.text == SUCCESS
        seen.add(response.headers["safelight-worker"])
        return len(seen) == 2

    wait_until(both_have_answered)
    assert len(list(system.store.iterdir())) == len({path.name for path in system.store.iterdir()})
