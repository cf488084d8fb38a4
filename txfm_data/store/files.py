"""The list of a store's files, kept beside them: what is missing, cut or changed is found before it is read.

A TileDB array whose commit file is lost reads as if the rows had never been written, and a Zarr array whose shard is
lost reads as zeros (field measurements; docs/format_store.md). No checksum inside a file notices either.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from txfm_data.progress import Progress, ignore

LIST = "txfm_files.json"
_VERSION = 1
_OUTSIDE = frozenset({LIST, f"{LIST}.part"})
_SMALL = 4 * 1024**2
"""Files up to this size are hashed whenever a store is opened: all metadata, whose flips no filter checks."""


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    """Every file as (path relative to the root, bytes)."""
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif name not in _OUTSIDE:
                    yield name, entry.stat(follow_symlinks=False).st_size


def stamp(root: str | Path) -> tuple[int, int] | None:
    """What tells one state of a store from the next: every append writes the list anew. None where there is no list."""
    try:
        found = os.stat(os.path.join(root, LIST))
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def replaced(root: str | Path, before: tuple[int, int] | None) -> bool:
    """Whether an append has taken a store's place since its stamp was `before`, or is just doing so."""
    now = stamp(root)
    return now != before and (now is not None or not os.path.exists(root))


def replaced_error(path: str | Path) -> ValueError:
    """Error for who goes on reading a store that an append has replaced."""
    return ValueError(
        f"{path}: an append has just replaced the store since it was opened, and what was asked for lies elsewhere by now; "
        "open it again"
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_list(root: Path, *, before: Path | None = None) -> None:
    """List every file with its size and sha256.

    before : the store that `root` was linked from; a file that both share (the same inode) keeps its hash unread.
    """
    known = _read(before) if before is not None and (before / LIST).exists() else {}
    listed = {}
    for name, size in sorted(_walk(root)):
        shared = (
            name in known
            and before is not None
            and (before / name).exists()
            and os.path.samefile(root / name, before / name)
        )
        listed[name] = list(known[name]) if shared else [size, _sha256(root / name)]
    text = json.dumps({"version": _VERSION, "files": listed}, separators=(",", ":"))
    document = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "list": text}
    part = root / f"{LIST}.part"
    with open(part, "w", encoding="utf-8") as handle:
        json.dump(document, handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(part, root / LIST)


def _read(root: Path) -> dict[str, tuple[int, str]]:
    path = root / LIST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        text = document["list"]
        if hashlib.sha256(text.encode()).hexdigest() != document["sha256"]:
            raise ValueError("its checksum differs")
        tree = json.loads(text)
        version = tree["version"]
        listed = {str(name): (int(size), str(sha256)) for name, (size, sha256) in tree["files"].items()}
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: missing, so nothing says which files belong to the store; restore it from a copy"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable list of files ({error}); restore the store from a copy") from error
    if version != _VERSION:
        raise ValueError(f"{path}: version {version}, this release reads {_VERSION}; upgrade txfm")
    return listed


def _compare(root: Path, must_hash: Callable[[int], bool], progress: Progress = ignore) -> None:
    listed, found = _read(root), dict(_walk(root))
    remedy = "restore the store from a copy, or ingest again"
    for name, (size, _) in listed.items():
        if name not in found:
            raise ValueError(f"{root / name}: missing, though the store's list has it ({size} bytes); {remedy}")
        if found[name] != size:
            raise ValueError(
                f"{root / name}: {found[name]} bytes, the store's list says {size}: cut or changed; {remedy}"
            )
    more = sorted(found.keys() - listed.keys())
    if more:
        raise ValueError(
            f"{root / more[0]}: not in the store's list of files ({len(more)} such); another program wrote into the store: "
            f"remove what it wrote, or {remedy}"
        )
    for done, (name, (size, sha256)) in enumerate(listed.items(), 1):
        if sha256 and must_hash(size) and _sha256(root / name) != sha256:
            raise ValueError(f"{root / name}: its sha256 is not that of the store's list: damaged or changed; {remedy}")
        progress(done, len(listed))


def _compare_settled(root: Path, must_hash: Callable[[int], bool], progress: Progress = ignore) -> None:
    """`_compare`, once more if an append took the store's place meanwhile: that is no damage."""
    before = stamp(root)
    try:
        _compare(root, must_hash, progress)
    except (ValueError, OSError):
        if stamp(root) in (None, before):
            raise
        _compare(root, must_hash, progress)


def check_list(root: Path) -> None:
    """Refuse a store with a missing, cut, foreign or (small files) changed file. Costs a listing, not a read of the data.

    Raises
    ------
    ValueError
        Names the first such file.
    """
    _compare_settled(root, lambda size: size <= _SMALL)


def verify_list(root: Path, *, progress: Progress = ignore) -> int:
    """Hash every file of a store; returns how many there are.

    Raises
    ------
    ValueError
        Names the first file that is missing, cut, foreign or changed.
    """
    _compare_settled(root, lambda size: True, progress)
    return len(_read(root))
