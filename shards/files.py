"""Where the bytes of a shard corpus come from: a folder, or an object store with blocks kept on this machine.

A read gives as many bytes as were asked for, or an error that names the file. Whether they are the right ones is for
their reader to tell by their checksum; if they came from the cache, `Files.forget` has them fetched again.
"""

import fcntl
import hashlib
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from txfm_data.address import file_size, is_remote, join, list_files, local_path, read_range, redact
from txfm_data.retry import with_retries

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_NO_LISTING = ("http://", "https://")
_REQUESTS_AT_ONCE = 16
_KEPT, _TEMPORARY, _LOCK = ".txfm-block", ".txfm-block-tmp", ".txfm-cache-lock"
_SHARES, _PROCESSES = 64, 16
"""A process looks after the bound when it has added one of so many shares of it; there is room for so many processes."""
_STALE_S = 3_600.0
_CLIENTS = ("aiohttp", "aiobotocore", "azure", "botocore", "gcsfs", "google")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where blocks of a remote corpus are kept on this machine.

    folder : may be shared by processes and corpora; only files that this module wrote there are ever removed.
    max_bytes : when there would be more, those used longest ago go.
    """

    folder: str
    max_bytes: int = 64 * 1024**3

    def __post_init__(self) -> None:
        if not str(self.folder):
            raise ValueError("cache.folder is empty; name a folder of this machine")
        if is_remote(self.folder):
            raise ValueError(f"cache.folder is {redact(str(self.folder))}; it must be of this machine")
        if self.max_bytes < 1024**2:
            raise ValueError(f"cache.max_bytes must be at least 1 MiB, got {self.max_bytes}")


class Files(Protocol):
    """The files of one folder, wherever it is."""

    @property
    def address(self) -> str:
        """The folder."""

    @property
    def path(self) -> Path:
        """The folder, if it is of this machine; else a ValueError."""

    @property
    def origin(self) -> "Files":
        """The same files past any cache."""

    def where(self, name: str) -> str:
        """A file's address for messages, without secrets."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `offset`."""

    def fetch(self, name: str, max_bytes: int) -> bytes:
        """A whole small file; more than `max_bytes` is an error."""

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of all regular files there; where a place cannot be listed, of those of these names."""

    def forget(self, name: str, offset: int, length: int) -> bool:
        """Drop what a cache holds of a read; whether it held something."""


def open_files(address: str | Path, cache: CacheConfig | None = None) -> Files:
    """Files of a folder; `cache` is for remote ones, local ones have the system's own.

    Raises
    ------
    ValueError
        If the address is a command, or of an unknown scheme.
    OSError
        If the folder of the cache cannot be made.
    """
    text = str(address)
    if text.lower().lstrip().startswith("pipe:") or "::" in text:
        raise ValueError(
            f"{redact(text.splitlines()[0][:80])}: commands and chained addresses are not run for a corpus; give a folder, or an "
            "address such as s3://bucket/corpus"
        )
    files = DirectFiles(address)
    return CachedFiles(files, cache) if cache is not None and is_remote(address) else files


class DirectFiles:
    """Reads where the files are; faults of a network are tried again.

    tries, first_wait_s : attempts in all; seconds before the second, doubling each time.
    """

    def __init__(self, address: str | Path, *, tries: int = 5, first_wait_s: float = 1.0) -> None:
        self._is_remote = is_remote(address)
        self.address = join(address) if self._is_remote else str(local_path(address))
        self._tries, self._first_wait_s = tries, first_wait_s

    @property
    def path(self) -> Path:
        """The folder, if it is of this machine."""
        return local_path(self.address)

    @property
    def origin(self) -> Files:
        """These files: there is no cache."""
        return self

    def where(self, name: str) -> str:
        """A file's address for messages, without secrets."""
        return redact(join(self.address, name))

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `offset`.

        Raises
        ------
        ValueError
            If the file ends before, or the server does not serve ranges.
        FileNotFoundError, PermissionError, OSError
            If it cannot be reached, after `tries` attempts.
        """
        where = self.where(name)

        def attempt() -> bytes:
            data = _clear(lambda: read_range(join(self.address, name), offset, offset + length))
            if len(data) > length:
                raise ValueError(
                    f"{len(data)} bytes came where {length} from byte {offset} were asked for: the server serves no ranges"
                )
            if len(data) < length:
                text = f"the file ends too early: {len(data)} of {length} bytes from byte {offset}"
                # Over a network, a connection that broke looks like the end of the file
                raise ConnectionError(text) if self._is_remote else ValueError(text)
            return data

        return self._retried(attempt, f"{where}: bytes {offset} to {offset + length}")

    def fetch(self, name: str, max_bytes: int) -> bytes:
        """A whole small file.

        Raises
        ------
        ValueError
            If it is larger than `max_bytes`.
        FileNotFoundError, PermissionError, OSError
            If it cannot be reached, after `tries` attempts.
        """
        where = self.where(name)
        data = self._retried(lambda: _clear(lambda: read_range(join(self.address, name), 0, max_bytes + 1)), where)
        if len(data) > max_bytes:
            raise ValueError(
                f"{where}: more than {max_bytes} bytes, which is no such file of txfm; build the shards again"
            )
        return data

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of all regular files there; over HTTP, which lists nothing, of those of these names that are there.

        Raises
        ------
        FileNotFoundError, NotADirectoryError, PermissionError, OSError
            If there is no such folder, or it cannot be reached.
        """
        if not self._is_remote:
            with os.scandir(self.address) as entries:
                stats = {entry.name: _stat(entry) for entry in entries}
            return {
                name: found.st_size
                for name, found in stats.items()
                if found is not None and stat.S_ISREG(found.st_mode)
            }
        if not self.address.lower().startswith(_NO_LISTING):
            return self._retried(lambda: _clear(lambda: list_files(self.address)), redact(self.address))
        names = list(names)
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            found_sizes = list(pool.map(self._size, names))
        return {name: size for name, size in zip(names, found_sizes, strict=True) if size is not None}

    def forget(self, name: str, offset: int, length: int) -> bool:
        """Nothing is kept."""
        return False

    def _size(self, name: str) -> int | None:
        """Bytes of one file, None if it is not there."""
        try:
            return self._retried(lambda: _clear(lambda: file_size(join(self.address, name))), self.where(name))
        except FileNotFoundError:
            return None

    def _retried(self, work: Callable[[], _T], what: str) -> _T:
        remedy = "copy the corpus again or build it anew"
        if self._is_remote:
            remedy = f"check the connection and the address, or {remedy}"
        return with_retries(work, what=what, remedy=remedy, tries=self._tries, first_wait_s=self._first_wait_s)


