"""Two gateways and two workers behind nginx, which has the very file that users are given."""

from __future__ import annotations

import concurrent.futures
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import httpx
import pytest
from conftest import ROOT, STARTED_SECONDS, SUCCESS, BrokerServer, free_port, needed, wait_until

CONFIGURATION = ROOT / "deploy" / "nginx.conf"
REQUESTS = 200
CLIENTS = 8
LEASE = "1"  # seconds
# What a distribution's own nginx.conf says around the file, without its users and folders.
AROUND = """
daemon off; master_process off; pid nginx.pid; error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    {file}
}}
"""


class Behind:
    """Gateways, workers and nginx, as processes of the test's own."""

    def __init__(self, folder: Path, broker: str) -> None:
        self.folder, self.store, self.broker = folder, folder / "mirrored", broker
        self.processes: list[subprocess.Popen[bytes]] = []
        self.gateways: dict[int, subprocess.Popen[bytes]] = {}
        self.workers: list[subprocess.Popen[bytes]] = []
        self.port = free_port()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=90)

    def run(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            self.processes.append(subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, env=os.environ))
        return self.processes[-1]

    def gateway(self, broker: str) -> None:
        port = free_port()
        options = ("--broker", broker, "--port", str(port), "--store", str(self.store), "--drain-delay", "0")
        options += ("--lease", LEASE)
        self.gateways[port] = self.run(sys.executable, "-m", "safelight", "gateway", *options)

    def worker(self) -> None:
        self.workers.append(
            self.run(sys.executable, "-m", "safelight", "worker", "--broker", self.broker, "--lease", LEASE)
        )

    def nginx(self) -> None:
        """In front of the two gateways."""
        text = CONFIGURATION.read_text()
        for given, port in zip((8080, 8081, 8082), (self.port, *self.gateways), strict=True):
            text, count = re.subn(rf"\b{given}\b(?=[ ;])", str(port), text)
            assert count == 1
        path = self.folder / "nginx.conf"
        path.write_text(AROUND.format(file=text))
        self.run("nginx", "-p", str(self.folder), "-c", str(path), "-e", "stderr")

    def status(self, port: int, path: str = "/readyz") -> int:
        try:
            return httpx.get(f"http://127.0.0.1:{port}{path}").status_code
        except httpx.TransportError:
            return 0

    def post(self, image: bytes, **headers: str) -> httpx.Response:
        return self.client.post("/query", files={"image": ("picture.jpg", image)}, headers=headers)

    def refuses(self, port: int, image: bytes) -> bool:
        """Whether a gateway says 503, for which it takes its time (two leases without a worker)."""
        files = {"image": ("picture.jpg", image)}
        return httpx.post(f"http://127.0.0.1:{port}/query?timeout=1", files=files).status_code == 503

    def answered(self, port: int) -> float:
        """Requests that a gateway answered with success, by its own count."""
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        return sum(float(found) for found in re.findall(r'requests_total\{.*"success".*\} (\S+)', text))

    def all_ready(self) -> bool:
        return all(self.status(port) == 200 for port in (*self.gateways, self.port))

    def end(self) -> None:
        self.client.close()
        for process in reversed(self.processes):
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            process.wait(timeout=30)


@pytest.fixture
def brokers(runtime_folder: Path) -> Iterator[list[BrokerServer]]:
    """One for the workers, and one that nobody works for."""
    servers = [BrokerServer("embedded", Path(mkdtemp(dir=runtime_folder))) for _ in range(2)]
    for server in servers:
        server.start()
    yield servers
    for server in servers:
        server.stop()


@contextmanager
def behind_nginx(folder: Path, broker: str, *brokers: str) -> Iterator[Behind]:
    """nginx, two workers, and a gateway for each of `brokers`."""
    needed("nginx", "nginx")
    system = Behind(folder, broker)
    try:
        for each in brokers:
            system.gateway(each)
            system.worker()
        system.nginx()
        yield system
    finally:
        system.end()


