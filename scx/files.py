"""Files in folders that others may write to as well."""

import errno
import os
import stat
from pathlib import Path

READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
"""To open what anyone may have put there: a link as the last component is not followed,
and no fifo is waited for."""


def read_regular(path: Path, limit: int) -> tuple[os.stat_result, bytes]:
    """Status and up to `limit` bytes of a regular file, both of one open descriptor.

    So what the caller checks is what it read, whatever happens to the path meanwhile.
    Opened as by READ_FLAGS. Raises OSError: ELOOP for a link, EINVAL for anything else
    but a regular file.
    """
    descriptor = os.open(path, READ_FLAGS)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            return status, file.read(limit)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a loss of power. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
