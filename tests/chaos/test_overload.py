"""A small overload with what must hold on any machine, and what judges the large one."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator

import pytest
from conftest import TEST_IMAGE, System, start_system, wait_until
from PIL import Image
from raw_http import Connection, head, metric

from chaos.load import Answer, Load, Picture, crowd, offer
from chaos.overload import Rates, judged, percentile

IMAGE = TEST_IMAGE.read_bytes()
OPERATION = '''
import time
from pathlib import Path

GATE = Path(__file__).with_name("gate")

def waiting(image: bytes) -> dict[str, str]:
    """A heavy picture waits while there is a gate."""
    while image.startswith(b"\\x89PNG") and len(image) > 5_000 and GATE.exists():
        time.sleep(0.01)
    return {"waited": "yes"}
'''


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Two workers, and room for eight."""
    folder = tmp_path_factory.mktemp("narrow")
    (folder / "gated.py").write_text(OPERATION)
    system = start_system(folder, "--workers", "2", "--max-jobs", "8", "--import", "gated")
    yield system
    assert system.stop() == 0


def is_empty(system: System) -> bool:
    """Nothing is in flight, neither here nor at the broker."""
    kinds = [f"safelight_in_flight_{kind}" for kind in ("jobs", "bytes", "pixels")]
    return not any(metric(system, series) for series in [*kinds, "safelight_backlog"])


def test_who_is_not_answered_is_refused_before_the_body(narrow: System) -> None:
    load = offer(narrow.port, [Picture(IMAGE)], rate=500, seconds=2, most_open=800)
    assert set(load.statuses) == {200, 503}
    refused = load.with_status(503)
    assert not any(answer.was_asked for answer in refused)
    assert all(answer.closes and 1 <= int(answer.retry_after) <= 30 for answer in refused)
    assert len(list(narrow.store.iterdir())) >= len(load.with_status(200))
    wait_until(lambda: is_empty(narrow))


def test_who_comes_again_when_told_is_mostly_taken(narrow: System) -> None:
    load = crowd(narrow.port, Picture(IMAGE), clients=80, seconds=2)
    assert set(load.statuses) == {200, 503}
    wait_until(lambda: is_empty(narrow))


def test_clients_that_leave_free_their_places(narrow: System) -> None:
    """In the middle of the body, while the job waits or is worked on, and by half a close after the whole request."""
    gate = narrow.store.with_name("gate")
    gate.touch()
    out = io.BytesIO()
    Image.effect_noise((200, 200), 50).save(out, "PNG")
    whole = head("/query?operations=waiting", f"Content-Length: {len(out.getvalue())}") + out.getvalue()
    connections = [Connection(narrow.port) for _ in range(8)]
    for number, connection in enumerate(connections):
        connection.send(whole[:-10] if number < 2 else whole)
    wait_until(lambda: metric(narrow, "safelight_in_flight_jobs") == 8)
    wait_until(lambda: metric(narrow, "safelight_backlog") == 6)  # two never came whole
    children = narrow.parts("safelight.worker.child")
    half, *others = reversed(connections)
    half.socket.shutdown(1)  # SHUT_WR
    for connection in others:
        connection.socket.shutdown(2)
        connection.__exit__()
    wait_until(lambda: is_empty(narrow))
    wait_until(lambda: not any(child.is_running() for child in children))  # each was at work on one of them
    assert half.closed()
    half.__exit__()
    gate.unlink()
    assert narrow.post(IMAGE).status_code == 200


def test_light_ones_are_answered_while_heavy_ones_are_worked_on(narrow: System) -> None:
    """Three heavy pictures at once, two workers: one child is busy with them, the other one does all the rest."""
    gate = narrow.store.with_name("gate")
    gate.touch()
    heavy = io.BytesIO()
    Image.new("1", (9_900, 9_900)).save(heavy, "PNG")
    target = "?operations=waiting"
    answers: list[int] = []
    asking = [
        threading.Thread(target=lambda: answers.append(narrow.post(heavy.getvalue(), target).status_code))
        for _ in range(3)
    ]
    for thread in asking:
        thread.start()
    wait_until(lambda: metric(narrow, "safelight_in_flight_jobs") == 3)
    wait_until(lambda: metric(narrow, "safelight_backlog") == 1)  # the others wait in the gateway
    assert [narrow.post(IMAGE).status_code for _ in range(30)] == [200] * 30
    assert answers == []
    gate.unlink()
    for thread in asking:
        thread.join(30)
    assert answers == [200] * 3


def test_the_judge() -> None:
    """Peak 10/s; in 2 s 18 answers, 10 refusals."""
    good = [Answer(200, 0.5, float(number) / 9) for number in range(18)]
    refused = [Answer(503, 0.01, 0.1, retry_after="3") for _ in range(10)]
    rows = judged(Rates(10.0, 12.0), Load([*good, *refused]), until=2.0, seconds=2.0, strict=True)
    assert [row.what for row in rows if row.ok is False] == []
    spoilt = {
        "goodput": [*good[1:], *refused],
        "refused": good,
        "median of a refusal": [*good, *[Answer(503, 0.06, 0.1, retry_after="3")] * 11, *refused],
        "refused before the body": [*good, *refused, Answer(503, 0.01, 0.1, was_asked=True, retry_after="3")],
        "Retry-After": [*good, *refused, Answer(503, 0.01, 0.1)],
        "slowest admitted": [*good, *refused, Answer(200, 21.0, 1.0, admitted_seconds=21.0)],
        "neither answered nor refused": [*good, *refused, Answer(504, 1.0, 1.0)],
    }
    for what, answers in spoilt.items():
        rows = judged(Rates(10.0, 12.0), Load(answers), until=2.0, seconds=2.0, strict=True)
        assert what in [row.what for row in rows if row.ok is False], what


def test_percentiles() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 99) == 99.0
    assert percentile([], 50) == 0.0
