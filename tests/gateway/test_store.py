"""Images on disk: whole or not at all, on disks that are full, read-only, or gone."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safelight.errors import ConfigurationError, StoreFullError
from safelight.gateway import store as module
from safelight.gateway.store import FolderStore
from safelight.message import new_id

if TYPE_CHECKING:
    from collections.abc import Iterator

LARGE = bytes(range(256)) * 8 * 1024  # 2 MB: written in a thread


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[None]:
    """A real file system of its own."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(params=["nameless", "renamed"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FolderStore:
    """A store on a file system that has files without names, and on one that has not."""
    store = FolderStore(str(tmp_path / "images"))
    if request.param == "renamed":
        store._nameless = False
    return store


def _save(store: FolderStore, image: bytes, extension: str = "jpg") -> str:
    name = f"{new_id()}.{extension}"
    asyncio.run(store.save(name, image))
    return name


@pytest.mark.parametrize("image", [b"", b"x", LARGE], ids=len)
def test_what_is_saved_is_there_and_nothing_else(store: FolderStore, image: bytes) -> None:
    name = _save(store, image)
    assert [path.name for path in store.folder.iterdir()] == [name]
    assert store.path(name) == store.folder / name
    assert (store.folder / name).read_bytes() == image
    assert (store.folder / name).stat().st_mode & 0o777 == 0o644 & ~_umask()


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def test_many_at_once(store: FolderStore) -> None:
    async def all_of_them() -> None:
        await asyncio.gather(*(store.save(f"{new_id()}.png", LARGE) for _ in range(20)))

    asyncio.run(all_of_them())
    assert {path.read_bytes() for path in store.folder.iterdir()} == {LARGE}
    assert len(list(store.folder.iterdir())) == 20


@pytest.mark.parametrize("image", [bytes(100_000), LARGE], ids=len)
def test_a_full_disk_leaves_nothing(store: FolderStore, image: bytes) -> None:
    with tmpfs(store.folder, "size=64k"):
        with pytest.raises(StoreFullError, match="No space left on device"):
            _save(store, image)
        assert list(store.folder.iterdir()) == []
        _save(store, b"this fits")


def test_a_disk_without_inodes_leaves_nothing(store: FolderStore) -> None:
    with tmpfs(store.folder, "size=1m,nr_inodes=2"):
        _save(store, b"one")
        with pytest.raises(StoreFullError, match="No space left on device"):
            _save(store, b"two")
        assert len(list(store.folder.iterdir())) == 1


def test_a_disk_that_turns_read_only(store: FolderStore) -> None:
    # A folder's mode would not do: root may write in spite of it.
    with tmpfs(store.folder, "size=1m"):
        name = _save(store, b"before")
        subprocess.run(["mount", "-o", "remount,ro", str(store.folder)], check=True)
        with pytest.raises(StoreFullError, match="Read-only file system"):
            _save(store, b"after")
        assert [path.name for path in store.folder.iterdir()] == [name]
        subprocess.run(["mount", "-o", "remount,rw", str(store.folder)], check=True)
        _save(store, b"after all")


LIMITED = """
import asyncio, resource, sys
from safelight.errors import StoreFullError
from safelight.gateway.store import FolderStore
from safelight.message import new_id

store = FolderStore(sys.argv[1])
store._nameless = sys.argv[2] == "True"
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
try:
    asyncio.run(store.save(f"{new_id()}.jpg", bytes(80_000)))
except StoreFullError as exc:
    print(exc.detail)
"""


def test_a_write_that_ends_early_leaves_nothing(store: FolderStore) -> None:
    command = [sys.executable, "-c", LIMITED, str(store.folder), str(store._nameless)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout == "The resulting image could not be saved: File too large.\n"
    assert list(store.folder.iterdir()) == []


KILLED = """
import asyncio, os, signal, sys
from safelight.gateway import store as module
from safelight.message import new_id

def write(descriptor, image):
    os.write(descriptor, image[:1000])
    os.kill(os.getpid(), signal.SIGKILL)

module._write = write
asyncio.run(module.FolderStore(sys.argv[1]).save(f"{new_id()}.jpg", bytes(80_000)))
"""


def test_a_gateway_that_is_killed_while_it_saves_leaves_nothing(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert ended.returncode == -9
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL])
def test_a_file_system_without_nameless_files(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_tmpfile(path: str, flags: int, *arguments: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number))
        return opened(path, flags, *arguments)

    opened = os.open
    store = FolderStore(str(tmp_path))
    monkeypatch.setattr(module.os, "open", no_tmpfile)
    names = [_save(store, LARGE), _save(store, b"x")]
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_a_folder_that_was_deleted_is_made_again(store: FolderStore) -> None:
    (store.folder / _save(store, b"one")).unlink()
    store.folder.rmdir()
    name = _save(store, b"two")
    found = store.path(name)
    assert found
    assert found.read_bytes() == b"two"


def test_a_folder_that_was_replaced_is_saved_into(store: FolderStore) -> None:
    old = _save(store, b"one")
    store.folder.rename(store.folder.with_name("old"))
    store.folder.mkdir()
    new = _save(store, b"two")
    assert store.path(old) is None
    assert store.path(new) is not None


def test_a_name_that_is_taken_is_not_overwritten_by_halves(store: FolderStore) -> None:
    name = _save(store, b"first")
    if store._nameless:
        with pytest.raises(StoreFullError):
            asyncio.run(store.save(name, b"second"))
    else:
        asyncio.run(store.save(name, b"second"))
    assert (store.folder / name).read_bytes() in (b"first", b"second")
    assert [path.name for path in store.folder.iterdir()] == [name]


def _open_below(folder: Path) -> list[str]:
    """What the open descriptors in a folder point at; those of other tests close whenever they are collected."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            links.append(str(descriptor.readlink()))
    return sorted(link for link in links if link.startswith(str(folder)))


def test_no_descriptor_is_left_open(store: FolderStore) -> None:
    with tmpfs(store.folder, "size=64k"):
        _save(store, b"warm")
        before = _open_below(store.folder)
        with (store.folder / "other").open("wb"):
            assert _open_below(store.folder) == sorted([*before, str(store.folder / "other")])
        for _ in range(20):
            _save(store, b"")
            with pytest.raises(StoreFullError):
                _save(store, bytes(100_000))
        assert _open_below(store.folder) == before


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../images/{0}",
        "./{0}",
        "{0}\0",
        "{0}\n",
        "{0}/",
        "/etc/passwd",
        "notes.txt",
        ".{0}",
        "{0}.png",
        "00000000-0000-7000-8000-000000000000.jpg",
        "00000000-0000-7000-8000-000000000001.jpg",
    ],
)
def test_only_our_own_files_are_found(name: str, tmp_path: Path) -> None:
    store = FolderStore(str(tmp_path))
    saved = _save(store, b"x")
    assert store.path(saved)
    (tmp_path / "notes.txt").write_text("private")
    (tmp_path / f".{saved}").write_text("unfinished")
    (tmp_path / "00000000-0000-7000-8000-000000000001.jpg").mkdir()
    assert store.path(name.format(saved)) is None
    assert store.path(saved.upper()) is None


def test_a_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    store = FolderStore(str(tmp_path / "a" / "b" / "c"))
    assert store.path(_save(store, b"x"))


def test_a_relative_folder_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = FolderStore("images")
    monkeypatch.chdir("/")
    name = _save(store, b"x")
    assert (tmp_path / "images" / name).exists()


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for below in ("file", "file/below"):
        with pytest.raises(ConfigurationError, match="cannot be used"):
            FolderStore(str(tmp_path / below))
