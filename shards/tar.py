"""One shard as a tar file of blocks, synced to disk, with what the manifest says of it."""

import hashlib
import os
import secrets
import tarfile
import zlib
from pathlib import Path
from types import TracebackType

from shards.entries import TAR_BLOCK, BlockEntry, FileEntry, ShardEntry

_END = 2 * TAR_BLOCK
_RECORD = 10_240
"""Tar files are a whole number of records, says the standard."""


def member_header(name: str, n_bytes: int) -> bytes:
    """Header of a plain file; owner and time are fixed, so that the same corpus gives the same bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = n_bytes, 0o444, "txfm", "txfm"
    return info.tobuf(tarfile.USTAR_FORMAT)


class TarShard:
    """Writes a shard under another name, and gives it its own when it is whole and on disk. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Each time another name: a worker that outlives a killed build may write the same shard
        self._part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        self._handle = open(self._part, "wb")
        self._sha256 = hashlib.sha256()
        self._at = 0
        self._blocks: list[BlockEntry] = []

    def __enter__(self) -> "TarShard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()
        self._part.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self._handle.write(data)
        self._sha256.update(data)
        self._at += len(data)

    def add(self, data: bytes, samples: int, datasets: int, batches: int) -> None:
        """Append a block, and note how many samples and distinct datasets and batches it has."""
        entry = BlockEntry(self._at, len(data), zlib.crc32(data), samples, datasets, batches)
        self._write(member_header(f"{len(self._blocks):06d}.arrow", len(data)))
        self._write(data)
        self._write(bytes(-len(data) % TAR_BLOCK))
        self._blocks.append(entry)

    def close(self, name: str) -> ShardEntry:
        """End the tar; its entry under that name."""
        self._write(bytes(_END + -(self._at + _END) % _RECORD))
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()
        if self._part.stat().st_size != self._at:
            raise OSError(f"{self._part}: {self._part.stat().st_size} bytes on disk of {self._at} written")
        os.replace(self._part, self._path)
        samples = sum(block.samples for block in self._blocks)
        return ShardEntry(name, self._at, self._sha256.hexdigest(), samples, tuple(self._blocks))


def file_entry(path: Path) -> FileEntry:
    """Size and sha256 of a file."""
    with open(path, "rb") as handle:
        return FileEntry(path.stat().st_size, hashlib.file_digest(handle, "sha256").hexdigest())


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with open(path, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