def _stat(entry: "os.DirEntry[str]") -> os.stat_result | None:
    try:
        return entry.stat()
    except FileNotFoundError:  # a link to nowhere, or gone since
        return None


def _clear(work: Callable[[], _T]) -> _T:
    """Do a request; faults of network clients that are no OSErrors of Python become such."""
    try:
        return work()
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] not in _CLIENTS:
            raise
        status = getattr(error, "status", None)
        text = redact(f"{type(error).__name__}: {error}")
        if status in (401, 403):
            clear: Exception = PermissionError(text)
        elif status in (404, 410):
            clear = FileNotFoundError(text)
        elif isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
            clear = ValueError(text)
        else:
            clear = ConnectionError(text)
        # Not `from error`: a traceback would show what was just taken out
        raise clear from None


class CachedFiles:
    """Files of another place, with what was read kept in a folder of this machine.

    A kept read is a file of its own, put there whole by a rename; so processes may share the folder. Each process
    looks after the bound whenever it has added a share of it, and then makes room for what the others add meanwhile.
    """

    def __init__(self, inner: Files, config: CacheConfig) -> None:
        self.origin = inner
        self._folder, self._max_bytes = local_path(config.folder), config.max_bytes
        self._folder.mkdir(parents=True, exist_ok=True)
        self._added = self._share  # what is there from before is not known yet

    @property
    def address(self) -> str:
        """The folder of the files, not of the cache."""
        return self.origin.address

    @property
    def path(self) -> Path:
        """The folder, if it is of this machine."""
        return self.origin.path

    def where(self, name: str) -> str:
        """A file's address for messages, without secrets."""
        return self.origin.where(name)

    def fetch(self, name: str, max_bytes: int) -> bytes:
        """A whole small file, never from the cache."""
        return self.origin.fetch(name, max_bytes)

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of the files, never from the cache."""
        return self.origin.sizes(names)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `offset`, from the cache if it holds them; errors as of the files themselves."""
        kept = self._kept(name, offset, length)
        try:
            data = kept.read_bytes()
            if len(data) == length:
                os.utime(kept)  # used now: the time of the last change tells which go first
                return data
        except OSError:  # not there yet, or the folder is out of order, which is told when something is to be kept
            pass
        data = self.origin.read(name, offset, length)
        if length <= self._max_bytes // 4:
            self._keep(kept, data)
        return data

    def forget(self, name: str, offset: int, length: int) -> bool:
        """Drop what is kept of a read; whether there was something."""
        try:
            self._kept(name, offset, length).unlink()
        except OSError:
            return False
        return True

    @property
    def _share(self) -> int:
        return self._max_bytes // _SHARES

    def _kept(self, name: str, offset: int, length: int) -> Path:
        key = hashlib.sha256(f"{self.address}\n{name}\n{offset}\n{length}".encode()).hexdigest()
        return self._folder / f"{key[:32]}{_KEPT}"

    def _keep(self, kept: Path, data: bytes) -> None:
        try:
            self._added += len(data)
            if self._added <= self._share:
                self._put(kept, data)
                return
            with open(self._folder / _LOCK, "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # let go when it is closed
                self._make_room(len(data))
                self._put(kept, data)
            self._added = 0
        except OSError as error:  # reading goes on without the cache: it is a help, not a need
            _log.warning(
                "%s: a block could not be kept there (%s); free the disk, or name another folder", self._folder, error
            )

    def _put(self, kept: Path, data: bytes) -> None:
        temporary = kept.with_name(f"{kept.stem}.{secrets.token_hex(4)}{_TEMPORARY}")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, kept)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def _make_room(self, n_bytes: int) -> None:
        """Remove what was used longest ago until there is room for this, and for what processes add before they look again."""
        found = []
        for entry in os.scandir(self._folder):
            if not entry.name.endswith((_KEPT, _TEMPORARY)) or (info := _stat(entry)) is None:
                continue
            if (
                entry.name.endswith(_TEMPORARY) and info.st_mtime < time.time() - _STALE_S
            ):  # of a process that was killed
                Path(entry.path).unlink(missing_ok=True)
                continue
            found.append((info.st_mtime_ns, info.st_size, entry.path))
        total = n_bytes + sum(size for _, size, _ in found)
        room = self._max_bytes - self._share * _PROCESSES
        for _, size, path in sorted(found):
            if total <= room:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
