"""Pass 2 of the shuffle: the samples of one shard from all spills, cut into blocks, encoded, and written as a tar.

A shard is worked on in groups of blocks that fit the memory budget; how many at a time does not change a byte.
"""

import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards import codec, spill
from shards.buffers import BufferPool
from shards.codec import Block, BlockSchema
from shards.entries import BlockEntry, ShardEntry, file_name
from shards.packing import Packed
from shards.spill import WORD, Field
from shards.tar import TarShard, file_entry

_ID_TYPE = np.dtype([("sample_id", np.int64), ("dataset", np.int32)])


@dataclass(frozen=True)
class ShardTask:
    """One shard to write.

    split, number : of the shard.  block_samples : (n_blocks,) int64.
    slices : (n, 5) int64. For each spill that has samples of it: its number, first and last record, first word, CRC-32
        of these records.
    """

    split: str
    number: int
    block_samples: np.ndarray
    slices: np.ndarray


@dataclass(frozen=True)
class Gather:
    """Work of pass 2; can be sent to another process.

    key : names this build among all others.
    spills, shards, done : folders of the spills, of the shards, and of what says which are finished.
    spill_words : per spill, words of its values.  fields : labels of a record, the batch first.
    texts : file with the texts that codes of labels stand for.  schema : of blocks.
    group_bytes : values held at once.  with_ids : also note the samples in order of storage.
    """

    key: str
    spills: Path
    shards: Path
    done: Path
    fields: tuple[Field, ...]
    texts: Path
    schema: BlockSchema
    group_bytes: int
    with_ids: bool
    spill_words: np.ndarray

    def __call__(self, task: ShardTask) -> tuple[ShardEntry, str, int]:
        """Write one shard; its entry, split and number."""
        records = self._records(task)
        words = spill.n_words(records)
        order = np.argsort(records["key"])  # keys never tie
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        starts = np.concatenate([[0], np.cumsum(task.block_samples)])
        if starts[-1] != len(records):
            raise ValueError(
                f"{self.spills}: {len(records)} samples for a shard of {starts[-1]}; pieces of another build are among them, "
                "remove the folder and run the command again"
            )
        name = file_name(task.split, task.number)
        with TarShard(self.shards / name) as tar:
            for low, high in _groups(words[order], starts, self.group_bytes // WORD):
                values, first_word = self._values(task, records, words, rank, int(starts[low]), int(starts[high]))
                for at in range(low, high):
                    rows = order[starts[at] : starts[at + 1]]
                    chosen = records[rows]
                    block = self._block(chosen, spill.lift(values, first_word[rows], chosen))
                    data = codec.encode(block, self.schema)
                    if len(data) > codec.MAX_BLOCK_BYTES or 1.1 * block.packed.n_bytes > codec.MAX_DECODED_BYTES:
                        raise ValueError(
                            f"{name}: a block of {len(rows)} samples takes {block.packed.n_bytes} bytes; lower --block"
                        )
                    tar.add(data, len(rows), *_distinct(chosen))
            if self.with_ids:
                self._write_ids(name, records[order])
            entry = tar.close(name)
        spill.write_json(self.done / f"{name}.json", {**asdict(entry), "blocks": [list(b) for b in entry.blocks]})
        return entry, task.split, task.number

    def _records(self, task: ShardTask) -> np.ndarray:
        """Records of the shard's samples, spill after spill."""
        kind = spill.record_type(self.fields)
        records = np.empty(int((task.slices[:, 2] - task.slices[:, 1]).sum()), kind)
        at = 0
        for number, low, high, _, crc in task.slices.tolist():
            path = spill.spill_path(self.spills, number)
            part = records[at : at + high - low]
            _read_into(path, int(self.spill_words[number]) * WORD + low * kind.itemsize, part)
            if zlib.crc32(part.tobytes()) != crc:
                raise spill.damaged(path)
            at += high - low
        return records

    def _values(
        self, task: ShardTask, records: np.ndarray, words: np.ndarray, rank: np.ndarray, first: int, last: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Words of the samples of ranks [first, last), and where each sample's begin, (n,) int64 over all records."""
        is_in = (rank >= first) & (rank < last)
        first_word = np.cumsum(np.where(is_in, words, 0)) - np.where(is_in, words, 0)
        values = _buffers(self.key).take(int(words[is_in].sum()), np.uint64)
        checks = np.ascontiguousarray(records["check"])
        low = 0
        for number, row, stop, word, _ in task.slices.tolist():
            high = low + stop - row
            # A spill is in the order of the shuffle, so these lie end to end in it
            a, b = low + np.searchsorted(rank[low:high], (first, last))
            n = int(words[a:b].sum())
            if n:
                path = spill.spill_path(self.spills, number)
                begin = int(first_word[a])
                part = values[begin : begin + n]
                _read_into(path, (word + int(words[low:a].sum())) * WORD, part)
                if spill.first_damaged(values, first_word[a:b], words[a:b], checks[a:b]) >= 0:
                    raise spill.damaged(path)
            low = high
        return values, first_word

    def _block(self, chosen: np.ndarray, packed: Packed) -> Block:
        texts = _texts(self.texts)
        labels = []
        for at, field in enumerate(self.fields):
            missing = chosen[f"missing{at}"] if field.has_missing else None
            labels.append(_label(field, chosen[f"label{at}"], missing, texts))
        obs = pa.RecordBatch.from_arrays(labels, names=[field.name for field in self.fields])
        numbers = {name: np.ascontiguousarray(chosen[name]) for name in ("sample_id", "dataset", "library_size")}
        return Block(**numbers, panel_id=numbers["dataset"], packed=packed, obs=obs)

    def _write_ids(self, name: str, records: np.ndarray) -> None:
        ids = np.empty(len(records), _ID_TYPE)
        ids["sample_id"], ids["dataset"] = records["sample_id"], records["dataset"]
        part = spill.part_of(ids_path(self.done, name))
        with open(part, "wb") as handle:
            handle.write(ids.tobytes())
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, ids_path(self.done, name))


@lru_cache(maxsize=1)
def _buffers(key: str) -> BufferPool:
    return BufferPool()


def close() -> None:
    """Let go of what this process keeps for the next shard."""
    _buffers.cache_clear()
    _read_texts.cache_clear()


def ids_path(done: Path, name: str) -> Path:
    """File with the samples of a shard in order of storage."""
    return done / f"{name}.ids"


def read_ids(done: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Id and dataset of the samples of a shard in order of storage."""
    ids = np.fromfile(ids_path(done, name), _ID_TYPE)
    return ids["sample_id"], ids["dataset"]


def _groups(words: np.ndarray, starts: np.ndarray, room: int) -> Iterator[tuple[int, int]]:
    """Runs of blocks whose words fit the room, one block at the least; words are in the order of storage."""
    ends = np.concatenate([[0], np.cumsum(words)])[starts]
    low = 0
    while low < len(starts) - 1:
        high = max(low + 1, int(np.searchsorted(ends, ends[low] + room, side="right")) - 1)
        yield low, high
        low = high


def _read_into(path: Path, offset: int, out: np.ndarray) -> None:
    view = memoryview(out.view(np.uint8).data)
    with open(path, "rb", buffering=0) as handle:
        handle.seek(offset)
        while len(view):
            n = handle.readinto(view)
            if not n:
                raise spill.damaged(path)
            view = view[n:]


def _distinct(chosen: np.ndarray) -> tuple[int, int]:
    """Distinct datasets, and distinct pairs of dataset and batch."""
    pairs = np.unique((chosen["dataset"].astype(np.int64) << 32) | chosen["label0"].astype(np.int64))
    return len(np.unique(pairs >> 32)), len(pairs)


def write_texts(path: Path, texts: dict[str, tuple[str, ...]]) -> None:
    """Write the texts of labels for the workers."""
    table = pa.table({"name": list(texts), "texts": pa.array(list(map(list, texts.values())), pa.list_(pa.string()))})
    part = spill.part_of(path)
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    os.replace(part, path)


def _texts(path: Path) -> dict[str, pa.Array]:
    return _read_texts(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _read_texts(path: Path, changed_ns: int) -> dict[str, pa.Array]:
    with pa.OSFile(str(path), "rb") as source:
        table = pa.ipc.open_file(source).read_all()
    return {name.as_py(): values.values for name, values in zip(table["name"], table["texts"], strict=True)}


def _label(field: Field, values: np.ndarray, missing: np.ndarray | None, texts: dict[str, pa.Array]) -> pa.Array:
    if field.kind == "string":
        codes = pa.array(np.ascontiguousarray(values), pa.int32(), mask=values < 0)
        return pa.DictionaryArray.from_arrays(codes, texts[field.name])
    if field.kind == "bool":
        return pa.array(values == 1, mask=values < 0)
    return pa.array(np.ascontiguousarray(values), mask=None if missing is None else np.ascontiguousarray(missing))


def finished_shard(shards: Path, done: Path, name: str, *, with_ids: bool) -> ShardEntry | None:
    """The shard of that name if an earlier run has finished it, its sha256 compared."""
    tree: dict[str, Any] | None = spill.read_json(done / f"{name}.json")
    if tree is None or not (shards / name).is_file() or (with_ids and not ids_path(done, name).is_file()):
        return None
    try:
        entry = ShardEntry(**{**tree, "blocks": tuple(BlockEntry(*block) for block in tree["blocks"])})
    except (KeyError, TypeError):  # of another release
        return None
    found = file_entry(shards / name)
    return entry if (found.bytes, found.sha256) == (entry.bytes, entry.sha256) else None
