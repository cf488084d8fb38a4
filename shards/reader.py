"""Samples from blocks, batch by batch: what executes the plans of `shards.order`. No torch.

A plan says which rows of which blocks make a batch. Threads may fetch and decode the blocks before they are needed;
blocks stay packed while they are, a third of the unpacked size, and the rows of a batch are unpacked from them into their
place in buffers that are used again.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numba import njit

from shards.blocks import BlockReader
from shards.buffers import BufferPool, Buffers
from shards.codec import Block
from shards.manifest import TRAIN_SAMPLES, Corpus
from shards.order import BLOCKS, LANES, BatchPlan, Layout, rank_plan
from shards.packing import take, unpack_counts, unpack_genes
from txfm_data.address import is_remote
from txfm_data.kernels import keep_samples
from txfm_data.ragged import Ragged
from txfm_data.random_order import permutation

_AHEAD_BLOCKS = 6
_AHEAD_SAMPLES = 8_192
_AHEAD_PLANS = 256
_REMOTE_THREADS = 4
_CHUNK = 1 << 20


@dataclass(frozen=True)
class RaggedBatch:
    """Samples as they were counted, with what is known of each.

    sample_id : (b,) int64, row of the store.  dataset : (b,) int32.  panel_id : (b,) int64.
    library_size : (b,) float64, counts of the whole library.
    samples : counts over the vocabulary; uint32, or float64 in a corpus that holds values that are not whole.
    obs : b rows; ``batch`` and the columns that the shards carry, if they were asked for.
    number : of the global batch in its epoch, from 0.
    The arrays are the caller's as long as anything refers to them; then their memory is used again.
    """

    sample_id: np.ndarray
    dataset: np.ndarray
    panel_id: np.ndarray
    library_size: np.ndarray
    samples: Ragged
    obs: pa.RecordBatch | None
    number: int

    def __len__(self) -> int:
        return len(self.sample_id)


@njit(nogil=True, cache=True)
def _place(block, rows, starts, out_gene_ids, out_counts):  # type: ignore[no-untyped-def]
    """Unpack samples `rows` of a block (`Packed.arrays`, checked), each to where it starts in the batch."""
    (
        indptr,
        genes,
        gene_escapes,
        gene_escape_indptr,
        counts,
        count_escapes,
        count_escape_indptr,
        fractions,
        exact_indptr,
    ) = block
    for r in range(rows.shape[0]):
        row, start = rows[r : r + 1], starts[r]
        unpack_genes(indptr, genes, gene_escapes, gene_escape_indptr, row, out_gene_ids[start:])
        unpack_counts(
            indptr, counts, count_escapes, count_escape_indptr, fractions, exact_indptr, row, out_counts[start:]
        )


def epoch_layout(corpus: Corpus, *, seed: int, epoch: int) -> Layout:
    """How the samples that one epoch serves lie in the blocks of the train split.

    With weights, every sample id is hashed; that takes a second for a hundred million.
    """
    layout = corpus.layout
    if not corpus.is_weighted:
        return layout
    sample_id, dataset = corpus.train_samples()
    ends = np.cumsum([entry.samples for _, entry in corpus.blocks("train")])
    if len(sample_id) != ends[-1]:
        raise ValueError(
            f"{corpus.files.where(TRAIN_SAMPLES)}: {len(sample_id)} rows, but the blocks hold {ends[-1]} samples; the corpus is "
            "damaged, build it again"
        )
    # Sums up to the end of each block, a chunk at a time: the table need not fit in memory.
    served_before, done = np.zeros(len(ends) + 1, np.int64), 0
    for start in range(0, len(sample_id), _CHUNK):
        stop = min(start + _CHUNK, len(sample_id))
        kept = np.cumsum(_kept(corpus, seed, epoch, sample_id[start:stop], dataset[start:stop]))
        low, high = np.searchsorted(ends, [start, stop], side="right")
        served_before[low + 1 : high + 1] = done + kept[ends[low:high] - start - 1]
        done += int(kept[-1])
    return Layout(np.diff(served_before), layout.lanes, layout.mix_blocks, layout.window)


def _kept(corpus: Corpus, seed: int, epoch: int, sample_id: np.ndarray, dataset: np.ndarray) -> np.ndarray:
    kept = np.empty(len(sample_id), bool)
    keep_samples(seed, epoch, np.ascontiguousarray(sample_id), corpus.weights[dataset], kept)
    return kept


def train_batches(
    corpus: Corpus,
    *,
    seed: int,
    epoch: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    start_batch: int = 0,
    step: int = 1,
    threads: int | None = None,
    with_obs: bool = False,
    buffers: Buffers | None = None,
    layout: Layout | None = None,
) -> Generator[RaggedBatch, None, None]:
    """This rank's part of the global batches of one epoch, from batch `start_batch` on, every `step`-th.

    The samples of a global batch depend on (corpus, seed, epoch, batch) alone; ranks hold consecutive parts of it.

    threads : that fetch and decode blocks ahead of need; by default none for a local corpus, four for a remote one.
    with_obs : give `obs` too, which costs more than the counts.
    buffers : where arrays come from; by default a pool.  layout : of `epoch_layout`, if it is at hand.

    Raises
    ------
    ValueError
        At the call, if lanes, processes and global batch do not fit, with the sizes that would; while iterating, if a
        shard is damaged.
    """
    if layout is None:
        layout = epoch_layout(corpus, seed=seed, epoch=epoch)
    plans = rank_plan(
        layout, seed=seed, epoch=epoch, global_batch=global_batch, rank=rank, world_size=world_size,
        start_batch=start_batch, step=step,
    )  # fmt: skip
    choose = partial(_served_rows, corpus, seed, epoch, layout.block_samples) if corpus.is_weighted else None
    return _execute(corpus, "train", plans, threads, with_obs, buffers, choose)


def _served_rows(corpus: Corpus, seed: int, epoch: int, served: np.ndarray, number: int, block: Block) -> np.ndarray:
    rows = np.flatnonzero(_kept(corpus, seed, epoch, block.sample_id, block.dataset))
    if len(rows) != served[number]:
        raise ValueError(
            f"{corpus.files.where(TRAIN_SAMPLES)}: says that epoch {epoch} serves {served[number]} samples of block {number}; the "
            f"block has {len(rows)}. The table is of another corpus, build the shards again"
        )
    return rows


def val_batches(
    corpus: Corpus,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    threads: int | None = None,
    with_obs: bool = False,
    buffers: Buffers | None = None,
) -> Generator[RaggedBatch, None, None]:
    """The val split in its stored order, batch i on rank i modulo world size; the last batch may be short."""
    _check_size(batch_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} processes does not exist")
    plans = _stored_plan(_block_samples(corpus, "val"), batch_size, rank, world_size)
    return _execute(corpus, "val", plans, threads, with_obs, buffers)


def ragged_batches(
    corpus: Corpus,
    split: str = "train",
    *,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    threads: int | None = None,
    with_obs: bool = False,
    buffers: Buffers | None = None,
) -> Generator[RaggedBatch, None, None]:
    """Every sample of a split once, whatever the weights; the last batch may be short. For PCA, scVI, statistics.

    shuffle : another order in each epoch, samples of as many blocks mixed as in training; else as stored, which is
        random already, and always the same.
    """
    _check_size(batch_size)
    sizes = _block_samples(corpus, split)
    if shuffle:
        plans = _shuffled_plan(sizes, corpus.layout.mix_blocks, batch_size, seed, epoch)
    else:
        plans = _stored_plan(sizes, batch_size, 0, 1)
    return _execute(corpus, split, plans, threads, with_obs, buffers)


def _block_samples(corpus: Corpus, split: str) -> np.ndarray:
    return np.array([entry.samples for _, entry in corpus.blocks(split)], np.int64)


def _stored_plan(sizes: np.ndarray, batch_size: int, rank: int, world_size: int) -> Iterator[BatchPlan]:
    """Samples as stored, `batch_size` at a time; every `world_size`-th batch from `rank` on."""
    ends = np.cumsum(sizes)
    n_samples = int(sizes.sum())
    for number in range(rank, -(-n_samples // batch_size), world_size):
        low, high = number * batch_size, min((number + 1) * batch_size, n_samples)
        position = np.arange(low, high)
        block = np.searchsorted(ends, position, side="right")
        row = position - (ends - sizes)[block]
        used = np.arange(block[0], block[-1] + 1)
        done = used[ends[used] <= low + world_size * batch_size]
        yield BatchPlan(number, block, row, tuple(done.tolist()))


def _shuffled_plan(sizes: np.ndarray, mix_blocks: int, batch_size: int, seed: int, epoch: int) -> Iterator[BatchPlan]:
    """Blocks in random order, the samples of `mix_blocks` at a time permuted, and cut into batches."""
    order = permutation(len(sizes), seed=seed, epoch=epoch, item=BLOCKS)
    ends_with: dict[int, list[int]] = {}
    block = row = np.empty(0, np.int64)
    number = begin = 0
    for turn, first in enumerate(range(0, len(order), mix_blocks)):
        mixed = order[first : first + mix_blocks]
        n = int(sizes[mixed].sum())
        shuffled = permutation(n, seed=seed, epoch=epoch, item=LANES + turn)
        local = np.repeat(np.arange(len(mixed)), sizes[mixed])[shuffled]
        last = np.zeros(len(mixed), np.int64)
        last[local] = begin + np.arange(n)  # of repeated positions the last assignment stays
        for used, position in zip(mixed.tolist(), last.tolist(), strict=True):
            ends_with.setdefault(position // batch_size, []).append(used)
        begins = np.cumsum(sizes[mixed]) - sizes[mixed]
        block = np.concatenate([block, mixed[local]])
        row = np.concatenate([row, shuffled - begins[local]])
        begin += n
        is_last = first + mix_blocks >= len(order)
        while len(block) >= batch_size or (is_last and len(block)):
            yield BatchPlan(number, block[:batch_size], row[:batch_size], tuple(ends_with.pop(number, ())))
            block, row = block[batch_size:], row[batch_size:]
            number += 1


def _check_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 sample, got {batch_size}")


@dataclass(frozen=True)
class _Loaded:
    """A block ready to be served: its samples' columns in order served, and the packed arrays for the kernel."""

    columns: dict[str, np.ndarray]
    arrays: tuple[np.ndarray, ...]
    obs: pa.RecordBatch


