"""Clients: a steady load of distinct images, each posted until it is answered; what is refused is posted again."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from chaos import images
from chaos.images import Form
from chaos.system import System

TIMEOUT = 60.0  # each request's own; an answer may come a second after it, and no later
LATE_SECONDS = 1.0
PAUSE_SECONDS = 1.0  # before a request that was refused is sent again
# What an image asks of `ledger.py`, and out of how many it does.
POISON = {"kill": 150, "hang": 400, "fail": 200, "hogs": 250}
LEAVES = 100  # one client of so many goes away before it is answered
LEAVES_SECONDS = 0.05


@dataclass(eq=False)
class Post:
    """One request and what became of it: a status, or `left`, `closed` (no answer at all), `not connected`."""

    mark: bytes
    form: Form
    gateway: int
    begun: float  # by the event loop's clock
    ended: float = 0.0
    outcome: str = ""
    error: str = ""
    job: str = ""
    wrong: str = ""

    @property
    def asked(self) -> str:
        """good, or the poison in it."""
        return self.mark[-4:].decode()


@dataclass
class Load:
    """All posts of one run. `rate` a second; `images` are distinct, `posts` their requests."""

    system: System
    rate: float
    dice: random.Random
    posts: list[Post] = field(default_factory=list)
    images: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._forms = images.forms()
        self._judge = images.Judge()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    @property
    def waiting(self) -> list[Post]:
        """Posts that are not answered yet."""
        return [post for post in self.posts if not post.ended]

    async def run(self) -> None:
        """Post until `stop`, then wait for what is not answered."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not self._stopped:
            number, self.images = self.images, self.images + 1
            asked = next((poison for poison, one_of in POISON.items() if self.dice.randrange(one_of) == 0), "good")
            leaves = asked == "good" and self.dice.randrange(LEAVES) == 0
            task = asyncio.create_task(self._until_answered(number, asked, leaves))
            self._tasks.add(task)
            task.add_done_callback(self._done)
            due += 1 / self.rate
            await asyncio.sleep(due - loop.time())
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()

    def stop(self) -> None:
        """Post nothing new."""
        self._stopped = True

    async def _until_answered(self, number: int, asked: str, leaves: bool) -> None:
        form = self._forms[number % len(self._forms)]
        for attempt in range(100):
            gateway = (number + attempt) % len(self.system.gateway_ports)
            post = Post(images.tag(number, attempt, asked), form, gateway, asyncio.get_running_loop().time())
            self.posts.append(post)
            await self._post(post, leaves)
            if post.outcome not in {"503", "closed", "not connected"}:
                return
            self.refused[post.error or post.outcome] += 1
            await asyncio.sleep(PAUSE_SECONDS)
        post.wrong = f"refused {attempt + 1} times"

    async def _post(self, post: Post, leaves: bool) -> None:
        try:
            async with asyncio.timeout(TIMEOUT + 10 * LATE_SECONDS):
                await self._exchange(post, leaves)
        except ConnectionRefusedError:
            post.outcome = "not connected"
        except TimeoutError:
            post.outcome = "silence"
        except (OSError, EOFError):
            post.outcome = "closed"
        post.ended = asyncio.get_running_loop().time()

    async def _exchange(self, post: Post, leaves: bool) -> None:
        """One connection for one request, read to its end: a second answer would show."""
        port = self.system.gateway_ports[post.gateway]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            body = post.form.tagged(post.mark)
            writer.write(
                f"POST /query?operations=ledger,size,mirror&timeout={TIMEOUT:.0f} HTTP/1.1\r\nHost: chaos\r\n"
                f"Content-Type: image/jpeg\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
            )
            writer.write(body)
            if leaves:
                await asyncio.sleep(LEAVES_SECONDS)
                post.outcome = "left"
                return
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
            answer = await reader.readexactly(int(headers["content-length"]))
            post.job = headers["x-request-id"]
            if await reader.read(1):
                post.wrong = "a second answer"
            post.outcome = head[0].split()[1]
            self._look(post, body, headers, answer.decode())
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _look(self, post: Post, body: bytes, headers: dict[str, str], answer: str) -> None:
        if post.outcome != "200":
            post.error = answer.partition('"error": "')[2].partition('"')[0]
            return
        size = max(1, (len(body) + 512) // 1024)
        if answer != f'{{"status": "SUCCESS", "size": "{size}kb"}}':
            post.wrong = f"answered {answer}"
            return
        name = Path(headers.get("link", "").partition(">")[0]).name
        saved = images.read(self.system.stores[post.gateway] / name)
        notes = {"mirror": headers.get("safelight-mirror", "")}
        post.wrong = post.wrong or ("not saved" if saved is None else self._judge(post.form, post.mark, saved, notes))
