"""C1: the image out of a request, streamed, within limits.

A form's image is the part named `image` (RFC 7578); any other body is the image itself. Limits hold before memory is
spent: bytes as they come, and after the first 64 KB (or the end) the format by its magic bytes and the dimensions.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser, parse_options_header

from safelight import formats
from safelight.errors import (
    DeadlinePassedError,
    EmptyImageError,
    MalformedRequestError,
    NoImageError,
    RequestTooSlowError,
    SeveralImagesError,
    TooLargeError,
    UnsupportedFormatError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.types import Receive

__all__ = ["FORM_OVERHEAD", "ClientLeftError", "Upload", "too_large"]

FIELD = "image"
FORM_OVERHEAD = 64 * 1024  # bytes of a form beside its image: boundaries, headers, other fields
MAX_PARTS = 64
SLOWEST_RATE = 64 * 1024  # bytes a second, once `body_timeout` is over


class ClientLeftError(Exception):
    """The client closed its connection before it was answered."""


class Upload:
    """One request's image as it arrives. `grow(kind, amount)` is asked before bytes or pixels are held."""

    def __init__(
        self, content_type: str, *, max_bytes: int, body_timeout: float, grow: Callable[[str, int], None]
    ) -> None:
        self._parts = _parts(content_type)
        self._max_bytes = max_bytes
        self._body_timeout = body_timeout
        self._grow = grow
        self._chunks: list[bytes] = []
        self._size = 0
        self._is_seen = False
        self.pixels = 0  # as the header tells them; 0 until it was seen, or if it does not

    async def read(self, receive: Receive, timeout: float) -> bytes:
        """The whole image, of an allowed format; `receive` is ASGI's, `timeout` the request's, in seconds.

        Errors are those of DESIGN's 400, 408, 413, 415, 422, 503 and 504, and `ClientLeftError`.
        """
        begun = asyncio.get_running_loop().time()
        deadline, received = begun + timeout, 0
        slowest = begun + self._body_timeout
        try:
            async with asyncio.timeout_at(min(slowest, deadline)) as limit:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeftError
                    if chunk := message.get("body"):
                        received += len(chunk)
                        self._feed(chunk, received)
                    if not message.get("more_body"):
                        break
                    slowest = begun + self._body_timeout + received / SLOWEST_RATE
                    limit.reschedule(min(slowest, deadline))
        except TimeoutError:
            raise (DeadlinePassedError if deadline <= slowest else RequestTooSlowError) from None
        return self._finish()

    def _feed(self, chunk: bytes, received: int) -> None:
        # A form's other fields are read over, so they count apart from the image.
        if received > self._max_bytes + FORM_OVERHEAD:
            raise too_large(self._max_bytes)
        for piece in self._parts.feed(chunk):
            self._size += len(piece)
            if self._size > self._max_bytes:
                raise too_large(self._max_bytes)
            self._grow("bytes", self._size)
            self._chunks.append(piece)
        if not self._is_seen and self._size >= formats.HEAD_BYTES:
            self._look()

    def _finish(self) -> bytes:
        self._parts.close()
        if not self._size:
            raise EmptyImageError
        if not self._is_seen:
            self._look()
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)

    def _look(self) -> None:
        """Refuse what is not an image that we take, or has too many pixels; hold room for its pixels."""
        head = self._chunks[0] if len(self._chunks[0]) >= formats.HEAD_BYTES else b"".join(self._chunks)
        found = formats.sniff(head)
        if found is None:
            raise UnsupportedFormatError
        size = formats.dimensions(head, found)
        if size is not None:
            formats.check_dimensions(*size)
            self.pixels = size[0] * size[1]
            self._grow("pixels", self.pixels)
        self._is_seen = True


def too_large(max_bytes: int) -> TooLargeError:
    """The refusal of an image over the limit."""
    return TooLargeError(f"The image is over {max_bytes:,} bytes, the most that is taken.")


class _Body:
    """A raw body: all of it is the image."""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        yield chunk

    def close(self) -> None:
        pass


class _Form:
    """A form: the one part named `image`."""

    def __init__(self, boundary: str) -> None:
        try:
            self._parser = PushMultipartParser(boundary, max_segment_count=MAX_PARTS)
        except MultipartError as exc:
            raise MalformedRequestError(f"The form's boundary cannot be used: {exc}.") from exc
        self._inside = False
        self._seen = False

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        try:
            for event in self._parser.parse(chunk):
                if isinstance(event, MultipartSegment):
                    self._inside = event.name == FIELD
                    if self._inside and self._seen:
                        raise SeveralImagesError
                    self._seen |= self._inside
                elif event is None:
                    self._inside = False
                elif self._inside:
                    yield bytes(event)
        except ParserLimitReached as exc:
            raise MalformedRequestError(f"The form is too big: {exc}.") from exc
        except MultipartError as exc:
            raise MalformedRequestError(f"The form cannot be read: {exc}.") from exc

    def close(self) -> None:
        try:
            self._parser.close()
        except MultipartError as exc:
            raise MalformedRequestError(f"The form is cut short or malformed: {exc}.") from exc
        if not self._seen:
            raise NoImageError


def _parts(content_type: str) -> _Body | _Form:
    kind, options = parse_options_header(content_type)
    if not kind.startswith("multipart/"):
        return _Body()
    if kind != "multipart/form-data" or not options.get("boundary"):
        raise MalformedRequestError("A form must be multipart/form-data with a boundary.")
    return _Form(options["boundary"])
