"""Deadlines, matching, sending again: against a broker that does as it is told."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from safelight.brokers import Renewed
from safelight.errors import (
    BrokerAwayError,
    BrokerFullError,
    DeadlinePassedError,
    GatewayFullError,
    InternalError,
    NoWorkerError,
    SafelightError,
    UnknownOperationError,
)
from safelight.gateway import dispatch as module
from safelight.gateway.dispatch import MAX_BACKLOG, Dispatch
from safelight.gateway.workers import Workers
from safelight.message import Job, Presence, Reply, new_id, now_ms

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine


class FakeBroker:
    """Remembers what was sent, gives the replies that the test puts in, and fails as long as `error` is set."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.withdrawn: list[str] = []
        self.inbox: asyncio.Queue[Reply | Renewed] = asyncio.Queue()
        self.inbox.put_nowait(Renewed())
        self.error: SafelightError | None = None
        self.hold: asyncio.Event | None = None
        self.length = 0
        self.present = [Presence(worker="w", operations=["size"], free=1, slots=2)]

    def _check(self) -> None:
        if self.error:
            raise self.error

    async def send(self, job: Job) -> None:
        if self.hold:
            await self.hold.wait()
        self._check()
        self.sent.append(job.id)

    async def withdraw(self, job: Job) -> None:
        self._check()
        self.withdrawn.append(job.id)

    async def replies(self, inbox: str) -> AsyncIterator[Reply | Renewed]:
        assert inbox
        while True:
            yield await self.inbox.get()

    async def presence(self) -> list[Presence]:
        self._check()
        return self.present

    async def backlog(self) -> int:
        self._check()
        return self.length


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A dispatch at work, its broker and its clock."""

    def __init__(self) -> None:
        self.broker = FakeBroker()
        self.clock = Clock()
        self.workers = Workers(10.0, self.clock)
        broker: Any = self.broker
        self.dispatch = Dispatch(broker, "inbox", self.workers, self.clock)

    def ask(self, timeout: float = 10.0, *, heavy: bool = False) -> tuple[str, asyncio.Task[Reply]]:
        job = Job(
            id=new_id(),
            operations=[("size", {})],
            deadline=now_ms() + 10_000,
            reply_to="inbox",
            pixels=10_000_000 if heavy else 1,
            image=b"\x89PNG\r\n\x1a\n",
        )
        return job.id, asyncio.create_task(self.dispatch.ask(job, timeout))

    def reply(self, job_id: str, worker: str = "w") -> None:
        self.broker.inbox.put_nowait(Reply(id=job_id, worker=worker))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - each round lets the other tasks go one step
            await asyncio.sleep(0)


@asynccontextmanager
async def at_work() -> AsyncIterator[Bench]:
    bench = Bench()
    running = asyncio.create_task(bench.dispatch.run())
    await until(bench.broker.inbox.empty)
    yield bench
    assert not running.done()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[pytest.MonkeyPatch], None]:
    """A test in a loop of its own, where nothing is left over and the beats are quick."""

    def wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "BEAT_SECONDS", 0.001)
        monkeypatch.setattr(module, "RESEND_SECONDS", 0.001)
        asyncio.run(test())

    wrapped.__name__ = test.__name__
    return wrapped


@run
async def test_nothing_is_sent_before_the_inbox_is_there() -> None:
    bench = Bench()
    job_id, asking = bench.ask()
    await asyncio.sleep(0)
    bench.broker.inbox.get_nowait()
    running = asyncio.create_task(bench.dispatch.run())
    await until(lambda: bench.dispatch.backlog == 0 and bench.workers.fresh)
    assert (bench.broker.sent, bench.dispatch.ready) == ([], False)
    bench.broker.inbox.put_nowait(Renewed())
    await until(lambda: bench.broker.sent == [job_id])
    assert bench.dispatch.ready
    bench.reply(job_id)
    assert (await asking).id == job_id
    running.cancel()


@run
async def test_a_request_that_is_given_up_ends_with_the_reason() -> None:
    async with at_work() as bench:
        job_id, asking = bench.ask()
        await until(lambda: bench.broker.sent)
        bench.dispatch.give_up("another", RuntimeError("not this one"))
        bench.dispatch.give_up(job_id, RuntimeError("nobody waits"))
        with pytest.raises(RuntimeError, match="nobody waits"):
            await asking
        await until(lambda: bench.broker.withdrawn == [job_id])
        bench.dispatch.give_up(job_id, RuntimeError("too late"))


@run
async def test_a_reply_finds_its_request() -> None:
    async with at_work() as bench:
        asked = [bench.ask() for _ in range(20)]
        await until(lambda: len(bench.broker.sent) == 20)
        for number, (job_id, _) in enumerate(reversed(asked)):
            bench.reply(job_id, f"worker {19 - number}")
        assert [(await task).worker for _, task in asked] == [f"worker {number}" for number in range(20)]
        assert bench.broker.withdrawn == []


@run
async def test_a_second_reply_is_ignored() -> None:
    async with at_work() as bench:
        job_id, task = bench.ask()
        bench.reply(job_id, "first")
        bench.reply(job_id, "second")
        bench.reply("of somebody else")
        assert (await task).worker == "first"
        bench.reply(job_id, "third")
        await until(bench.broker.inbox.empty)
        assert bench.dispatch._pending == {}


@run
async def test_a_reply_may_come_before_the_job_is_known_to_be_sent() -> None:
    async with at_work() as bench:
        bench.broker.hold = asyncio.Event()
        job_id, task = bench.ask()
        bench.reply(job_id)
        await until(bench.broker.inbox.empty)
        bench.broker.hold.set()
        assert (await task).id == job_id


@run
async def test_the_deadline() -> None:
    async with at_work() as bench:
        job_id, task = bench.ask(timeout=0.01)
        with pytest.raises(DeadlinePassedError):
            await task
        await until(lambda: bench.broker.withdrawn == [job_id])
        bench.reply(job_id)
        await until(bench.broker.inbox.empty)


@pytest.mark.parametrize("left", [0, -1.0])
def test_a_deadline_that_passed_while_the_body_arrived(left: float) -> None:
    async def test() -> None:
        async with at_work() as bench:
            job_id, task = bench.ask(timeout=left)
            with pytest.raises(DeadlinePassedError):
                await task
            await until(lambda: bench.broker.withdrawn == [job_id])

    asyncio.run(test())


@run
async def test_the_deadline_holds_though_the_broker_does_not_answer() -> None:
    async with at_work() as bench:
        bench.broker.hold = asyncio.Event()
        _, task = bench.ask(timeout=0.01)
        with pytest.raises(DeadlinePassedError):
            await task


@run
async def test_who_stops_asking_is_withdrawn() -> None:
    async with at_work() as bench:
        job_id, task = bench.ask()
        await until(lambda: bench.broker.sent)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: bench.broker.withdrawn == [job_id])
        assert bench.dispatch._pending == {}


@run
async def test_a_withdrawal_that_fails_harms_nobody() -> None:
    async with at_work() as bench:
        _, task = bench.ask(timeout=0.01)
        await until(lambda: bench.broker.sent)
        bench.broker.error = BrokerAwayError()
        with pytest.raises(DeadlinePassedError):
            await task
        await until(lambda: not bench.dispatch._withdrawals)


@run
async def test_what_is_unanswered_is_sent_again_under_the_same_id() -> None:
    async with at_work() as bench:
        (first, task), (second, other) = bench.ask(), bench.ask()
        await until(lambda: len(bench.broker.sent) == 2)
        bench.reply(first)
        await task
        bench.broker.inbox.put_nowait(Renewed())
        await until(lambda: len(bench.broker.sent) == 3)
        assert bench.broker.sent[2] == second
        bench.broker.inbox.put_nowait(Renewed())
        await until(lambda: len(bench.broker.sent) == 4)
        bench.reply(second)
        await other
        bench.broker.inbox.put_nowait(Renewed())
        await until(bench.broker.inbox.empty)
        assert bench.broker.sent == [first, second, second, second]


@run
async def test_lost_again_while_it_is_sent_again() -> None:
    async with at_work() as bench:
        job_id, task = bench.ask()
        await until(lambda: bench.broker.sent)
        bench.broker.hold = asyncio.Event()
        bench.broker.inbox.put_nowait(Renewed())
        await until(lambda: not bench.dispatch._something_unsent.is_set() and bench.broker.inbox.empty())
        bench.broker.inbox.put_nowait(Renewed())  # what is being sent now may have gone to the server that died
        await until(bench.dispatch._something_unsent.is_set)
        bench.broker.hold.set()
        await until(lambda: len(bench.broker.sent) == 3)
        bench.reply(job_id)
        await task


@run
async def test_what_could_not_be_sent_is_sent_when_the_broker_is_back() -> None:
    async with at_work() as bench:
        bench.broker.error = BrokerAwayError()
        asked = [bench.ask() for _ in range(5)]
        await until(lambda: bench.dispatch._away_since is not None and len(bench.dispatch._unsent) == 5)
        bench.dispatch.check()  # not for long enough yet
        assert not bench.dispatch.ready
        bench.broker.error = None
        await until(lambda: len(bench.broker.sent) == 5)
        assert set(bench.broker.sent) == {job_id for job_id, _ in asked}
        for job_id, _ in asked:
            bench.reply(job_id)
        await asyncio.gather(*(task for _, task in asked))
        await until(lambda: bench.dispatch.ready)
        assert not bench.dispatch._unsent


@run
async def test_a_broker_that_stays_away_refuses_the_new_and_keeps_the_old() -> None:
    async with at_work() as bench:
        bench.broker.error = BrokerAwayError()
        job_id, task = bench.ask()
        await until(lambda: bench.dispatch._away_since is not None)
        bench.clock.now += 1.9
        bench.dispatch.check()
        bench.clock.now += 0.1
        with pytest.raises(BrokerAwayError):
            bench.dispatch.check()
        assert not task.done()
        bench.broker.error = None
        await until(lambda: bench.dispatch._away_since is None)
        bench.dispatch.check()
        await until(lambda: bench.broker.sent == [job_id])
        bench.reply(job_id)
        await task


@pytest.mark.parametrize("error", [InternalError("NOPERM no permissions"), BrokerFullError()])
def test_a_broker_that_refuses_our_commands_is_away(error: SafelightError, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with at_work() as bench:
            bench.broker.error = error
            with pytest.raises(BrokerAwayError) as raised:
                await bench.ask()[1]
            assert "NOPERM" not in raised.value.detail
            await until(lambda: bench.dispatch._away_since is not None)
            bench.clock.now += 2
            with pytest.raises(BrokerAwayError):
                bench.dispatch.check()
            bench.broker.error = None
            await until(lambda: bench.dispatch.ready)

    monkeypatch.setattr(module, "RESEND_SECONDS", 0.001)
    asyncio.run(test())


def test_refused_while_it_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with at_work() as bench:
            job_id, task = bench.ask()
            await until(lambda: bench.broker.sent)
            bench.broker.error = InternalError("NOPERM")
            bench.broker.inbox.put_nowait(Renewed())
            await until(lambda: bench.dispatch._away_since is not None and bench.broker.inbox.empty())
            bench.broker.error = None
            await until(lambda: bench.broker.sent == [job_id, job_id])
            bench.reply(job_id)
            await task

    monkeypatch.setattr(module, "BEAT_SECONDS", 0.001)
    monkeypatch.setattr(module, "RESEND_SECONDS", 0.001)
    asyncio.run(test())


@run
async def test_a_queue_that_is_too_long_refuses_the_new() -> None:
    async with at_work() as bench:
        bench.broker.length = MAX_BACKLOG
        await until(lambda: bench.dispatch.backlog)
        with pytest.raises(BrokerFullError):
            bench.dispatch.check()
        bench.broker.length = MAX_BACKLOG - 1
        await until(lambda: bench.dispatch.backlog == MAX_BACKLOG - 1)
        bench.dispatch.check()


@run
async def test_readiness_and_workers_come_from_the_beat() -> None:
    async with at_work() as bench:
        await until(lambda: bench.dispatch.ready)
        bench.broker.present = []
        await until(lambda: not bench.dispatch.ready)
        bench.clock.now += 11
        await until(lambda: not bench.workers._seen)
        with pytest.raises(NoWorkerError):
            bench.workers.check(["size"])


def lacks_workers(bench: Bench) -> bool:
    """Whether the beat's last look made it certain."""
    try:
        bench.workers.check(["size"])
    except NoWorkerError:
        return True
    return False


