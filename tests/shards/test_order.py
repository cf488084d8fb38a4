"""Laws of the order: epochs are permutations, ranks partition batches, nothing depends on the layout of processes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.order import Layout, batches_per_epoch, block_sizes, lane_windows, permutation, rank_lanes


def epoch_rows(layout: Layout, *, seed: int, epoch: int) -> list[np.ndarray]:
    """Global row numbers that each lane gives, in order."""
    starts = np.cumsum(layout.block_samples) - layout.block_samples
    lanes = []
    for lane in range(layout.lanes):
        rows = []
        for blocks, order in lane_windows(layout, lane, seed=seed, epoch=epoch):
            inside = np.concatenate([starts[b] + np.arange(layout.block_samples[b]) for b in blocks])
            rows.append(inside[order])
        lanes.append(np.concatenate(rows))
    return lanes


@given(n=st.integers(1, 400), block_rows=st.integers(2, 50), lanes=st.sampled_from([1, 2, 4, 8]))
@settings(deadline=None)
def test_blocks_cut_all_samples_evenly(n, block_rows, lanes):
    if n < lanes:
        with pytest.raises(ValueError, match="at most"):
            block_sizes(n, block_rows, lanes)
        return
    sizes = block_sizes(n, block_rows, lanes)
    assert sizes.sum() == n and len(sizes) % lanes == 0
    assert 1 <= sizes.min() and sizes.max() <= block_rows and sizes.max() - sizes.min() <= 1


@given(
    n=st.integers(16, 300), block_rows=st.integers(2, 40), lanes=st.sampled_from([1, 2, 4, 8]), mix=st.integers(1, 4),
    seed=st.integers(0, 99), epoch=st.integers(0, 5),
)  # fmt: skip
@settings(deadline=None)
def test_an_epoch_visits_every_sample_once(n, block_rows, lanes, mix, seed, epoch):
    layout = Layout(block_sizes(n, block_rows, lanes), lanes, mix)
    rows = np.concatenate(epoch_rows(layout, seed=seed, epoch=epoch))
    assert np.array_equal(np.sort(rows), np.arange(n))


def test_epochs_and_seeds_differ_and_repeat():
    layout = Layout(block_sizes(500, 20, 4), 4, 2)
    rows = {key: np.concatenate(epoch_rows(layout, seed=key[0], epoch=key[1])) for key in [(0, 0), (0, 1), (1, 0)]}
    assert not np.array_equal(rows[0, 0], rows[0, 1]) and not np.array_equal(rows[0, 0], rows[1, 0])
    assert np.array_equal(rows[0, 0], np.concatenate(epoch_rows(layout, seed=0, epoch=0)))


@given(global_batch=st.sampled_from([4, 8, 12]), epoch=st.integers(0, 20))
@settings(deadline=None)
def test_every_lane_serves_the_promised_batches_in_every_epoch(global_batch, epoch):
    layout = Layout(block_sizes(101, 7, 4), 4, 2)
    step = global_batch // 4
    promised = batches_per_epoch(layout, global_batch)
    assert min(len(lane) for lane in epoch_rows(layout, seed=3, epoch=epoch)) >= promised * step
    assert promised * global_batch > 101 - global_batch - 4 * layout.blocks_per_lane


def test_permutations_are_stable_across_releases():
    """A change here would silently change every resumed run."""
    assert permutation(8, seed=1, epoch=2, item=3).tolist() == PINNED


PINNED = [0, 7, 2, 3, 4, 1, 6, 5]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_lanes(world_size):
    assert sum((list(rank_lanes(4, rank, world_size)) for rank in range(world_size)), []) == [0, 1, 2, 3]


def test_sizes_that_do_not_fit_are_refused_with_sizes_that_do():
    layout = Layout(block_sizes(64, 8, 4), 4, 2)
    with pytest.raises(ValueError, match=r"multiple of 4, for example \[4, 8\]"):
        batches_per_epoch(layout, 6)
    with pytest.raises(ValueError, match="use at most 64"):
        batches_per_epoch(layout, 400)
    with pytest.raises(ValueError, match=r"start one of \[1, 2, 4\]"):
        rank_lanes(4, 0, 3)
    with pytest.raises(ValueError, match="at least 2 samples"):
        block_sizes(64, 1, 4)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        rank_lanes(4, 2, 2)
