"""A folder of files that engines share: whole or absent, the oldest first to go."""

import contextlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from scx.files import READ_FLAGS, sync_folder

# Nothing else in the folder is counted or removed.
_SHARD = re.compile("[0-9a-f]{2}")
_FILE = re.compile(r"[0-9a-f]{64}(\.[a-z0-9_]{8}\.draft)?")
_SCANS = 16
"""Scans of the folder for each `max_bytes` that are written."""


class Store:
    """Files by name, of at most `max_bytes` in all, the least recently used evicted.

    Each engine that shares the folder may exceed that by a 16th, since it counts what
    others wrote only then. None is half of the file system. The folder is made once: one
    that vanishes, as an unmounted disk does, is not made again. Every method may raise
    OSError, and any thread may call it.
    """

    def __init__(self, folder: Path, max_bytes: int | None, fsync: bool) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._max_bytes = max_bytes or shutil.disk_usage(folder).total // 2
        self._fsync = fsync
        self._lock = threading.Lock()
        self._unscanned = self._max_bytes

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def open(self, name: str) -> BinaryIO:
        """A file to read, which counts as used now."""
        descriptor = os.open(self._path(name), READ_FLAGS)
        with contextlib.suppress(OSError):
            os.utime(descriptor)
        return open(descriptor, "rb")

    def write(self, name: str, parts: Iterable[bytes], size: int) -> None:
        """Write a file of `size` bytes whole; on failure there is none, or the one that
        was."""
        path = self._path(name)
        self._make_room(size)
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(mode=0o700)
        descriptor, draft = tempfile.mkstemp(".draft", f"{name}.", path.parent)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                for part in parts:
                    view = memoryview(part)
                    while view:
                        view = view[file.write(view) :]
                if self._fsync:
                    os.fsync(descriptor)
            os.replace(draft, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise
        if self._fsync:
            sync_folder(path.parent)

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def touch(self, name: str) -> None:
        """Count a file as used now."""
        os.utime(self._path(name))

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / name

    def _make_room(self, size: int) -> None:
        share = self._max_bytes // _SCANS
        with self._lock:
            if self._unscanned + size > share:
                self._evict(self._max_bytes - max(share, size))
                self._unscanned = 0
            self._unscanned += size

    def _evict(self, limit: int) -> None:
        """Remove the least recently used files until at most `limit` bytes are left.

        Drafts that a killed engine left age like any file.
        """
        files = sorted(self._scan())
        excess = sum(size for _, size, _ in files) - limit
        for _, size, path in files:
            if excess <= 0:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            excess -= size

    def _scan(self) -> Iterable[tuple[int, int, str]]:
        """The last use in ns, the size in bytes and the path of each file."""
        for shard in os.scandir(self._folder):
            if not (_SHARD.fullmatch(shard.name) and shard.is_dir(follow_symlinks=False)):
                continue
            for file in os.scandir(shard.path):
                # Others evict too.
                with contextlib.suppress(FileNotFoundError):
                    if _FILE.fullmatch(file.name):
                        status = file.stat(follow_symlinks=False)
                        yield status.st_mtime_ns, status.st_size, file.path
