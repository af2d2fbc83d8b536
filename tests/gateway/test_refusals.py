"""What a gateway refuses because of how things stand: no room, no time, no worker, no broker, no disk."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from conftest import BrokerServer, System, free_port, start_system, wait_until
from raw_http import FORM, GOOD, IMAGE, Answer, Connection, check_failure, form, head, metric, part, post, works

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OPERATIONS = '''
import time
from pathlib import Path

GATE = Path(__file__).with_name("gate")

def waiting(image: bytes) -> dict[str, str]:
    """Wait while there is a gate; not for the tiny picture that a worker warms up with."""
    while len(image) > 10_000 and GATE.exists():
        time.sleep(0.01)
    return {"waited": "yes", "status": "an operation's own"}

def png(image: bytes) -> bytes:
    return b"\\x89PNG\\r\\n\\x1a\\n" + image

def text(image: bytes) -> bytes:
    return b"this is no picture"
'''


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A system with room for one request, short leases, and operations of its own."""
    folder = tmp_path_factory.mktemp("narrow")
    (folder / "gated.py").write_text(OPERATIONS)
    system = start_system(folder, "--workers", "1", "--lease", "1", "--max-jobs", "1", "--import", "gated")
    yield system
    assert system.stop() == 0


@pytest.fixture
def gate(narrow: System) -> Iterator[Path]:
    """While this file is there, `waiting` waits; afterwards nothing is in flight any more."""
    gate = narrow.store.with_name("gate")
    gate.touch()
    yield gate
    gate.unlink(missing_ok=True)
    wait_until(lambda: metric(narrow, "safelight_in_flight_jobs") == metric(narrow, "safelight_backlog") == 0)


WAITING = post(form(part()), target="/query?operations=waiting")


def _ask(port: int, data: bytes = GOOD) -> Answer:
    with Connection(port) as connection:
        connection.send(data)
        return connection.answer()


def test_a_full_gateway(narrow: System, gate: Path) -> None:
    with Connection(narrow.port) as first, Connection(narrow.port) as second:
        first.send(WAITING)
        wait_until(lambda: metric(narrow, "safelight_in_flight_jobs") == 1)
        second.send(GOOD)
        answer = second.answer()
        check_failure(answer, 503, "gateway_full")
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        for path in ("/livez", "/readyz", "/metrics", "/openapi.json"):
            assert narrow.client.get(path).status_code == 200
        second.send(head("/query", f"Content-Type: {FORM}", "Content-Length: 90000", "Expect: 100-continue"))
        asking = second.answer()
        check_failure(asking, 503, "gateway_full")
        assert (asking.interim, asking.headers["connection"]) == ([], "close")
        gate.unlink()
        assert first.answer().json() == {"status": "SUCCESS", "waited": "yes"}
        works(first)


ASKING = head("/query", f"Content-Type: {FORM}", "Content-Length: 90000", "Expect: 100-continue", "X-Request-Id: mine")


def test_who_comes_to_a_full_gateway_is_refused_as_who_was_there(narrow: System, gate: Path) -> None:
    shed = 'safelight_requests_total{outcome="gateway_full"}'
    with Connection(narrow.port) as first, Connection(narrow.port) as second:
        first.send(WAITING)
        wait_until(lambda: metric(narrow, "safelight_in_flight_jobs") == 1)
        second.send(ASKING)
        there = second.answer()
        before = metric(narrow, shed)
        with Connection(narrow.port) as new:
            new.send(ASKING)
            answer = new.answer()
            check_failure(answer, 503, "gateway_full")
            assert new.quiet(0.0) or new.closed()
        assert answer.body == there.body
        assert set(answer.headers) == set(there.headers) - {"date"}
        assert (answer.interim, answer.headers["connection"], answer.headers["x-request-id"]) == ([], "close", "mine")
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert metric(narrow, shed) == before + 1
        with Connection(narrow.port) as new:  # opened while there is no room, and heard when there is
            gate.unlink()
            assert first.answer().status == 200
            new.send(ASKING.replace(b"90000", str(len(form(part()))).encode()))
            new.send(form(part()))
            answer = new.answer()
            assert (answer.status, answer.interim) == (200, [100])


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (ASKING.replace(b"90000", b"99000000"), 413, "too_large"),
        (ASKING.replace(b"/query", b"/nothing"), 404, "not_found"),
        (ASKING.replace(b"90000", b"many"), 400, "malformed_request"),
    ],
    ids=["too large", "another path", "malformed"],
)
def test_what_a_full_gateway_refuses_for_another_reason(
    narrow: System, gate: Path, data: bytes, status: int, code: str
) -> None:
    assert gate.exists()
    with Connection(narrow.port) as first:
        first.send(WAITING)
        wait_until(lambda: metric(narrow, "safelight_in_flight_jobs") == 1)
        check_failure(_ask(narrow.port), 503, "gateway_full")
        check_failure(_ask(narrow.port, data), status, code)
        gate.unlink()
        assert first.answer().status == 200