_Choose = Callable[[int, Block], np.ndarray]


def _load(reader: BlockReader, choose: _Choose | None, number: int) -> _Loaded:
    block = reader.read(number)
    packed, obs = block.packed, block.obs
    columns = {name: getattr(block, name) for name in ("sample_id", "dataset", "panel_id", "library_size")}
    if choose is not None:
        # What this epoch does not serve is let go: a round of a corpus of low weights spans many blocks.
        rows = choose(number, block)
        packed, obs = take(packed, rows), obs.take(pa.array(rows))
        columns = {name: values[rows] for name, values in columns.items()}
    columns["length"] = np.diff(packed.indptr)
    # Whether an array is empty, and so writable, must not have the kernel compiled once more in the midst of an epoch.
    arrays = tuple(np.require(array, requirements=("C", "A")).view() for array in packed.arrays)
    for array in arrays:
        array.flags.writeable = False
    return _Loaded(columns, arrays, obs)


class _Held:
    """The blocks that are needed now, in slots.

    What is looked up of each sample stands in tables of slots x rows, so that a batch takes one look-up for all its blocks.
    """

    _DTYPES = {
        "sample_id": np.int64, "dataset": np.int32, "panel_id": np.int64, "library_size": np.float64,
        "length": np.int64,
    }  # fmt: skip

    def __init__(self, sizes: np.ndarray, counts_dtype: type[np.generic], buffers: Buffers) -> None:
        self._counts_dtype, self._buffers = counts_dtype, buffers
        self._rows = int(sizes.max(initial=0))
        self._slot = np.full(len(sizes), -1)
        self._blocks: dict[int, _Loaded] = {}  # by slot
        self._free: list[int] = []
        self._tables = {name: np.empty((0, self._rows), dtype) for name, dtype in self._DTYPES.items()}

    def add(self, number: int, block: _Loaded) -> None:
        if not self._free:
            n_slots = len(self._blocks)
            more = max(8, n_slots)
            self._free = list(range(n_slots, n_slots + more))
            for name, table in self._tables.items():
                self._tables[name] = np.concatenate([table, np.empty((more, self._rows), table.dtype)])
        slot = self._free.pop()
        self._slot[number], self._blocks[slot] = slot, block
        for name, values in block.columns.items():
            self._tables[name][slot, : len(values)] = values

    def drop(self, number: int) -> None:
        slot = int(self._slot[number])
        del self._blocks[slot]
        self._free.append(slot)

    def batch(self, plan: BatchPlan, with_obs: bool) -> RaggedBatch:
        slot = self._slot[plan.block]
        place = slot * self._rows + plan.row
        found = {name: table.reshape(-1).take(place) for name, table in self._tables.items()}
        indptr = np.zeros(len(place) + 1, np.int64)
        np.cumsum(found["length"], out=indptr[1:])
        gene_ids = self._buffers.take(int(indptr[-1]), np.uint16)
        counts = self._buffers.take(int(indptr[-1]), self._counts_dtype)
        by_block = np.argsort(slot, kind="stable")
        slot, rows, starts = slot[by_block], plan.row[by_block], indptr[by_block]
        obs = []
        for low, high in pairwise([0, *(np.flatnonzero(np.diff(slot)) + 1).tolist(), len(slot)]):
            block = self._blocks[int(slot[low])]
            _place(block.arrays, rows[low:high], starts[low:high], gene_ids, counts)
            if with_obs:
                obs.append(block.obs.take(pa.array(rows[low:high])))
        return RaggedBatch(
            found["sample_id"], found["dataset"], found["panel_id"], found["library_size"], Ragged(indptr, gene_ids, counts),
            _join_obs(obs, by_block) if with_obs else None, plan.batch,
        )  # fmt: skip


