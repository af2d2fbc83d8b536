"""C1: routes: HTTP -> Job, Reply -> HTTP.

`POST /query` is read from top to bottom: what can be refused is refused before the body is read, then comes the
upload, the job, its reply, the store, the answer. Every failure is a `SafelightError` and is answered in one place.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from functools import lru_cache
from http import HTTPStatus
from importlib import resources
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from starlette.responses import FileResponse, Response

from safelight import formats
from safelight.errors import (
    InternalError,
    MalformedRequestError,
    MethodNotAllowedError,
    NotFoundError,
    SafelightError,
    from_code,
)
from safelight.gateway.accept import wanted
from safelight.gateway.metrics import CONTENT_TYPE_LATEST
from safelight.gateway.request import Request
from safelight.gateway.upload import FORM_OVERHEAD, ClientLeftError, Upload, too_large
from safelight.message import Job, now_ms

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import Receive, Scope, Send

    from safelight import settings
    from safelight.gateway.accept import Wanted
    from safelight.gateway.admission import Admission, Place
    from safelight.gateway.dispatch import Dispatch
    from safelight.gateway.metrics import Metrics
    from safelight.gateway.store import FolderStore
    from safelight.gateway.workers import Workers
    from safelight.message import Reply

    Handler = Callable[[Request], Awaitable[Response]]

__all__ = ["App", "error_body"]

log = logging.getLogger(__name__)

DEFAULT_OPERATIONS = "size,mirror"
DEFAULT_TIMEOUT = 60.0
LONGEST_TIMEOUT = 300.0
UNKNOWN_TYPE = "application/octet-stream"
MAX_OPERATIONS = 32
IMAGES = "/images/"
MAX_NAME = 64  # of an operation; `message.py` takes 256, and no worker can read a job with a longer one
ENTITY_TAG = re.compile(r'(?:W/)?("[^"]*")')  # RFC 9110, 13.1.2: compared without regard to W/
NOTE_NAME = re.compile(r"[A-Za-z0-9-]{1,64}")
NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]")


class WholeFile(FileResponse):
    """A file without its ranges: a Range may be ignored (RFC 9110, 14.2), and one that is malformed is none of ours."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [given for given in scope["headers"] if given[0] != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)


def error_body(error: SafelightError) -> bytes:
    """The JSON of a failure."""
    return json.dumps({"status": "FAILURE", "error": error.code, "detail": error.detail}).encode()


def closing_response(error: SafelightError, request_id: str, retry_after: int | None = None) -> bytes:
    """A failure as it is written where no request was made of it, its connection to be closed."""
    body = error_body(error)
    head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
    if retry_after is not None:
        head += f"retry-after: {retry_after}\r\n"
    head += (
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
        f"x-request-id: {request_id}\r\nserver-timing: total;dur=0\r\n\r\n"
    )
    return head.encode() + body


