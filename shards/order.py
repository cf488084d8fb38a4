"""The order of samples as a pure function of (corpus, seed, epoch): which rows of which blocks make each batch.

Nothing here reads a file. A plan says what to read, and the reader executes it. Permutations sort draws of a hash of the
position, so they do not depend on any library's random generator. Blocks are permuted and dealt to lanes in turn; a
lane cuts the samples of its blocks into rounds and permutes each, so that neighbours of a block do not travel together.
`docs/format_shards.md`, "Order", is the contract.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from txfm_data.kernels import hash_range
from txfm_data.random_order import permutation

# Streams of the hash that are not masks; sample ids stay below all of them.
BLOCKS = 2**62
LANES = 2**61
SHUFFLE = 2**60
KEEP = 2**59


@dataclass(frozen=True)
class Layout:
    """How the samples of a split lie in blocks, as one epoch serves them.

    block_samples : (n_blocks,) int64. Samples of each block that this epoch serves: all of them, where sizes differ by
        one at most, or those that the weights of the datasets kept; none is legal then.
    lanes : independent sequences that the blocks are dealt to; divides the number of blocks.
    mix_blocks : blocks of samples that a lane permutes together.
    window : samples of a round: `mix_blocks` × the samples of the largest block, before any weights.

    Raises
    ------
    ValueError
        If the numbers do not fit each other.
    """

    block_samples: np.ndarray
    lanes: int
    mix_blocks: int
    window: int

    def __post_init__(self) -> None:
        n_blocks = len(self.block_samples)
        if self.lanes < 1 or n_blocks == 0 or n_blocks % self.lanes:
            raise ValueError(
                f"{n_blocks} blocks cannot be dealt to {self.lanes} lanes; there must be some, in a multiple of the lanes"
            )
        # A round of at least one block has at most two rounds share a block, which is all that a plan looks ahead.
        smallest, largest = int(self.block_samples.min()), int(self.block_samples.max())
        if self.mix_blocks < 1 or smallest < 0 or self.window < largest:
            raise ValueError(
                f"blocks of {smallest} to {largest} samples, {self.mix_blocks} of them mixed in rounds of {self.window} samples: "
                "at least one block must be mixed, and a round must hold the largest block"
            )

    @property
    def blocks_per_lane(self) -> int:
        """Blocks that each lane gets in an epoch."""
        return len(self.block_samples) // self.lanes


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What one rank reads for one global batch.

    batch : number of the global batch in its epoch.
    block : (b,) int64. Block of each sample.
    row : (b,) int64. Position of each sample among the served samples of its block, in order of storage.
    done : blocks that this plan used and that no later batch of it needs, ascending; each is named once.
    """

    batch: int
    block: np.ndarray
    row: np.ndarray
    done: tuple[int, ...]


def sort_keys(start: int, stop: int, *, seed: int, item: int) -> np.ndarray:
    """Keys of positions start to stop - 1, (stop - start,) uint64: sorted by them, things are in the order of `permutation`.

    So a permutation of epoch 0 can be made in pieces. Keys of one stream never tie.
    """
    keys = np.empty(stop - start, np.uint64)
    hash_range(seed, 0, item, keys, start)
    return keys