def _join_obs(parts: list[pa.RecordBatch], order: np.ndarray) -> pa.RecordBatch:
    """Rows of several blocks, which lie in `order`, in the order of the batch."""
    table = pa.Table.from_batches(parts).unify_dictionaries().combine_chunks()
    return table.take(pa.array(np.argsort(order))).combine_chunks().to_batches()[0]


def _execute(
    corpus: Corpus,
    split: str,
    plans: Iterator[BatchPlan],
    threads: int | None,
    with_obs: bool,
    buffers: Buffers | None,
    choose: _Choose | None = None,
) -> Generator[RaggedBatch, None, None]:
    if threads is None:
        # Reading from the page cache beside what unpacks was no faster on two cores, and took a third more CPU time
        threads = _REMOTE_THREADS if is_remote(corpus.address) else 0
    if threads < 0:
        raise ValueError(f"threads must be 0 or more, got {threads}")
    sizes = _block_samples(corpus, split)
    reader = BlockReader(corpus, split)
    counts_dtype = np.float64 if corpus.schema.has_fractions else np.uint32
    held = _Held(sizes, counts_dtype, BufferPool() if buffers is None else buffers)
    return _serve(held, plans, partial(_load, reader, choose), sizes, threads, with_obs)


def _serve(
    held: _Held,
    plans: Iterator[BatchPlan],
    load: Callable[[int], _Loaded],
    sizes: np.ndarray,
    threads: int,
    with_obs: bool,
) -> Generator[RaggedBatch, None, None]:
    pool = ThreadPoolExecutor(threads, "txfm-blocks") if threads else None
    fetch: Callable[[int], _Fetched] = _Call(load) if pool is None else lambda number: pool.submit(load, number)
    # Ahead of need are some blocks, fewer if they are large: they cost memory.
    n_ahead = max(1, min(_AHEAD_BLOCKS, _AHEAD_SAMPLES // int(sizes.max(initial=1)))) if threads else 0
    try:
        for plan, fetched in _look_ahead(plans, len(sizes), max(n_ahead, threads), fetch):
            for number in list(fetched):
                held.add(number, fetched.pop(number).result())  # a future keeps its block: none may stay behind
            yield held.batch(plan, with_obs)
            for number in plan.done:
                held.drop(number)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Call:
    """Stands in for a pool: what it gives back is worked out when its result is asked for, in that thread."""

    work: Callable[[int], _Loaded]
    number: int = -1

    def __call__(self, number: int) -> "_Call":
        return _Call(self.work, number)

    def result(self) -> _Loaded:
        return self.work(self.number)


_Fetched = Future[_Loaded] | _Call


def _look_ahead(
    plans: Iterator[BatchPlan], n_blocks: int, n_ahead: int, fetch: Callable[[int], _Fetched]
) -> Iterator[tuple[BatchPlan, dict[int, _Fetched]]]:
    """Plans with the blocks that each is the first to need, whose fetching began when they were `n_ahead` blocks away."""
    is_known = np.zeros(n_blocks, bool)
    waiting: deque[tuple[BatchPlan, dict[int, _Fetched]]] = deque()
    n_waiting = 0
    is_planned = False
    while True:
        while not is_planned and len(waiting) < _AHEAD_PLANS:
            if waiting and n_waiting - len(waiting[0][1]) >= n_ahead:
                break
            plan = next(plans, None)
            if plan is None:
                is_planned = True
                break
            new = dict.fromkeys(plan.block[~is_known[plan.block]].tolist())  # each once, in order of need
            is_known[plan.block] = True
            waiting.append((plan, {number: fetch(number) for number in new}))
            n_waiting += len(new)
        if not waiting:
            return
        plan, fetched = waiting.popleft()
        n_waiting -= len(fetched)
        yield plan, fetched
