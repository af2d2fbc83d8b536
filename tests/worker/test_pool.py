"""The child processes: what they see, what they may do, and what becomes of those that end, hang or lie."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop
from conftest import wait_until

from safelight.conformance import is_true, until
from safelight.errors import ConfigurationError
from safelight.message import Job, new_id
from safelight.worker import pool as pool_module
from safelight.worker.child import Outcome
from safelight.worker.pool import Child, ChildDiedError, OverrunError, Pool

HOSTILE = Path(__file__).parent / "hostile.py"
MEMORY = 1024**3


def job(operation: str, image: bytes = b"not a picture") -> Job:
    return Job(id=new_id(), operations=[(operation, {})], deadline=0, reply_to="x", image=image)


def in_pool(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[Pool], Awaitable[Any]], size: int = 1, **recycling: int
) -> Any:
    monkeypatch.setenv("PYTHONPATH", str(HOSTILE.parent))
    monkeypatch.setenv("SAFELIGHT_BROKER", "redis://:secret@example.invalid")
    monkeypatch.setenv("SECRET_TOKEN", "secret")

    async def using() -> Any:
        async with Pool(size, ["hostile"], MEMORY, **recycling) as pool:
            return await use(pool)

    return asyncio.run(using())


async def run(
    pool: Pool, operation: str, image: bytes = b"not a picture", limit: float = 20.0
) -> tuple[Outcome, bytes]:
    async with pool.child() as child:
        return await child.run(job(operation, image), limit)


def children() -> list[psutil.Process]:
    """Those of a pool; this process may have a whole system beside them."""
    found = []
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            if "safelight.worker.child" in process.cmdline():
                found.append(process)
    return found


def test_an_image_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(pool: Pool) -> None:
        for length in (1, 100_000, 40_000_000, 10):  # the last one shows nothing of the longer one before
            image = os.urandom(length)
            assert (await run(pool, "echo", image))[1] == image

    in_pool(monkeypatch, use)


def test_a_child_knows_nothing_of_the_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, _ = in_pool(monkeypatch, lambda pool: run(pool, "surroundings"))
    seen = json.dumps(outcome.facts)
    assert "secret" not in seen
    assert "SAFELIGHT_BROKER" not in seen
    open_files = sorted(target.partition(":")[0] for target in outcome.facts["descriptors"].values())
    inherited = [target for target in open_files if target in ("socket", "/memfd")]
    assert inherited == ["/memfd", "socket"]


def test_where_memory_runs_out_a_child_is_killed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, _ = in_pool(monkeypatch, lambda pool: run(pool, "surroundings"))
    assert outcome.facts["oom_score_adj"] == "1000"


@pytest.mark.parametrize(
    ("operation", "cause"),
    [
        ("segfault", "the child was ended by SIGSEGV"),
        ("leave", "the child exited with 7"),
        ("garbage", "the child sent what is not a outcome"),
        ("long_header", "the child announced a header of 2147483648 bytes"),
        ("empty_header", "the child sent what is not a outcome"),
        ("flood", "the child sent what is not a outcome"),
        ("false_size", "the child announced an image that is not there"),
        ("short_memory", "the child announced an image that is not there"),
        ("close_and_go_on", "the child closed its socket and went on"),
    ],
)
def test_a_child_that_dies_or_lies_is_replaced(monkeypatch: pytest.MonkeyPatch, operation: str, cause: str) -> None:
    async def use(pool: Pool) -> None:
        async with pool.child() as child:
            pid = child.pid
            with pytest.raises(ChildDiedError, match=cause):
                await child.run(job(operation), 20.0)
            assert not psutil.pid_exists(pid)
        assert (await run(pool, "echo", b"next"))[1] == b"next"

    in_pool(monkeypatch, use)


@pytest.mark.parametrize("is_lent", [False, True])
def test_a_child_that_was_killed_just_now_ends_nothing_else(monkeypatch: pytest.MonkeyPatch, is_lent: bool) -> None:
    """Its socket is closed and its end is not told yet; uvloop refuses to write to such a socket."""

    async def use(pool: Pool) -> None:
        [child] = pool._children
        lent = await pool._lend() if is_lent else None
        os.kill(child.pid, signal.SIGSTOP)  # so that its end is not told
        child._frames.close()
        await until(lambda: is_true(child._frames.is_lost))
        assert child._process.returncode is None
        if lent is not None:
            with pytest.raises(ChildDiedError):
                await lent.run(job("echo"), 20.0)
            pool._take_back(lent)
        assert (await run(pool, "echo", b"next"))[1] == b"next"
        await until(lambda: is_true(not psutil.pid_exists(child.pid)))

    monkeypatch.setattr(asyncio, "run", uvloop.run)
    in_pool(monkeypatch, use)


def test_a_child_that_hangs_is_killed_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(pool: Pool) -> None:
        with pytest.raises(OverrunError):
            await run(pool, "hang", limit=0.2)
        assert (await run(pool, "echo", b"next"))[1] == b"next"

    in_pool(monkeypatch, use)


def test_a_child_whose_job_is_given_up_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(pool: Pool) -> None:
        async with pool.child() as child:
            running = asyncio.create_task(child.run(job("hang"), 60.0))
            await asyncio.sleep(0)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert not child.alive
        assert (await run(pool, "echo", b"next"))[1] == b"next"

    in_pool(monkeypatch, use)


@pytest.mark.parametrize(
    ("operation", "failure"),
    [
        ("fail", "ValueError: it does not like this one"),
        ("eat_memory", "MemoryError"),
        ("talk_too_much", "its facts and notes are"),
        ("not_json", "its facts cannot be written as JSON"),
        ("nothing", "TypeError: The operation 'nothing' returned NoneType"),
    ],
)
def test_what_an_operation_raises_is_its_failure_and_the_child_lives(
    monkeypatch: pytest.MonkeyPatch, operation: str, failure: str
) -> None:
    async def use(pool: Pool) -> None:
        async with pool.child() as child:
            outcome, image = await child.run(job(operation), 20.0)
            assert (outcome.failure or "").startswith(failure)
            assert image == b""
            assert child.alive

    in_pool(monkeypatch, use)


def test_an_image_at_fault_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, _ = in_pool(monkeypatch, lambda pool: run(pool, "mirror", b"not a picture"))
    assert (outcome.error, outcome.failure) == ("unsupported_format", None)


def test_children_end_with_a_consumer_that_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import asyncio\n"
        "from test_pool import job, Pool\n"
        "async def main():\n"
        "    async with Pool(2, ['hostile'], 0) as pool, pool.child() as child:\n"
        "        await pool._idle.get()\n"
        "        print('running', flush=True)\n"
        "        await child.run(job('hang'), 60)\n"
        "asyncio.run(main())\n"
    )
    folder = str(HOSTILE.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((folder, str(HOSTILE.parent.parent))))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as consumer:
        assert consumer.stdout is not None
        assert consumer.stdout.readline() == b"running\n"
        children = psutil.Process(consumer.pid).children()
        assert len(children) == 2
        consumer.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))


async def pid_of(pool: Pool) -> int:
    """The child that ran a job."""
    return int((await run(pool, "leak", b"0"))[0].facts["pid"])


def test_a_child_is_recycled_after_its_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    most, pids = 0, set()

    async def use(pool: Pool) -> None:
        await until(settled(pool, 2))
        open_files = psutil.Process().num_fds()

        async def recycled() -> bool:
            nonlocal most
            most = max(most, len(children()))
            pids.add(await pid_of(pool))
            return len(pids) == 4

        async def closed() -> bool:
            return psutil.Process().num_fds() == open_files

        await until(recycled, seconds=30)
        await until(settled(pool, 2))
        await until(closed)

    in_pool(monkeypatch, use, 2, jobs=20)
    assert most == 3  # no child ends before its successor is there, and one is replaced at a time


def settled(pool: Pool, size: int) -> Callable[[], Awaitable[bool]]:
    async def is_settled() -> bool:
        return len(children()) == pool.free == size and pool._leaving is None

    return is_settled


def test_no_job_waits_for_a_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(pool: Pool) -> None:
        old = await pid_of(pool)
        assert pool._leaving is not None  # and its successor is a process that has yet to import all
        assert await pid_of(pool) == old

    in_pool(monkeypatch, use, jobs=1)


def test_a_job_in_hand_is_finished_by_the_child_that_began_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def use(pool: Pool) -> None:
        old = await pid_of(pool)
        running = asyncio.create_task(run(pool, "until", str(tmp_path / "end").encode()))

        async def warm() -> bool:
            return pool._successor is not None

        await until(warm)
        assert pool.free == 0  # at most one job at once: what the machine was given memory for
        (tmp_path / "end").touch()
        assert (await running)[0].facts == {"pid": old}
        assert await pid_of(pool) != old
        await until(settled(pool, 1))

    in_pool(monkeypatch, use, jobs=1)


@pytest.mark.skipif(sys.platform != "linux", reason="no cheap way to a process's resident size")
def test_a_child_that_leaks_is_recycled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(pool: Pool) -> None:
        pids = set()
        for _ in range(3):
            while True:  # 1 GB of address space bears 20 of them, and a successor comes after two
                outcome, _ = await run(pool, "leak", b"50000000")
                assert outcome.failure is None
                pids.add(outcome.facts["pid"])
                if pool._leaving is not None:
                    break
            await until(settled(pool, 1))
        assert len(pids) == 3

    in_pool(monkeypatch, use, resident=100_000_000)


def test_a_child_goes_on_while_no_successor_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fickle = (
        "import pathlib\nassert not pathlib.Path(__file__).with_name('no').exists()\ndef same(image): return image\n"
    )
    (tmp_path / "fickle.py").write_text(fickle)
    (tmp_path / "no").touch()
    monkeypatch.setattr(pool_module, "AGAIN_SECONDS", 0.0)

    async def use(pool: Pool) -> None:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(HOSTILE.parent), str(tmp_path))))
        pool._modules = [*pool._modules, "fickle"]
        old = await pid_of(pool)

        async def refused() -> bool:
            assert await pid_of(pool) == old
            return caplog.text.count("the child goes on") >= 2

        await until(refused)
        (tmp_path / "no").unlink()

        async def replaced() -> bool:
            return await pid_of(pool) != old

        await until(replaced)

    in_pool(monkeypatch, use, jobs=1)


@pytest.mark.parametrize("warm", [False, True])
def test_a_child_that_dies_before_its_successor_takes_its_place(monkeypatch: pytest.MonkeyPatch, warm: bool) -> None:
    async def use(pool: Pool) -> None:
        await run(pool, "echo")
        async with pool.child() as child:
            if warm:

                async def is_warm() -> bool:
                    return pool._successor is not None

                await until(is_warm)
            with pytest.raises(ChildDiedError):
                await child.run(job("leave"), 20.0)
        await run(pool, "echo")
        await until(settled(pool, 1))

    in_pool(monkeypatch, use, jobs=1)


def test_a_child_that_dies_while_its_successor_fails_is_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = ("from pathlib import Path", "once = Path(__file__).with_name('once')", "if once.exists():")
    lines += ("    once.unlink()", "    raise ValueError", "def same(image): return image")
    (tmp_path / "fickle.py").write_text("\n".join(lines))
    (tmp_path / "once").touch()

    async def use(pool: Pool) -> None:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(HOSTILE.parent), str(tmp_path))))
        pool._modules = [*pool._modules, "fickle"]
        await run(pool, "echo")
        with pytest.raises(ChildDiedError):
            await run(pool, "leave")
        async with asyncio.timeout(20):
            assert (await run(pool, "same", b"next"))[1] == b"next"
        assert caplog.text.count("the child goes on") == 1

    in_pool(monkeypatch, use, jobs=1)


def test_a_child_that_is_killed_while_it_waits_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(pool: Pool) -> None:
        open_files = psutil.Process().num_fds()
        for _ in range(2):
            async with pool.child() as child:
                os.kill(child.pid, signal.SIGKILL)

            async def noticed(child: Child = child) -> bool:
                return not child.alive

            await until(noticed)
            await run(pool, "echo")
        assert psutil.Process().num_fds() == open_files

    in_pool(monkeypatch, use)


@pytest.mark.parametrize(
    ("module", "reason"),
    [("no_such_module", "There is no module 'no_such_module'"), ("broken_module", "cannot be imported")],
)
def test_a_module_that_cannot_be_imported_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, reason: str
) -> None:
    (tmp_path / "broken_module.py").write_text("1 / 0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def using() -> None:
        async with Pool(1, [module], 0):
            pass

    with pytest.raises(ConfigurationError, match=reason):
        asyncio.run(using())
