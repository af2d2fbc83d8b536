"""The parts apart: a gateway without an image library, a worker without a web library, together a whole system."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import httpx
import pytest
from conftest import BrokerServer, free_port, wait_until

IMAGE_LIBRARIES = ("PIL", "turbojpeg", "pyvips", "safelight.operations")
WEB_LIBRARIES = ("starlette", "uvicorn", "httptools", "multipart", "httpx", "prometheus_client", "safelight.gateway")

BLOCK = """
import os, sys
from importlib.abc import MetaPathFinder
class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        for absent in os.environ.get("ABSENT", "").split():
            if name == absent or name.startswith(absent + "."):
                raise ModuleNotFoundError(f"{name} is absent in this test", name=name)
sys.meta_path.insert(0, Absent())
"""


@pytest.fixture
def server(runtime_folder: Path) -> Iterator[BrokerServer]:
    started = BrokerServer("embedded", Path(mkdtemp(dir=runtime_folder)))
    started.start()
    yield started
    started.stop()


def start(part: str, absent: tuple[str, ...], url: str, port: int, folder: Path) -> subprocess.Popen[bytes]:
    (folder / "sitecustomize.py").write_text(BLOCK)
    variables = {"PYTHONPATH": str(folder), "ABSENT": " ".join(absent), "SAFELIGHT_BROKER": url}
    return subprocess.Popen(
        [sys.executable, "-m", "safelight", part, "--port", str(port)], env=os.environ | variables, cwd=folder
    )


def test_a_gateway_without_image_libraries_and_a_worker_without_web_libraries(
    server: BrokerServer, tmp_path: Path, image: bytes
) -> None:
    port = free_port()
    parts = [
        start("gateway", IMAGE_LIBRARIES, server.url, port, tmp_path),
        start("worker", WEB_LIBRARIES, server.url, port, tmp_path),
    ]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:

            def ready() -> bool:
                try:
                    return client.get("/readyz").status_code == 200
                except httpx.TransportError:
                    return False

            wait_until(ready)
            answer = client.post("/query", files={"image": image})
        assert answer.text == '{"status": "SUCCESS", "size": "82kb"}'
    finally:
        for part in parts:
            part.terminate()
        assert [part.wait(timeout=20) for part in parts] == [0, 0]


@pytest.mark.parametrize(("part", "absent"), [("gateway", "uvicorn"), ("worker", "redis")])
def test_the_absence_is_real(part: str, absent: str, tmp_path: Path, server: BrokerServer) -> None:
    """What is blocked cannot be imported: the test above would see it."""
    with start(part, (absent,), server.url, free_port(), tmp_path) as process:
        assert process.wait(timeout=20) != 0
