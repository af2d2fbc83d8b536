"""C1: what a client wants to be answered with: JSON or the resulting image (RFC 9110 §12.5.1, `Accept`)."""

from __future__ import annotations

from functools import lru_cache

from safelight.errors import NotAcceptableError

__all__ = ["Wanted", "wanted"]


class Wanted:
    """One request's `Accept` header; `NotAcceptableError` at once if it allows neither JSON nor any image."""

    def __init__(self, accept: str) -> None:
        self._ranges = [_range(part) for part in accept.split(",") if part.strip()] or [("*/*", 1.0)]
        if not self._quality("application/json") and not any(
            quality and (name.startswith("image/") or name == "*/*") for name, quality in self._ranges
        ):
            raise NotAcceptableError

    def image(self, media_type: str | None) -> bool:
        """Whether to answer with an image of this type (None: there is none). JSON wins when both are as welcome."""
        as_json = self._quality("application/json")
        as_image = self._quality(media_type) if media_type else 0.0
        if not as_json and not as_image:
            if media_type is None:
                raise NotAcceptableError("The operations made no image, and the Accept header does not allow JSON.")
            raise NotAcceptableError(f"The result is {media_type}, and the Accept header allows neither that nor JSON.")
        return as_image > as_json

    def _quality(self, media_type: str) -> float:
        """The weight of the most specific range that matches; 0 if none does."""
        family = media_type.partition("/")[0] + "/*"
        for candidate in (media_type, family, "*/*"):
            weights = [quality for name, quality in self._ranges if name == candidate]
            if weights:
                return max(weights)
        return 0.0


@lru_cache(maxsize=256)  # a client sends the same one each time
def wanted(accept: str) -> Wanted:
    """What a client wants; `accept` is its header's value, empty if there is none."""
    return Wanted(accept)


def _range(part: str) -> tuple[str, float]:
    name, *parameters = (word.strip().lower() for word in part.split(";"))
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return name, min(1.0, max(0.0, float(parameter[2:])))
            except ValueError:
                return name, 0.0
    return name, 1.0
