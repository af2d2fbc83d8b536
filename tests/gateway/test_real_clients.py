"""Requests as real clients send them, and as the RFCs allow: each gets exactly the seed's answer."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest
from conftest import ROOT
from raw_http import FORM, GOOD, IMAGE, SUCCESS, Connection, check_failure, chunked, form, head, part, post, works

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import System


def _curl(system: System, *arguments: str, path: str = "/query") -> str:
    command = ["curl", "-sS", "--max-time", "20", *arguments, f"http://localhost:{system.port}{path}"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


CURLS = {
    "a form": ["-F", "image=@./test_image.jpg"],
    "asking first": ["-H", "Expect: 100-continue", "-F", "image=@./test_image.jpg"],
    "not asking first": ["-H", "Expect:", "-F", "image=@./test_image.jpg"],
    "expecting something else": ["-H", "Expect: miracles", "-F", "image=@./test_image.jpg"],
    "chunked": ["-H", "Transfer-Encoding: chunked", "-F", "image=@./test_image.jpg"],
    "HTTP/1.0": ["-0", "-F", "image=@./test_image.jpg"],
    "HTTP/2 if you like": ["--http2", "-F", "image=@./test_image.jpg"],
    "HTTP/2 if you like, raw": ["--http2", "--data-binary", "@test_image.jpg"],
    "HTTP/2 if you like, chunked": ["--http2", "-H", "Transfer-Encoding: chunked", "-F", "image=@test_image.jpg"],
    "another name": ["-F", "image=@./test_image.jpg;filename=x.txt"],
    "an empty name": ["-F", "image=@./test_image.jpg;filename="],
    "a name with quotes": ["-F", 'image=@./test_image.jpg;filename="a\\"; name=\\"b.jpg"'],
    "a name of other alphabets": ["-F", "image=@./test_image.jpg;filename=фото 写真.jpg"],
    "another type": ["-F", "image=@./test_image.jpg;type=text/html"],
    "no name": ["-F", "image=<./test_image.jpg;type=image/jpeg"],
    "fields around it": ["-F", "a=1", "-F", "image=@./test_image.jpg", "-F", "b=2", "-F", "images=@README.md"],
    "raw": ["--data-binary", "@test_image.jpg", "-H", "Content-Type: image/jpeg"],
    "raw, as a form": ["--data-binary", "@test_image.jpg"],  # curl says application/x-www-form-urlencoded
    "raw, without a type": ["--data-binary", "@test_image.jpg", "-H", "Content-Type:"],
    "raw, of a wrong type": ["--data-binary", "@test_image.jpg", "-H", "Content-Type: image/png"],
    "raw, chunked": ["--data-binary", "@test_image.jpg", "-H", "Transfer-Encoding: chunked"],
    "compressed answers": ["--compressed", "-F", "image=@./test_image.jpg"],
}


@pytest.mark.parametrize("name", CURLS)
def test_curl(name: str, shared_system: System) -> None:
    assert _curl(shared_system, *CURLS[name]) == SUCCESS.decode()


def test_curl_is_refused_before_it_sends_the_body(shared_system: System, tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(IMAGE + bytes(33 * 1024 * 1024))
    arguments = [
        "-F",
        f"image=@{tmp_path}/large.jpg",
        "-w",
        "\n%{http_code} %{size_upload}",
        "-H",
        "Expect: 100-continue",
    ]
    assert re.search(r'"too_large".*\n413 0$', _curl(shared_system, *arguments))
    assert re.search(r'"not_found".*\n404 0$', _curl(shared_system, *arguments, path="/elsewhere"))


def test_curl_that_does_not_ask_first_reads_the_refusal(shared_system: System, tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(IMAGE + bytes(40 * 1024 * 1024))
    arguments = ["-F", f"image=@{tmp_path}/large.jpg", "-w", "\n%{http_code}", "-H", "Expect:"]
    assert re.search(r'"too_large".*\n413$', _curl(shared_system, *arguments))


def test_httpx_streams_without_a_length(shared_system: System) -> None:
    pieces = (IMAGE[at : at + 777] for at in range(0, len(IMAGE), 777))
    answer = shared_system.client.post("/query", content=pieces)
    assert answer.content == SUCCESS
    assert answer.request.headers["transfer-encoding"] == "chunked"


def test_httpx_fields_and_files(shared_system: System) -> None:
    files: list[tuple[str, tuple[str, bytes]]] = [
        ("other", ("a.txt", b"text")),
        ("image", ("b", IMAGE)),
        ("z", ("", b"")),
    ]
    assert shared_system.client.post("/query", data={"image2": "x", "n": "1"}, files=files).content == SUCCESS


FORMS = {
    "a preamble": (FORM, b"This is a form.\r\n" + form(part())),
    "an empty line first": (FORM, b"\r\n" + form(part())),
    "an epilogue": (FORM, form(part()) + b"That was it.\r\n--limit\r\nnot a part"),
    "no line end at the end": (FORM, form(part())[:-2]),
    "lines that look like delimiters": (FORM, form(part(b"--limi\r\n--limi", 'name="x"'), part())),
    "no quotes": (FORM, form(part(IMAGE, "name=image; filename=a.jpg"))),
    "the name last": (FORM, form(part(IMAGE, 'filename="a.jpg"; name="image"'))),
    "no filename": (FORM, form(part(IMAGE, 'name="image"'))),
    "an encoded filename": (FORM, form(part(IMAGE, "name=\"image\"; filename*=UTF-8''%e5%86%99%20%22.jpg"))),
    "both filenames": (FORM, form(part(IMAGE, 'name="image"; filename="a.jpg"; filename*=UTF-8\'\'b.jpg'))),
    "a path as filename": (FORM, form(part(IMAGE, 'name="image"; filename="../../etc/passwd"'))),
    "a Windows path": (FORM, form(part(IMAGE, 'name="image"; filename="C:\\photos\\a.jpg"'))),
    "name= in the filename": (FORM, form(part(IMAGE, 'filename="; name=\\"other\\""; name="image"'))),
    "semicolons in the filename": (FORM, form(part(IMAGE, 'name="image"; filename="a;b=c;.jpg"'))),
    "a type and an encoding": (
        FORM,
        form(part(IMAGE, 'name="image"', "Content-Type: image/jpeg", "Content-Transfer-Encoding: binary")),
    ),
    "a wrong type": (FORM, form(part(IMAGE, 'name="image"', "Content-Type: text/plain; charset=utf-16"))),
    "a part's length": (FORM, form(part(IMAGE, 'name="image"', f"Content-Length: {len(IMAGE)}"))),
    "small letters": (FORM, form(part()).replace(b"Content-Disposition", b"content-disposition")),
    "capitals": ("MULTIPART/FORM-DATA; BOUNDARY=limit", form(part())),
    "a folded header": (FORM, form(part()).replace(b'"; filename', b'";\r\n filename')),
    "a quoted boundary": ('multipart/form-data; boundary="limit"', form(part())),
    "parameters around the boundary": ("multipart/form-data; charset=utf-8; boundary=limit; x=y", form(part())),
    "blanks around the boundary": ("multipart/form-data ;  boundary = limit", form(part())),
    "no blank before the boundary": ("multipart/form-data;boundary=limit", form(part())),
    **{
        f"the boundary {boundary}": (
            f"multipart/form-data; boundary={boundary}",
            form(part()).replace(b"--limit", f"--{boundary}".replace('"', "").encode()),
        )
        for boundary in (
            "----WebKitFormBoundary7MA4YWxkTrZu0gW",
            "---------------------------9051914041544843365972754266",
            '"a b:c/d=e?f(g)h,i+j_k.l\'m"',
            "-",
            "--",
            "0" * 70,
        )
    },
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form(name: str, shared_system: System) -> None:
    content_type, body = FORMS[name]
    with Connection(shared_system.port) as connection:
        connection.send(post(body, content_type=content_type))
        assert connection.answer().body == SUCCESS
        connection.send(
            head("/query", f"Content-Type: {content_type}", "Transfer-Encoding: chunked") + chunked(body, 997)
        )
        assert connection.answer().body == SUCCESS


def test_asking_first_is_answered_by_100(shared_system: System) -> None:
    body = form(part())
    with Connection(shared_system.port) as connection:
        connection.send(head("/query", f"Content-Type: {FORM}", f"Content-Length: {len(body)}", "Expect: 100-Continue"))
        assert not connection.quiet(5)
        connection.send(body)
        answer = connection.answer()
        assert (answer.interim, answer.body) == ([100], SUCCESS)
        works(connection)


@pytest.mark.parametrize(
    ("target", "header", "status", "code"),
    [
        ("/query", "Accept: text/html", 406, "not_acceptable"),
        ("/query?timeout=nan", "X: x", 400, "malformed_request"),
        ("/elsewhere", "X: x", 404, "not_found"),
        ("/livez", "X: x", 405, "method_not_allowed"),
    ],
)
def test_asking_first_for_what_is_refused(
    target: str, header: str, status: int, code: str, shared_system: System
) -> None:
    with Connection(shared_system.port) as connection:
        connection.send(head(target, header, "Content-Length: 90000", "Expect: 100-continue"))
        answer = connection.answer()
        check_failure(answer, status, code)
        assert answer.interim == []
        assert answer.headers["connection"] == "close"
        assert connection.closed()


def test_http_1_0_gets_no_100_and_is_closed(shared_system: System) -> None:
    body = form(part())
    headers = [f"Content-Type: {FORM}", f"Content-Length: {len(body)}", "Expect: 100-continue"]
    with Connection(shared_system.port) as connection:
        connection.send(head("/query", *headers, version="1.0").replace(b"Host: here\r\n", b"") + body)
        answer = connection.answer()
        assert (answer.interim, answer.body) == ([], SUCCESS)
        assert answer.headers["connection"] == "close"
        assert connection.closed()


def test_a_client_may_ask_to_close(shared_system: System) -> None:
    with Connection(shared_system.port) as connection:
        connection.send(post(form(part()), "Connection: close"))
        answer = connection.answer()
        assert (answer.body, answer.headers["connection"]) == (SUCCESS, "close")
        assert connection.closed()


def test_a_connection_is_used_again_and_again(shared_system: System) -> None:
    with Connection(shared_system.port) as connection:
        for _ in range(10):
            works(connection)


def test_pipelined_requests_are_answered_in_their_order(shared_system: System) -> None:
    queries = [GOOD, head("/livez", method="GET"), post(b""), post(form(part()), "Accept: image/*"), GOOD] * 3
    with Connection(shared_system.port) as connection:
        connection.send(b"".join(queries))
        answers = [connection.answer() for _ in queries]
        assert [answer.status for answer in answers] == [200, 200, 400, 200, 200] * 3
        assert [answer.body for answer in answers[::5]] == [SUCCESS] * 3
        assert {answer.headers["content-type"] for answer in answers[3::5]} == {"image/jpeg"}
        works(connection)


@pytest.mark.parametrize("size", [1, 7, 1_000, 65_536])
def test_bytes_arrive_in_any_pieces(size: int, shared_system: System) -> None:
    data = GOOD if size > 1 else post(form(part())[:3_000])
    with Connection(shared_system.port) as connection:
        for at in range(0, len(data), size):
            connection.send(data[at : at + size])
        if size > 1:
            assert connection.answer().body == SUCCESS
        else:
            check_failure(connection.answer(), 400, "malformed_request")
        works(connection)
