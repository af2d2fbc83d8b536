"""The client against a real system, and its retries against a server that fails as it is told to."""

from __future__ import annotations

import asyncio
import email.utils
import io
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from conftest import TEST_IMAGE, System, free_port
from PIL import Image, ImageChops

from safelight.batch import find, save
from safelight.client import Answer, Client
from safelight.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SUCCESS = (200, {}, b'{"status": "SUCCESS", "size": "1kb"}')
FULL = (503, {"Retry-After": "1"}, b'{"status": "FAILURE", "error": "gateway_full", "detail": "Full."}')
DROPPED = (0, {}, b"")
Script = tuple[int, dict[str, str], bytes]


class FakeGateway(ThreadingHTTPServer):
    """Answers one scripted response after the other, the last one for ever; status 0 drops the connection."""

    def __init__(self, *script: Script) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = list(script)
        self.asked: list[tuple[float, str, bytes]] = []
        self.connections = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeGateway
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append((time.monotonic(), self.path, body))
        script = self.server.script
        status, headers, body = script.pop(0) if len(script) > 1 else script[0]
        if not status:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def fake() -> Iterator[Callable[..., FakeGateway]]:
    started: list[tuple[FakeGateway, threading.Thread]] = []

    def start(*script: Script) -> FakeGateway:
        server = FakeGateway(*script)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(url: str, *images: bytes, **options: Any) -> list[Answer]:
    async def asking() -> list[Answer]:
        async with Client(url, **options) as client:
            return await asyncio.gather(*(client.query(str(number), image) for number, image in enumerate(images)))

    return asyncio.run(asking())


def command(port: int, *words: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "safelight", "query", "--port", str(port), *words],
        input=stdin,
        capture_output=True,
        check=False,
        timeout=60,
    )


def test_an_answer_has_facts_notes_worker_and_link(shared_system: System, image: bytes) -> None:
    (answer,) = ask(f"http://localhost:{shared_system.port}", image)
    assert (answer.status, answer.facts, answer.notes) == ("SUCCESS", {"size": "82kb"}, {"mirror": "lossless"})
    assert answer.worker
    assert answer.error is None
    assert answer.link
    saved = shared_system.store / answer.link.rpartition("/")[2]
    assert shared_system.client.get(answer.link).content == saved.read_bytes()


def test_a_refusal_is_an_answer_with_its_code(shared_system: System, image: bytes) -> None:
    url = f"localhost:{shared_system.port}"
    good, empty = ask(url, image, b"", operations="size,mirror,size")
    assert (good.status, good.facts) == ("SUCCESS", {"size": "82kb"})
    assert (empty.status, empty.error) == ("FAILURE", "empty_image")
    assert empty.detail
    assert ask(url, b"not an image")[0].error == "unsupported_format"


def test_503_is_tried_again_after_the_time_that_it_names(fake: Callable[..., FakeGateway]) -> None:
    server = fake(FULL, SUCCESS)
    (answer,) = ask(server.url, b"picture")
    assert answer.facts == {"size": "1kb"}
    assert [body for _, _, body in server.asked] == [b"picture"] * 2
    assert server.asked[1][0] - server.asked[0][0] >= 1.0
    timeouts = [float(path.partition("timeout=")[2]) for _, path, _ in server.asked]
    assert timeouts[0] <= 60
    assert timeouts[1] <= timeouts[0] - 1.0  # the gateway is told what is left


def test_retry_after_may_be_a_date(fake: Callable[..., FakeGateway]) -> None:
    date = email.utils.formatdate(time.time() + 2, usegmt=True)  # in whole seconds, so 1 to 2 s from now
    server = fake((503, {"Retry-After": date}, FULL[2]), SUCCESS)
    assert ask(server.url, b"picture")[0].status == "SUCCESS"
    assert server.asked[1][0] - server.asked[0][0] >= 0.9


