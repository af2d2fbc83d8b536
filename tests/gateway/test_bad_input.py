"""What clients send that is no picture in a form: a clear failure each, and everything goes on as before."""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING

import pytest
from conftest import wait_until
from PIL import Image
from raw_http import FORM, IMAGE, Connection, check_failure, chunked, form, head, metric, part, post, refused, works

if TYPE_CHECKING:
    from conftest import System

MEGABYTE = 1024 * 1024


def _png(width: int, height: int, size: int) -> bytes:
    """A PNG that claims to be so large, and has so many bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    data = zlib.compress(bytes(60_000_000), 9)[: size - len(start) - 24]
    return start + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _gif(frames: int) -> bytes:
    """An animation of one pixel."""
    frame = b"!\xf9\x04\0\x0a\0\0\0" + b",\0\0\0\0\1\0\1\0\0" + b"\2\2D\1\0"
    return b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff" + frame * frames + b";"


def _saved(name: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(buffer, name)
    return buffer.getvalue()


TEXT = b"This is no picture.\n" * 5_000

BAD_FORMS = {
    "no part named image": (form(part(disposition='name="picture"; filename="a.jpg"')), 400, "no_image"),
    "no part at all": (form(), 400, "no_image"),
    "a name in other letters": (form(part(disposition='name="Image"; filename="a.jpg"')), 400, "no_image"),
    "two images": (form(part(), part()), 400, "several_images"),
    "two images, the first one empty": (form(part(b""), part()), 400, "several_images"),
    "an empty file": (form(part(b"")), 400, "empty_image"),
    "an empty body": (b"", 400, "malformed_request"),
    "a short text": (form(part(b"hello")), 415, "unsupported_format"),
    "a long text": (form(part(TEXT)), 415, "unsupported_format"),
    "zeros": (form(part(bytes(100_000))), 415, "unsupported_format"),
    "one byte": (form(part(b"\xff")), 415, "unsupported_format"),
    "a JPEG's first bytes alone": (form(part(IMAGE[:3])), 422, "unprocessable_image"),
    "a JPEG cut in half": (form(part(IMAGE[: len(IMAGE) // 2])), 422, "unprocessable_image"),
    "a PNG's first bytes alone": (form(part(b"\x89PNG\r\n\x1a\n")), 422, "unprocessable_image"),
    "60,000 x 60,000 pixels": (form(part(_png(60_000, 60_000, 40_000))), 422, "too_many_pixels"),
    "a PNG without pixels": (form(part(_png(0, 0, 1_000))), 422, "unprocessable_image"),
    "10,000 frames": (form(part(_gif(10_000))), 422, "too_many_frames"),
    "PPM": (form(part(_saved("PPM"))), 415, "unsupported_format"),
    "ICO": (form(part(_saved("ICO"))), 415, "unsupported_format"),
    "SVG": (form(part(b'<svg xmlns="http://www.w3.org/2000/svg"/>')), 415, "unsupported_format"),
    "a form cut short": (form(part())[:-20], 400, "malformed_request"),
    "no delimiter": (IMAGE, 400, "malformed_request"),
    "other bytes after a delimiter": (form(part()).replace(b"--limit--", b"--limit!!"), 400, "malformed_request"),
    "a part without a disposition": (form(part(disposition="")), 400, "malformed_request"),
    "an attachment": (form(part()).replace(b"form-data", b"attachment"), 400, "malformed_request"),
    "65 parts": (form(*[part(b"x", 'name="x"')] * 65, part()), 400, "malformed_request"),
    "a long header in a part": (form(part(IMAGE, 'name="image"', "X: " + "x" * 5_000)), 400, "malformed_request"),
    "many headers in a part": (form(part(IMAGE, 'name="image"', *["X: x"] * 9)), 400, "malformed_request"),
    "a part's header in no alphabet": (form(part()).replace(b"picture", b"\xff\xfe"), 400, "malformed_request"),
    "a part longer than it says": (form(part(IMAGE, 'name="image"', "Content-Length: 9")), 400, "malformed_request"),
}


@pytest.mark.parametrize("name", BAD_FORMS)
def test_a_bad_form(name: str, shared_system: System) -> None:
    body, status, code = BAD_FORMS[name]
    refused(shared_system, post(body), status, code)
    refused(
        shared_system,
        head("/query", f"Content-Type: {FORM}", "Transfer-Encoding: chunked") + chunked(body),
        status,
        code,
    )


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        "multipart/form-data; boundary=other",
        "multipart/mixed; boundary=limit",
        "multipart/; boundary=limit",
        "multipart/form-data; charset=utf-8",
    ],
)
def test_a_wrong_boundary(content_type: str, shared_system: System) -> None:
    refused(shared_system, post(form(part()), content_type=content_type), 400, "malformed_request")


@pytest.mark.parametrize(
    "content_type", ["application/x-www-form-urlencoded", "text/plain", "nonsense", "limit;;;=", ""]
)
def test_a_form_under_another_type_is_no_image(content_type: str, shared_system: System) -> None:
    refused(shared_system, post(form(part()), content_type=content_type), 415, "unsupported_format")


@pytest.mark.parametrize(
    "seconds", ["0", "-1", "nan", "inf", "-inf", "1e999", "300.1", "", "soon", "1,5", "0x10", "٣٠٠٠", "-0.0"]
)
def test_a_timeout_that_is_none(seconds: str, shared_system: System) -> None:
    target = str(
        shared_system.client.build_request("POST", "/query", params={"timeout": seconds}).url.raw_path, "ascii"
    )
    refused(shared_system, post(form(part()), target=target), 400, "malformed_request")


@pytest.mark.parametrize("seconds", ["300", "3e2", "5.5", "%2B20"])
def test_a_timeout_that_is_one(seconds: str, shared_system: System, image: bytes) -> None:
    assert shared_system.post(image, f"?timeout={seconds}").status_code == 200


@pytest.mark.parametrize("names", ["", ",", "size,", ",size", "size,,mirror", ",".join(["size"] * 33), "x" * 65])
def test_operations_that_are_none(names: str, shared_system: System) -> None:
    refused(shared_system, post(form(part()), target=f"/query?operations={names}"), 400, "malformed_request")


@pytest.mark.parametrize(
    "target",
    [
        "/images/../../etc/passwd",
        "/images/../../../../../../etc/passwd",
        "/images/%2e%2e/%2e%2e/etc/passwd",
        "/images/..%2f..%2fetc%2fpasswd",
        "/images/%2fetc%2fpasswd",
        "/images//etc/passwd",
        "/images/..%5c..%5cetc",
        "/images/%252e%252e%252fetc%252fpasswd",
        "/images/%00",
        "/images/01a21103-0513-779f-8caa-6c7bde12f009.jpg%00.png",
        "/images/01a21103-0513-779f-8caa-6c7bde12f009.jpg%0a",
        "/images/01a21103-0513-779f-8caa-6c7bde12f009.jpg",
        "/images/.01a21103-0513-779f-8caa-6c7bde12f009.jpg",
        "/images/",
        "/images",
        "/images/%ff%fe",
        "/images/%zz%",
        "/query/",
        "/livez/",
        "//livez",
        "/",
        "*",
    ],
)
def test_a_path_that_leads_nowhere(target: str, shared_system: System) -> None:
    refused(shared_system, head(target, method="GET"), 404, "not_found")


def test_a_body_over_the_limit_is_refused_by_its_announced_length(shared_system: System) -> None:
    refused(
        shared_system,
        head("/query", f"Content-Length: {33 * MEGABYTE}", "Expect: 100-continue"),
        413,
        "too_large",
        closes=True,
    )


def test_a_body_over_the_limit_is_refused_and_read_over(shared_system: System) -> None:
    body = IMAGE + bytes(33 * MEGABYTE - len(IMAGE))
    refused(shared_system, post(body, content_type="image/jpeg"), 413, "too_large")


def test_a_body_without_length_is_refused_where_it_goes_over_the_limit(shared_system: System) -> None:
    body = chunked(IMAGE + bytes(33 * MEGABYTE), 200_000)
    refused(shared_system, head("/query", "Transfer-Encoding: chunked") + body, 413, "too_large")
    in_form = chunked(form(part(IMAGE + bytes(33 * MEGABYTE))), 200_000)
    refused(
        shared_system, head("/query", f"Content-Type: {FORM}", "Transfer-Encoding: chunked") + in_form, 413, "too_large"
    )


def test_the_largest_body_is_not_too_large(shared_system: System) -> None:
    image = IMAGE + bytes(32 * MEGABYTE - len(IMAGE))  # bytes after a JPEG's end are nobody's
    with Connection(shared_system.port) as connection:
        connection.send(post(form(part(image)), target="/query?operations=size"))
        assert connection.answer().json() == {"status": "SUCCESS", "size": "32768kb"}
        connection.send(post(form(part(image + b"x")), target="/query?operations=size"))
        check_failure(connection.answer(), 413, "too_large")


def test_other_fields_do_not_make_room_for_more(shared_system: System) -> None:
    refused(shared_system, post(form(part(), part(bytes(33 * MEGABYTE), 'name="more"'))), 413, "too_large")


def test_a_client_that_stops_half_way(shared_system: System) -> None:
    whole = post(form(part()))
    refused(shared_system, whole[: len(whole) // 2], 408, "request_too_slow", closes=True)


def test_a_client_that_sends_a_byte_a_second(shared_system: System) -> None:
    with Connection(shared_system.port) as connection:
        connection.send(head("/query", f"Content-Type: {FORM}", "Content-Length: 90000"))
        sent = 0
        while connection.quiet(1.0):
            connection.send(b"-")
            sent += 1
            assert sent < 6
        check_failure(connection.answer(), 408, "request_too_slow")
        assert connection.closed()
    with Connection(shared_system.port) as connection:
        works(connection)


def test_a_body_that_is_later_than_its_own_deadline(shared_system: System) -> None:
    with Connection(shared_system.port) as connection:
        whole = post(form(part()), target="/query?timeout=0.2")
        connection.send(whole[:5_000])
        check_failure(connection.answer(), 504, "deadline_passed")
        connection.send(whole[5_000:])
        works(connection)


def test_a_client_that_goes_away_half_way_leaves_nothing(shared_system: System) -> None:
    before = set(shared_system.store.iterdir())
    left = 'safelight_requests_total{outcome="client_left"}'
    count = metric(shared_system, left)
    whole = post(form(part()))
    with Connection(shared_system.port) as connection:
        connection.send(whole[: len(whole) // 2])
    wait_until(lambda: metric(shared_system, left) == count + 1)
    for kind in ("jobs", "bytes", "pixels"):
        assert metric(shared_system, f"safelight_in_flight_{kind}") == 0
    assert set(shared_system.store.iterdir()) == before


def test_memory_stays_flat(shared_system: System) -> None:
    gateway = shared_system.part("gateway")
    bad = [
        post(form(part(TEXT * 20))),
        post(form(part(IMAGE[: len(IMAGE) // 2]))),
        post(form(part(), part())),
        post(bytes(2 * MEGABYTE), content_type=""),
        head("/query", "Transfer-Encoding: chunked") + chunked(bytes(2 * MEGABYTE)),
        head(f"/livez?{'x' * 30_000}", method="GET"),
    ]
    last = [head("/livez", f"X: {'x' * MEGABYTE}"), post(form(part())) + b"\0nonsense\r\n\r\n", post(IMAGE)[:40_000]]

    def round_of_all() -> int:
        for end in last:
            with Connection(shared_system.port) as connection:
                for data in bad:
                    connection.send(data)
                    assert 400 <= connection.answer().status < 500 or data is bad[-1]
                connection.send(end)
        return gateway.memory_info().rss

    for _ in range(5):
        round_of_all()
    before = gateway.memory_info().rss
    for _ in range(15):
        after = round_of_all()
    assert after - before < 6 * MEGABYTE  # of some 350 MB that were sent
    wait_until(lambda: metric(shared_system, "safelight_in_flight_jobs") == 0)
