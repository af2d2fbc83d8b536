"""Operations that only wait: safelight worker --import waits."""

import time

__all__ = ["wait20", "wait100"]


def wait20(image: bytes) -> dict[str, int]:
    """20 ms, without CPU."""
    time.sleep(0.020)
    return {"waited_ms": 20}


def wait100(image: bytes) -> dict[str, int]:
    """100 ms, without CPU."""
    time.sleep(0.100)
    return {"waited_ms": 100}
