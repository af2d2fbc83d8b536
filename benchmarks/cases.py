"""The table of cases: each rung of the ladder, and each axis of the whole service.

Whatever a target's ratio needs has its turn in every round, so that ratios are of neighbours in time. The rest is
measured in the first round alone, unless all combinations are asked for (`full`).
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING

import measure
from baselines import BASELINES
from images import PICTURES
from measure import Case
from service import BROKERS
from skeleton import SKELETON

from safelight.settings import Gateway

if TYPE_CHECKING:
    from collections.abc import Iterator

    from system import System

__all__ = ["MAIN", "cases"]

MAIN = "1024x688"
BOTH = "size,mirror"
CONNECTIONS = (1, 4, 16, 64, 256)
OTHERS_CONNECTIONS = (1, 16, 64)
TARGETS = {MAIN: (1, 16, 64), "unaligned": (16,), "small": (16,)}  # connections of the targets, size,mirror
BASELINE_CONNECTIONS = {MAIN: (16, 64), "small": (16,)}
BESIDE_SMALL = ("mosec", "celery")

Row = tuple[str, int, str]  # operations, connections, broker


def cases(pictures: dict[str, measure.Picture], *, full: bool) -> Iterator[Case]:
    """All of them, in the order of a round."""
    yield Case("store", "store", measure.store)
    for broker, size in itertools.product(BROKERS.values(), ("empty", MAIN)):
        run = partial(measure.trip, broker=broker, name=size)
        yield Case(f"trip/{size}/{broker.name}", "trip", run, picture=size, broker=broker.name)
    for name in PICTURES:
        yield from _bare(name, every_round=full or name in TARGETS)
        for row in _rows(name, full=full):
            if row[1] * len(pictures[name].image) <= Gateway().max_bytes:  # what a gateway admits
                yield from _loaded(name, *row, full=full)


def _bare(name: str, *, every_round: bool) -> Iterator[Case]:
    """The codec, and the rungs next to it."""
    yield Case(f"codec/{name}", "codec", partial(measure.codec, name=name), every_round, name)
    if name in TARGETS:
        yield Case(
            f"operation/{name}", "operation", partial(measure.codec, name=name, what="operation"), name == MAIN, name
        )
    if name == MAIN:
        yield Case(f"solo/{name}", "solo", partial(measure.solo, name=name), True, name)
        yield Case(f"pool/{name}", "pool", partial(measure.pool, name=name), True, name)
        for operations in (BOTH, "size"):
            row = {"name": name, "operations": operations, "connections": 16, "broker": BROKERS["embedded"]}
            run = partial(measure.gateway, **row)
            yield Case(f"gateway/{name}/{operations}", "gateway", run, True, name, operations, 16, "embedded")
        for count in (1, 16):
            run = partial(measure.baseline, name=name, connections=count, system=SKELETON)
            yield Case(f"skeleton/{name}/{count}", "skeleton", run, True, name, BOTH, count, "embedded")


def _rows(name: str, *, full: bool) -> list[Row]:
    if full:
        return list(itertools.product((BOTH, "size"), CONNECTIONS, BROKERS))
    if name != MAIN:
        return [(BOTH, count, "embedded") for count in OTHERS_CONNECTIONS]
    rows = list(itertools.product((BOTH, "size"), CONNECTIONS, ("embedded",)))
    return rows + [(BOTH, count, broker) for broker in BROKERS if broker != "embedded" for count in (16, 64)]


def _loaded(name: str, operations: str, count: int, broker: str, *, full: bool) -> Iterator[Case]:
    """The whole service, and beside it the baselines, if there are some for this."""
    is_usual = operations == BOTH and broker == "embedded"
    every_round = full or (is_usual and count in TARGETS.get(name, ()))
    run = partial(measure.service, name=name, operations=operations, connections=count, broker=BROKERS[broker])
    title = f"service/{name}/{operations}/{count}/{broker}"
    yield Case(title, "service", run, every_round, name, operations, count, broker)
    if is_usual and count in BASELINE_CONNECTIONS.get(name, ()):
        for system in BASELINES:
            if name == MAIN or _is_beside_small(system):
                run = partial(measure.baseline, name=name, connections=count, system=system)
                title = f"baseline/{name}/{count}/{system.name}"
                yield Case(title, "baseline", run, True, name, BOTH, count, system.name)


def _is_beside_small(system: System) -> bool:
    return any(word in system.name.lower() for word in BESIDE_SMALL)