@run
async def test_workers_that_come_back_after_the_gateway_are_not_missed() -> None:
    async with at_work() as bench:
        await until(lambda: bench.dispatch.ready)
        bench.broker.error = BrokerAwayError()
        await until(lambda: not bench.dispatch.ready)
        bench.clock.now += 30
        bench.broker.present, bench.broker.error = [], None
        await until(lambda: bench.dispatch._away_since is None)
        bench.workers.check(["size"])
        bench.clock.now += 10
        await until(lambda: lacks_workers(bench))


@run
async def test_what_turns_out_to_be_offered_by_nobody() -> None:
    async with at_work() as bench:
        bench.broker.present = [Presence(worker="w", operations=["mirror"], free=1, slots=2)]
        job_id, task = bench.ask()
        await until(lambda: bench.dispatch.ready and bench.broker.sent)
        assert not task.done()
        bench.clock.now += 10  # two leases from the gateway's start: now it is certain
        with pytest.raises(UnknownOperationError):
            await task
        await until(lambda: bench.broker.withdrawn == [job_id])


@run
async def test_what_was_admitted_waits_for_a_worker_to_come() -> None:
    async with at_work() as bench:
        bench.broker.present = []
        job_id, task = bench.ask()
        await until(lambda: bench.broker.sent)
        bench.clock.now += 11
        await until(lambda: lacks_workers(bench))
        bench.broker.length = 1
        await until(lambda: bench.dispatch.backlog == 1)
        assert not task.done()
        bench.reply(job_id)
        await task


