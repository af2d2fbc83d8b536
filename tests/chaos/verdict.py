"""What a run is judged by: each request's end, the starts that were written down, the quarantine, and the disk."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from chaos.clients import LATE_SECONDS, TIMEOUT, Post

CLOSED_SECONDS = 10.0  # a connection that is refused or closed is explained by the death of its gateway so long ago
# Failures that a fault explains, to requests that were under way while it lasted.
EXPLAINED = {
    "full_store": {"507"},
    "deleted_queue": {"504"},
    "deleted_topics": {"504"},
}
LOSES_ALL = {"restart_broker", "emptied"}
# After these, recovery is how soon the jobs that were at work are started in another worker, from the fault's begin on.
# After all others it is how soon all that was under way is started, from when the fault was undone.
AT_WORK = {"kill_consumer", "kill_worker", "freeze_worker", "end_worker"}
# With more under way than two workers have places for, what comes back waits for a child, as all else does: a bound
# that is shorter than such a wait is held to where there was room.
ROOM = 8
WAIT_SECONDS = 5.0


@dataclass(frozen=True)
class Injected:
    """One fault that was done: times by the clock that all processes share."""

    name: str
    begun: float
    undone: float
    under_way: list[Post]


@dataclass
class Verdict:
    """The table of a run; `sentences` is empty when nothing was lost, wrong or late."""

    counts: dict[str, int]
    faults: dict[str, int]
    refused: dict[str, int]
    failed: dict[str, int]
    recovery: dict[str, float]
    recovery_with_room: dict[str, float]
    sentences: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Markdown."""
        rows = [*self.counts.items(), ("longest recovery", f"{max(self.recovery.values(), default=0):.1f} s")]
        lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
        lines += ["| fault | times | longest recovery | with room |", "|---|---|---|---|"]
        for name, times in sorted(self.faults.items()):
            found = [each.get(name) for each in (self.recovery, self.recovery_with_room)]
            told = ["nobody waited" if seconds is None else f"{seconds:.1f} s" for seconds in found]
            lines.append(f"| {name} | {times} | {' | '.join(told)} |")
        for title, found in (("refused, and sent again", self.refused), ("failed, as it was told", self.failed)):
            lines += ["", f"{title}: " + (", ".join(f"{n} x {code}" for code, n in sorted(found.items())) or "none")]
        return "\n".join([*lines, "", *self.sentences])

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


class Start(NamedTuple):
    """When work on an image began, and in which worker."""

    at: float
    worker: int


def starts_of(ledger: str) -> dict[str, list[Start]]:
    """Number and attempt of a post -> its starts, in their order."""
    found: dict[str, list[Start]] = defaultdict(list)
    for line in ledger.splitlines():
        name, _, at, worker = line.split()
        found[name].append(Start(float(at), int(worker)))
    return found


def name_of(post: Post) -> str:
    """As the ledger has it."""
    return post.mark.decode().split()[1]


def judge(
    posts: list[Post],
    injected: list[Injected],
    starts: dict[str, list[Start]],
    deaths: dict[int, list[float]],
    bounds: dict[str, float],
) -> Verdict:
    """`deaths` are those of each gateway, `bounds` the longest recovery of a fault in seconds."""
    lost = [post for post in posts if _is_lost(post, deaths)]
    wrong = [post for post in posts if _what_is_wrong(post, injected)]
    late = [post for post in posts if post.ended - post.begun > TIMEOUT + LATE_SECONDS]
    again = sum(
        len(starts.get(name_of(post), ())) - 1 for post in posts if post.asked == "good" and _started(post, starts)
    )
    with_room = recoveries([fault for fault in injected if len(fault.under_way) <= ROOM], starts)
    outcomes = Counter(post.outcome for post in posts)
    verdict = Verdict(
        counts={
            "requests": len(posts) - sum(outcomes[refused] for refused in ("503", "not connected")),
            "answered SUCCESS": outcomes["200"],
            "poison, quarantined": outcomes["422"],
            "clients that left": outcomes["left"],
            "closed by a gateway's death": outcomes["closed"],
            "lost": len(lost),
            "wrong": len(wrong),
            "late": len(late),
            "started more than once": again,
        },
        faults=dict(Counter(fault.name for fault in injected)),
        refused=dict(Counter(post.error or post.outcome for post in posts if post.outcome in {"503", "not connected"})),
        failed=dict(
            Counter(post.error for post in posts if post.outcome[0] in "45" and post.outcome not in {"422", "503"})
        ),
        recovery=recoveries(injected, starts),
        recovery_with_room=with_room,
    )
    for post in lost:
        verdict.sentences.append(f"lost: {post.mark.decode()} ({post.outcome})")
    for post in wrong:
        verdict.sentences.append(f"wrong: {post.mark.decode()}: {_what_is_wrong(post, injected)}")
    for post in late:
        verdict.sentences.append(f"late: {post.mark.decode()}: {post.ended - post.begun:.1f} s")
    for name in verdict.recovery:
        bound = bounds.get(name, TIMEOUT)
        seconds = (with_room if bound < WAIT_SECONDS else verdict.recovery).get(name, 0.0)
        if seconds > bound:
            verdict.sentences.append(f"slow: recovery from {name} took {seconds:.1f} s, {bound:.1f} s are allowed")
    return verdict


