"""C3: the registry of operations, and how a job's steps are run. An operation is a pure function of bytes.

It takes the image's bytes (and a job's parameters as keywords) and returns the image for the next one (`bytes`),
facts for the answer (a mapping) or a `Result` with both. Whoever writes one needs no import of this package.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from safelight.errors import ConfigurationError, UnknownOperationError

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["ENTRY_POINTS", "Operation", "Result", "load", "run"]

ENTRY_POINTS = "safelight.operations"

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")  # what is safe in a URL's query and a header


@dataclass(frozen=True)
class Result:
    """What came of an image: the resulting one if any, facts for the answer, notes that become response headers."""

    image: bytes | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


Operation: TypeAlias = Callable[..., bytes | Mapping[str, Any] | Result]


def load(modules: Sequence[str] = ()) -> dict[str, Operation]:
    """Every operation by name: the installed ones (entry points) and those of `modules` (`--import MODULE`).

    A module's operations are what its `__all__` lists, else the public functions that it defines itself. Raises
    `ConfigurationError` for a module or an operation that cannot be used.
    """
    found: dict[str, Operation] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            operation = point.load()
        except Exception as error:
            raise ConfigurationError(
                f"The installed operation {point.name!r} ({point.value}) cannot be imported: {_told(error)}."
            ) from error
        _add(found, point.name, operation, point.value)
    for name in modules:
        for key, operation in _operations_of(_import(name)).items():
            _add(found, key, operation, name)
    return found


def run(operations: Mapping[str, Operation], steps: Sequence[tuple[str, Mapping[str, Any]]], image: bytes) -> Result:
    """Run `steps` (name, parameters) in order, each on the image as the one before left it.

    `Result.image` is None if no step returned an image. Raises `UnknownOperationError`, `TypeError` for a step that
    returns something else, and whatever an operation raises.
    """
    current, changed = image, False
    facts: dict[str, Any] = {}
    notes: dict[str, str] = {}
    for name, parameters in steps:
        if name not in operations:
            raise UnknownOperationError(f"This worker has no operation named {name!r}.")
        result = _normalised(name, operations[name](current, **parameters))
        if result.image is not None:
            current, changed = result.image, True
        facts |= result.facts
        notes |= result.notes
    return Result(current if changed else None, facts, notes)


def _normalised(name: str, returned: object) -> Result:
    if isinstance(returned, Result):
        return returned
    if isinstance(returned, bytes | bytearray | memoryview):
        return Result(image=bytes(returned))
    if isinstance(returned, Mapping):
        return Result(facts=returned)
    raise TypeError(
        f"The operation {name!r} returned {type(returned).__name__}; "
        "an operation returns bytes (an image), a mapping (facts) or a Result."
    )


def _import(name: str) -> ModuleType:
    # A console script has its own folder at the front of sys.path, not the current one; uvicorn does the same.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ConfigurationError(
                f"There is no module {name!r} to import; it is looked for in the current folder and among the "
                "installed packages."
            ) from error
        raise ConfigurationError(f"The module {name!r} cannot be imported: {_told(error)}.") from error


def _operations_of(module: ModuleType) -> dict[str, Operation]:
    listed = getattr(module, "__all__", None)
    if listed is not None:
        if missing := [key for key in listed if not hasattr(module, key)]:
            raise ConfigurationError(f"The module {module.__name__!r} has no {missing[0]!r}, which its __all__ lists.")
        found = {key: getattr(module, key) for key in listed}
    else:
        found = {
            key: value
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
        }
    if not found:
        raise ConfigurationError(f"The module {module.__name__!r} defines no public function to use as an operation.")
    return found


def _add(found: dict[str, Operation], name: str, operation: Operation, origin: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"The operation {name!r} of {origin!r} cannot have that name: use up to 64 lower-case letters, digits, "
            "_ and -, a letter first."
        )
    if not callable(operation) or inspect.iscoroutinefunction(operation):
        raise ConfigurationError(f"{name!r} of {origin!r} is no operation: it must be an ordinary function.")
    if found.setdefault(name, operation) is not operation:
        raise ConfigurationError(f"The operation {name!r} of {origin!r} has the name of another one; rename it.")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(".: ")
