"""C1: routes: HTTP -> Job, Reply -> HTTP.

`POST /query` is read from top to bottom: what can be refused is refused before the body is read, then comes the
upload, the job, its reply, the store, the answer. Every failure is a `SafelightError` and is answered in one place.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from safelight import formats
from safelight.errors import (
    InternalError,
    MalformedRequestError,
    MethodNotAllowedError,
    NotFoundError,
    SafelightError,
    from_code,
)
from safelight.gateway.accept import Wanted
from safelight.gateway.metrics import CONTENT_TYPE_LATEST
from safelight.gateway.upload import FORM_OVERHEAD, Upload, too_large
from safelight.message import Job, new_id, now_ms

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

    from safelight import settings
    from safelight.gateway.admission import Admission, Place
    from safelight.gateway.dispatch import Dispatch
    from safelight.gateway.metrics import Metrics
    from safelight.gateway.store import FolderStore
    from safelight.gateway.workers import Workers
    from safelight.message import Reply

__all__ = ["App", "error_body"]

log = logging.getLogger(__name__)

DEFAULT_OPERATIONS = "size,mirror"
DEFAULT_TIMEOUT = 60.0
LONGEST_TIMEOUT = 300.0
UNKNOWN_TYPE = "application/octet-stream"
MAX_OPERATIONS = 32
MAX_NAME = 64  # of an operation; `message.py` takes 256, and no worker can read a job with a longer one
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
ENTITY_TAG = re.compile(r'(?:W/)?("[^"]*")')  # RFC 9110, 13.1.2: compared without regard to W/
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C Trace Context, 3.2
NOTE_NAME = re.compile(r"[A-Za-z0-9-]{1,64}")
NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]")


class ClientGoneError(Exception):
    """The client closed its connection while its job was out."""


@dataclass
class Trace:
    """What every response carries: the request's id, seconds by phase, and headers that are known before it is made."""

    id: str
    begun: float = field(default_factory=time.perf_counter)
    phases: dict[str, float] = field(default_factory=dict)
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body_begun: bool = False