def test_503_that_asks_for_more_time_than_there_is_ends_at_once(fake: Callable[..., FakeGateway]) -> None:
    server = fake((503, {"Retry-After": "30"}, FULL[2]))
    begun = time.monotonic()
    (answer,) = ask(server.url, b"picture", timeout=5.0)
    assert (answer.error, answer.detail) == ("gateway_full", "Full.")
    assert time.monotonic() - begun < 5.0
    assert len(server.asked) == 1


def test_503_for_ever_ends_within_the_time(fake: Callable[..., FakeGateway]) -> None:
    server = fake((503, {}, FULL[2]))
    begun = time.monotonic()
    (answer,) = ask(server.url, b"picture", timeout=1.0)
    assert answer.error == "gateway_full"
    assert time.monotonic() - begun < 2.0
    assert len(server.asked) > 1


@pytest.mark.parametrize("status", [400, 404, 413, 422, 429, 500, 504])
def test_nothing_else_is_tried_again(fake: Callable[..., FakeGateway], status: int) -> None:
    body = b'{"status": "FAILURE", "error": "some_code", "detail": "A sentence."}'
    server = fake((status, {"Retry-After": "0"}, body), SUCCESS)
    (answer,) = ask(server.url, b"picture")
    assert (answer.status, answer.error, answer.detail) == ("FAILURE", "some_code", "A sentence.")
    assert len(server.asked) == 1


def test_a_dropped_connection_is_tried_again(fake: Callable[..., FakeGateway]) -> None:
    server = fake(DROPPED, DROPPED, SUCCESS)
    assert ask(server.url, b"picture")[0].facts == {"size": "1kb"}
    assert len(server.asked) == 3


def test_a_gateway_that_is_not_there_is_given_up(fake: Callable[..., FakeGateway]) -> None:
    (answer,) = ask(f"http://127.0.0.1:{free_port()}", b"picture", timeout=1.0)
    assert answer.error == "unreachable"
    assert "ConnectError" in str(answer.detail)


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ((200, {}, b"<html>hello</html>"), "not_safelight"),
        ((200, {}, b"[1]"), "not_safelight"),
        ((502, {}, b"<html>bad gateway</html>"), "http_502"),
    ],
)
def test_another_servers_answer_is_no_success(fake: Callable[..., FakeGateway], response: Script, code: str) -> None:
    assert ask(fake(response).url, b"picture")[0].error == code


def test_connections_are_bounded_and_kept(fake: Callable[..., FakeGateway]) -> None:
    server = fake(SUCCESS)
    answers = ask(server.url, *[b"picture"] * 40, at_once=4)
    assert {answer.status for answer in answers} == {"SUCCESS"}
    assert server.connections <= 4


@pytest.mark.parametrize("url", ["ftp://localhost", "http://", "http://localhost:port"])
def test_a_wrong_address_is_a_sentence(url: str) -> None:
    with pytest.raises(ConfigurationError, match="is no address of a gateway"):
        asyncio.run(_opened(url))


async def _opened(url: str) -> Client:
    return Client(url)


def test_a_folder_is_posted_and_saved_under_its_names(shared_system: System, tmp_path: Path) -> None:
    given, out = tmp_path / "given", tmp_path / "out"
    (given / "sub" / ".hidden").mkdir(parents=True)
    colours = {"a.JPG": (200, 0, 0), "sub/a.JPG": (0, 200, 0), "b.png": (0, 0, 200), "sub/.hidden/c.jpg": (9, 9, 9)}
    for name, colour in colours.items():
        picture = Image.new("RGB", (32, 16), colour)
        picture.paste((255, 255, 255), (0, 0, 16, 16))
        picture.save(given / name, "PNG" if name.endswith("png") else "JPEG")
    other = tmp_path / "a.JPG"  # a second input of the same name
    other.write_bytes((given / "a.JPG").read_bytes())
    ended = command(shared_system.port, str(given), str(other), "--out", str(out), "--json")
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert {line["name"] for line in lines} == {*(str(given / name) for name in list(colours)[:3]), str(other)}
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert names == ["a-2.JPG", "a.JPG", "b.png", "sub/a.JPG"]
    assert {line["saved"] for line in lines} == {str(out / name) for name in names}
    for line in lines:
        before, after = Image.open(line["name"]).convert("RGB"), Image.open(line["saved"]).convert("RGB")
        flipped = after.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert max(high for _, high in ImageChops.difference(before, flipped).getextrema()) <= 3
        assert after.getpixel((31, 8)) != before.getpixel((31, 8))
    assert ended.stderr == b""  # not a terminal: no bar


