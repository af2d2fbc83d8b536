"""What `safelight query` is: many files through one client, their results saved and shown."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from safelight.client import Answer, Client
from safelight.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from safelight import settings

__all__ = ["Source", "find", "query", "save"]

STDIN = "-"
SAME_EXTENSIONS = {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg"}


@dataclass(frozen=True)
class Source:
    """An image to post: its name as it was given or found, and the name that its result is saved under."""

    name: str
    target: PurePosixPath

    async def read(self) -> bytes:
        """Its bytes; `OSError` if they cannot be read."""
        return await asyncio.to_thread(sys.stdin.buffer.read if self.name == STDIN else Path(self.name).read_bytes)


def find(paths: Sequence[str]) -> list[Source]:
    """Files as given, folders with all below them but what is hidden, `-` for standard input."""
    found: list[Source] = []
    for given in paths:
        path = Path(given)
        if given == STDIN:
            found.append(Source(STDIN, PurePosixPath("stdin")))
        elif path.is_dir():
            below = sorted(entry.relative_to(path) for entry in path.rglob("*") if entry.is_file())
            shown = [entry for entry in below if not any(part.startswith(".") for part in entry.parts)]
            found.extend(Source(str(path / entry), PurePosixPath(entry.as_posix())) for entry in shown)
        elif path.exists():
            found.append(Source(given, PurePosixPath(path.name)))
        else:
            kind = "option" if given.startswith("-") else "file or folder"
            raise ConfigurationError(f"There is no {kind} {given}.")
    if not found:
        raise ConfigurationError("There is no file to post in what was given.")
    if [source.name for source in found].count(STDIN) > 1:
        raise ConfigurationError("Standard input (-) can be given only once.")
    return found


async def query(options: settings.Query, paths: Sequence[str], out: Console, err: Console) -> int:
    """Post everything and show the answers on `out`, with a bar on `err` if that is a terminal; 1 if any failed."""
    sources = find(paths)
    answers: dict[int, Answer] = {}
    waiting = iter(enumerate(sources))
    bar = err.is_terminal and not (options.json and out.is_terminal)  # lines of JSON show the progress themselves
    columns = (BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    url = options.url or f"http://localhost:{options.port}"
    async with Client(url, operations=options.operations, timeout=options.timeout, at_once=options.at_once) as client:
        # `redirect_stdout` would send what is printed on `out` to the bar's own console.
        with Progress(*columns, console=err, disable=not bar, transient=True, redirect_stdout=False) as progress:
            task = progress.add_task("", total=len(sources))

            async def work() -> None:
                for number, source in waiting:
                    answers[number] = await _one(client, source, options.out)
                    progress.advance(task)
                    if options.json:
                        _print_line(answers[number], out)

            async with asyncio.TaskGroup() as group:
                for number in range(min(options.at_once, len(sources))):
                    group.create_task(work(), name=f"posting {number}")
    if not options.json:
        _print_table([answers[number] for number in range(len(sources))], out)
    return int(any(answer.error for answer in answers.values()))


async def _one(client: Client, source: Source, folder: str | None) -> Answer:
    try:
        image = await source.read()
    except OSError as exc:
        return Answer(source.name).failed("unreadable", f"The file cannot be read: {exc.strerror}.")
    answer = await client.query(source.name, image)
    if folder is None or answer.link is None:
        return answer
    fetched = await client.fetch(answer)
    if isinstance(fetched, Answer):
        return fetched
    try:
        path = await asyncio.to_thread(save, fetched, Path(folder), source.target, answer.link.rpartition(".")[2])
    except OSError as exc:
        return answer.failed("not_saved", f"The resulting image cannot be saved: {exc.strerror}.")
    return replace(answer, saved=str(path))


def save(image: bytes, folder: Path, name: PurePosixPath, extension: str) -> Path:
    """Save as `name`, with the `extension` of what it is; never over another file: `a.jpg`, then `a-2.jpg`."""
    suffix = name.suffix.lower().removeprefix(".")
    suffix = name.suffix if SAME_EXTENSIONS.get(suffix, suffix) == extension else f".{extension}"
    base = folder / name.with_suffix("")
    base.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = base.with_name(f"{base.name}{suffix}" if number == 1 else f"{base.name}-{number}{suffix}")
        with suppress(FileExistsError), path.open("xb") as file:
            try:
                file.write(image)
            except OSError:
                path.unlink()
                raise
            return path
    raise AssertionError  # the loop has no end of its own


def _print_line(answer: Answer, out: Console) -> None:
    out.out(json.dumps(asdict(answer)), highlight=False)


def _print_table(answers: Sequence[Answer], out: Console) -> None:
    table = Table("image", "answer", "notes", *(["saved"] if any(answer.saved for answer in answers) else []))
    for answer in answers:
        told = f"{answer.error}: {answer.detail}" if answer.error else _pairs(answer.facts)
        row = [answer.name, told, _pairs(answer.notes), answer.saved or ""]
        style = "red" if answer.error else ""
        table.add_row(*(Text(cell, overflow="fold") for cell in row[: len(table.columns)]), style=style)
    out.print(table, soft_wrap=False)
    counted = Counter("failed" if answer.error else "succeeded" for answer in answers)
    out.print(f"{len(answers)} image(s): {counted['succeeded']} succeeded, {counted['failed']} failed")


def _pairs(members: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in members.items())