class App:
    """The ASGI application of one gateway."""

    def __init__(
        self,
        options: settings.Gateway,
        *,
        dispatch: Dispatch,
        workers: Workers,
        admission: Admission,
        store: FolderStore,
        metrics: Metrics,
    ) -> None:
        self._options = options
        self._dispatch = dispatch
        self._workers = workers
        self._admission = admission
        self._store = store
        self._metrics = metrics
        self._openapi = resources.files("safelight.gateway").joinpath("openapi.json").read_bytes()
        self.draining = False
        # path (of saved images, whose path goes on: its beginning) -> method, handler
        self._routes: dict[str, tuple[str, Handler]] = {
            "/query": ("POST", self.query),
            IMAGES: ("GET", self.image),
            "/livez": ("GET", self.livez),
            "/readyz": ("GET", self.readyz),
            "/metrics": ("GET", self.exposition),
            "/openapi.json": ("GET", self.openapi),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; what fails is answered here."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        try:
            response = await self._handler(request)(request)
        except ClientLeftError:
            self._metrics.answered("client_left", request.phases)
            return
        except SafelightError as exc:
            response = self._failure(request, exc)
        except Exception:
            log.exception("request %s failed by a defect", request.id)
            response = self._failure(request, InternalError())
        if self.draining and response.status_code < 400:  # whose request was read to its end
            response.headers["Connection"] = "close"  # a client that keeps its connection asks no balancer again
        response.raw_headers += request.response_headers()
        await response(scope, receive, send)

    def _handler(self, request: Request) -> Handler:
        path = IMAGES if request.path.startswith(IMAGES) else request.path
        method, handler = self._routes.get(path, ("", None))
        if handler is None:
            raise NotFoundError
        allowed = [method, "HEAD"] if method == "GET" else [method]
        if request.method not in allowed:
            request.notes.append((b"allow", ", ".join(allowed).encode()))
            raise MethodNotAllowedError
        return handler

    async def query(self, request: Request) -> Response:
        """Work on one image."""
        accepts = wanted(request.header(b"accept"))
        timeout, names = _asked(request.query)
        self._dispatch.check()
        self._workers.check(names)
        with self._admission.enter(self._announced(request)) as place:
            image, pixels = await self._upload(request, place, timeout)
            request.phases["upload"] = request.elapsed
            left = timeout - request.phases["upload"]
            job = Job(
                id=request.job_id,
                operations=[(name, {}) for name in names],
                deadline=now_ms() + round(left * 1_000),
                reply_to=self._dispatch.inbox,
                pixels=pixels,
                traceparent=request.traceparent,
                image=image,
            )
            reply = await self._ask(request, job, left)
            self._note(request, reply, names)
            if reply.error is not None:
                raise from_code(reply.error, reply.detail)
            response = await self._answer(request, accepts, reply)
        self._metrics.answered("success", request.phases)
        return response

    def _announced(self, request: Request) -> int:
        """The body's length as the client gives it, refused here if it is too much; 0 if it gives none."""
        announced = int(request.header(b"content-length") or 0)  # httptools refuses what is not a number
        if announced > self._options.max_upload + FORM_OVERHEAD:
            raise too_large(self._options.max_upload)
        return announced

    async def _upload(self, request: Request, place: Place, timeout: float) -> tuple[bytes, int]:
        request.body_begun = True
        upload = Upload(
            request.header(b"content-type"),
            max_bytes=self._options.max_upload,
            body_timeout=self._options.body_timeout,
            grow=place.grow,
        )
        return await upload.read(request.receive, timeout), upload.pixels

    async def _ask(self, request: Request, job: Job, timeout: float) -> Reply:
        """The reply to a job; the job is given up as soon as its client goes away."""

        def give_up(_: object) -> None:
            self._dispatch.give_up(job.id, ClientLeftError())

        request.connection_lost.add_done_callback(give_up)
        try:
            return await self._dispatch.ask(job, timeout)
        finally:
            request.connection_lost.remove_done_callback(give_up)

    def _note(self, request: Request, reply: Reply, names: tuple[str, ...]) -> None:
        phases = request.phases
        phases["work"] = reply.work / 1_000_000
        phases["queue"] = max(0.0, request.elapsed - phases["upload"] - phases["work"])
        self._metrics.worked(reply.worker, names)
        request.notes.append((b"safelight-worker", _printable(reply.worker)))
        request.notes.extend(
            (f"safelight-{name.lower()}".encode(), _printable(note))
            for name, note in reply.notes.items()
            if NOTE_NAME.fullmatch(name)
        )

    async def _answer(self, request: Request, accepts: Wanted, reply: Reply) -> Response:
        headers: dict[str, str] = {}
        media_type = None
        if reply.image:
            found = formats.sniff(reply.image)
            media_type = found.media_type if found else UNKNOWN_TYPE
        as_image = accepts.image(media_type)  # before anything is saved: a failure leaves nothing
        if reply.image:
            name = f"{request.job_id}.{found.extension if found else 'bin'}"
            begun = time.perf_counter()
            await self._store.save(name, reply.image)
            request.phases["store"] = time.perf_counter() - begun
            headers["Link"] = f'<{IMAGES}{name}>; rel="related"; type="{media_type}"'
        if as_image:
            return Response(reply.image, media_type=media_type, headers=headers)
        body = {"status": "SUCCESS"} | {name: fact for name, fact in reply.facts.items() if name != "status"}
        return Response(json.dumps(body), media_type="application/json", headers=headers)

    async def image(self, request: Request) -> Response:
        """A saved image."""
        name = request.path.removeprefix(IMAGES)
        path = self._store.path(name)
        if path is None:
            raise NotFoundError("There is no such image.")
        # The name holds the job's id and an image is never changed: the name is its own validator.
        headers = {"ETag": f'"{name}"', "Cache-Control": "private, max-age=31536000, immutable"}
        known = request.header(b"if-none-match")
        if known.strip() == "*" or headers["ETag"] in ENTITY_TAG.findall(known):
            return Response(status_code=304, headers=headers)
        extension = name.rpartition(".")[2]
        media_type = next((f.media_type for f in formats.FORMATS if f.extension == extension), UNKNOWN_TYPE)
        headers |= {"X-Content-Type-Options": "nosniff", "Accept-Ranges": "none"}
        return WholeFile(path, media_type=media_type, headers=headers)

    async def livez(self, request: Request) -> Response:
        """This process answers; nothing else is asked."""
        return Response("ok\n", media_type="text/plain")

    async def readyz(self, request: Request) -> Response:
        """New requests would be worked on: broker reachable, a worker's beat fresh, not draining."""
        ready = self._dispatch.ready and not self.draining
        return Response("ready\n" if ready else "not ready\n", 200 if ready else 503, media_type="text/plain")

    async def exposition(self, request: Request) -> Response:
        """Metrics for Prometheus."""
        return Response(self._metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def openapi(self, request: Request) -> Response:
        """The description of this API."""
        return Response(self._openapi, media_type="application/json")

    @property
    def refuses(self) -> bool:
        """Whether there was no room for a request within the last second."""
        return self._admission.refuses

    def shed(self, announced: int, request_id: str) -> bytes | None:
        """The whole answer to a request to /query of so many bytes that there is no room for; None if it is heard."""
        if announced > self._options.max_upload + FORM_OVERHEAD:  # 413, which room does not mend
            return None
        try:
            self._dispatch.check()
            self._admission.check(announced)
        except SafelightError as exc:
            self._metrics.answered(exc.code, {})
            return closing_response(exc, request_id, self._admission.retry_after())
        return None

    def _failure(self, request: Request, error: SafelightError) -> Response:
        if request.path == "/query":
            self._metrics.answered(error.code, request.phases)
        headers = {}
        if error.status == 503:
            headers["Retry-After"] = str(self._admission.retry_after())
        if error.status == 408 or (request.header(b"expect") and not request.body_begun):
            headers["Connection"] = "close"  # a body that nobody waits for must not be taken for a next request
        return Response(error_body(error), error.status, headers, media_type="application/json")


@lru_cache(maxsize=256)
def _asked(query: bytes) -> tuple[float, tuple[str, ...]]:
    """The request's `timeout` in seconds and the names of its `operations`."""
    given = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    return _timeout(given.get("timeout")), _operations(given.get("operations", DEFAULT_OPERATIONS))


def _timeout(given: str | None) -> float:
    if given is None:
        return DEFAULT_TIMEOUT
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST_TIMEOUT:  # false for nan
        raise MalformedRequestError(f"timeout must be a number of seconds over 0 and at most {LONGEST_TIMEOUT:.0f}.")
    return seconds


def _operations(given: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in given.split(","))
    if len(names) > MAX_OPERATIONS or not all(1 <= len(name) <= MAX_NAME for name in names):
        raise MalformedRequestError(
            f"operations must be 1 to {MAX_OPERATIONS} names of at most {MAX_NAME} characters "
            "with commas between them, as in ?operations=size,mirror."
        )
    return names


def _printable(text: str) -> bytes:
    return NOT_PRINTABLE.sub("?", text)[:256].encode()
