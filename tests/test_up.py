"""`safelight up`: the seed's request as its user sends it, and faults of each part, on a whole system."""

from __future__ import annotations

import concurrent.futures
import io
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, SUCCESS, System, answers_through, free_port, wait_until
from PIL import Image, ImageChops


def _differs(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two pictures, in levels."""
    assert a.size == b.size
    return max(high for _, high in ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getextrema())


def test_curl_prints_exactly_the_seeds_answer(shared_system: System) -> None:
    command = ["curl", "-s", "-F", "image=@./test_image.jpg", f"localhost:{shared_system.port}/query"]
    assert subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode() == SUCCESS


def test_the_link_names_the_mirrored_image_on_disk(shared_system: System, image: bytes) -> None:
    answer = shared_system.post(image)
    match = re.fullmatch(r'</images/([0-9a-f-]{36}\.jpg)>; rel="related"; type="image/jpeg"', answer.headers["link"])
    assert match
    saved = (shared_system.store / match[1]).read_bytes()
    served = shared_system.client.get(f"/images/{match[1]}")
    assert served.content == saved
    assert served.headers["content-type"] == "image/jpeg"
    assert (
        shared_system.client.get(f"/images/{match[1]}", headers={"If-None-Match": served.headers["etag"]}).status_code
        == 304
    )
    original = Image.open(io.BytesIO(image))
    mirrored = Image.open(io.BytesIO(saved)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert _differs(original, mirrored) <= 3  # DESIGN §4: the inverse DCT rounds asymmetrically
    assert _differs(original, Image.open(io.BytesIO(saved))) > 50


def test_every_answer_is_traced(shared_system: System, image: bytes) -> None:
    answer = shared_system.post(image, x_request_id="my-own.id")
    assert answer.headers["x-request-id"] == "my-own.id"
    assert re.search(
        r"upload;dur=[\d.]+, work;dur=[\d.]+, queue;dur=[\d.]+, store;dur=[\d.]+, total",
        answer.headers["server-timing"],
    )
    assert answer.headers["safelight-mirror"] == "lossless"
    assert answer.headers["safelight-worker"]


def _killed_worker(system: System) -> None:
    system.part("worker").kill()


def _killed_child(system: System) -> None:
    system.part("safelight.worker.child").kill()


def _killed_gateway_neighbour(system: System) -> None:
    for child in system.parts("safelight.worker.child"):
        child.suspend()
    system.part("worker").kill()


def _killed_broker(system: System) -> None:
    system.part("valkey-server").kill()


@pytest.mark.parametrize("fault", [_killed_worker, _killed_child, _killed_broker, _killed_gateway_neighbour])
def test_no_request_fails_through(
    fault: Callable[[System], None], new_system: Callable[..., System], image: bytes
) -> None:
    system = new_system("--workers", "2")
    texts = answers_through(lambda: fault(system), lambda: system.post(image).text, 200)
    assert texts == [SUCCESS] * 200
    assert len(list(system.store.iterdir())) == 200


def test_ctrl_c_leaves_nothing_behind(new_system: Callable[..., System], runtime_folder: Path) -> None:
    system = new_system()
    assert list(runtime_folder.rglob(f"{system.port}.sock"))
    assert system.stop(signal.SIGINT) == 0
    assert not list(runtime_folder.rglob(f"{system.port}.*"))


@pytest.mark.parametrize("seen", [b"", b"broker", b"listening"])
def test_sigterm_in_the_middle_of_starting(
    new_system: Callable[..., System], seen: bytes, runtime_folder: Path
) -> None:
    system = new_system(wait=False)
    wait_until(lambda: seen in system.log.read_bytes() and (seen or system.process.poll() is None))
    system.stop()
    assert not list(runtime_folder.rglob(f"{system.port}.sock"))


def test_a_killed_supervisor_takes_its_parts_along(new_system: Callable[..., System]) -> None:
    system = new_system()
    parts = [*system.parts("gateway"), *system.parts("worker"), *system.parts("valkey-server")]
    assert len(parts) >= 3
    system.process.kill()
    system.process.wait()
    wait_until(lambda: not any(part.is_running() for part in parts))


def test_a_taken_port_is_one_sentence(shared_system: System) -> None:
    command = [sys.executable, "-m", "safelight", "up", "--port", str(shared_system.port)]
    ended = subprocess.run(command, capture_output=True, check=False, text=True, timeout=30)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"safelight: Port {shared_system.port} cannot be used")
    assert ended.stderr.count("\n") == 1


def test_a_store_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "safelight", "gateway", "--port", str(free_port()), "--store", "file/below"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, text=True, timeout=30)
    assert ended.returncode == 2
    assert "cannot be used: Not a directory" in ended.stderr


def test_a_worker_joins_and_leaves_without_a_failed_request(new_system: Callable[..., System], image: bytes) -> None:
    system = new_system("--workers", "1")
    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        first = system.post(image).headers["safelight-worker"]
        joined = subprocess.Popen([sys.executable, "-m", "safelight", "worker", "--port", str(system.port)])

        def both_work() -> bool:
            answers = list(clients.map(system.post, [image] * 16))
            assert {answer.text for answer in answers} == {SUCCESS}
            return any(answer.headers["safelight-worker"] != first for answer in answers)

        wait_until(both_work)
        answers = [clients.submit(system.post, image) for _ in range(100)]
        joined.send_signal(signal.SIGINT)
        assert joined.wait(timeout=20) == 0
        assert [answer.result().text for answer in answers] == [SUCCESS] * 100