def test_the_deadline(narrow: System, gate: Path) -> None:
    assert gate.exists()
    data = post(form(part()), target="/query?operations=waiting&timeout=0.3")
    with Connection(narrow.port) as connection:
        connection.send(data)
        check_failure(connection.answer(), 504, "deadline_passed")
        works(connection)  # the child that still waited for the gate was stopped


def test_a_client_that_goes_away_takes_its_job_along(narrow: System, gate: Path) -> None:
    assert gate.exists()
    with Connection(narrow.port) as connection:
        connection.send(WAITING)
        wait_until(lambda: metric(narrow, "safelight_in_flight_jobs") == 1)
    wait_until(lambda: metric(narrow, "safelight_in_flight_jobs") == 0)
    wait_until(lambda: metric(narrow, "safelight_backlog") == 0)
    assert _ask(narrow.port).status == 200


def test_an_operation_that_nobody_offers(narrow: System) -> None:
    def answered() -> Answer | None:
        answer = _ask(narrow.port, post(form(part()), target="/query?operations=size,nonsense&timeout=0.1"))
        return answer if answer.status != 504 else None  # it is not certain before the gateway is two leases old

    answer = wait_until(answered)
    check_failure(answer, 422, "unknown_operation")
    assert "'nonsense'" in answer.json()["detail"]
    assert _ask(narrow.port).status == 200


def test_no_room_in_the_store(narrow: System) -> None:
    works_before = _ask(narrow.port)
    assert works_before.status == 200
    before = set(narrow.store.iterdir())
    options = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(narrow.store)]
    done = subprocess.run(options, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.decode().strip()}")
    try:
        with Connection(narrow.port) as connection:
            connection.send(GOOD)
            answer = connection.answer()
            check_failure(answer, 507, "store_full")
            assert "link" not in answer.headers
            assert list(narrow.store.iterdir()) == []
            connection.send(post(form(part()), target="/query?operations=size"))
            assert connection.answer().status == 200
    finally:
        subprocess.run(["umount", str(narrow.store)], check=True)
    assert _ask(narrow.port).status == 200
    assert len(set(narrow.store.iterdir()) - before) == 1


def test_a_result_of_another_type(narrow: System) -> None:
    before = set(narrow.store.iterdir())
    with Connection(narrow.port) as connection:
        connection.send(post(form(part()), "Accept: image/jpeg", target="/query?operations=png"))
        answer = connection.answer()
        check_failure(answer, 406, "not_acceptable")
        assert "link" not in answer.headers
        assert set(narrow.store.iterdir()) == before
        connection.send(post(form(part()), "Accept: image/jpeg, image/png;q=0.5", target="/query?operations=png"))
        answer = connection.answer()
        assert (answer.status, answer.headers["content-type"]) == (200, "image/png")
        assert answer.headers["link"].endswith('.png>; rel="related"; type="image/png"')
        assert answer.body == b"\x89PNG\r\n\x1a\n" + IMAGE


def test_a_result_that_is_no_picture_is_never_taken_for_one(narrow: System) -> None:
    answer = _ask(narrow.port, post(form(part()), target="/query?operations=text"))
    assert answer.headers["link"].endswith('.bin>; rel="related"; type="application/octet-stream"')
    served = narrow.client.get(answer.headers["link"].partition(">")[0][1:])
    assert served.content == b"this is no picture"
    assert served.headers["content-type"] == "application/octet-stream"
    assert served.headers["x-content-type-options"] == "nosniff"