def test_closing_fails_what_waits() -> None:
    async def test() -> None:
        async with at_work() as bench:
            tasks = [bench.ask()[1] for _ in range(3)]
            await until(lambda: len(bench.broker.sent) == 3)
        for task in tasks:
            with pytest.raises(BrokerAwayError):
                await task

    asyncio.run(test())


@run
async def test_a_heavy_job_waits_for_the_one_before_and_a_light_one_does_not() -> None:
    async with at_work() as bench:
        (first, task), (second, other) = bench.ask(heavy=True), bench.ask(heavy=True)
        light, quick = bench.ask()
        await until(lambda: len(bench.broker.sent) == 2)
        bench.reply(light)
        await quick
        bench.broker.inbox.put_nowait(Renewed())  # only what was sent is sent again
        await until(lambda: len(bench.broker.sent) == 3)
        assert sorted(bench.broker.sent) == sorted([first, light, first])
        bench.reply(first)
        await task
        await until(lambda: bench.broker.sent[3:] == [second])
        bench.reply(second)
        await other
        assert bench.broker.withdrawn == []


@run
async def test_workers_that_come_make_room_for_heavy_jobs() -> None:
    async with at_work() as bench:
        asked = [bench.ask(heavy=True)[1] for _ in range(3)]
        await until(lambda: bench.dispatch.ready and bench.broker.sent)
        bench.broker.present = [Presence(worker=name, operations=["size"], free=2, slots=2) for name in "abcd"]
        await until(lambda: len(bench.broker.sent) == 2)
        assert bench.workers.children == 4
        for task in asked:
            task.cancel()


@run
async def test_a_heavy_job_that_nobody_waits_for_any_more_is_never_sent() -> None:
    async with at_work() as bench:
        first, task = bench.ask(heavy=True)
        left, leaving = bench.ask(heavy=True)
        _, late = bench.ask(heavy=True, timeout=0.01)
        with pytest.raises(GatewayFullError):
            await late
        bench.dispatch.give_up(left, RuntimeError("its client left"))
        with pytest.raises(RuntimeError, match="its client left"):
            await leaving
        last, waiting = bench.ask(heavy=True)
        bench.dispatch.give_up(first, RuntimeError("this one, too"))
        with pytest.raises(RuntimeError, match="this one, too"):
            await task
        await until(lambda: bench.broker.sent == [first, last])
        bench.reply(last)
        await waiting
        await until(lambda: bench.broker.withdrawn == [first])