@pytest.fixture
def behind(brokers: list[BrokerServer], tmp_path: Path) -> Iterator[Behind]:
    """Two gateways and two workers that are ready."""
    url = brokers[0].url
    with behind_nginx(tmp_path, url, url, url) as system:
        wait_until(system.all_ready, STARTED_SECONDS)
        yield system


def test_what_is_asked_through_it(behind: Behind, image: bytes) -> None:
    first, second = behind.gateways
    answers = [behind.post(image) for _ in range(20)]
    assert [answer.text for answer in answers] == [SUCCESS] * 20
    assert behind.answered(first) > 0
    assert behind.answered(second) > 0

    path = re.fullmatch(r"<(/images/\S+)>.*", answers[0].headers["Link"])
    assert path is not None
    saved = {httpx.get(f"http://127.0.0.1:{port}{path[1]}").content for port in (first, second, behind.port)}
    assert saved == {behind.store.joinpath(Path(path[1]).name).read_bytes()}

    assert behind.post(image, **{"X-Request-ID": "mine"}).headers["X-Request-ID"] == "mine"
    assert re.fullmatch("[0-9a-f]{32}", answers[0].headers["X-Request-ID"])
    assert behind.post(image, Accept="image/*").headers["Content-Type"] == "image/jpeg"

    refused = behind.post(b"no image")
    assert (refused.status_code, refused.json()["error"]) == (415, "unsupported_format")
    for length in (32 * 1024 * 1024 + 1, 40 * 1024 * 1024):  # the gateway's word, nginx's word
        large = behind.post(image[:100] + bytes(length - 100))
        assert (large.status_code, large.json()["error"]) == (413, "too_large")
    assert behind.client.get("/metrics").status_code == 404


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_request_fails_through_the_end_of_a_gateway(behind: Behind, image: bytes, number: int) -> None:
    leaving, staying = behind.gateways
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
        answers = [clients.submit(behind.post, image) for _ in range(REQUESTS)]
        wait_until(lambda: sum(answer.done() for answer in answers) > 20)
        behind.gateways[leaving].send_signal(number)
    # SIGKILL may meet an answer of which a part has been passed on.
    cut = [answer for answer in answers if isinstance(answer.exception(), httpx.RemoteProtocolError)]
    assert len(cut) <= (0 if number == signal.SIGTERM else CLIENTS)
    assert {answer.result().text for answer in answers if answer not in cut} == {SUCCESS}
    assert behind.gateways[leaving].wait(timeout=30) == (0 if number == signal.SIGTERM else -number)
    before = behind.answered(staying)
    assert behind.post(image).text == SUCCESS
    assert behind.answered(staying) == before + 1


def test_a_gateway_that_is_not_ready_is_passed_over(brokers: list[BrokerServer], tmp_path: Path, image: bytes) -> None:
    theirs, another = brokers
    with behind_nginx(tmp_path, theirs.url, theirs.url, another.url) as behind:
        ready, alone = behind.gateways
        wait_until(lambda: behind.status(ready) == 200 and behind.status(alone, "/livez") == 200, STARTED_SECONDS)
        another.kill()
        wait_until(lambda: behind.refuses(alone, image))
        answers = [behind.post(image) for _ in range(20)]
        assert [answer.text for answer in answers] == [SUCCESS] * 20
        assert behind.answered(ready) == 20


def test_a_refusal_by_both_is_told_as_it_is(behind: Behind, image: bytes) -> None:
    for worker in behind.workers:
        worker.terminate()
        worker.wait(timeout=30)
    wait_until(lambda: all(behind.refuses(port, image) for port in behind.gateways))
    for _ in range(4):
        refused = behind.post(image)
        assert (refused.status_code, refused.json()["error"]) == (503, "no_worker")
        assert int(refused.headers["Retry-After"]) > 0
    for gateway in behind.gateways.values():
        gateway.terminate()
        gateway.wait(timeout=30)
    nobody = behind.post(image)
    assert (nobody.status_code, nobody.json()["error"]) == (502, "no_gateway")
