"""C1: resulting images on disk, each whole or not at all.

An image is written to a file without a name (`O_TMPFILE`), which then gets its name: a gateway that is killed in
between leaves nothing. Where the file system has no such files it is written under a hidden name and renamed. There
is no fsync: a saved image survives the death of our processes, not a power cut. Nothing here ever deletes an image.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
from contextlib import suppress
from pathlib import Path

from safelight.errors import ConfigurationError, StoreFullError

__all__ = ["FolderStore"]

# What can be written within a millisecond; more goes to a thread, which costs the event loop a tenth of one. 1 MB took
# 3.5 ms, and up to 9, where the page cache had to find new pages for it.
IN_PLACE_BYTES = 128 * 1024
NAME = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}\.[a-z]{2,5}")
FILE_MODE = 0o644
# open(2): a file system, or a kernel, without O_TMPFILE
NO_TMPFILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}


class FolderStore:
    """Images in one folder, named by their job's id."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder).absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigurationError(f"The store {self.folder} cannot be used: {exc.strerror}.") from exc
        self._path = str(self.folder)
        self._nameless = hasattr(os, "O_TMPFILE")

    async def save(self, name: str, image: bytes) -> None:
        """Save under `name`; `StoreFullError` if it cannot be, and then nothing is left of it."""
        try:
            if len(image) <= IN_PLACE_BYTES:
                self._save_in_folder(name, image)
            else:
                await asyncio.to_thread(self._save_in_folder, name, image)
        except OSError as exc:
            raise StoreFullError(f"The resulting image could not be saved: {exc.strerror}.") from exc

    def _save_in_folder(self, name: str, image: bytes) -> None:
        try:
            self._save(name, image)
        except FileNotFoundError:  # someone deleted the folder
            self.folder.mkdir(parents=True, exist_ok=True)
            self._save(name, image)

    def _save(self, name: str, image: bytes) -> None:
        if self._nameless:
            try:
                descriptor = os.open(self._path, os.O_TMPFILE | os.O_WRONLY, FILE_MODE)
            except OSError as exc:
                if exc.errno not in NO_TMPFILE:
                    raise
                self._nameless = False
        if not self._nameless:
            return self._save_renamed(name, image)
        try:
            _write(descriptor, image)
            # linkat(2): the documented way to name such a file without privileges. Python calls link(2), which does not
            # follow the link in /proc, unless it is given some descriptor; absolute paths are not looked up from it.
            os.link(f"/proc/self/fd/{descriptor}", f"{self._path}/{name}", dst_dir_fd=descriptor, follow_symlinks=True)
        finally:
            os.close(descriptor)
        return None

    def _save_renamed(self, name: str, image: bytes) -> None:
        hidden = self.folder / f".{name}"
        descriptor = os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_WRONLY, FILE_MODE)
        try:
            _write(descriptor, image)
            hidden.rename(self.folder / name)
        except OSError:
            with suppress(OSError):
                hidden.unlink()
            raise
        finally:
            os.close(descriptor)

    def path(self, name: str) -> Path | None:
        """The file of a saved image; None for any name that is not one of ours, or not there."""
        if not NAME.fullmatch(name):
            return None
        path = self.folder / name
        return path if path.is_file() else None


def _write(descriptor: int, image: bytes) -> None:
    view, offset = memoryview(image), 0
    while offset < len(view):
        offset += os.write(descriptor, view[offset:])
