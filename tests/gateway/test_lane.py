"""Heavy jobs: so many at once, the others in their order."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from safelight.errors import GatewayFullError
from safelight.gateway.lane import Lane


class Visitors:
    """Those who enter a lane with a changing number of places, in the order of their letters."""

    def __init__(self, room: int, names: str) -> None:
        self.room = room
        self.lane = Lane(lambda: self.room)
        loop = asyncio.get_running_loop()
        self.given_up: dict[str, asyncio.Future[Any]] = {name: loop.create_future() for name in names}
        self.tasks = {
            name: asyncio.create_task(self.lane.enter(given_up, seconds=2.0, timeout=60.0))
            for name, given_up in self.given_up.items()
        }

    def leave(self, name: str) -> None:
        self.lane.leave(self.given_up[name])

    async def inside(self) -> str:
        """Who came in so far, whether or not they left."""
        for _ in range(5):
            await asyncio.sleep(0)
        return "".join(name for name, task in self.tasks.items() if task.done() and not task.cancelled())


def test_so_many_at_once_in_their_order() -> None:
    async def test() -> None:
        visitors = Visitors(2, "abcd")
        assert await visitors.inside() == "ab"
        visitors.leave("a")
        assert await visitors.inside() == "abc"
        visitors.room = 1  # a worker left: nobody is thrown out, and the next waits for two to leave
        visitors.leave("b")
        assert await visitors.inside() == "abc"
        visitors.leave("c")
        assert await visitors.inside() == "abcd"
        assert [task.result() for task in visitors.tasks.values()] == [True] * 4

    asyncio.run(test())


def test_more_room() -> None:
    async def test() -> None:
        visitors = Visitors(1, "abcd")
        assert await visitors.inside() == "a"
        visitors.room = 3
        assert await visitors.inside() == "a"
        visitors.lane.admit()
        assert await visitors.inside() == "abc"

    asyncio.run(test())


def test_who_gives_up_or_is_cancelled_takes_nobodys_place() -> None:
    async def test() -> None:
        visitors = Visitors(1, "abcde")
        assert await visitors.inside() == "a"
        visitors.given_up["b"].set_exception(RuntimeError("its client left"))
        visitors.tasks["c"].cancel()
        assert await visitors.inside() == "ab"
        assert visitors.tasks["b"].result() is False
        visitors.leave("a")
        visitors.tasks["d"].cancel()  # its turn has come, and it does not know yet
        assert await visitors.inside() == "abe"
        assert visitors.lane._inside == 1
        visitors.leave("e")
        assert visitors.lane._predicted == {}
        assert visitors.given_up["b"].exception()  # or the loop tells that nobody asked

    asyncio.run(test())


def test_who_would_not_begin_in_time_is_refused() -> None:
    async def test() -> None:
        visitors = Visitors(2, "abcde")  # 10 s of work for two
        await visitors.inside()
        late, in_time = (asyncio.get_running_loop().create_future() for _ in range(2))
        with pytest.raises(GatewayFullError):
            await visitors.lane.enter(late, seconds=2.0, timeout=4.9)
        waiting = asyncio.create_task(visitors.lane.enter(in_time, seconds=2.0, timeout=5.0))
        await visitors.inside()
        assert not waiting.done()
        waiting.cancel()

    asyncio.run(test())
