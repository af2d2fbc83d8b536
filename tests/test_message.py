"""The wire form: what is encoded comes back; anything else is a `MalformedMessageError`, never another exception."""

from __future__ import annotations

import json
import time
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.errors import MalformedMessageError
from safelight.message import Job, Presence, Quarantined, Reply, decode, encode, new_id

names = st.text(min_size=1, max_size=64)
counts = st.integers(min_value=0, max_value=2**53)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
jobs = st.builds(
    Job,
    id=names,
    operations=st.lists(st.tuples(names, st.dictionaries(st.text(), plain, max_size=3)), min_size=1, max_size=4),
    deadline=counts,
    reply_to=names,
    starts=counts,
    pixels=counts,
    traceparent=st.none() | st.text(),
    image=st.binary(),
)
replies = st.builds(
    Reply,
    id=names,
    worker=st.text(),
    work=counts,
    facts=st.dictionaries(st.text(), plain, max_size=3),
    notes=st.dictionaries(st.text(), st.text(), max_size=3),
    error=st.none() | st.text(),
    detail=st.text(),
    image=st.binary(),
)
presences = st.builds(Presence, worker=names, operations=st.lists(st.text()), free=counts, slots=counts, seen=counts)
quarantined = st.builds(
    Quarantined, id=names, cause=st.text(), attempts=counts, worker=st.text(), at=counts, size=counts, job=st.none()
)


@given(jobs | replies | presences | quarantined)
def test_what_is_encoded_comes_back(message: Job | Reply | Presence | Quarantined) -> None:
    header, body = encode(message)
    assert decode(type(message), header, body) == message
    assert json.loads(header)["v"] == 1


@given(jobs)
def test_newer_members_are_ignored(job: Job) -> None:
    header, body = encode(job)
    assert decode(Job, json.dumps(json.loads(header) | {"newer": [1]}).encode(), body) == job


@given(st.binary())
def test_bytes_that_are_no_message_are_malformed(header: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        decode(Job, header)


@given(plain)
def test_json_that_is_no_message_is_malformed(value: object) -> None:
    with pytest.raises(MalformedMessageError):
        decode(Job, json.dumps(value).encode())


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"operations": []},
        {"operations": [["size"]]},
        {"id": ""},
        {"deadline": "soon"},
        {"starts": -1},
        {"id": 5},
    ],
)
def test_a_job_of_another_shape_is_malformed(change: dict[str, object]) -> None:
    header = {"v": 1, "id": "a", "operations": [["size", {}]], "deadline": 1, "reply_to": "b"}
    assert decode(Job, json.dumps(header).encode()).id == "a"
    with pytest.raises(MalformedMessageError):
        decode(Job, json.dumps(header | change).encode())


def test_deep_nesting_is_malformed() -> None:
    with pytest.raises(MalformedMessageError):
        decode(Job, b'{"v":1,"id":"a","operations":' + b"[" * 100_000)


def test_ids_are_uuids_of_version_7_that_sort_by_time() -> None:
    before = time.time_ns() // 1_000_000
    ids = [UUID(new_id()) for _ in range(1_000)]
    assert len(set(ids)) == 1_000
    assert {(value.version, value.variant) for value in ids} == {(7, "specified in RFC 4122")}
    stamps = [value.int >> 80 for value in ids]
    assert stamps == sorted(stamps)
    assert before <= stamps[0] <= stamps[-1] <= time.time_ns() // 1_000_000


@pytest.mark.parametrize(
    ("head", "megapixels", "megabytes", "heavy"),
    [
        (b"\xff\xd8\xff", 12, 4, False),  # a telephone's photograph
        (b"\xff\xd8\xff", 0, 4, False),  # its metadata fills what is looked at
        (b"\x89PNG\r\n\x1a\n", 2, 3, False),  # a screenshot
        (b"\x89PNG\r\n\x1a\n", 40, 1, True),
        (b"GIF89a", 1, 1, False),
        (b"RIFF....WEBP", 1, 12, True),  # an animation: many frames of one megapixel
        (b"a text", 100, 0, False),
    ],
)
def test_what_is_heavy(head: bytes, megapixels: int, megabytes: int, *, heavy: bool) -> None:
    image = head + bytes(megabytes * 1_000_000)
    job = Job(id="a", operations=[("size", {})], deadline=0, reply_to="b", pixels=megapixels * 1_000_000, image=image)
    assert job.heavy is heavy


def test_a_job_of_a_gateway_that_tells_no_pixels() -> None:
    header = b'{"v":1,"id":"a","operations":[["size",{}]],"deadline":0,"reply_to":"b"}'
    assert decode(Job, header, b"an image").pixels == 0
