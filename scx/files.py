"""Files that others may have put in place: opened once, and read up to a bound."""

import errno
import os
import stat
from pathlib import Path

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


def read_regular(path: Path, limit: int) -> tuple[os.stat_result, bytes]:
    """Status and up to `limit` bytes of a regular file, both of one open descriptor.

    So what the caller checks is what it read, whatever happens to the path meanwhile.
    A link as the last component is not followed, and no fifo is waited for. Raises
    OSError: ELOOP for a link, EINVAL for what else is no regular file.
    """
    descriptor = os.open(path, _FLAGS)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            return status, file.read(limit)
    finally:
        os.close(descriptor)
