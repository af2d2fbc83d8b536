"""Real servers for the tests: embedded Valkey, Debian's redis-server, and whole systems started by the command line."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import httpx
import psutil
import pytest

from safelight.brokers import embedded
from safelight.message import new_id

if TYPE_CHECKING:
    from kafka_server import KafkaServer
    from rabbit_server import RabbitServer

    from safelight.conformance import Server

ROOT = Path(__file__).parent.parent
TEST_IMAGE = ROOT / "test_image.jpg"
SUCCESS = '{"status": "SUCCESS", "size": "82kb"}'  # the seed's answer to that image
STARTED_SECONDS = 30.0
NODES = {"rabbitmq": "rabbit_node", "kafka": "kafka_node"}  # one for all tests: they take seconds to start
REFUSED_SECONDS = 60.0  # for so long a request is sent again that was refused with 503


def wait_until(condition: Callable[[], Any], seconds: float = 15.0) -> Any:
    """The first true value of `condition`, looked at again and again; fails after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        if time.monotonic() > until:
            pytest.fail(f"not within {seconds} s: {condition.__qualname__}")
        time.sleep(0.01)  # the pace of looking, not a guess at how long something takes


def needed(tool: str, package: str) -> str:
    """The name of a tool that is installed. A person's machine may lack it, then the test is skipped; CI may not."""
    if shutil.which(tool) is None:
        absent(f"{tool} is not installed", f"apt-get install {package}")
    return tool


def absent(what: str, remedy: str) -> NoReturn:
    """Skip, or fail in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}, and in CI nothing may be skipped: {remedy}")
    pytest.skip(f"{what} ({remedy})")


def need_judges() -> None:
    """The tools that `judge.py` asks."""
    for tool, package in (
        ("jpegtran", "libjpeg-turbo-progs"),
        ("exiftool", "libimage-exiftool-perl"),
        ("pngcheck", "pngcheck"),
        ("tiffcp", "libtiff-tools"),
        ("giftopnm", "netpbm"),
    ):
        needed(tool, package)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def certify(folder: Path) -> None:
    """certificate.pem, of this machine and vouching for itself; key.pem; both in server.pem."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "server.pem").write_text(key.read_text() + certificate.read_text())


@pytest.fixture(scope="session", autouse=True)
def runtime_folder() -> Iterator[Path]:
    """Sockets and locks of the tests apart from those of a system that runs on this machine; a short path."""
    folder = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    for name in [name for name in os.environ if name.startswith("SAFELIGHT_")]:
        del os.environ[name]
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def image() -> bytes:
    return TEST_IMAGE.read_bytes()


class OneProcess:
    """A server that is one process."""

    process: subprocess.Popen[bytes] | None

    def kill(self) -> None:
        """SIGKILL: nobody is told."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def freeze(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def stop(self) -> None:
        if self.process is not None:
            self.kill()


@dataclass
class BrokerServer(OneProcess):
    """A Redis or Valkey of a test's own, on a Unix socket, which can be killed and started again."""

    program: str
    folder: Path
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    lifeline: int = -1

    @property
    def socket(self) -> Path:
        return self.folder / "broker.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        reading, self.lifeline = os.pipe()
        if self.program == "embedded":
            command = embedded.server_command(self.socket, reading)
        else:
            command = [self.program, "--port", "0", "--unixsocket", str(self.socket), "--save", ""]
        self.process = subprocess.Popen([*command, *self.options], pass_fds=(reading,), stdout=subprocess.DEVNULL)
        os.close(reading)
        wait_until(self.answers)

    def answers(self) -> bool:
        return self.command("PING") == b"+PONG"

    def command(self, *words: str | bytes) -> bytes:
        """The first line of the answer to one command; empty while the server is away."""
        data = b"".join(
            b"$%d\r\n%b\r\n" % (len(word), word) for word in (w.encode() if isinstance(w, str) else w for w in words)
        )
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(self.socket))
                connection.sendall(b"*%d\r\n" % len(words) + data)
                return connection.makefile("rb").readline().strip()
        except OSError:
            return b""

    def kill(self) -> None:
        """SIGKILL: nothing is kept, and nobody is told."""
        super().kill()
        os.close(self.lifeline)


