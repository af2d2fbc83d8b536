"""What a run is judged by finds what is planted, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TEST_IMAGE, need_judges

from chaos import images, verdict
from chaos.clients import Post
from chaos.images import Form
from chaos.verdict import Injected, Verdict
from safelight.operations.mirror import mirror

FORM = Form("the test image", TEST_IMAGE.read_bytes())
KILLED = 15.0


def a_post(number: int = 1, asked: str = "good", **members: object) -> Post:
    post = Post(images.tag(number, 0, asked), FORM, 0, begun=10.0, ended=11.0, outcome="200", job=f"job-{number}")
    for name, value in members.items():
        setattr(post, name, value)
    return post


def judged(
    *posts: Post, fault: str = "", undone: float = 16.0, starts: list[tuple[float, int]] | None = None
) -> Verdict:
    injected = [Injected(fault, KILLED, undone, under_way=list(posts))] if fault else []
    ledger = "".join(f"00000001.00 good {at} {worker}\n" for at, worker in starts or [])
    deaths = {0: [KILLED] if fault == "kill_gateway" else []}
    return verdict.judge(
        list(posts), injected, verdict.starts_of(ledger), deaths, {"kill_worker": 7.5, "kill_consumer": 1.0}
    )


def test_a_good_run() -> None:
    posts = [
        a_post(),
        a_post(2, "kill", outcome="422"),
        a_post(3, outcome="left"),
        a_post(4, outcome="503", error="full"),
    ]
    found = judged(*posts)
    assert found.sentences == []
    assert (found.counts["requests"], found.counts["answered SUCCESS"], found.refused) == (3, 1, {"full": 1})
    assert "| lost | 0 |" in found.table()


@pytest.mark.parametrize(
    ("post", "sentence"),
    [
        (a_post(outcome="silence"), "lost"),
        (a_post(outcome="closed"), "lost"),
        (a_post(outcome="not connected"), "lost"),
        (a_post(wrong="a second answer"), "wrong"),
        (a_post(asked="kill"), "wrong"),
        (a_post(outcome="422"), "wrong"),
        (a_post(outcome="500"), "wrong"),
        (a_post(outcome="504"), "wrong"),
        (a_post(ended=71.5), "late"),
    ],
)
def test_what_is_planted_is_found(post: Post, sentence: str) -> None:
    [found] = judged(post, a_post(2)).sentences
    assert found.startswith(f"{sentence}: safelight-chaos 00000001.00")


@pytest.mark.parametrize(
    ("fault", "outcome", "is_explained"),
    [
        ("kill_gateway", "closed", True),
        ("kill_worker", "closed", False),
        ("full_store", "507", True),
        ("full_store", "504", False),
        ("kill_worker", "507", False),
    ],
)
def test_what_a_fault_explains(fault: str, outcome: str, is_explained: bool) -> None:
    assert (judged(a_post(begun=14.9, ended=15.5, outcome=outcome), fault=fault).sentences == []) is is_explained
    if outcome == "507":  # but not before it, nor after it
        for begun, ended in ((10.0, 14.0), (17.0, 18.0)):
            assert judged(a_post(begun=begun, ended=ended, outcome=outcome), fault=fault).sentences


def test_recovery_is_from_the_kill_to_the_start_elsewhere() -> None:
    found = judged(a_post(), fault="kill_worker", starts=[(14.0, 1), (21.0, 2)])
    assert (found.recovery, found.sentences) == ({"kill_worker": 6.0}, [])
    assert found.counts["started more than once"] == 1
    for starts in ([(23.0, 2)], [(14.0, 1), (23.0, 1)]):  # it waited in a queue; it was a living worker's
        assert judged(a_post(), fault="kill_worker", starts=starts).recovery == {}
    [slow] = judged(a_post(), fault="kill_worker", starts=[(14.0, 1), (23.0, 2)]).sentences
    assert slow.startswith("slow: recovery from kill_worker took 8.0 s")
    many = [a_post() for _ in range(9)]  # more than two workers have places for
    [slow] = judged(*many, fault="kill_worker", starts=[(14.0, 1), (23.0, 2)]).sentences
    assert slow.startswith("slow: recovery from kill_worker took 8.0 s")
    found = judged(*many, fault="kill_consumer", starts=[(14.0, 1), (17.0, 2)])
    assert (found.recovery, found.sentences) == ({"kill_consumer": 2.0}, [])
    [slow] = judged(a_post(), fault="kill_consumer", starts=[(14.0, 1), (17.0, 2)]).sentences
    assert slow.startswith("slow: recovery from kill_consumer took 2.0 s, 1.0 s")
    found = judged(a_post(), fault="restart_broker", undone=18.0, starts=[(21.0, 1)])
    assert found.recovery == {"restart_broker": 3.0}  # from when the broker was there again


def test_what_lies_on_disk(tmp_path: Path) -> None:
    jobs = [f"0000000{n}-0000-7000-8000-000000000000" for n in range(3)]
    posts = [a_post(n, job=job) for n, job in enumerate(jobs)]
    for job in jobs:
        (tmp_path / f"{job}.jpg").touch()
    assert verdict.on_disk([tmp_path], posts) == []
    assert len(verdict.on_disk([tmp_path], posts[:2])) == 1
    assert verdict.on_disk([tmp_path], [*posts[:2], a_post(3, outcome="left")]) == []
    (tmp_path / f".{jobs[0]}.jpg").touch()
    (tmp_path / f"{jobs[1]}.jpg").unlink()
    assert len(verdict.on_disk([tmp_path], posts)) == 3  # half-saved, not there, and nobody's


def test_what_lies_in_quarantine() -> None:
    posts = [a_post(1), a_post(2, "kill", outcome="422")]
    good, poison = ({"id": f"job-{n}", "cause": "SIGSEGV"} for n in (1, 2))
    assert verdict.in_quarantine([poison], posts, [], {}) == []
    assert "the good job job-1" in verdict.in_quarantine([good, poison], posts, [], {})[0]
    assert verdict.in_quarantine([], posts, [], {}) == ["not in quarantine: ['job-2']"]
    for fault, begun, undone, is_explained in (
        ("emptied", 11.5, 12.0, True),  # the broker lost it
        ("kill_worker", 11.5, 12.0, False),
        ("full_memory", 10.5, 13.0, True),  # the broker did not take it
        ("full_memory", 11.5, 13.0, False),  # it was there before
    ):
        injected = [Injected(fault, begun, undone, under_way=[])]
        assert (verdict.in_quarantine([], posts, injected, {}) == []) is is_explained
    stranger = {"id": "of a client that was cut off", "cause": "SIGSEGV"}
    assert verdict.in_quarantine([poison, stranger], posts, [], {stranger["id"]: "kill"}) == []
    assert len(verdict.in_quarantine([poison, stranger], posts, [], {})) == 1


def _of_another(image: bytes, mark: bytes) -> bytes:
    return image.replace(mark, images.tag(99, 0, "good"))


def _not_mirrored(image: bytes, mark: bytes) -> bytes:
    return FORM.tagged(mark)


def _spoiled(image: bytes, mark: bytes) -> bytes:
    return image[:-1_000] + bytes(998) + image[-2:]


@pytest.mark.parametrize("spoil", [_of_another, _not_mirrored, _spoiled])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_mirror_that_is_none(spoil: Callable[[bytes, bytes], bytes], is_first: bool) -> None:
    need_judges()
    judge, mark = images.Judge(), images.tag(1, 0, "good")
    result = mirror(FORM.tagged(mark))
    assert not isinstance(result, bytes)
    right = result.image or b""
    if not is_first:
        assert judge(FORM, mark, right, {"mirror": "lossless"}) == ""
    assert judge(FORM, mark, spoil(right, mark), {"mirror": "lossless"})


def test_every_form_is_mirrored_with_its_comment() -> None:
    need_judges()
    judge = images.Judge()
    for number, form in enumerate(images.forms()):
        for attempt in range(2):
            mark = images.tag(number, attempt, "good")
            result = mirror(form.tagged(mark))
            assert not isinstance(result, bytes)
            assert judge(form, mark, result.image or b"", dict(result.notes)) == ""
