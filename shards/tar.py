"""Blocks of one split into WebDataset tar files of a bounded size, synced to disk, with what the manifest says of them."""

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import webdataset

from shards import manifest as mf
from shards.codec import Block, encode


class SplitWriter:
    """Writes the blocks of one split into tar files of a bounded size."""

    def __init__(self, folder: Path, split: str, shard_bytes: int) -> None:
        self._folder, self._split, self._shard_bytes = folder, split, shard_bytes
        self._shards: list[mf.ShardEntry] = []
        self._pending: list[tuple[bytes, int]] = []
        self._pending_bytes = 0

    def add(self, block: Block) -> None:
        """Encode a block; write a shard once enough blocks have come together."""
        data = encode(block)
        if self._pending and self._pending_bytes + len(data) > self._shard_bytes:
            self._flush()
        self._pending.append((data, len(block)))
        self._pending_bytes += len(data)

    def close(self) -> tuple[mf.ShardEntry, ...]:
        """Write what is left; entries of all shards."""
        if self._pending:
            self._flush()
        return tuple(self._shards)

    def _flush(self) -> None:
        name = f"{self._split}-{len(self._shards):06d}.tar"
        path = self._folder / name
        with open(path, "wb") as handle:
            # Fixed owner and time, so that the same corpus gives the same bytes.
            with webdataset.TarWriter(handle, encoder=False, user="txfm", group="txfm", mtime=0) as tar:
                for number, (data, _) in enumerate(self._pending):
                    tar.write({"__key__": f"{number:06d}", "arrow": data})
            handle.flush()
            os.fsync(handle.fileno())
        blocks = tuple(
            mf.BlockEntry(offset, len(data), zlib.crc32(data), n)
            for offset, (data, n) in zip(_member_offsets(path), self._pending, strict=True)
        )
        entry = file_entry(path)
        self._shards.append(mf.ShardEntry(name, entry.bytes, entry.sha256, sum(b.samples for b in blocks), blocks))
        self._pending, self._pending_bytes = [], 0


def _member_offsets(path: Path) -> Iterator[int]:
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            yield member.offset


def file_entry(path: Path) -> mf.FileEntry:
    """Size and sha256 of a file."""
    with open(path, "rb") as handle:
        return mf.FileEntry(path.stat().st_size, hashlib.file_digest(handle, "sha256").hexdigest())


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
