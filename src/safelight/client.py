"""Posts images to a gateway, with retries: `async with Client(url) as client: await client.query("a.jpg", image)`.

A connection that fails and a 503 are tried again: operations are pure, so that a job which is done twice does no harm.
What else a gateway says is final. An image has one time for all its tries, and each try's `?timeout=` is what is left
of it. A gateway that gave no answer to anybody for `AWAY_SECONDS` is given up: the images after it get one try each.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import httpx

from safelight.errors import ConfigurationError, DeadlinePassedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

__all__ = ["Answer", "Client"]

AWAY_SECONDS = 10.0  # the longest pause before a supervisor starts a gateway again
CONNECT_SECONDS = 5.0
GRACE_SECONDS = 2.0  # a gateway answers by its deadline; so long later nothing comes any more
KEEP_ALIVE_SECONDS = 60.0  # below the gateway's 65 s, so that no request meets a closing connection
LONGEST_TIMEOUT = 300.0  # the most that a gateway allows
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.2, 5.0  # between tries, doubling, where no Retry-After tells
NOTE = "safelight-"


@dataclass(frozen=True)
class Answer:
    """What became of one image: facts and notes, or an `error` (a code, stable) with its `detail` (a sentence).

    Beside the gateway's own codes there are `unreachable`, `not_safelight` and `http_NNN` (an answer that no gateway
    gave), and of whoever reads and saves files `unreadable` and `not_saved`. `link` is the resulting image's address.
    """

    name: str
    status: str = "SUCCESS"
    facts: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    worker: str | None = None
    link: str | None = None
    saved: str | None = None
    error: str | None = None
    detail: str | None = None

    def failed(self, error: str, detail: str) -> Answer:
        """The same image's answer, as a failure."""
        return replace(self, status="FAILURE", error=error, detail=detail)


class Client:
    """One gateway's client: at most `at_once` requests at a time, over connections that are kept."""

    def __init__(self, url: str, *, operations: str | None = None, timeout: float = 60.0, at_once: int = 8) -> None:
        self._url = _checked(url)
        self._operations = operations
        self._timeout = timeout
        self._slots = asyncio.Semaphore(at_once)
        self._away_since: float | None = None
        self._http = httpx.AsyncClient(
            base_url=self._url,
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=at_once, keepalive_expiry=KEEP_ALIVE_SECONDS),
            headers={"Accept": "application/json", "Content-Type": "application/octet-stream"},
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def query(self, name: str, image: bytes) -> Answer:
        """The answer for one image; `name` is the caller's own. A failure is an answer too, and nothing is raised."""

        def post(left: float) -> httpx.Request:
            query = {"timeout": f"{min(left, LONGEST_TIMEOUT):.3f}"}
            if self._operations is not None:
                query["operations"] = self._operations
            return self._http.build_request("POST", "query", params=query, content=image)

        answered = await self._ask(name, post)
        return answered if isinstance(answered, Answer) else _answer(name, answered)

    async def fetch(self, answer: Answer) -> Answer | bytes:
        """The resulting image that an answer links to, or the answer as a failure."""
        link = answer.link or ""
        answered = await self._ask(answer.name, lambda _: self._http.build_request("GET", link))
        if isinstance(answered, Answer):
            return answer.failed(answered.error or "", answered.detail or "")
        if answered.status_code != 200:
            return answer.failed(
                "not_saved", f"The resulting image cannot be fetched: {link} says {answered.status_code}."
            )
        return answered.content

    async def _ask(self, name: str, request: Callable[[float], httpx.Request]) -> httpx.Response | Answer:
        """The last response to a request that is made anew for each try (of the seconds left), or why there is none."""
        async with self._slots:
            until = time.monotonic() + self._timeout
            for tries in itertools.count():
                wait = min(FIRST_WAIT_SECONDS * 2**tries, LONGEST_WAIT_SECONDS)
                left = until - time.monotonic()
                outcome: httpx.Response | Answer
                try:
                    async with asyncio.timeout(left + GRACE_SECONDS):
                        outcome = await self._http.send(request(left))
                except TimeoutError:
                    return Answer(name).failed(DeadlinePassedError.code, DeadlinePassedError.sentence)
                except httpx.TransportError as exc:
                    told = f"{type(exc).__name__}: {exc}".rstrip(": ")
                    outcome = Answer(name).failed("unreachable", f"No gateway answers at {self._url} ({told}).")
                    self._away_since = self._away_since or time.monotonic()
                    if time.monotonic() + wait - self._away_since > AWAY_SECONDS:
                        return outcome
                else:
                    self._away_since = None
                    if outcome.status_code != 503:
                        return outcome
                    wait = _retry_after(outcome.headers.get("retry-after", ""), wait)
                wait *= random.uniform(1, 1.25)  # noqa: S311 - so that not all come back at once
                if time.monotonic() + wait >= until:
                    return outcome
                await asyncio.sleep(wait)
        raise AssertionError  # the loop has no end of its own


def _checked(url: str) -> str:
    url = url if "://" in url else f"http://{url}"
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as exc:
        raise ConfigurationError(f"{url} is no address of a gateway: {exc}.") from exc
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigurationError(f"{url} is no address of a gateway; it looks like http://localhost:8080.")
    return url


def _retry_after(given: str, otherwise: float) -> float:
    """Seconds to wait (RFC 9110 §10.2.3: a number, or a date)."""
    if given.isascii() and given.isdigit():
        return max(float(given), FIRST_WAIT_SECONDS)
    try:
        return max((parsedate_to_datetime(given) - datetime.now(UTC)).total_seconds(), FIRST_WAIT_SECONDS)
    except (ValueError, TypeError):
        return otherwise


def _answer(name: str, response: httpx.Response) -> Answer:
    headers = response.headers
    notes = {key.removeprefix(NOTE): value for key, value in headers.items() if key.startswith(NOTE)}
    worker = notes.pop("worker", None)
    related = response.links.get("related", {}).get("url")
    link = str(response.url.join(related)) if related else None
    try:
        body = response.json()
        status = body.pop("status")
    except (ValueError, AttributeError, KeyError, TypeError):  # not JSON, no object, not ours
        code = "not_safelight" if response.is_success else f"http_{response.status_code}"
        return Answer(name).failed(
            code, f"{response.url.host} answered {response.status_code}, and not as a gateway does."
        )
    if status == "SUCCESS" and response.is_success:
        return Answer(name, facts=body, notes=notes, worker=worker, link=link)
    failure = Answer(name, notes=notes, worker=worker)
    return failure.failed(str(body.get("error", f"http_{response.status_code}")), str(body.get("detail", "")))