def _started(post: Post, starts: dict[str, list[Start]]) -> bool:
    return name_of(post) in starts


def _is_lost(post: Post, deaths: dict[int, list[float]]) -> bool:
    if post.outcome == "silence":
        return True
    if post.outcome not in {"closed", "not connected"}:
        return False
    return not any(post.begun - CLOSED_SECONDS <= death <= post.ended for death in deaths[post.gateway])


def _what_is_wrong(post: Post, injected: list[Injected]) -> str:
    if post.wrong:
        return post.wrong
    if post.outcome == "200":
        return "" if post.asked == "good" else "a poison image succeeded"
    if post.outcome == "422":
        return "a good image was quarantined" if post.asked == "good" else ""
    if post.outcome in {"left", "closed", "not connected", "silence", "503"}:
        return ""
    for fault in injected:
        if _meets(post, fault) and post.outcome in EXPLAINED.get(fault.name, ()):
            return ""
    return f"failed with {post.outcome} {post.error}"


def _meets(post: Post, fault: Injected) -> bool:
    return post.begun <= fault.undone and post.ended >= fault.begun


def recoveries(injected: list[Injected], starts: dict[str, list[Start]]) -> dict[str, float]:
    """Fault -> seconds until the last job that it concerned was started (anew), at the most."""
    longest: dict[str, float] = {}
    for fault in injected:
        is_of_work = fault.name in AT_WORK
        since = fault.begun if is_of_work else fault.undone
        for post in fault.under_way:
            known = starts.get(name_of(post), [])
            before = [start for start in known if start.at < fault.begun]
            after = [start for start in known if start.at >= fault.begun]
            if after and (not is_of_work or (before and before[-1].worker != after[0].worker)):
                longest[fault.name] = max(longest.get(fault.name, 0.0), after[0].at - since)
    return longest


def on_disk(stores: list[Path], posts: list[Post]) -> list[str]:
    """What is saved and is nobody's, and what is only half there."""
    sentences = []
    nobodys = sum(post.outcome in {"closed", "left"} for post in posts)
    for number, store in enumerate(stores):
        answered = {post.job for post in posts if post.gateway == number and post.outcome == "200"}
        names = [path.name for path in store.iterdir()]
        if hidden := [name for name in names if not re.fullmatch(r"[0-9a-f-]{36}\.(jpg|png)", name)]:
            sentences.append(f"left on disk: {hidden}")
        saved = {name.partition(".")[0] for name in names}
        if missing := answered - saved:
            sentences.append(f"not on disk: {sorted(missing)}")
        if len(saved - answered) > nobodys:
            sentences.append(f"{len(saved - answered)} images on disk were never answered; {nobodys} clients left")
    return sentences


def in_quarantine(
    records: list[dict[str, Any]], posts: list[Post], injected: list[Injected], marks: dict[str, str]
) -> list[str]:
    """What should not be in quarantine, or should be; `marks` is what the images of jobs of unknown id say.

    A broker that lost all lost these as well, and one in full memory does not take them (`docs/guarantee.md`).
    """
    lost_at = max((fault.undone for fault in injected if fault.name in LOSES_ALL), default=0.0)
    full = [fault for fault in injected if fault.name == "full_memory"]
    jobs = {post.job: post for post in posts if post.job}
    sentences = []
    for record in records:
        asked = jobs[record["id"]].asked if record["id"] in jobs else marks.get(record["id"], "good")
        if asked == "good":
            sentences.append(f"in quarantine: the good job {record['id']}: {record['cause']}")
    kept = {record["id"] for record in records}
    expected = [
        post
        for post in posts
        if post.outcome == "422" and post.begun > lost_at and not any(_meets(post, fault) for fault in full)
    ]
    if len(kept) < 100 and (missing := [post.job for post in expected if post.job not in kept]):
        sentences.append(f"not in quarantine: {missing}")
    return sentences