@pytest.fixture(params=["embedded", "redis-server"])
def broker_server(request: pytest.FixtureRequest, runtime_folder: Path) -> Iterator[BrokerServer]:
    """A running server: the embedded Valkey, then Debian's redis-server."""
    if request.param != "embedded":
        needed(request.param, request.param)
    server = BrokerServer(request.param, Path(tempfile.mkdtemp(dir=runtime_folder)))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def rabbit_node(runtime_folder: Path) -> Iterator[RabbitServer]:
    from rabbit_server import RabbitServer  # noqa: PLC0415 - it imports this file

    needed("rabbitmq-server", "rabbitmq-server")
    server = RabbitServer(Path(tempfile.mkdtemp(dir=runtime_folder)))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def kafka_node(runtime_folder: Path) -> Iterator[KafkaServer]:
    from kafka_server import JARS, KafkaServer  # noqa: PLC0415 - it imports this file

    if not JARS.is_dir():
        absent(f"Apache Kafka is not at {JARS}", "see .ci/run")
    server = KafkaServer(Path(tempfile.mkdtemp(dir=runtime_folder)))
    server.start()
    yield server
    server.stop()


@dataclass
class Apart:
    """One test's part of a node that all use: a job which another has left there would be begun again."""

    node: RabbitServer | KafkaServer
    url: str

    def kill(self) -> None:
        self.node.kill()

    def start(self) -> None:
        self.node.start()


@pytest.fixture(params=["redis", "rabbitmq", "kafka"])
def broker(request: pytest.FixtureRequest, runtime_folder: Path) -> Iterator[Server]:
    """A running server of each kind."""
    if request.param in NODES:
        node = request.getfixturevalue(NODES[request.param])
        if node.process is None:
            node.start()
        yield Apart(node, node.url_apart(new_id()))
        return
    needed("redis-server", "redis-server")
    server = BrokerServer("redis-server", Path(tempfile.mkdtemp(dir=runtime_folder)))
    server.start()
    yield server
    server.stop()


@dataclass
class System:
    """A whole system, started by `safelight up`."""

    port: int
    store: Path
    process: subprocess.Popen[bytes]
    log: Path
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=90)

    def post(self, image: bytes, query: str = "", **headers: str) -> httpx.Response:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post(f"/query{query}", files={"image": ("picture.jpg", image)}, headers=given)

    def parts(self, name: str) -> list[psutil.Process]:
        """The running processes whose command line holds `name`: gateway, worker, worker.child, valkey-server."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if name in (process.name(), *process.cmdline()[:4]):
                    found.append(process)
        return found

    def part(self, name: str) -> psutil.Process:
        return self.parts(name)[0]

    def ready(self) -> bool:
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it and return its exit code; fails if it leaves a process behind."""
        running = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(number)
        code = self.process.wait(timeout=30)
        self.client.close()
        _, alive = psutil.wait_procs(running, timeout=10)
        assert not alive, f"left behind: {alive}"
        return code


def admitted_answer(system: System, image: bytes) -> str:
    """The answer to an image; one that was not admitted (503) is sent again."""

    def admitted() -> httpx.Response | None:
        answer = system.post(image)
        return None if answer.status_code == 503 else answer

    return str(wait_until(admitted, REFUSED_SECONDS).text)


def answers_through(fault: Callable[[], Any], send: Callable[[], str], requests: int) -> list[str]:
    """The answers to so many requests of eight clients, while `fault` is done in mid-load."""
    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(send) for _ in range(requests)]
        wait_until(lambda: sum(answer.done() for answer in answers) > 20)
        fault()
        return [answer.result() for answer in answers]


def start_system(folder: Path, *options: str, wait: bool = True, **variables: str) -> System:
    """`safelight up` on a free port, saving below `folder`; `variables` join its environment."""
    port, store, log = free_port(), folder / "mirrored", folder / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "safelight", "up", "--port", str(port), "--store", str(store), *options],
            env=os.environ | variables,
            cwd=folder,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    system = System(port, store, process, log)
    if wait:
        try:
            wait_until(lambda: system.ready() or process.poll() is not None, STARTED_SECONDS)
            assert process.poll() is None, log.read_text()
        except BaseException:
            process.kill()
            raise
    return system


@pytest.fixture(scope="session")
def shared_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One system for all tests that leave it as they found it."""
    system = start_system(tmp_path_factory.mktemp("shared"), SAFELIGHT_BODY_TIMEOUT="2")
    yield system
    assert system.stop() == 0


@pytest.fixture
def new_system(tmp_path: Path) -> Iterator[Callable[..., System]]:
    """A function that starts a system of the test's own."""
    started: list[System] = []

    def start(*options: str, **keywords: Any) -> System:
        started.append(start_system(tmp_path, *options, **keywords))
        return started[-1]

    yield start
    for system in started:
        if system.process.poll() is None:
            system.stop()
        system.client.close()
