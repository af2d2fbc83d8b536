"""Routes on a running system: what is asked for is what is answered."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import pytest
from conftest import wait_until
from PIL import Image
from raw_http import Connection, check_failure, form, head, part, post, works

if TYPE_CHECKING:
    import httpx
    from conftest import System


def _linked(answer: httpx.Response) -> str:
    return answer.headers["link"].partition(">")[0].removeprefix("<")


@pytest.mark.parametrize(
    ("operations", "body", "image"),
    [
        ("size,mirror", '{"status": "SUCCESS", "size": "82kb"}', True),
        ("size", '{"status": "SUCCESS", "size": "82kb"}', False),
        ("mirror", '{"status": "SUCCESS"}', True),
        ("mirror,mirror,size", None, True),
        ("%20size%20,%20mirror%20", '{"status": "SUCCESS", "size": "82kb"}', True),
    ],
)
def test_operations(operations: str, body: str | None, image: bool, shared_system: System) -> None:
    before = set(shared_system.store.iterdir())
    with Connection(shared_system.port) as connection:
        connection.send(post(form(part()), target=f"/query?operations={operations}"))
        answer = connection.answer()
        assert answer.status == 200
        assert body is None or answer.body.decode() == body
        assert ("link" in answer.headers) == image
        assert len(set(shared_system.store.iterdir()) - before) == image
        assert ("store;dur=" in answer.headers["server-timing"]) == image


def test_mirrored_twice_is_the_picture_again(shared_system: System, image: bytes) -> None:
    twice = shared_system.post(image, "?operations=mirror,mirror", accept="image/*").content
    assert (
        Image.open(io.BytesIO(twice)).convert("RGB").tobytes() == Image.open(io.BytesIO(image)).convert("RGB").tobytes()
    )


@pytest.mark.parametrize("accept", ["image/*", "image/jpeg", "image/jpeg, application/json;q=0.5"])
def test_the_image_itself(accept: str, shared_system: System, image: bytes) -> None:
    answer = shared_system.post(image, accept=accept)
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.content == (shared_system.store / _linked(answer).removeprefix("/images/")).read_bytes()
    assert answer.headers["safelight-mirror"] == "lossless"


@pytest.mark.parametrize(
    ("query", "accept"),
    [("", "text/html"), ("", "image/*;q=0, application/json;q=0"), ("?operations=size", "image/*"), ("", "image/png")],
)
def test_nothing_acceptable(query: str, accept: str, shared_system: System, image: bytes) -> None:
    before = set(shared_system.store.iterdir())
    answer = shared_system.post(image, query, accept=accept)
    assert (answer.status_code, answer.json()["error"]) == (406, "not_acceptable")
    assert set(shared_system.store.iterdir()) == before


def test_several_accept_headers_are_one_list(shared_system: System) -> None:
    with Connection(shared_system.port) as connection:
        connection.send(post(form(part()), "Accept: text/html", "Accept: image/*"))
        assert connection.answer().headers["content-type"] == "image/jpeg"
        works(connection)


@pytest.mark.parametrize(("name", "extension"), [("PNG", "png"), ("GIF", "gif"), ("WEBP", "webp"), ("JPEG", "jpg")])
def test_the_result_has_the_format_of_the_upload(name: str, extension: str, shared_system: System) -> None:
    buffer = io.BytesIO()
    Image.linear_gradient("L").rotate(90).save(buffer, name)
    answer = shared_system.post(buffer.getvalue())
    assert answer.status_code == 200, answer.text
    path = _linked(answer)
    assert path.endswith(f".{extension}")
    served = shared_system.client.get(path)
    assert served.headers["content-type"] == f"image/{name.lower()}"
    assert Image.open(io.BytesIO(served.content)).format == name


def test_a_saved_image_and_its_validator(shared_system: System, image: bytes) -> None:
    path = _linked(shared_system.post(image))
    served = shared_system.client.get(path)
    etag = served.headers["etag"]
    assert etag == f'"{path.removeprefix("/images/")}"'
    assert served.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert served.headers["x-content-type-options"] == "nosniff"
    asked = shared_system.client.head(path)
    assert (asked.status_code, asked.content) == (200, b"")
    assert asked.headers["content-length"] == str(len(served.content))
    for known in (etag, f"W/{etag}", f'"other", {etag}', f'W/"a,b" , W/{etag}', "*"):
        for method in ("GET", "HEAD"):
            answer = shared_system.client.request(method, path, headers={"If-None-Match": known})
            assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    for unknown in ('"other"', etag.strip('"'), "", '"*"'):
        assert shared_system.client.get(path, headers={"If-None-Match": unknown}).content == served.content


@pytest.mark.parametrize(
    "wanted", ["bytes=0-9", "bytes=999999999-", "bytes=9-0", "items=1-2", "nonsense", "bytes=" + "0-0," * 500]
)
def test_a_range_is_ignored(wanted: str, shared_system: System, image: bytes) -> None:
    path = _linked(shared_system.post(image))
    answer = shared_system.client.get(path, headers={"Range": wanted})
    assert (answer.status_code, answer.headers["accept-ranges"]) == (200, "none")
    assert len(answer.content) == int(answer.headers["content-length"]) > 10_000


def test_a_request_keeps_its_own_id_and_every_other_gets_one(shared_system: System, image: bytes) -> None:
    assert shared_system.post(image, x_request_id="a/b:c@d+e=f").headers["x-request-id"] == "a/b:c@d+e=f"
    ids = [shared_system.post(b"").headers["x-request-id"] for _ in range(5)]
    assert len(set(ids)) == 5
    milliseconds = [one[:13] for one in ids]
    assert milliseconds == sorted(milliseconds)
    assert all(re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", one) for one in ids)


@pytest.mark.parametrize(
    "traceparent", ["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "nonsense", "00-" + "x" * 5_000]
)
def test_a_trace_never_stands_in_the_way(traceparent: str, shared_system: System, image: bytes) -> None:
    assert shared_system.post(image, traceparent=traceparent).status_code == 200


def test_the_last_of_two_parameters_counts(shared_system: System) -> None:
    with Connection(shared_system.port) as connection:
        connection.send(
            post(form(part()), target="/query?timeout=0&timeout=9&operations=nonsense&operations=size&other=1")
        )
        assert connection.answer().status == 200
        connection.send(post(form(part()), target="/query?timeout=9&timeout=0"))
        check_failure(connection.answer(), 400, "malformed_request")


def test_health_is_for_machines(shared_system: System) -> None:
    assert shared_system.client.get("/livez").text == "ok\n"
    assert shared_system.client.get("/readyz").text == "ready\n"


def test_a_file_that_was_deleted_is_not_found(shared_system: System, image: bytes) -> None:
    path = _linked(shared_system.post(image))
    (shared_system.store / path.removeprefix("/images/")).unlink()
    assert shared_system.client.get(path).status_code == 404


def test_other_methods_on_an_image(shared_system: System) -> None:
    with Connection(shared_system.port) as connection:
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            connection.send(head("/images/x", "Content-Length: 5", method=method) + b"hello")
            answer = connection.answer()
            check_failure(answer, 405, "method_not_allowed")
            assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}
        works(connection)


def test_an_image_is_served_to_many_at_once(shared_system: System, image: bytes) -> None:
    path = _linked(shared_system.post(image))
    connections = [Connection(shared_system.port) for _ in range(30)]
    for connection in connections:
        connection.send(head(path, method="GET") * 3)
    bodies = {connection.answer().body for connection in connections for _ in range(3)}
    assert bodies == {(shared_system.store / path.removeprefix("/images/")).read_bytes()}
    for connection in connections:
        connection.__exit__()
    wait_until(shared_system.ready)
