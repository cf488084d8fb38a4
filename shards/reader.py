"""Blocks from shards, checked, and the samples of each lane and global batch from blocks. No torch."""

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shards.codec import MAX_BLOCK_BYTES, Block, decode
from shards.manifest import BlockEntry, Corpus
from shards.order import batches_per_epoch, lane_windows, rank_lanes
from shards.packing import take_samples
from txfm_data.ragged import concatenate

_TAR_HEADER = 512


class BlockReader:
    """Reads blocks of one split by number."""

    def __init__(self, corpus: Corpus, split: str) -> None:
        self._corpus = corpus
        self._blocks = corpus.blocks(split)

    def read(self, number: int) -> Block:
        """One block, its tar header, CRC and every size checked.

        Raises
        ------
        FileNotFoundError, ValueError
            Names the shard and the block.
        """
        name, entry = self._blocks[number]
        path = self._corpus.path / name
        where = f"{path}: block at byte {entry.offset}"
        data = _payload(path, entry, where)
        n_genes, n_panels = len(self._corpus.vocabulary), len(self._corpus.panels)
        return decode(data, n_samples=entry.samples, n_genes=n_genes, n_panels=n_panels, where=where)


def _payload(path: Path, entry: BlockEntry, where: str) -> bytes:
    if not 0 < entry.bytes <= MAX_BLOCK_BYTES:
        raise ValueError(
            f"{where}: claims {entry.bytes} bytes, at most {MAX_BLOCK_BYTES} are read; the manifest is damaged"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: missing, though the manifest names it; copy the whole folder, or build it again"
        )
    with open(path, "rb") as handle:
        handle.seek(entry.offset)
        member = handle.read(_TAR_HEADER + entry.bytes)
    if len(member) < _TAR_HEADER + entry.bytes:
        raise ValueError(f"{where}: the file ends too early; it is cut, copy it or build the shards again")
    try:
        header = tarfile.TarInfo.frombuf(member[:_TAR_HEADER], "utf-8", "strict")
    except tarfile.HeaderError as error:
        raise ValueError(f"{where}: the tar header is damaged ({error}); copy the shard or build it again") from error
    data = member[_TAR_HEADER:]
    if header.size != entry.bytes or not header.isreg() or zlib.crc32(data) != entry.crc32:
        raise ValueError(
            f"{where}: CRC-32 {zlib.crc32(data)} of {header.size} bytes, the manifest says {entry.crc32} of {entry.bytes}; "
            "the shard is damaged, copy it or build it again"
        )
    return data


_COLUMNS = ("sample_id", "dataset", "panel_id", "batch", "library_size")


def join(blocks: list[Block]) -> Block:
    """Blocks laid end to end."""
    columns = {name: np.concatenate([getattr(block, name) for block in blocks]) for name in _COLUMNS}
    return Block(**columns, samples=concatenate([block.samples for block in blocks]))


def take(block: Block, rows: np.ndarray) -> Block:
    """Chosen samples of a block, in the order given."""
    columns = {name: getattr(block, name)[rows] for name in _COLUMNS}
    return Block(**columns, samples=take_samples(block.samples, rows))


def _lane(
    corpus: Corpus, reader: BlockReader, lane: int, *, seed: int, epoch: int, skip: int, step: int
) -> Iterator[Block]:
    """Samples of one lane in order, `step` at a time, after the first `skip`."""
    held: list[Block] = []
    n_held = 0
    for numbers, order in lane_windows(corpus.layout, lane, seed=seed, epoch=epoch):
        if skip >= len(order):
            skip -= len(order)
            continue
        window = join([reader.read(int(number)) for number in numbers])
        at, skip = skip, 0
        while at < len(order):
            part = order[at : at + step - n_held]
            held.append(take(window, part))
            n_held += len(part)
            at += len(part)
            if n_held == step:
                yield join(held) if len(held) > 1 else held[0]
                held, n_held = [], 0


def train_batches(
    corpus: Corpus,
    *,
    seed: int,
    epoch: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    start_batch: int = 0,
) -> Iterator[Block]:
    """This rank's part of each global batch of one epoch, as ragged samples, from batch `start_batch` on.

    The samples of a global batch depend on (corpus, seed, epoch, batch) alone; ranks hold consecutive parts of it.
    """
    n_batches = batches_per_epoch(corpus.layout, global_batch)
    step = global_batch // corpus.lanes
    reader = BlockReader(corpus, "train")
    lanes = [
        _lane(corpus, reader, lane, seed=seed, epoch=epoch, skip=start_batch * step, step=step)
        for lane in rank_lanes(corpus.lanes, rank, world_size)
    ]
    for _ in range(start_batch, n_batches):
        yield join([next(lane) for lane in lanes])


def val_batches(corpus: Corpus, *, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Block]:
    """The val split in its stored order, batch i on rank i modulo world size; the last batch may be short."""
    reader = BlockReader(corpus, "val")
    sizes = [entry.samples for _, entry in corpus.blocks("val")]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    cached: tuple[int, Block] | None = None
    for number in range(rank, -(-int(starts[-1]) // batch_size), world_size):
        low, high = number * batch_size, min((number + 1) * batch_size, int(starts[-1]))
        parts = []
        while low < high:
            block = int(np.searchsorted(starts, low, side="right")) - 1
            if cached is None or cached[0] != block:
                cached = (block, reader.read(block))
            stop = min(high, int(starts[block + 1]))
            parts.append(take(cached[1], np.arange(low, stop) - starts[block]))
            low = stop
        yield join(parts)
