"""The order of samples as a pure function of (corpus, seed, epoch): which rows each lane gives, one after the other.

Nothing here reads a file. Permutations sort a hash of the position, so they do not depend on any library's
random generator. Blocks are permuted, then dealt to lanes in turn; a lane takes its blocks `mix_blocks` at a time
and permutes their samples together, so that neighbours of a block do not travel together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from txfm_data import kernels

# Streams of the hash that are not masks; sample ids stay below all of them.
_BLOCKS = 2**62
_LANES = 2**61
SHUFFLE = 2**60


@dataclass(frozen=True)
class Layout:
    """How the samples of a split lie in blocks.

    block_samples : (n_blocks,) int64. Samples of each block; sizes differ by one at most.
    lanes : independent sequences that the blocks are dealt to; divides the number of blocks.
    mix_blocks : blocks whose samples a lane permutes together.
    """

    block_samples: np.ndarray
    lanes: int
    mix_blocks: int

    @property
    def blocks_per_lane(self) -> int:
        """Blocks that each lane gets in an epoch."""
        return len(self.block_samples) // self.lanes


def permutation(n: int, *, seed: int, epoch: int, item: int) -> np.ndarray:
    """Random order of 0..n-1, (n,) int64, from the hash stream (seed, epoch, item)."""
    keys = np.empty(n, np.uint64)
    kernels.hash_range(seed, epoch, item, keys)
    return np.argsort(keys, kind="stable")


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


def lane_windows(layout: Layout, lane: int, *, seed: int, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows of one lane in order: (block numbers, order of the samples of those blocks laid end to end)."""
    dealt = permutation(len(layout.block_samples), seed=seed, epoch=epoch, item=_BLOCKS)[lane :: layout.lanes]
    for window, start in enumerate(range(0, len(dealt), layout.mix_blocks)):
        blocks = dealt[start : start + layout.mix_blocks]
        n = int(layout.block_samples[blocks].sum())
        yield blocks, permutation(n, seed=seed, epoch=epoch, item=_LANES + (lane << 32) + window)


def batches_per_epoch(layout: Layout, global_batch: int) -> int:
    """Whole global batches that every lane can serve in any epoch; what is left over is not served in that epoch.

    Raises
    ------
    ValueError
        If the lanes do not divide the global batch, naming the nearest sizes that would do.
    """
    lanes = layout.lanes
    if global_batch < 1 or global_batch % lanes:
        near = sorted({max(lanes, global_batch // lanes * lanes), (global_batch // lanes + 1) * lanes})
        raise ValueError(
            f"a global batch of {global_batch} samples cannot be shared by {lanes} lanes; "
            f"use a multiple of {lanes}, for example {near}"
        )
    fewest = layout.blocks_per_lane * int(layout.block_samples.min())
    batches = fewest // (global_batch // lanes)
    if batches == 0:
        raise ValueError(
            f"an epoch holds {int(layout.block_samples.sum())} samples in {lanes} lanes, too few for one global batch of "
            f"{global_batch}; use at most {fewest * lanes}"
        )
    return batches


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
