"""Folders that are written to safely: room on the disk, one writer at a time, bytes that come from the disk."""

import errno
import fcntl
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

LOCK = ".lock"
LOCK_WAIT_S = 60.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems say that have no locks; they are written to without."""


def check_room(folder: Path, needed: int) -> None:
    """Check that a folder's disk has room for `needed` bytes.

    Raises
    ------
    OSError
        With the bytes that are needed and free.
    """
    if shutil.disk_usage(folder).free < needed:
        raise _full_disk(folder, needed)


@contextmanager
def full_disk_is_named(folder: Path, needed: int) -> Iterator[None]:
    """Turn what a full disk or quota raises in the middle of writing into an OSError that says what is needed and free."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _full_disk(folder, needed) from error
        raise
    except SafetensorError as error:  # it keeps the system's error as text alone
        if any(f"os error {number})" in str(error) for number in _FULL):
            raise _full_disk(folder, needed) from error
        raise OSError(f"{folder}: a checkpoint could not be written: {error}") from error


@contextmanager
def only_writer(folder: Path, *, waits: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder: True while no other living process writes there, so that leftovers are nobody's.

    The system frees the lock when a process dies, however it dies. False where the file system has no locks, or with
    `waits=False` where somebody else holds it.

    Raises
    ------
    OSError
        If another process still holds it after a minute.
    """
    with (folder / LOCK).open("a") as handle:
        until = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_alone = True
                break
            except BlockingIOError:
                is_alone = False
                if not waits:
                    break
                if time.monotonic() > until:
                    raise OSError(
                        f"{folder}: another process has been writing a checkpoint there for {LOCK_WAIT_S:g} s; two runs must "
                        f"not share a folder, give another out"
                    ) from None
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                is_alone = False
                break
        yield is_alone


def drop_cache(paths: Iterable[Path]) -> None:
    """Ask the system to forget the cached bytes of files, so that reading them reads the disk (Linux; elsewhere nothing)."""
    if sys.platform != "linux":
        return
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def file_size(path: Path) -> int | None:
    """Bytes of a regular file, also through a link; None for what is none or is not there (a pipe would block its reader)."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_size if stat.S_ISREG(facts.st_mode) else None


def _full_disk(folder: Path, needed: int) -> OSError:
    free = shutil.disk_usage(folder).free
    return OSError(
        errno.ENOSPC,
        f"the disk of {folder} is full: a checkpoint needs {needed:,} bytes, {free:,} are free; nothing was written and "
        f"older checkpoints are as they were. Free some space and resume",
    )
