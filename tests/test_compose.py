"""The compose files, run for real where a Docker engine is: what they promise on each broker, under load and faults."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, SUCCESS, TEST_IMAGE, free_port, wait_until
from test_parts import IMAGE_LIBRARIES, WEB_LIBRARIES

FILES = {"valkey": "compose.yaml", "rabbitmq": "compose.rabbitmq.yaml", "kafka": "compose.kafka.yaml"}
CONTEXT = ("Dockerfile", ".dockerignore", "LICENSE", "README.md", "pyproject.toml", "uv.lock", "src", *FILES.values())
SECONDS = 120.0  # for a broker or worker to be there; a first build of the images is not counted
CLIENTS = 4
BETWEEN = 40  # answers before the next fault
SOMEBODY = 12_345  # owns the folder, where the test may give it away

pytestmark = pytest.mark.timeout(900)


def _docker(*words: str) -> str:
    return subprocess.run(["docker", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def _engine() -> None:
    """Docker, Compose and the base images; else these tests are skipped, in CI too: no package brings images."""
    try:
        _docker("info")
        _docker("compose", "version")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no Docker engine with Compose runs here")
    named = [line for name in ("Dockerfile", *FILES.values()) for line in (ROOT / name).read_text().splitlines()]
    for image in re.findall(r"^(?:ARG PYTHON=| +image: )(\S+)$", "\n".join(named), re.MULTILINE):
        try:
            _docker("image", "inspect", image)
        except subprocess.CalledProcessError:
            try:
                _docker("pull", "-q", image)
            except subprocess.CalledProcessError:
                pytest.skip(f"the image {image} cannot be had here")


@dataclass
class Stack:
    """One compose project in a folder of its own."""

    folder: Path
    file: str
    port: int = field(default_factory=free_port)

    def compose(self, *words: str) -> str:
        command = ["docker", "compose", "-p", "safelight-test", "-f", self.file, *words]
        variables = os.environ | {"PORT": str(self.port)}
        done = subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def up(self, *words: str) -> None:
        self.compose("up", "--detach", "--wait", "--wait-timeout", f"{SECONDS:.0f}", *words)

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "-q", service).split()

    def python(self, service: str, script: str) -> str:
        return self.compose("exec", "-T", service, "python", "-c", script).strip()

    def saved(self) -> list[Path]:
        return list((self.folder / "mirrored").glob("*.jpg"))


@pytest.fixture(params=FILES)
def stack(request: pytest.FixtureRequest, _engine: None, tmp_path: Path) -> Iterator[Stack]:
    for name in CONTEXT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "mirrored").mkdir()
    if os.getuid() == 0:
        os.chown(tmp_path / "mirrored", SOMEBODY, SOMEBODY)
    started = Stack(tmp_path, FILES[request.param])
    started.compose("build", "--quiet")
    try:
        started.up()
        yield started
    finally:
        print(started.compose("logs", "--timestamps", "--no-color"))  # noqa: T201 - shown if the test failed
        started.compose("down", "--volumes", "--rmi", "local", "--timeout", "30")


@dataclass
class Load:
    """Clients that post one image after the other. A request that was not admitted (503) is sent again."""

    stack: Stack
    texts: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    workers: set[str] = field(default_factory=set)
    ended: threading.Event = field(default_factory=threading.Event)

    def post(self) -> None:
        image = TEST_IMAGE.read_bytes()
        with httpx.Client(base_url=f"http://127.0.0.1:{self.stack.port}", timeout=90) as client:
            while not self.ended.is_set():
                answer = client.post("/query", files={"image": image})
                if answer.status_code == 503:
                    self.refused.append(answer.text)
                    self.ended.wait(0.2)
                else:
                    self.texts.append(answer.text)
                    self.workers.add(answer.headers.get("safelight-worker", ""))

    def go_on(self) -> None:
        """Wait for more answers than there are, and take stock of the workers anew."""
        self.workers.clear()
        before = len(self.texts)
        wait_until(lambda: len(self.texts) >= before + BETWEEN, SECONDS)


@contextlib.contextmanager
def _load(stack: Stack) -> Iterator[Load]:
    load = Load(stack)
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
        posting = [clients.submit(load.post) for _ in range(CLIENTS)]
        try:
            load.go_on()
            yield load
        finally:
            load.ended.set()
    for client in posting:
        client.result()
    assert load.texts == [SUCCESS] * len(load.texts)


def test_all_that_compose_promises(stack: Stack) -> None:
    command = ["curl", "-s", "-F", "image=@./test_image.jpg", f"localhost:{stack.port}/query"]
    assert subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode() == SUCCESS
    [saved] = stack.saved()
    owner = (stack.folder / "mirrored").stat()
    assert (saved.stat().st_uid, saved.stat().st_gid) == (owner.st_uid, owner.st_gid)
    answer = httpx.post(f"http://127.0.0.1:{stack.port}/query", files={"image": TEST_IMAGE.read_bytes()})
    assert answer.headers["safelight-mirror"] == "lossless"
    _are_confined(stack)
    with _load(stack) as load:
        stack.up("--no-recreate", "--scale", "worker=4")
        load.go_on()
        wait_until(lambda: len(load.workers) == 4, SECONDS)
        stack.up("--no-recreate", "--scale", "worker=1")
        load.go_on()
        assert len(load.workers) == 1
        assert load.refused == []
        stack.up("--no-recreate", "--scale", "worker=2")
        _docker("kill", stack.containers("worker")[0])
        load.go_on()
        _docker("restart", *stack.containers("broker"))
        load.go_on()
    assert len(stack.saved()) == len(load.texts) + 2
    _ends_in_good_order(stack)


def _are_confined(stack: Stack) -> None:
    """No capability, no way to more, nothing to write to, nothing installed that only the other part uses."""
    for service, others in (("gateway", IMAGE_LIBRARIES), ("worker", WEB_LIBRARIES)):
        [container] = stack.containers(service)
        # Of process 1, which passes signals on, and of the part, its child.
        read = "cat /proc/1/status /proc/$(cut -d' ' -f1 /proc/1/task/1/children)/status"
        told = [line.split(":\t") for line in _docker("exec", container, "sh", "-c", read).splitlines()]
        found = {name: [value for each, value in told if each == name] for name, _ in told}
        assert found["Name"] == ["tini", "safelight"]
        for kind in ("Prm", "Eff", "Bnd", "Inh", "Amb"):
            assert found[f"Cap{kind}"] == ["0" * 16] * 2
        assert found["NoNewPrivs"] == ["1"] * 2
        assert "0" not in " ".join(found["Uid"]).split() or os.getuid() != 0
        assert "Read-only" in stack.python(service, "try: open('/x', 'w')\nexcept OSError as e: print(e)")
        absent = [module for module in others if not module.startswith("safelight.")]  # code of both is in both
        script = f"from importlib.util import find_spec; print([m for m in {absent} if find_spec(m)])"
        assert stack.python(service, script) == "[]"
        limits = _docker("inspect", "-f", "{{.HostConfig.Memory}} {{.HostConfig.PidsLimit}}", container).split()
        assert all(int(limit) > 0 for limit in limits)
    for service, port in itertools.product(("worker", "broker"), (5672, 6379, 9092, 15672)):
        for container in stack.containers(service):
            assert f"{port}/tcp -> " not in _docker("port", container)


def _ends_in_good_order(stack: Stack) -> None:
    stack.compose("stop", "gateway", "worker")
    ended = [*stack.compose("ps", "-aq", "gateway").split(), *stack.compose("ps", "-aq", "worker").split()]
    codes = [_docker("inspect", "-f", "{{.State.ExitCode}}", container).strip() for container in ended]
    assert sorted(codes) in (["0", "0"], ["0", "0", "137"])  # one was killed, if Docker did not start it again


def test_a_sigterm_is_not_lost_while_a_part_starts(stack: Stack) -> None:
    """The kernel gives process 1 no signal that it has not asked for, and Python asks late."""
    for service in ("gateway", "worker"):
        [container] = stack.containers(service)
        _docker("restart", "--time", "30", container)
        _docker("kill", "--signal", "TERM", container)
        wait_until(lambda: _docker("inspect", "-f", "{{.State.Running}}", container).strip() == "false")  # noqa: B023
