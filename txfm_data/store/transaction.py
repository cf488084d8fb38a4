"""All or nothing for a whole folder: changes are made in a copy that shares unchanged files, and the two change places.

The copy is made of hard links, so it costs no space and little time; files are never changed in place, so the store stays as
it was until the one system call that swaps the folders. A process killed at any moment leaves a copy that nobody reads.
"""

import ctypes
import errno
import fcntl
import logging
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from txfm_data.store import files

_log = logging.getLogger(__name__)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_SETTLE_TRIES, _SETTLE_WAIT_S = 20, 0.05


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def _inode(path: Path) -> int | None:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time. The lock lies beside the store, which changes place; the system frees it when a process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = _beside(path, "lock")
    while True:
        handle = open(name, "w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.close()
            raise ValueError(f"{path}: another process is writing to this store; wait until it has ended") from error
        if _inode(name) == os.fstat(handle.fileno()).st_ino:
            break
        handle.close()  # its last holder removed it between our opening it and our lock
    try:
        yield
    finally:
        name.unlink(missing_ok=True)
        handle.close()


def _exchange(first: Path, second: Path) -> None:
    """Let two folders change places in one step, where the system can; else in two, the second of which `recover` repeats."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2"):
            done = libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
            if done == 0:
                return
            if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))
    old = _beside(second, "old")
    os.rename(second, old)
    os.rename(first, second)
    os.rename(old, first)


def recover(path: Path) -> None:
    """Put back a store that a two-step exchange had moved aside when its process died, or remove it if the new one was in place.

    Only for who holds the lock: a store moved aside is also what an exchange at work looks like.
    """
    old = _beside(path, "old")
    if not old.exists():
        return
    if path.exists():
        shutil.rmtree(old)
    else:
        os.rename(old, path)


def settle(path: Path) -> None:
    """For who may find no store at `path`: put back one that stands aside. A writer at work is waited for.

    Raises
    ------
    ValueError
        If the store still stands aside after a second.
    PermissionError
        If this user may not put it back.
    """
    for attempt in range(_SETTLE_TRIES):
        if path.exists() or not _beside(path, "old").exists():
            return
        try:
            with _locked(path):
                recover(path)
        except PermissionError as error:
            raise PermissionError(
                f"{path}: an append was stopped while it took the store's place, and its folder cannot be written to "
                f"({error.strerror}); let a user who may write there open the store once"
            ) from error
        except ValueError:
            if attempt == _SETTLE_TRIES - 1:
                raise
            time.sleep(_SETTLE_WAIT_S)


def _copies(path: Path) -> list[Path]:
    prefix = _beside(path, "new-").name
    if not path.parent.exists():
        return []
    return [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
            raise
        shutil.copy2(source, target)  # file systems without links: slower, and as safe
    return target


def _sync(root: Path) -> None:
    """Make what was written durable before it takes the store's place."""
    for folder, _, names in os.walk(root):
        for name in names:
            file = os.path.join(folder, name)
            if os.stat(file).st_nlink == 1:  # linked files were made durable by the append that wrote them
                _fsync(file)
        _fsync(folder)


def _fsync(name: str) -> None:
    handle = os.open(name, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def staged(path: Path, create: Callable[[str], None]) -> Iterator[Path]:
    """A copy of the store at `path` to change at will; it takes the store's place when the block ends without an exception.

    create : makes an empty store in a folder; called if there is none at `path`.

    Raises
    ------
    ValueError
        If another process is writing to the store, or the store is damaged.
    """
    with _locked(path):
        recover(path)
        for left in _copies(path):
            _log.warning("%s: removing what an unfinished append left", path)
            shutil.rmtree(left, ignore_errors=True)
        # A name of its own: a worker that outlived its killed append for a moment cannot write into this copy.
        copy = _beside(path, f"new-{secrets.token_hex(4)}")
        is_new = not path.exists()
        try:
            if is_new:
                create(str(copy))
            else:
                files.check_list(path)
                shutil.copytree(path, copy, copy_function=_link)
            yield copy
            files.write_list(copy, before=None if is_new else path)
            _sync(copy)
            if is_new:
                os.rename(copy, path)
            else:
                _exchange(copy, path)
            _fsync(str(path.parent))
        except Exception as error:
            _name_store(error, copy, path)
            raise
        finally:
            shutil.rmtree(copy, ignore_errors=True)


def _name_store(error: Exception, copy: Path, path: Path) -> None:
    """Let an error say the store where it says the copy, which nobody else has seen and which is about to go."""
    error.args = tuple(
        arg.replace(str(copy), str(path)).replace(copy.name, path.name) if isinstance(arg, str) else arg
        for arg in error.args
    )
    for name in ("filename", "filename2"):
        if isinstance(error, OSError) and isinstance(getattr(error, name), str):
            setattr(error, name, getattr(error, name).replace(str(copy), str(path)))


def unfinished(path: Path) -> bool:
    """Whether a killed append left a copy that the next one will remove."""
    return bool(_copies(path))
