"""What a store on object storage has besides its arrays: the list of its objects, the mark of one in the making, its lock.

The list, ``txfm_files.json``, has the names and sizes of all objects when it was written, and how many datasets they are of.
Objects of TileDB are written once and never changed, so all that are listed must be there as long as the store is; others
may be there too, of an append in progress or one that failed. An append writes the list after the ledger's commit. A
process killed between the two leaves a store that is sound and complete, and whose list lacks the last dataset:
`txfm_data.store.opening.open_store` then counts that dataset's rows and values in place of its objects, until the next
append writes the list anew.

The mark, ``txfm_unfinished.json``, lies in a store until its first dataset is in; there is no store for readers till then.

The lock lies beside the store (``s3://bucket/store.lock``), made by a request that succeeds for one writer alone, and says who
holds it and since when. A writer that was killed leaves it. One that runs on the same machine sees that the process is no
more, and takes over; elsewhere nobody can know, so the lock stays until somebody deletes that object, as the error says.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from txfm_data import address as addresses
from txfm_data.store.files import LIST

MARK = "txfm_unfinished.json"
_VERSION = 1
_REMEDY = "restore the store from a copy, or ingest again"
_TIMES = re.compile(r"(?:^|/)__(\d{13})_(\d{13})_")
_WAIT_MS = 5_000
"""Clocks of machines that are kept in time differ by less."""

_held: set[str] = set()
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listed:
    """A store's list: size and sha256 (None if unknown) by name, and how many datasets it covers (None: all)."""

    files: dict[str, tuple[int, str | None]]
    n_datasets: int | None


