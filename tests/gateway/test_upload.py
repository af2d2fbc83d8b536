"""The image out of a request: whatever the pieces, whatever the form."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_http import FORM, IMAGE, form, part

from safelight import formats
from safelight.errors import (
    DeadlinePassedError,
    EmptyImageError,
    GatewayFullError,
    NoImageError,
    RequestTooSlowError,
    SafelightError,
    SeveralImagesError,
    TooLargeError,
    TooManyPixelsError,
    UnsupportedFormatError,
)
from safelight.gateway.upload import Upload

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

PROPERTY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
SMALL = b"\xff\xd8\xff\xe0" + b"\r\n--limit\r--limit--\r\n-" * 20  # sniffed as JPEG, and full of almost-delimiters


class Held:
    """What `grow` was asked for, up to a limit."""

    def __init__(self, **most: int) -> None:
        self.most = most
        self.shares: dict[str, int] = {}

    def __call__(self, kind: str, amount: int) -> None:
        if amount > self.most.get(kind, amount):
            raise GatewayFullError
        self.shares[kind] = amount


def receiving(chunks: AsyncIterator[bytes]) -> Any:
    """ASGI's `receive` of a body that comes in these chunks."""

    async def receive() -> dict[str, Any]:
        chunk = await anext(chunks, None)
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    return receive


def _read(chunks: Iterable[bytes], content_type: str = FORM, held: Held | None = None, **options: Any) -> bytes:
    async def arriving() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    upload = Upload(content_type, **{"max_bytes": 10_000_000, "body_timeout": 5.0} | options, grow=held or Held())
    image = asyncio.run(upload.read(receiving(arriving()), 60.0))
    assert formats.sniff(image)
    return image


def _outcome(chunks: Iterable[bytes], content_type: str = FORM) -> bytes | SafelightError:
    try:
        return _read(chunks, content_type)
    except SafelightError as exc:
        return exc


def _cut(data: bytes, at: Iterable[int]) -> list[bytes]:
    marks = [0, *sorted(mark % (len(data) + 1) for mark in at), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(marks)]


@PROPERTY
@given(st.lists(st.integers(0, 200_000), max_size=30))
def test_any_pieces_of_a_form_give_the_same_image(at: list[int]) -> None:
    body = b"preamble\r\n" + form(part(b"x", 'name="a"'), part(), part(b"y", 'name="b"')) + b"epilogue"
    assert _read(_cut(body, at)) == IMAGE


@PROPERTY
@given(st.lists(st.integers(0, 200_000), max_size=30))
def test_any_pieces_of_a_raw_body_give_the_same_image(at: list[int]) -> None:
    assert _read(_cut(IMAGE, at), "image/jpeg") == IMAGE


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 9, 11])
def test_small_pieces_that_break_every_delimiter(size: int) -> None:
    inside = SMALL.replace(b"--limit", b"--limi_")
    body = form(part(b"-", 'name="a"'), part(inside), part(b"\r\n", 'name="b"'))
    assert _read(body[at : at + size] for at in range(0, len(body), size)) == inside


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20).filter(lambda name: name != "image")
VALUES = st.binary(max_size=200)


@PROPERTY
@given(
    before=st.lists(st.tuples(NAMES, NAMES, VALUES), max_size=4),
    after=st.lists(st.tuples(NAMES, NAMES, VALUES), max_size=4),
    name=NAMES,
    tail=st.binary(max_size=300),
    kind=st.sampled_from(["image/jpeg", "text/plain", "application/octet-stream"]),
    at=st.lists(st.integers(0, 5_000), max_size=5),
)
def test_forms_of_an_independent_encoder(
    *,
    before: list[tuple[str, str, bytes]],
    after: list[tuple[str, str, bytes]],
    name: str,
    tail: bytes,
    kind: str,
    at: list[int],
) -> None:
    image = b"GIF89a\1\0\1\0" + tail
    fields = [(field, (filename, value)) for field, filename, value in before]
    files: list[Any] = [*fields, ("image", (name, image, kind)), *((f, (n, v)) for f, n, v in after)]
    request = httpx.Request("POST", "http://here/query", files=files)
    assert _read(_cut(request.read(), at), request.headers["content-type"]) == image


@PROPERTY
@given(
    st.text(max_size=60)
    | st.sampled_from([FORM, "multipart/form-data", "image/png", 'multipart/form-data; boundary="\\']),
    st.lists(
        st.binary(max_size=100) | st.sampled_from([form(), part(SMALL), b"--limit", b"\r\n", IMAGE[:70_000]]),
        max_size=8,
    ),
)
def test_garbage_is_an_image_or_a_failure_of_the_clients(content_type: str, chunks: list[bytes]) -> None:
    outcome = _outcome(chunks, content_type)
    assert isinstance(outcome, bytes) or 400 <= outcome.status < 500


