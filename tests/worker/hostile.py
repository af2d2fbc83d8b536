"""Operations that do what a decoder that was taken over, or is merely broken, would do; imported by name in tests."""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path

COUNTED = "SAFELIGHT-TEST-COUNT:"  # an image that begins so names a file in which each start writes a line

LEAKED: list[bytes] = []


def _is_warm_up(image: bytes) -> bool:
    """Whether it is one of the tiny pictures that a child runs each operation on before it is ready."""
    return image.startswith((b"\x89PNG", b"\xff\xd8"))


def count(image: bytes) -> Mapping[str, int]:
    if image.startswith(COUNTED.encode()):
        with Path(image.decode().removeprefix(COUNTED).strip()).open("a") as file:
            file.write(f"{os.getpid()}\n")
    return {"length": len(image)}


def echo(image: bytes) -> bytes:
    return image


def segfault(image: bytes) -> bytes:
    if _is_warm_up(image):
        return image
    count(image)
    os.kill(os.getpid(), signal.SIGSEGV)
    return image


def leave(image: bytes) -> bytes:
    if not _is_warm_up(image):
        os._exit(7)
    return image


def hang(image: bytes) -> bytes:
    if not _is_warm_up(image):
        count(image)
        while True:
            time.sleep(60)
    return image


def fail(image: bytes) -> bytes:
    count(image)
    raise ValueError("it does not like this one")


def slow(image: bytes) -> bytes:
    if not _is_warm_up(image):
        count(image)
        time.sleep(0.5)
    return image


def until(image: bytes) -> Mapping[str, int]:
    """At work until the file exists that the image names."""
    while not (_is_warm_up(image) or Path(image.decode()).exists()):
        time.sleep(0.01)
    return {"pid": os.getpid()}


def leak(image: bytes) -> Mapping[str, int]:
    """Keep so many bytes as the image says, for ever."""
    if not _is_warm_up(image):
        LEAKED.append(b"x" * int(image))
    return {"pid": os.getpid()}


def gated(image: bytes) -> bytes:
    """Wait until there is a file beside the one that counts, named as it with `.go` behind."""
    if not _is_warm_up(image):
        count(image)
        go = Path(image.decode().removeprefix(COUNTED) + ".go")
        while not go.exists():
            time.sleep(0.01)
    return image


def wait_for_a_file(image: bytes) -> bytes:
    """Until there is the file that the image names behind its first bytes, which are a format's."""
    if not _is_warm_up(image) or b"WAIT-FOR:" in image:
        path = Path(image.partition(b"WAIT-FOR:")[2].decode())
        while not path.exists():
            time.sleep(0.01)
    return image


def surroundings(image: bytes) -> Mapping[str, object]:
    descriptors = {}
    for path in Path("/proc/self/fd").iterdir():
        try:
            descriptors[path.name] = str(path.readlink())
        except FileNotFoundError:
            continue
    return {
        "environment": dict(os.environ),
        "descriptors": descriptors,
        "oom_score_adj": Path("/proc/self/oom_score_adj").read_text().strip(),
        "command": Path("/proc/self/cmdline").read_bytes().decode().replace("\0", " "),
    }


def eat_memory(image: bytes) -> bytes:
    return bytes(8 * 1024**3)[: len(image)]


def talk_too_much(image: bytes) -> Mapping[str, str]:
    return {"size": "x" * 200_000}


def not_json(image: bytes) -> Mapping[str, object]:
    return {"size": object()}


def nothing(image: bytes) -> object:
    return None


def _send(data: bytes) -> None:
    os.write(int(sys.argv[2]), data)


def garbage(image: bytes) -> bytes:
    if not _is_warm_up(image):
        _send(struct.pack(">I", 12) + b"\x80\x04pickled..!")
    return image


def long_header(image: bytes) -> bytes:
    if not _is_warm_up(image):
        _send(struct.pack(">I", 2**31))
    return image


def empty_header(image: bytes) -> bytes:
    if not _is_warm_up(image):
        _send(struct.pack(">I", 0))
    return image


def flood(image: bytes) -> bytes:
    if not _is_warm_up(image):
        while True:
            _send(bytes.fromhex("0000ffff") + b" " * 100_000)
    return image


def false_size(image: bytes) -> bytes:
    if not _is_warm_up(image):
        header = b'{"size":100000000}'
        _send(struct.pack(">I", len(header)) + header)
    return image


def short_memory(image: bytes) -> bytes:
    if not _is_warm_up(image):
        os.ftruncate(int(sys.argv[3]), 0)
        header = b'{"size":1000}'
        _send(struct.pack(">I", len(header)) + header)
    return image


def close_and_go_on(image: bytes) -> bytes:
    if not _is_warm_up(image):
        os.close(int(sys.argv[2]))
        while True:
            time.sleep(60)
    return image
