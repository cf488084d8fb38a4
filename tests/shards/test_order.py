"""Laws of the order: epochs are permutations, ranks and workers partition batches, plans start anywhere and let blocks go.

`reference_epoch` is the page docs/format_shards.md, "Order", written out in plain Python.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shards import order
from shards.order import Layout, batches_in_epoch, block_sizes, rank_lanes, rank_plan, sort_keys
from txfm_data.random_order import permutation

WORD = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def reference_permutation(n: int, seed: int, epoch: int, item: int) -> list[int]:
    key = mix((seed + GOLDEN) & WORD)
    key = mix(((key ^ epoch) + GOLDEN) & WORD)
    key = mix(((key ^ item) + GOLDEN) & WORD)
    return sorted(range(n), key=lambda i: mix((key + (i + 1) * GOLDEN) & WORD))


def reference_epoch(layout: Layout, seed: int, epoch: int) -> list[list[tuple[int, int]]]:
    """(block, row) of all samples of each lane, in order."""
    dealt = reference_permutation(len(layout.block_samples), seed, epoch, 2**62)
    lanes = []
    for lane in range(layout.lanes):
        left = [(block, row) for block in dealt[lane :: layout.lanes] for row in range(layout.block_samples[block])]
        size = -(-layout.window * (lane + 1) // layout.lanes)
        served, number = [], 0
        while left:
            samples, left = left[:size], left[size:]
            item = 2**61 + lane * 2**32 + number
            served += [samples[i] for i in reference_permutation(len(samples), seed, epoch, item)]
            size, number = layout.window, number + 1
        lanes.append(served)
    return lanes


def even_layout(n: int, block_rows: int, lanes: int, mix_blocks: int) -> Layout:
    sizes = block_sizes(n, block_rows, lanes)
    return Layout(sizes, lanes, mix_blocks, mix_blocks * int(sizes.max()))


def thinned(layout: Layout, share: float, seed: int = 0) -> Layout:
    """The layout of an epoch that serves about a share of the samples."""
    sizes = np.random.default_rng(seed).binomial(layout.block_samples, share)
    return Layout(sizes, layout.lanes, layout.mix_blocks, layout.window)


@st.composite
def layouts(draw: st.DrawFn, n_lanes: tuple[int, ...] = (1, 2, 4, 8)) -> tuple[Layout, int]:
    """A layout, thinned or not, and a global batch that it can fill at least once in epochs 0 to 3 of seed 5."""
    lanes = draw(st.sampled_from(n_lanes))
    layout = even_layout(draw(st.integers(16, 300)), draw(st.integers(2, 40)), lanes, draw(st.integers(1, 4)))
    if draw(st.booleans()):
        layout = thinned(layout, draw(st.sampled_from([0.2, 0.5, 0.9])), draw(st.integers(0, 9)))
    sizes, epochs = (
        layout.block_samples,
        [reference_permutation(len(layout.block_samples), 5, e, 2**62) for e in range(4)],
    )
    fewest = min(int(sizes[dealt[lane::lanes]].sum()) for dealt in epochs for lane in range(lanes))
    fewest = min(fewest, int(np.sort(sizes)[: layout.blocks_per_lane].sum()) or fewest)
    assume(fewest > 0)
    return layout, lanes * draw(st.integers(1, min(fewest, 20)))


def pairs(plan: order.BatchPlan) -> list[tuple[int, int]]:
    return list(zip(plan.block.tolist(), plan.row.tolist(), strict=True))


def epoch_pairs(layout: Layout, global_batch: int, *, seed: int = 5, epoch: int = 0) -> list[list[tuple[int, int]]]:
    """(block, row) of each global batch."""
    return [pairs(plan) for plan in rank_plan(layout, seed=seed, epoch=epoch, global_batch=global_batch)]


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


@given(case=layouts(), epoch=st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_batches_are_those_of_the_format_page(case, epoch):
    layout, global_batch = case
    share = global_batch // layout.lanes
    lanes = reference_epoch(layout, 5, epoch)
    batches = epoch_pairs(layout, global_batch, epoch=epoch)
    assert batches
    for t, batch in enumerate(batches):
        assert batch == [pair for lane in lanes for pair in lane[t * share : (t + 1) * share]]


@given(case=layouts(), epoch=st.integers(0, 3))
@settings(deadline=None)
def test_an_epoch_is_a_permutation_up_to_the_stated_remainder(case, epoch):
    layout, global_batch = case
    batches = epoch_pairs(layout, global_batch, epoch=epoch)
    served = Counter(pair for batch in batches for pair in batch)
    assert max(served.values()) == 1
    assert all(0 <= row < layout.block_samples[block] for block, row in served)
    assert {len(batch) for batch in batches} == {global_batch}
    assert len(batches) == batches_in_epoch(layout, global_batch, seed=5, epoch=epoch)
    remainder = int(layout.block_samples.sum()) - len(served)
    if np.ptp(layout.block_samples) <= 1 and layout.window == layout.mix_blocks * layout.block_samples.max():
        assert 0 <= remainder < global_batch + len(layout.block_samples)
    else:  # the poorest lane could not fill another batch, and nothing else ends an epoch
        poorest = min(len(lane) for lane in reference_epoch(layout, 5, epoch))
        assert 0 <= poorest - len(batches) * global_batch // layout.lanes < global_batch // layout.lanes


def test_epochs_and_seeds_differ_and_repeat_and_so_does_the_remainder():
    layout = even_layout(500, 20, 4, 2)
    everything = {(block, row) for block, n in enumerate(layout.block_samples) for row in range(n)}
    keys = [(0, 0), (0, 1), (0, 2), (1, 0)]
    epochs = {key: sum(epoch_pairs(layout, 48, seed=key[0], epoch=key[1]), []) for key in keys}
    left = {key: frozenset(everything - set(served)) for key, served in epochs.items()}
    assert len({tuple(served) for served in epochs.values()}) == len(keys)
    assert len(set(left.values())) == len(keys) and min(map(len, left.values())) > 0
    assert epochs[0, 0] == sum(epoch_pairs(layout, 48, seed=0, epoch=0), [])


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_epochs_are_equally_long_unless_weights_thin_them(share):
    layout = thinned(even_layout(1010, 7, 4, 2), share)
    for global_batch in (4, 8, 20):
        lengths = {batches_in_epoch(layout, global_batch, seed=3, epoch=epoch) for epoch in range(40)}
        assert (len(lengths) == 1) == (share == 1.0)


@given(case=layouts((4, 8)), epoch=st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_ranks_and_workers_share_the_same_global_batches(case, epoch):
    layout, global_batch = case
    whole = epoch_pairs(layout, global_batch, epoch=epoch)
    for world_size in (1, 2, 4):
        for step in (1, 3):
            ranks = []
            for rank in range(world_size):
                workers = [
                    rank_plan(
                        layout, seed=5, epoch=epoch, global_batch=global_batch,
                        rank=rank, world_size=world_size, start_batch=worker, step=step,
                    )
                    for worker in range(step)
                ]  # fmt: skip
                plans = sorted((plan for worker in workers for plan in worker), key=lambda plan: plan.batch)
                assert [plan.batch for plan in plans] == list(range(len(whole)))  # as many on every rank
                ranks.append([pairs(plan) for plan in plans])
            assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == whole


@given(case=layouts((4,)), epoch=st.integers(0, 3), step=st.sampled_from([1, 3]), world_size=st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=30)
def test_a_plan_starts_at_every_batch(case, epoch, step, world_size):
    layout, global_batch = case
    options = {"seed": 5, "epoch": epoch, "global_batch": global_batch, "rank": world_size - 1}
    whole = list(rank_plan(layout, **options, world_size=world_size))
    for start in range(len(whole) + 2):
        rest = list(rank_plan(layout, **options, world_size=world_size, start_batch=start, step=step))
        assert [plan.batch for plan in rest] == [plan.batch for plan in whole[start::step]]
        assert [pairs(plan) for plan in rest] == [pairs(plan) for plan in whole[start::step]]


def test_a_late_start_permutes_one_round_of_each_lane(monkeypatch):
    layout = even_layout(200_000, 50, 8, 4)
    last = batches_in_epoch(layout, 64, seed=0, epoch=0) - 1
    whole = list(rank_plan(layout, seed=0, epoch=0, global_batch=64))
    permuted = []
    permute = permutation

    def counting(n: int, *, seed: int, epoch: int, item: int) -> np.ndarray:
        permuted.append(n)
        return permute(n, seed=seed, epoch=epoch, item=item)

    monkeypatch.setattr(order, "permutation", counting)
    plans = list(rank_plan(layout, seed=0, epoch=0, global_batch=64, start_batch=last))
    assert [pairs(plan) for plan in plans] == [pairs(whole[-1])]
    assert permuted[0] == len(layout.block_samples)
    assert len(permuted) <= 1 + 2 * layout.lanes and max(permuted[1:]) <= layout.window


@given(
    case=layouts((1, 2, 4)), start=st.integers(0, 5), step=st.integers(1, 4), is_split=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_done_names_each_block_used_once_and_never_too_early(case, start, step, is_split):
    layout, global_batch = case
    world_size = layout.lanes if is_split else 1
    plans = list(
        rank_plan(
            layout, seed=5, epoch=1, global_batch=global_batch, world_size=world_size, start_batch=start, step=step
        )
    )
    last_use = {block: plan.batch for plan in plans for block in plan.block.tolist()}
    served = Counter(block for plan in plans for block in plan.block.tolist())
    done = {block: plan.batch for plan in plans for block in plan.done}
    assert sum(len(plan.done) for plan in plans) == len(done)
    assert done.keys() == last_use.keys()
    held: set[int] = set()
    for plan in plans:
        assert list(plan.done) == sorted(plan.done)
        held |= set(plan.block.tolist())
        held -= set(plan.done)
        if layout.block_samples.min() > 0:  # at most the blocks that one round of each lane overlaps
            of_a_round = (layout.window - 2) // int(layout.block_samples.min()) + 2
            assert len(held) <= layout.lanes // world_size * max(of_a_round, 1)
    assert not held
    for block, batch in done.items():
        assert batch >= last_use[block]
        if served[block] == layout.block_samples[block]:
            assert batch == last_use[block]


def test_lanes_do_not_need_new_blocks_at_the_same_moment():
    """Eight lanes whose rounds of 4 blocks last 32 batches; in step they would ask for 32 blocks within few batches."""
    layout = even_layout(8 * 40 * 32, 32, 8, 4)
    seen: set[int] = set()
    new = []
    for plan in rank_plan(layout, seed=2, epoch=0, global_batch=32):
        blocks = set(plan.block.tolist())
        new.append(len(blocks - seen))
        seen |= blocks
    assert len(seen) == len(layout.block_samples)
    assert max(new[1:]) <= 8
    windows = np.convolve(new[4:], np.ones(8), "valid")  # a block a lane in 8 batches, on average
    assert windows.max() <= 16


def apart(layout: Layout, global_batch: int) -> float:
    """Share of neighbours in a block that a lane serves within one batch, over four epochs."""
    together = total = 0
    for epoch in range(4):
        for lane in range(layout.lanes):
            of = {}
            plans = rank_plan(
                layout, seed=1, epoch=epoch, global_batch=global_batch, rank=lane, world_size=layout.lanes
            )
            for plan in plans:
                of.update(dict.fromkeys(pairs(plan), plan.batch))
            neighbours = [(of[pair], of[pair[0], pair[1] + 1]) for pair in of if (pair[0], pair[1] + 1) in of]
            together += sum(a == b for a, b in neighbours)
            total += len(neighbours)
    return together / total


def test_neighbours_of_a_block_do_not_travel_together():
    """Of 16 samples in rounds of 256, two meet in 15 of 255 cases; the first and last rounds are smaller, so allow half more."""
    expected = 15 / 255
    assert apart(even_layout(4 * 40 * 64, 64, 4, 4), 64) < 1.5 * expected
    assert apart(even_layout(4 * 40 * 64, 64, 4, 1), 64) > 3 * expected  # what the bound refuses: blocks left unmixed


@given(cuts=st.lists(st.integers(0, 200), max_size=4), n=st.integers(0, 200), seed=st.integers(0, 2**40))
@settings(deadline=None)
def test_sort_keys_of_pieces_give_the_permutation(cuts, n, seed):
    edges = sorted({0, n, *(cut for cut in cuts if cut < n)})
    pieces = [sort_keys(a, b, seed=seed, item=order.SHUFFLE) for a, b in zip(edges, edges[1:], strict=False)]
    keys = np.concatenate([np.empty(0, np.uint64), *pieces])
    whole = permutation(n, seed=seed, epoch=0, item=order.SHUFFLE)
    assert keys.dtype == np.uint64 and np.array_equal(np.argsort(keys, kind="stable"), whole)
    assert whole.tolist() == reference_permutation(n, seed, 0, 2**60)


def test_positions_far_into_a_stream_have_their_own_keys():
    far = sort_keys(10**10, 10**10 + 3, seed=1, item=order.KEEP)
    assert far.tolist() == [sort_keys(10**10 + i, 10**10 + i + 1, seed=1, item=order.KEEP)[0] for i in range(3)]
    assert far[0] == FAR_KEY


FAR_KEY = 2234555909858704422
PINNED = [0, 7, 2, 3, 4, 1, 6, 5]
# Two lanes of 8 blocks in rounds of 8 samples, 4 in the first of lane 0: block:row of lane 0, of lane 1, blocks that are done.
EPOCHS = {
    0: [
        "6:0 7:1 2:0 4:2 done",
        "7:0 7:2 3:0 4:0 done 7",
        "0:2 5:1 3:1 2:2 done",
        "5:0 0:0 2:1 4:1 done 2 4",
        "6:2 5:2 1:2 1:3 done 3 5",
        "6:1 0:1 1:1 1:0 done 0 1 6",
    ],
    1: [
        "2:0 7:0 6:2 6:0 done",
        "2:2 2:1 3:0 6:1 done 2 6",
        "1:1 0:3 4:0 4:1 done",
        "7:1 1:0 3:1 4:2 done 1 4",
        "0:0 0:1 5:2 3:2 done 3",
        "0:2 7:2 5:0 5:1 done 0 5 7",
    ],
}


def table_row(plan: order.BatchPlan) -> str:
    return " ".join([*(f"{block}:{row}" for block, row in pairs(plan)), "done", *map(str, plan.done)])


def test_orders_are_stable_across_releases():
    """A change here would silently change every resumed run."""
    assert permutation(8, seed=1, epoch=2, item=3).tolist() == PINNED
    layout = even_layout(26, 4, 2, 2)
    assert layout.block_samples.tolist() == [4, 4, 3, 3, 3, 3, 3, 3] and layout.window == 8
    for epoch, expected in EPOCHS.items():
        plans = rank_plan(layout, seed=7, epoch=epoch, global_batch=4)
        assert [table_row(plan) for plan in plans] == expected


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_lanes(world_size):
    assert sum((list(rank_lanes(4, rank, world_size)) for rank in range(world_size)), []) == [0, 1, 2, 3]


def test_sizes_that_do_not_fit_are_refused_with_sizes_that_do():
    layout = even_layout(64, 8, 4, 2)
    here = {"seed": 0, "epoch": 0}
    with pytest.raises(ValueError, match=r"6 samples .* multiple of 4, for example \[4, 8\]"):
        batches_in_epoch(layout, 6, **here)
    with pytest.raises(ValueError, match="64 samples in 4 lanes.*400; use at most 64"):
        batches_in_epoch(layout, 400, **here)
    with pytest.raises(ValueError, match=r"3 processes cannot share 4 lanes evenly; start one of \[1, 2, 4\]"):
        rank_lanes(4, 0, 3)
    with pytest.raises(ValueError, match="at least 2 samples"):
        block_sizes(64, 1, 4)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        rank_lanes(4, 2, 2)


def test_a_plan_is_refused_when_it_is_asked_for():
    """Not at its first batch: a run must not start and then fail."""
    layout = even_layout(64, 8, 4, 2)
    here = {"seed": 0, "epoch": 0}
    with pytest.raises(ValueError, match="multiple of 4"):
        rank_plan(layout, **here, global_batch=6)
    with pytest.raises(ValueError, match="use at most 64"):
        rank_plan(layout, **here, global_batch=68)
    with pytest.raises(ValueError, match=r"start one of \[1, 2, 4\]"):
        rank_plan(layout, **here, global_batch=8, world_size=3)
    with pytest.raises(ValueError, match="got -1 and 1"):
        rank_plan(layout, **here, global_batch=8, start_batch=-1)
    with pytest.raises(ValueError, match="got 0 and 0"):
        rank_plan(layout, **here, global_batch=8, step=0)


def test_layouts_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="3 blocks cannot be dealt to 2 lanes"):
        Layout(np.full(3, 4), 2, 2, 8)
    with pytest.raises(ValueError, match="0 blocks"):
        Layout(np.empty(0, np.int64), 2, 2, 8)
    with pytest.raises(ValueError, match="4 to 4 samples, 2 of them mixed in rounds of 3"):
        Layout(np.full(4, 4), 2, 2, 3)
    with pytest.raises(ValueError, match="0 of them mixed"):
        Layout(np.full(4, 4), 2, 0, 4)
    with pytest.raises(ValueError, match="holds 8 samples, and one of 2 lanes has none"):
        batches_in_epoch(Layout(np.array([8, 0]), 2, 2, 16), 2, seed=0, epoch=0)