def block_sizes(n_samples: int, block_rows: int, lanes: int) -> np.ndarray:
    """Cut `n_samples` into a multiple of `lanes` blocks of at most `block_rows`, sizes equal to within one, (n,) int64."""
    if n_samples < lanes:
        raise ValueError(f"{n_samples} samples cannot fill {lanes} lanes; use at most {n_samples} lanes")
    if block_rows < 2:
        raise ValueError(f"blocks must hold at least 2 samples for lanes to fill evenly, got block_rows {block_rows}")
    n_blocks = lanes * -(-n_samples // (lanes * block_rows))
    sizes = np.full(n_blocks, n_samples // n_blocks, np.int64)
    sizes[: n_samples % n_blocks] += 1
    return sizes


def rank_lanes(lanes: int, rank: int, world_size: int) -> range:
    """Lanes that one rank serves.

    Raises
    ------
    ValueError
        If the world size does not divide the lanes, naming the sizes that would do.
    """
    if world_size < 1 or lanes % world_size:
        fits = [n for n in range(1, lanes + 1) if lanes % n == 0]
        raise ValueError(f"{world_size} processes cannot share {lanes} lanes evenly; start one of {fits}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} processes does not exist")
    share = lanes // world_size
    return range(rank * share, (rank + 1) * share)


def _deal(layout: Layout, *, seed: int, epoch: int) -> np.ndarray:
    """Blocks of each lane in the order it takes them, (lanes, blocks_per_lane) int64."""
    order = permutation(len(layout.block_samples), seed=seed, epoch=epoch, item=BLOCKS)
    return order.reshape(-1, layout.lanes).T


def _whole_batches(layout: Layout, global_batch: int, dealt: np.ndarray) -> int:
    """Global batches of the epoch that `dealt` (of `_deal`) belongs to; raises as `batches_in_epoch`."""
    lanes, sizes = layout.lanes, layout.block_samples
    smallest, largest = int(sizes.min()), int(sizes.max())
    if global_batch < 1 or global_batch % lanes:
        near = sorted({max(lanes, global_batch // lanes * lanes), (global_batch // lanes + 1) * lanes})
        raise ValueError(
            f"a global batch of {global_batch} samples cannot be shared by {lanes} lanes; "
            f"use a multiple of {lanes}, for example {near}"
        )
    if largest - smallest <= 1 and layout.window == layout.mix_blocks * largest:
        # No weights: count on the poorest lane that any epoch could deal, so that all epochs are equally long.
        fewest = int(np.sort(sizes)[: layout.blocks_per_lane].sum())
    else:
        fewest = int(sizes[dealt].sum(axis=1).min())
    if fewest == 0:
        raise ValueError(
            f"an epoch holds {int(sizes.sum())} samples, and one of {lanes} lanes has none of them; "
            "give the datasets more weight, or build the shards with fewer lanes"
        )
    batches = fewest // (global_batch // lanes)
    if batches == 0:
        raise ValueError(
            f"an epoch holds {int(sizes.sum())} samples in {lanes} lanes, too few for one global batch of "
            f"{global_batch}; use at most {fewest * lanes}"
        )
    return batches


def batches_in_epoch(layout: Layout, global_batch: int, *, seed: int, epoch: int) -> int:
    """Global batches that every lane can fill, the same on every rank; what is left over is not served in that epoch.

    Without weights (blocks equal to within one) it is the same in every epoch, whatever blocks a lane is dealt.

    Raises
    ------
    ValueError
        If the lanes do not divide the global batch, or cannot fill one, naming the nearest sizes that would do.
    """
    return _whole_batches(layout, global_batch, _deal(layout, seed=seed, epoch=epoch))


@dataclass(frozen=True)
class _Batches:
    """The batches of one plan: every `step`-th from `start` up to before `stop`, `share` samples of each lane in each."""

    share: int
    start: int
    stop: int
    step: int

    def last_use(self, local: np.ndarray, at: int, n_blocks: int) -> np.ndarray:
        """Last batch of the plan that uses each block of a round, (n_blocks,) int64, -1 where none does.

        local : (n,) int64. Block, numbered within the round, of samples `at`, at + 1, … of the lane in order served.
        """
        batch = np.arange(at, at + len(local)) // self.share
        used = (batch >= self.start) & (batch < self.stop)
        if self.step > 1:
            used &= (batch - self.start) % self.step == 0
        last = np.full(n_blocks, -1)
        last[local[used]] = batch[used]  # batches ascend, and of repeated positions the last assignment stays
        return last


class _Lane:
    """Where a lane stands in its sequence: the one round it is in, which was permuted when it was entered."""

    def __init__(self, layout: Layout, lane: int, blocks: np.ndarray, batches: _Batches, seed: int, epoch: int) -> None:
        self._blocks = blocks
        self._ends = np.cumsum(layout.block_samples[blocks])
        self._begins = self._ends - layout.block_samples[blocks]
        self._window = layout.window
        self._first = -(-layout.window * (lane + 1) // layout.lanes)  # staggers the rounds of the lanes
        self._stream = (seed, epoch, LANES + (lane << 32))
        self._batches = batches
        self._start = self._stop = 0  # of the round, in samples of the lane; before the first it is empty
        self._block = self._row = np.empty(0, np.int64)
        self._shared: int | None = None  # the block that goes on in the round after this one, if this one used it

    def take(self, batch: int, blocks: list[np.ndarray], rows: list[np.ndarray], done: dict[int, list[int]]) -> None:
        """Append the lane's samples of one batch to `blocks` and `rows`; batches must ascend.

        done : by batch, the blocks that are done after it; those of rounds that are entered are added.
        """
        at = batch * self._batches.share
        stop = at + self._batches.share
        while at < stop:
            if at >= self._stop:
                self._enter(at, batch, done)
            part = slice(at - self._start, stop - self._start)
            blocks.append(self._block[part])
            rows.append(self._row[part])
            at = self._stop

    def _enter(self, at: int, batch: int, done: dict[int, list[int]]) -> None:
        """Permute the round that sample `at` is in, and note when the plan is done with each of its blocks."""
        number = max(0, 1 + (at - self._first) // self._window)
        start = self._first + (number - 1) * self._window if number else 0
        stop = min(self._first + number * self._window, int(self._ends[-1]))
        low = int(np.searchsorted(self._ends, start, side="right"))
        high = int(np.searchsorted(self._ends, stop, side="left")) + 1
        blocks, begins, ends = self._blocks[low:high], self._begins[low:high], self._ends[low:high]
        inside = np.minimum(ends, stop) - np.maximum(begins, start)
        seed, epoch, item = self._stream
        order = permutation(stop - start, seed=seed, epoch=epoch, item=item + number)
        local = np.repeat(np.arange(len(blocks)), inside)[order]
        self._start, self._stop = start, stop
        self._block, self._row = blocks[local], order + start - begins[local]

        last = self._batches.last_use(local, start, len(blocks))
        if self._shared is not None and not (self._shared == blocks[0] and last[0] >= 0):
            done.setdefault(batch, []).append(self._shared)  # `step` passes by what is left of it
        # Only the last block can go on in the next round, and only if the plan goes on as well.
        goes_on = ends[-1] > stop and self._batches.stop * self._batches.share > stop and last[-1] >= 0
        self._shared = int(blocks[-1]) if goes_on else None
        for block, final in zip(blocks.tolist(), last.tolist(), strict=True):
            if final >= 0 and block != self._shared:
                done.setdefault(final, []).append(block)


def rank_plan(
    layout: Layout,
    *,
    seed: int,
    epoch: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    start_batch: int = 0,
    step: int = 1,
) -> Iterator[BatchPlan]:
    """Plan what one rank reads in one epoch, batch by batch; the parts of all ranks laid end to end are the global batch.

    start_batch : first batch planned. A late start costs one round of each lane; earlier rounds are not permuted.
    step : plan every `step`-th batch from there. Worker w of n starts at `start_batch` + w with step n.

    Raises
    ------
    ValueError
        At the call, before any batch, if lanes, processes and global batch do not fit, with the sizes that would.
    """
    lanes = rank_lanes(layout.lanes, rank, world_size)
    if start_batch < 0 or step < 1:
        raise ValueError(f"a plan starts at batch 0 or later in steps of at least 1, got {start_batch} and {step}")
    dealt = _deal(layout, seed=seed, epoch=epoch)
    n_batches = _whole_batches(layout, global_batch, dealt)
    # The plan stops after its own last batch, and then needs no block that later batches of others need.
    planned = range(start_batch, n_batches, step)
    batches = _Batches(global_batch // layout.lanes, start_batch, planned[-1] + 1 if planned else 0, step)
    return _plan([_Lane(layout, lane, dealt[lane], batches, seed, epoch) for lane in lanes], planned)


def _plan(lanes: list[_Lane], planned: range) -> Iterator[BatchPlan]:
    done: dict[int, list[int]] = {}
    for batch in planned:
        blocks: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        for lane in lanes:
            lane.take(batch, blocks, rows, done)
        yield BatchPlan(batch, np.concatenate(blocks), np.concatenate(rows), tuple(sorted(done.pop(batch, ()))))