def test_one_failure_shows_and_makes_the_exit_code(shared_system: System, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("no image")
    ended = command(shared_system.port, str(TEST_IMAGE), str(tmp_path / "note.txt"))
    text = ended.stdout.decode()
    assert ended.returncode == 1
    assert "82kb" in text
    assert "unsupported_format" in text
    assert "2 image(s): 1 succeeded, 1 failed" in text


def test_standard_input(shared_system: System, image: bytes, tmp_path: Path) -> None:
    ended = command(shared_system.port, "-", "--out", str(tmp_path), "--json", stdin=image)
    assert ended.returncode == 0
    line = json.loads(ended.stdout)
    assert (line["name"], line["facts"]) == ("-", {"size": "82kb"})
    with Image.open(tmp_path / "stdin.jpg") as saved, Image.open(io.BytesIO(image)) as given:
        assert saved.size == given.size


def test_operations_without_an_image_save_nothing(shared_system: System, tmp_path: Path) -> None:
    ended = command(
        shared_system.port, str(TEST_IMAGE), "--operations", "size", "--out", str(tmp_path / "out"), "--json"
    )
    line = json.loads(ended.stdout)
    assert (ended.returncode, line["link"], line["saved"]) == (0, None, None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["missing.jpg"], "There is no file or folder missing.jpg."),
        (["--unknown"], "There is no option --unknown."),
        (["-", "-"], "Standard input (-) can be given only once."),
        (["x.jpg", "--url", "ftp://x"], "ftp://x is no address of a gateway; it looks like http://localhost:8080."),
    ],
)
def test_what_cannot_work_is_one_sentence(tmp_path: Path, words: list[str], sentence: str) -> None:
    (tmp_path / "x.jpg").write_bytes(b"")
    ended = subprocess.run(
        [sys.executable, "-m", "safelight", "query", *words], cwd=tmp_path, capture_output=True, check=False, text=True
    )
    assert (ended.returncode, ended.stderr) == (2, f"safelight: {sentence}\n")


@pytest.mark.parametrize("words", [["--at-once", "0"], ["--timeout", "0"], ["--timeout", "nan"], []])
def test_what_is_out_of_bounds_is_refused(words: list[str]) -> None:
    given = [str(TEST_IMAGE)] if words else []
    ended = subprocess.run(
        [sys.executable, "-m", "safelight", "query", *given, *words], capture_output=True, check=False, timeout=30
    )
    assert ended.returncode == 2
    assert b"Traceback" not in ended.stderr


def test_find_takes_files_folders_and_nothing_hidden(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/c.jpg", "a/.d.jpg", ".e/f.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [str(source.target) for source in find([str(tmp_path)])] == ["a/c.jpg", "b.jpg"]
    assert [source.name for source in find([str(tmp_path / ".e/f.jpg")])] == [str(tmp_path / ".e/f.jpg")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="no file to post"):
        find([str(tmp_path / "empty")])


def test_save_never_overwrites(tmp_path: Path) -> None:
    target = find([str(TEST_IMAGE)])[0].target
    paths = [save(bytes([number]), tmp_path, target, "jpg") for number in range(3)]
    assert [path.name for path in paths] == ["test_image.jpg", "test_image-2.jpg", "test_image-3.jpg"]
    assert [path.read_bytes() for path in paths] == [b"\0", b"\1", b"\2"]
    assert save(b"", tmp_path, target, "png").name == "test_image.png"