class Lone:
    """A gateway without a system: no worker, and a broker that the test may kill."""

    def __init__(self, folder: Path, broker: BrokerServer) -> None:
        self.broker = broker
        self.port = free_port()
        command = [sys.executable, "-m", "safelight", "gateway", "--port", str(self.port), "--broker", broker.url]
        self.process = subprocess.Popen(
            [*command, "--lease", "1", "--store", str(folder / "images"), "--drain-delay", "0.3"],
            stderr=subprocess.DEVNULL,
        )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20)
        wait_until(self.lives)

    def lives(self) -> bool:
        try:
            return self.client.get("/livez").status_code == 200
        except httpx.TransportError:
            return False

    def refuses(self, code: str) -> Answer | None:
        """The answer, once it has this code; a request that waits for a worker is given a tenth of a second."""
        answer = _ask(self.port, post(form(part()), target="/query?timeout=0.1"))
        return answer if answer.json()["error"] == code else None


@pytest.fixture
def lone(tmp_path: Path, runtime_folder: Path) -> Iterator[Lone]:
    broker = BrokerServer("embedded", Path(tempfile.mkdtemp(dir=runtime_folder)))
    broker.start()
    lone = Lone(tmp_path, broker)
    yield lone
    lone.client.close()
    lone.process.terminate()
    assert lone.process.wait(20) == 0
    broker.stop()


def test_no_worker_and_no_broker(lone: Lone) -> None:
    first = _ask(lone.port, post(form(part()), target="/query?timeout=0.1"))
    check_failure(first, 504, "deadline_passed")  # a worker may be just about to come
    answer = wait_until(lambda: lone.refuses("no_worker"))
    check_failure(answer, 503, "no_worker")
    unknown = _ask(lone.port, post(form(part()), target="/query?operations=nonsense"))
    check_failure(unknown, 503, "no_worker")
    assert (lone.client.get("/readyz").status_code, lone.client.get("/readyz").text) == (503, "not ready\n")
    assert lone.client.get("/livez").status_code == 200
    lone.broker.kill()
    check_failure(wait_until(lambda: lone.refuses("broker_away")), 503, "broker_away")
    assert lone.client.get("/readyz").status_code == 503
    assert lone.client.get("/livez").status_code == 200
    assert lone.client.get("/metrics").status_code == 200
    lone.broker.start()
    check_failure(wait_until(lambda: lone.refuses("no_worker")), 503, "no_worker")


def test_what_asks_no_broker_answers_while_it_is_frozen(lone: Lone) -> None:
    answers: list[Answer] = []
    asking = threading.Thread(
        target=lambda: answers.append(_ask(lone.port, post(form(part()), target="/query?timeout=3")))
    )
    lone.broker.freeze()
    asking.start()
    wait_until(lambda: "safelight_in_flight_jobs 1.0" in lone.client.get("/metrics").text)
    for path, status in (("/livez", 200), ("/readyz", 503), ("/metrics", 200), ("/openapi.json", 200)):
        assert lone.client.get(path).status_code == status
    assert asking.is_alive()  # it waits for the broker, they did not
    lone.broker.thaw()
    asking.join(10)
    check_failure(answers[0], 504, "deadline_passed")


def test_a_drain_turns_readiness_first_and_answers_what_is_held(lone: Lone) -> None:
    """Without a worker the answer that is held is the deadline's."""
    answers: list[Answer] = []
    data = post(form(part()), target="/query?timeout=1")
    asking = threading.Thread(target=lambda: answers.append(_ask(lone.port, data)))
    asking.start()
    wait_until(lambda: "safelight_in_flight_jobs 1.0" in lone.client.get("/metrics").text)
    lone.process.terminate()
    wait_until(lambda: lone.client.get("/readyz").status_code == 503)
    asking.join(10)
    check_failure(answers[0], 504, "deadline_passed")
    assert lone.process.wait(10) == 0


def test_a_kept_connection_ends_with_the_drain(new_system: Callable[..., System]) -> None:
    """Else its client would never ask the balancer again, and lose what it sends in the very moment of the end."""
    system = new_system("--workers", "1", "--drain-delay", "1")
    with Connection(system.port) as kept:
        works(kept)
        system.part("gateway").send_signal(signal.SIGTERM)
        wait_until(lambda: not system.ready())
        kept.send(GOOD)
        answer = kept.answer()
        assert (answer.status, answer.headers.get("connection")) == (200, "close")
        assert kept.closed()