@PROPERTY
@given(st.integers(0, 90_000), st.binary(min_size=1, max_size=4), st.lists(st.integers(0, 90_000), max_size=4))
def test_a_damaged_form_is_an_image_or_a_failure_of_the_clients(at: int, noise: bytes, cuts: list[int]) -> None:
    body = bytearray(form(part(b"x", 'name="a"'), part()))
    body[at % len(body) : at % len(body) + len(noise)] = noise
    outcome = _outcome(_cut(bytes(body), cuts))
    assert isinstance(outcome, bytes) or 400 <= outcome.status < 500


@PROPERTY
@given(
    st.binary(max_size=300), st.sampled_from([b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP"])
)
def test_a_head_of_noise_never_breaks_the_look_at_it(noise: bytes, magic: bytes) -> None:
    outcome = _outcome([magic + noise], "")
    assert isinstance(outcome, bytes) or outcome.status == 422


def test_refused_as_soon_as_the_first_64_kb_are_there() -> None:
    taken = 0

    def counted() -> Iterable[bytes]:
        nonlocal taken
        while taken < 100:
            taken += 1
            yield bytes(16 * 1024)

    with pytest.raises(UnsupportedFormatError):
        _read(counted(), "image/jpeg")
    assert taken == 4


def test_too_many_pixels_are_refused_as_soon_as_the_first_64_kb_are_there() -> None:
    header = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR" + (60_000).to_bytes(4) * 2 + b"\x08\2\0\0\0"
    taken = 0

    def counted() -> Iterable[bytes]:
        nonlocal taken
        yield header
        while taken < 100:
            taken += 1
            yield bytes(16 * 1024)

    with pytest.raises(TooManyPixelsError):
        _read(counted(), "")
    assert taken == 4


def test_bytes_and_pixels_are_asked_for() -> None:
    held = Held()
    _read([form(part())], held=held)
    size = formats.dimensions(IMAGE[: formats.HEAD_BYTES], formats.JPEG)
    assert size
    assert held.shares == {"bytes": len(IMAGE), "pixels": size[0] * size[1]}


@pytest.mark.parametrize("most", [{"bytes": len(IMAGE) - 1}, {"pixels": 1_000}])
def test_no_room(most: dict[str, int]) -> None:
    with pytest.raises(GatewayFullError):
        _read(_cut(form(part()), range(0, 90_000, 5_000)), held=Held(**most))


def test_limits_to_the_byte() -> None:
    assert _read([form(part())], max_bytes=len(IMAGE)) == IMAGE
    assert _read([IMAGE], "", max_bytes=len(IMAGE)) == IMAGE
    for body, kind in ((form(part()), FORM), (IMAGE, "")):
        with pytest.raises(TooLargeError, match=f"{len(IMAGE) - 1:,} bytes"):
            _read(_cut(body, range(0, 90_000, 1_000)), kind, max_bytes=len(IMAGE) - 1)


def test_a_second_image_is_not_read() -> None:
    held = Held()
    with pytest.raises(SeveralImagesError):
        _read([form(part(), part(bytes(1_000_000)))], held=held)
    assert held.shares["bytes"] == len(IMAGE)


@pytest.mark.parametrize(
    ("body", "kind", "error"),
    [
        (form(part(b"")), FORM, EmptyImageError),
        (form(part(IMAGE, 'name="picture"')), FORM, NoImageError),
        (form(part(IMAGE, 'filename="image"')), FORM, NoImageError),
        (b"", "image/jpeg", EmptyImageError),
    ],
)
def test_nothing_to_work_on(body: bytes, kind: str, error: type[SafelightError]) -> None:
    with pytest.raises(error):
        _read([body], kind)


@pytest.mark.parametrize(
    ("body_timeout", "timeout", "error"), [(0.05, 60.0, RequestTooSlowError), (60.0, 0.05, DeadlinePassedError)]
)
def test_a_body_that_stops(body_timeout: float, timeout: float, error: type[SafelightError]) -> None:
    async def stopping() -> AsyncIterator[bytes]:
        yield form(part())[:5_000]
        await asyncio.Event().wait()

    upload = Upload(FORM, max_bytes=10_000_000, body_timeout=body_timeout, grow=Held())
    with pytest.raises(error):
        asyncio.run(upload.read(receiving(stopping()), timeout))


def test_what_arrives_buys_time() -> None:
    async def steady(size: int) -> AsyncIterator[bytes]:
        for at in range(0, len(IMAGE), size):
            await asyncio.sleep(0.02)  # the rate of this client, against the slowest one that is borne
            yield IMAGE[at : at + size]

    def read(size: int) -> bytes:
        upload = Upload("", max_bytes=10_000_000, body_timeout=0.1, grow=Held())
        return asyncio.run(upload.read(receiving(steady(size)), 60.0))

    assert read(16_000) == IMAGE
    with pytest.raises(RequestTooSlowError):
        read(100)