def error_body(error: SafelightError) -> bytes:
    """The JSON of a failure."""
    return json.dumps({"status": "FAILURE", "error": error.code, "detail": error.detail}).encode()


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
        self._routes = Starlette(
            routes=[
                Route("/query", self.query, methods=["POST"]),
                Route("/images/{name:path}", self.image, methods=["GET"]),
                Route("/livez", self.livez, methods=["GET"]),
                Route("/readyz", self.readyz, methods=["GET"]),
                Route("/metrics", self.exposition, methods=["GET"]),
                Route("/openapi.json", self.openapi, methods=["GET"]),
            ],
            exception_handlers={
                SafelightError: self._failed,
                HTTPException: self._failed,
                ClientDisconnect: self._left,
                ClientGoneError: self._left,
                Exception: self._failed,
            },
        )
        self._routes.router.redirect_slashes = False  # a redirect loses the body of `curl -F`; 404 says where to post

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Every response gets its id and its timing, whoever made it."""
        if scope["type"] != "http":
            return
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        trace = Trace(given if REQUEST_ID.fullmatch(given) else new_id())
        scope["trace"] = trace

        async def send_with_trace(message: Message) -> None:
            if message["type"] == "http.response.start":
                phases = trace.phases | {"total": time.perf_counter() - trace.begun}
                timing = ", ".join(f"{name};dur={seconds * 1_000:.2f}" for name, seconds in phases.items())
                message["headers"] = [
                    *message["headers"],
                    *trace.headers,
                    (b"x-request-id", trace.id.encode()),
                    (b"server-timing", timing.encode()),
                ]
            await send(message)

        await self._routes(scope, receive, send_with_trace)

    async def query(self, request: Request) -> Response:
        """Work on one image."""
        trace: Trace = request.scope["trace"]
        wanted = Wanted(", ".join(request.headers.getlist("accept")))
        timeout = _timeout(request.query_params.get("timeout"))
        names = _operations(request.query_params.get("operations", DEFAULT_OPERATIONS))
        self._dispatch.check()
        self._workers.check(names)
        with self._admission.enter(self._announced(request)) as place:
            image, _ = await self._upload(request, place, timeout)
            trace.phases["upload"] = time.perf_counter() - trace.begun
            left = timeout - trace.phases["upload"]
            job = Job(
                id=new_id(),
                operations=[(name, {}) for name in names],
                deadline=now_ms() + round(left * 1_000),
                reply_to=self._dispatch.inbox,
                traceparent=_traceparent(request),
                image=image,
            )
            reply = await self._ask(request, job, left)
            self._note(trace, reply, names)
            if reply.error is not None:
                raise from_code(reply.error, reply.detail)
            response = await self._answer(trace, wanted, job, reply)
        self._metrics.answered("success", trace.phases)
        return response

    def _announced(self, request: Request) -> int:
        """The body's length as the client gives it, refused here if it is too much; 0 if it gives none."""
        announced = int(request.headers.get("content-length", 0))  # httptools refuses what is not a number
        if announced > self._options.max_upload + FORM_OVERHEAD:
            raise too_large(self._options.max_upload)
        return announced

    async def _upload(self, request: Request, place: Place, timeout: float) -> tuple[bytes, formats.Format]:
        request.scope["trace"].body_begun = True
        upload = Upload(
            request.headers.get("content-type", ""),
            max_bytes=self._options.max_upload,
            body_timeout=self._options.body_timeout,
            grow=place.grow,
        )
        return await upload.read(request.stream(), timeout)

    async def _ask(self, request: Request, job: Job, timeout: float) -> Reply:
        """The reply to a job; the job is given up as soon as its client goes away."""
        # After the body, the next thing to be received is that the client went away.
        gone = asyncio.ensure_future(request.receive())
        gone.add_done_callback(lambda _: self._dispatch.give_up(job.id, ClientGoneError()))
        try:
            return await self._dispatch.ask(job, timeout)
        finally:
            gone.cancel()

    def _note(self, trace: Trace, reply: Reply, names: list[str]) -> None:
        total = time.perf_counter() - trace.begun
        trace.phases["work"] = reply.work / 1_000_000
        trace.phases["queue"] = max(0.0, total - trace.phases["upload"] - trace.phases["work"])
        self._metrics.worked(reply.worker, names)
        trace.headers.append((b"safelight-worker", _printable(reply.worker)))
        trace.headers.extend(
            (f"safelight-{name.lower()}".encode(), _printable(note))
            for name, note in reply.notes.items()
            if NOTE_NAME.fullmatch(name)
        )

    async def _answer(self, trace: Trace, wanted: Wanted, job: Job, reply: Reply) -> Response:
        headers: dict[str, str] = {}
        media_type = None
        if reply.image:
            found = formats.sniff(reply.image[: formats.HEAD_BYTES])
            media_type = found.media_type if found else UNKNOWN_TYPE
        as_image = wanted.image(media_type)  # before anything is saved: a failure leaves nothing
        if reply.image:
            name = f"{job.id}.{found.extension if found else 'bin'}"
            begun = time.perf_counter()
            await self._store.save(name, reply.image)
            trace.phases["store"] = time.perf_counter() - begun
            headers["Link"] = f'</images/{name}>; rel="related"; type="{media_type}"'
        if as_image:
            return Response(reply.image, media_type=media_type, headers=headers)
        body = {"status": "SUCCESS"} | {name: fact for name, fact in reply.facts.items() if name != "status"}
        return Response(json.dumps(body), media_type="application/json", headers=headers)

    async def image(self, request: Request) -> Response:
        """A saved image."""
        name = request.path_params["name"]
        path = self._store.path(name)
        if path is None:
            raise NotFoundError("There is no such image.")
        # The name holds the job's id and an image is never changed: the name is its own validator.
        headers = {"ETag": f'"{name}"', "Cache-Control": "private, max-age=31536000, immutable"}
        known = ", ".join(request.headers.getlist("if-none-match"))
        if known.strip() == "*" or headers["ETag"] in ENTITY_TAG.findall(known):
            return Response(status_code=304, headers=headers)
        # A Range may be ignored (RFC 9110, 14.2); Starlette answers one that it cannot read with a 400 of its own.
        request.scope["headers"] = [given for given in request.scope["headers"] if given[0] != b"range"]
        extension = name.rpartition(".")[2]
        media_type = next((f.media_type for f in formats.FORMATS if f.extension == extension), UNKNOWN_TYPE)
        headers |= {"X-Content-Type-Options": "nosniff", "Accept-Ranges": "none"}
        return FileResponse(path, media_type=media_type, headers=headers)

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

    async def _failed(self, request: Request, raised: Exception) -> Response:
        error = _ours(raised)
        trace: Trace = request.scope["trace"]
        if request.scope["path"] == "/query":
            self._metrics.answered(error.code, trace.phases)
        headers = dict(getattr(raised, "headers", None) or {})
        if error.status == 503:
            headers["Retry-After"] = str(self._admission.retry_after())
        if error.status == 408 or ("expect" in request.headers and not trace.body_begun):
            headers["Connection"] = "close"  # a body that nobody waits for must not be taken for a next request
        return Response(error_body(error), error.status, headers, media_type="application/json")

    async def _left(self, request: Request, raised: Exception) -> Response:
        """Nobody is there to read this."""
        self._metrics.answered("client_left", request.scope["trace"].phases)
        return Response(status_code=400)


def _ours(raised: Exception) -> SafelightError:
    if isinstance(raised, SafelightError):
        return raised
    if isinstance(raised, HTTPException):
        return MethodNotAllowedError() if raised.status_code == 405 else NotFoundError()
    return InternalError()


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


def _operations(given: str) -> list[str]:
    names = [name.strip() for name in given.split(",")]
    if len(names) > MAX_OPERATIONS or not all(1 <= len(name) <= MAX_NAME for name in names):
        raise MalformedRequestError(
            f"operations must be 1 to {MAX_OPERATIONS} names of at most {MAX_NAME} characters "
            "with commas between them, as in ?operations=size,mirror."
        )
    return names


def _traceparent(request: Request) -> str | None:
    given = request.headers.get("traceparent", "")
    return given if TRACEPARENT.fullmatch(given) else None


def _printable(text: str) -> bytes:
    return NOT_PRINTABLE.sub("?", text)[:256].encode()
