"""How each kind of case is measured; `cases.py` says which there are."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import codec as bare
from images import PICTURES
from load import posted, run
from loops import looped
from service import Broker, broker_url, gateway_alone, whole
from system import BenchmarkError, Part, System, running

from safelight.operations.mirror import mirror
from safelight.settings import usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable

    from system import Place

__all__ = [
    "Case",
    "Ground",
    "Picture",
    "baseline",
    "codec",
    "gateway",
    "pool",
    "prepared",
    "service",
    "solo",
    "store",
    "trip",
]

HERE = Path(__file__).parent
SOLO_SECONDS = 1.0  # of the codec in one process, for its own time beside the service's at one connection
ANSWERS = 3  # for each connection, at least: a load of slow pictures lasts longer
MOST_SECONDS = 12.0


@dataclass(frozen=True)
class Picture:
    """One of the pictures, in a file too; `call_seconds` is the operation's time, `way` its note."""

    image: bytes
    mirrored: bytes
    way: str
    call_seconds: float
    path: Path


@dataclass(frozen=True)
class Ground:
    """What all cases of a run share."""

    folder: Path
    pictures: dict[str, Picture]
    seconds: int

    def file(self, image: bytes) -> Path:
        """A new file that holds this."""
        path = Path(tempfile.mkdtemp(prefix="f-", dir=self.folder)) / "image"
        path.write_bytes(image)
        return path


@dataclass(frozen=True)
class Case:
    """One measurement: its name, the rung it stands on, how it is made, what it is of."""

    name: str
    rung: str
    run: Callable[[Ground], dict[str, Any]]
    every_round: bool = True
    picture: str = ""
    operations: str = ""
    connections: int = 0
    broker: str = ""  # a baseline's own name stands here


def prepared(folder: Path) -> dict[str, Picture]:
    """All pictures, each mirrored by the operation and found to be mirrored; a bare lossless codec gives the same."""
    pictures = {}
    for name, make in PICTURES.items():
        image = make()
        mirror(image)
        begun = time.perf_counter()
        result = mirror(image)
        seconds = time.perf_counter() - begun
        if not bare.is_mirrored(image, result.image):
            raise BenchmarkError(f"{name}: the operation does not mirror it")
        is_lossless_jpeg = image.startswith(b"\xff\xd8") and result.notes["mirror"] == "lossless"
        if is_lossless_jpeg and bare.codec(image)() != result.image:
            raise BenchmarkError(f"{name}: the bare codec's result is not the operation's")
        path = folder / name
        path.write_bytes(image)
        pictures[name] = Picture(image, result.image, result.notes["mirror"], seconds, path)
    return pictures


def codec(ground: Ground, name: str, what: str = "codec", seconds: float = 0, processes: int = 0) -> dict[str, Any]:
    """A bare loop on every core."""
    picture = ground.pictures[name]
    command = [sys.executable, str(HERE / "codec.py"), str(picture.path), str(seconds or ground.seconds), what]
    return looped(Part(what, command), processes or usable_cores(), image_bytes=len(picture.image))


def solo(ground: Ground, name: str) -> dict[str, Any]:
    """The codec in one process alone."""
    return codec(ground, name, seconds=SOLO_SECONDS, processes=1)


def _inside(kind: str, *arguments: object) -> Part:
    return Part(kind, [sys.executable, str(HERE / "inside.py"), *map(str, arguments)])


def pool(ground: Ground, name: str) -> dict[str, Any]:
    """The worker's children without a broker."""
    picture = ground.pictures[name]
    return looped(_inside("worker", "pool", picture.path, ground.seconds), image_bytes=len(picture.image))


def trip(ground: Ground, broker: Broker, name: str) -> dict[str, Any]:
    """A round trip over the broker, with this picture both ways or with none."""
    image = ground.pictures[name].image if name in ground.pictures else b""
    path = ground.file(image)

    def parts(place: Place) -> list[Part]:
        return [*broker.parts(place), _inside("worker", "worker", broker.url(place), path)]

    system = System("trip", broker.needs_redis, parts)
    with running(system, ground.folder, probe=lambda _: True) as now:
        url = broker.url(now.place)
        end = _inside("gateway", "gateway", url, path, ground.seconds)
        return looped(end, image_bytes=len(image), also=now.parts.processes, broker_url=broker_url(now.place))


def store(ground: Ground) -> dict[str, Any]:
    """A result saved in a new folder."""
    folder = tempfile.mkdtemp(prefix="store-", dir=ground.folder)
    return looped(_inside("gateway", "store", folder), image_bytes=0)


def _served(
    ground: Ground, system: System, picture: Picture, *, query: str = "", connections: int, workers: int = 0
) -> dict[str, Any]:
    load = posted(ground.folder, picture.image, raw=system.raw_body, query=query)
    enough = math.ceil(ANSWERS * connections * picture.call_seconds / usable_cores())
    seconds = min(max(ground.seconds, enough), MOST_SECONDS)
    mirrored = None if query.endswith("=size") else picture.mirrored
    found = run(system, ground.folder, load(connections, seconds), picture.image, mirrored, workers=workers)
    return found | {"seconds": seconds}


def gateway(ground: Ground, name: str, operations: str, connections: int, broker: Broker) -> dict[str, Any]:
    """The gateway alone, with a stub for its workers."""
    picture = ground.pictures[name]
    system = gateway_alone(broker, ground.file(picture.mirrored))
    return _served(ground, system, picture, query=f"?operations={operations}", connections=connections, workers=1)


def service(ground: Ground, name: str, operations: str, connections: int, broker: Broker) -> dict[str, Any]:
    """The whole service."""
    query = f"?operations={operations}"
    return _served(ground, whole(broker), ground.pictures[name], query=query, connections=connections)


def baseline(ground: Ground, name: str, connections: int, system: System) -> dict[str, Any]:
    """Another system, loaded as the service is."""
    found = _served(ground, system, ground.pictures[name], connections=connections)
    return found | {"needs_redis": system.needs_redis}
