"""`make demo`: the system as one would show it to a colleague, in a folder that is gone afterwards.

Each step says what it shows in one sentence, shows it, and is checked; the first that does not hold ends the demo
with exit code 1. The requests here are sent once each: nothing is tried again behind the scenes.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from PIL import Image, ImageChops
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IMAGE = Path(__file__).parent.parent / "test_image.jpg"
ANSWER = '{"status": "SUCCESS", "size": "82kb"}'
SAFELIGHT = [sys.executable, "-m", "safelight"]
LEASE_SECONDS = 2  # of 5 by default: a killed worker's jobs start elsewhere sooner, and the demo is shorter
LOAD, AT_ONCE = 160, 16
STARTED_SECONDS = 30.0
LOOK_SECONDS = 0.02
LARGEST_DIFFERENCE = 3  # levels of 255: the inverse DCT rounds asymmetrically, though the coefficients are the same
LARGEST_DRAWING = 48  # characters across

out = Console(soft_wrap=True, highlight=False)


class DemoError(Exception):
    """A step that did not show what it says."""


def step(sentence: str) -> None:
    """Say what comes."""
    out.print(f"\n[bold red]●[/] [bold]{sentence}[/]")


def shown(command: str) -> None:
    """A command as a person would type it."""
    out.print(f"  [dim]$[/] {command}")


def ensure(condition: object, otherwise: str) -> None:
    """End the demo unless it holds."""
    if not condition:
        raise DemoError(otherwise)


def wait_until(condition: Callable[[], object], otherwise: str) -> None:
    """Look again and again; `otherwise` after `STARTED_SECONDS`."""
    until = time.monotonic() + STARTED_SECONDS
    while not condition():
        ensure(time.monotonic() < until, otherwise)
        time.sleep(LOOK_SECONDS)


@contextlib.contextmanager
def running(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A `safelight` command in the background, and its output; ended by SIGTERM."""
    log = folder / f"{words[0]}.log"
    process = None
    try:
        with uninterrupted(), log.open("wb") as output:
            # A session of its own: Ctrl-C is for the demo, which ends the parts in their order.
            process = subprocess.Popen(
                [*SAFELIGHT, *words], cwd=folder, stdout=output, stderr=output, start_new_session=True
            )
        yield process, log
    finally:
        if process is not None and process.poll() is None:
            process.terminate()
            process.wait(timeout=60)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of this block: a process that it starts is known by then, and ended."""
    told: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: told.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if told:
        raise KeyboardInterrupt


def request(port: int) -> None:
    """A request, as the README has it."""
    step("One request: the answer is JSON, the mirrored image is saved.")
    command = f'curl -sS -F "image=@./test_image.jpg" localhost:{port}/query'
    shown(command)
    answer = subprocess.run(shlex.split(command), cwd=IMAGE.parent, capture_output=True, text=True, check=False)
    out.print(f"  {answer.stdout or answer.stderr}", markup=False)
    ensure(answer.stdout == ANSWER, f"curl did not print {ANSWER}")


def mirror(port: int, store: Path) -> None:
    """The saved image against the one that was sent."""
    saved = next(store.iterdir())
    step("The saved image is the picture's mirror image, and the gateway serves it.")
    out.print(f"  {saved.relative_to(store.parent)}, {saved.stat().st_size:,} bytes")
    served = httpx.get(f"http://localhost:{port}/images/{saved.name}")
    ensure(served.content == saved.read_bytes(), "what /images/ serves is not what was saved")
    before, after = (Image.open(io.BytesIO(data)).convert("RGB") for data in (IMAGE.read_bytes(), served.content))
    flipped = after.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    difference = max(high for _, high in ImageChops.difference(before, flipped).getextrema())
    out.print(f"  flipped back it differs from the original by at most {difference} of 255 levels")
    ensure(difference <= LARGEST_DIFFERENCE, "it is not the mirror image")
    ensure(before.tobytes() != after.tobytes(), "it is the picture itself")
    if out.is_terminal:
        draw(before, after)


def draw(*pictures: Image.Image) -> None:
    """The pictures side by side in characters: each the upper and the lower of two pixels."""
    width = min((out.width - 6) // len(pictures), LARGEST_DRAWING)
    small = [picture.resize((width, width * picture.height // picture.width // 2 * 2)) for picture in pictures]
    for y in range(0, small[0].height, 2):
        rows = []
        for picture in small:
            pairs = [(picture.getpixel((x, y)), picture.getpixel((x, y + 1))) for x in range(width)]
            rows.append(
                "".join("[rgb({},{},{}) on rgb({},{},{})]▀[/]".format(*upper, *lower) for upper, lower in pairs)
            )
        out.print("  " + "  ".join(rows))


def join(port: int) -> str:
    """Wait until a second worker answers; its name."""
    names: Counter[str] = Counter()

    def both_answer() -> bool:
        answer = httpx.post(f"http://localhost:{port}/query", content=IMAGE.read_bytes())
        ensure(answer.text == ANSWER, f"a request failed while the worker joined: {answer.text}")
        names[answer.headers["safelight-worker"]] += 1
        return len(names) == 2

    both_answer()
    first = next(iter(names))
    wait_until(both_answer, "the second worker never answered")
    second = next(name for name in names if name != first)
    out.print(f"  answers come from {first} and from {second}")
    return second


async def load(port: int, second: str, kill: Callable[[], None]) -> None:
    """`LOAD` images, `AT_ONCE` at a time; `kill` when a quarter is answered."""
    image, slots = IMAGE.read_bytes(), asyncio.Semaphore(AT_ONCE)
    by: Counter[str] = Counter()
    failed: list[str] = []
    slowest = 0.0
    killed_at = 0

    async with httpx.AsyncClient(base_url=f"http://localhost:{port}", timeout=60) as client:

        async def post() -> None:
            nonlocal slowest, killed_at
            async with slots:
                begun = time.monotonic()
                answer = await client.post("/query", content=image)
                slowest = max(slowest, time.monotonic() - begun)
            if answer.text != ANSWER:
                failed.append(answer.text)
            by[answer.headers.get("safelight-worker", "no worker")] += 1
            if not killed_at and by.total() >= LOAD // 4 and by[second]:
                killed_at = by.total()
                kill()

        await asyncio.gather(*(post() for _ in range(LOAD)))
    out.print(
        f"  killed after {killed_at} answers; answers by worker: {', '.join(f'{n} by {w}' for w, n in by.items())}"
    )
    out.print(
        f"  {LOAD - len(failed)} of {LOAD} succeeded, the slowest after {slowest:.1f} s (a lease is {LEASE_SECONDS} s)"
    )
    ensure(killed_at, "the second worker had no part in the load before it was killed")
    ensure(not failed, f"requests failed: {failed[:3]}")


def show(folder: Path) -> None:
    """All steps."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ("--port", str(port), "--lease", str(LEASE_SECONDS))
    store = folder / "mirrored"
    step("One command starts broker, gateway and worker.")
    shown("safelight up --workers 1")
    with running(folder, "up", "--workers", "1", *options) as (system, log):
        wait_until(lambda: b"ready " in log.read_bytes() or system.poll() is not None, "the system did not start")
        ensure(system.poll() is None, log.read_text())
        ready = next(line for line in log.read_text().splitlines() if line.startswith("ready "))
        out.print(f"  {ready.partition(' Try it')[0]}")
        request(port)
        mirror(port, store)
        step("A second worker joins, without a word to anybody else.")
        shown("safelight worker")
        with running(folder, "worker", *options) as (worker, _):
            second = join(port)
            step(
                f"It is killed with SIGKILL in the middle of {LOAD} requests, {AT_ONCE} at a time: none of them fails."
            )
            shown(f"kill -9 {worker.pid}")
            before = len(list(store.iterdir()))
            asyncio.run(load(port, second, worker.kill))
            ensure(worker.wait() == -signal.SIGKILL, "the worker was not killed")
        saved = len(list(store.iterdir())) - before
        out.print(f"  {saved} images were saved meanwhile")
        ensure(saved == LOAD, f"{saved} images were saved, not {LOAD}")
        step("Ctrl-C, or SIGTERM: what is held is answered, then all parts end.")
        shown("kill %1")
        system.terminate()
        ensure(system.wait(timeout=60) == 0, f"it ended with exit code {system.returncode}: {log.read_text()}")
        out.print("  exit code 0")


def main() -> int:
    """Run the demo; 1 if a step did not hold, 130 after Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if shutil.which("curl") is None:
        out.print("The demo needs curl: apt-get install curl, or brew install curl.")
        return 1
    for name in [name for name in os.environ if name.startswith("SAFELIGHT_")]:
        del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="sl-demo-") as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder  # the socket too is apart from those of a system that runs here
        try:
            show(Path(folder))
        except DemoError as exc:
            out.print(f"\nThe demo failed: {exc}", style="red", markup=False)
            return 1
        except KeyboardInterrupt:
            out.print("\nStopped.")
            return 130
    out.print("\nNothing of it is left. Your turn: [bold]make up[/]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
