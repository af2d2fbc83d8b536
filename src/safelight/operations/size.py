"""C3: the operation `size`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["size"]


def size(image: bytes) -> Mapping[str, str]:
    """The image's length in KB of 1,024 bytes, rounded half up, at least 1."""
    return {"size": f"{max(1, (len(image) + 512) // 1024)}kb"}
