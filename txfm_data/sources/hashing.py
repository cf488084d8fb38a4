"""Hashes of what a source holds, by which the ledger recognises a dataset that comes twice."""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's bytes, in hexadecimal digits.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    """
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def files_sha256(paths: Iterable[Path], root: Path) -> str:
    """sha256 over the names below `root` and the bytes of several files; the order given does not matter.

    Raises
    ------
    ValueError
        If a path is not below `root`.
    FileNotFoundError
        If a file is missing.
    """
    total = hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        total.update(f"{len(name.encode())}:{name}:{file_sha256(path)}\n".encode())
    return total.hexdigest()