def plain_address(address: str | Path) -> str:
    """The address of a store on object storage, without slashes at its end.

    Raises
    ------
    ValueError
        If it is not of the form ``s3://bucket/name``.
    """
    text = addresses.join(address)
    bucket, _, name = text.partition("://")[2].partition("/")
    if not text.lower().startswith("s3://") or not bucket or not name or re.search("[?#]", text) or "@" in bucket:
        raise ValueError(
            f"{addresses.redact(text)}: not the address of a store; it is a folder of this machine, or s3://bucket/name without "
            "user, password or query: keys come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    return "s3" + text[2:]


def children(address: str) -> set[str]:
    """Names of what lies directly in a folder; none if there is nothing. One request.

    Raises
    ------
    FileNotFoundError, PermissionError, ConnectionError
        If the bucket does not exist or cannot be read.
    """
    with addresses.clear_errors(address):
        filesystem, name = addresses._filesystem(address)
        try:
            found = filesystem.ls(name, detail=False)
        except FileNotFoundError as error:
            if "bucket does not exist" in str(error):
                raise
            return set()
    return {str(entry).rstrip("/").rpartition("/")[2] for entry in found if str(entry).rstrip("/") != name}


def _get(address: str) -> bytes:
    with addresses.clear_errors(address):
        filesystem, name = addresses._filesystem(address)
        return bytes(filesystem.cat_file(name))


def _put(address: str, tree: dict[str, Any], mode: str = "overwrite") -> None:
    with addresses.clear_errors(address):
        filesystem, name = addresses._filesystem(address)
        filesystem.pipe_file(name, json.dumps(tree).encode(), mode=mode)


def _delete(address: str) -> None:
    with addresses.clear_errors(address):
        filesystem, name = addresses._filesystem(address)
        filesystem.rm_file(name)


def read_list(address: str) -> Listed:
    """Read a store's list, or the one of a local store that was copied here.

    Raises
    ------
    ValueError
        If it is missing, damaged, or of a version this code does not read.
    """
    where = addresses.redact(addresses.join(address, LIST))
    try:
        document = json.loads(_get(addresses.join(address, LIST)))
        text = document["list"]
        if hashlib.sha256(text.encode()).hexdigest() != document["sha256"]:
            raise ValueError("its checksum differs")
        tree = json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{where}: missing, so nothing says which objects belong to the store; {_REMEDY}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not a readable list of objects ({error}); {_REMEDY}") from error
    if tree["version"] != _VERSION:
        raise ValueError(f"{where}: version {tree['version']}, this release reads {_VERSION}; upgrade txfm")
    return Listed({name: (size, sha256) for name, (size, sha256) in tree["files"].items()}, tree.get("n_datasets"))


def write_list(address: str, n_datasets: int) -> None:
    """List every object of a store that holds `n_datasets`. Hashes that a local store was listed with are kept."""
    known = read_list(address).files if LIST in children(address) else {}
    listed: dict[str, list[Any]] = {}
    for name, size in addresses.list_files(address).items():
        if name not in (LIST, MARK):
            before = known.get(name)
            listed[name] = [size, before[1] if before is not None and before[0] == size else None]
    tree = {"version": _VERSION, "files": listed, "n_datasets": n_datasets}
    text = json.dumps(tree, separators=(",", ":"))
    _put(addresses.join(address, LIST), {"sha256": hashlib.sha256(text.encode()).hexdigest(), "list": text})


def check_list(address: str) -> int | None:
    """Refuse a store that lacks an object of its list, or where one has another size; costs a listing.

    Returns
    -------
    int or None
        Datasets that the list covers; None: all.

    Raises
    ------
    ValueError
        Names the first such object.
    """
    listed = read_list(address)
    found = addresses.list_files(address)
    for name, (size, _) in listed.files.items():
        where = addresses.redact(addresses.join(address, name))
        if name not in found:
            raise ValueError(f"{where}: missing, though the store's list has it ({size} bytes); {_REMEDY}")
        if found[name] != size:
            raise ValueError(f"{where}: {found[name]} bytes, the store's list says {size}: cut or changed; {_REMEDY}")
    return listed.n_datasets


def check_finished(address: str) -> None:
    """Raise FileNotFoundError unless something lies at `address` that is not the beginning of a store."""
    where, found = addresses.redact(address), children(address)
    if not found:
        raise FileNotFoundError(f"{where}: no store there; make one with: txfm ingest KIND … --store {where}")
    if MARK in found:
        raise FileNotFoundError(
            f"{where}: no store there yet: an ingest is making it, or was killed while it did; ingest again, which removes "
            "what was left"
        )


def mark(address: str) -> None:
    """Begin a store at `address`, where there may be the remains of another beginning."""
    _put(addresses.join(address, MARK), {"since": datetime.now(UTC).isoformat(timespec="seconds")})


def unmark(address: str) -> None:
    """Let readers see the store."""
    _delete(addresses.join(address, MARK))


def remove_unfinished(address: str) -> None:
    """Remove a store that was never finished: its mark last, for if this stops half-way."""
    with addresses.clear_errors(address):
        filesystem, name = addresses._filesystem(address)
        folders = [str(entry["name"]) for entry in filesystem.ls(name, detail=True) if entry["type"] == "directory"]
    for folder in sorted(folders):
        addresses.remove_tree(addresses.join(address, folder.rstrip("/").rpartition("/")[2]))
    addresses.remove_tree(address)


def wait_for_clock(address: str) -> None:
    """Wait until this machine's clock is past all that was written: TileDB orders writes and deletions by the writers' clocks.

    Raises
    ------
    ValueError
        If that would take more than a few seconds: a clock is wrong.
    """
    times = [int(found[2]) for name in addresses.list_files(address) if (found := _TIMES.search(name))]
    ahead_ms = max(times, default=0) + 1 - time.time_ns() // 1_000_000
    if ahead_ms > _WAIT_MS:
        raise ValueError(
            f"{addresses.redact(address)}: holds objects written {ahead_ms / 1000:,.0f} s in the future of this machine's clock, "
            "beside which what is written now would count as older; set the clock of this machine (or wait, if another's was wrong)"
        )
    if ahead_ms > 0:
        time.sleep(ahead_ms / 1000)


@contextmanager
def writing(address: str) -> Iterator[None]:
    """Hold the store's lock.

    Raises
    ------
    ValueError
        If another writer holds it; says who, since when, and what to do if that process is no more.
    """
    name = f"{address}.lock"
    token = secrets.token_hex(8)
    own = {
        "token": token, "machine": _machine(), "host": socket.gethostname(), "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    _held.add(token)
    try:
        _acquire(address, name, own)
        try:
            yield
        finally:
            _release(name, token)
    finally:
        _held.discard(token)


def _acquire(address: str, name: str, own: dict[str, Any]) -> None:
    holder = _holder(name)
    if holder is not None:
        _take_over(address, name, holder)
    try:
        _put(name, own, mode="create")
    except FileExistsError:
        raise _busy(address, name, _holder(name) or {}) from None


def _take_over(address: str, name: str, holder: dict[str, Any]) -> None:
    """Remove the lock of a process of this machine that is no more."""
    if not _is_gone(holder):
        raise _busy(address, name, holder)
    handle = os.open("/", os.O_RDONLY)  # a lock that all processes of this machine know: one of them removes it
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if _holder(name) == holder:
            _log.warning(
                "%s: its last writer (process %s) was killed; taking over", addresses.redact(address), holder["pid"]
            )
            _delete(name)
    finally:
        os.close(handle)


def _release(name: str, token: str) -> None:
    try:
        holder = _holder(name)
        if holder is not None and holder.get("token") == token:
            _delete(name)
    except OSError as error:
        _log.warning("the lock could not be removed; delete that object before the next append (%s)", error)


def _holder(name: str) -> dict[str, Any] | None:
    try:
        tree = json.loads(_get(name))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _busy(address: str, name: str, holder: dict[str, Any]) -> ValueError:
    return ValueError(
        f"{addresses.redact(address)}: another process is writing to this store (process {holder.get('pid', '?')} on "
        f"{holder.get('host', '?')}, since {holder.get('since', '?')}); wait until it has ended. If it is no more, delete the "
        f"object {addresses.redact(name)}, for example with: aws s3 rm {addresses.redact(name)}"
    )


def _machine() -> str | None:
    """This boot of this machine and its namespace of process ids; None where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the process that made a lock surely runs no more."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0 or holder.get("machine") is None or holder["machine"] != _machine():
        return False
    if pid == os.getpid():
        return holder.get("token") not in _held
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
