"""The pieces of a build, one by one: cuts of the shuffle, tasks, spills, sizes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import shuffle, spill
from shards.gather import _groups
from shards.order import SHUFFLE, block_sizes, sort_keys
from shards.packing import pack
from shards.samples import Column, read_samples
from shards.scatter import _order, sample_bytes
from shards.select import ShardConfig, select
from shards.shuffle import cut_keys, make_plan
from shards.spill import Field
from txfm_data.ragged import Ragged
from txfm_data.random_order import permutation
from txfm_data.store.opening import open_store


@given(n=st.integers(1, 5_000), seed=st.integers(0, 2**40), item=st.integers(0, 3), data=st.data())
@settings(max_examples=60, deadline=None)
def test_cut_keys_are_those_of_the_sorted_keys(n, seed, item, data):
    ranks = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=9))))
    keys = np.sort(sort_keys(0, n, seed=seed, item=item))
    np.testing.assert_array_equal(cut_keys(n, ranks, seed=seed, item=item), keys[ranks])


def test_cut_keys_are_found_piece_by_piece(monkeypatch):
    ranks = np.array([0, 1, 77, 3_000, 9_999])
    expected = cut_keys(10_000, ranks, seed=1, item=2)
    monkeypatch.setattr(shuffle, "_PIECE", 999)
    monkeypatch.setattr(shuffle, "_FINEST", 3)
    np.testing.assert_array_equal(cut_keys(10_000, ranks, seed=1, item=2), expected)


@given(
    n=st.integers(1, 400), n_tasks=st.integers(1, 9), lanes=st.integers(1, 4), block_rows=st.integers(2, 40),
    val=st.floats(0, 0.9), seed=st.integers(0, 99), blocks_per_shard=st.integers(1, 5),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_pieces_put_together_are_the_permutation(n, n_tasks, lanes, block_rows, val, seed, blocks_per_shard):
    """Tasks that sort what they have, cut at the keys of shards, give the order of the whole split."""
    is_val = np.random.default_rng(seed).random(n) < val
    edges = np.unique(np.linspace(0, n, n_tasks + 1).astype(int))
    for split in (False, True):
        members = np.flatnonzero(is_val == split)
        if len(members) < lanes:
            continue
        sizes = block_sizes(len(members), block_rows, lanes)
        starts = np.concatenate([[0], np.cumsum(sizes)])[:-1][::blocks_per_shard]
        cuts = cut_keys(len(members), starts, seed=seed, item=SHUFFLE + split)
        shards: list[list[int]] = [[] for _ in cuts]
        keys_of: list[list[int]] = [[] for _ in cuts]
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            mine = np.flatnonzero(is_val[low:high] == split)
            first = int((is_val[:low] == split).sum())
            keys = sort_keys(first, first + len(mine), seed=seed, item=SHUFFLE + split)
            order = np.argsort(keys)
            bounds = [*np.searchsorted(keys[order], cuts), len(mine)]
            for number in range(len(cuts)):
                rows = order[bounds[number] : bounds[number + 1]]
                shards[number] += (low + mine[rows]).tolist()
                keys_of[number] += keys[rows].tolist()
        got = [
            shard[i] for shard, keys in zip(shards, keys_of, strict=True) for i in np.argsort(np.array(keys, np.uint64))
        ]
        assert got == members[permutation(len(members), seed=seed, epoch=0, item=SHUFFLE + split)].tolist()


@st.composite
def samples(draw) -> Ragged:
    """Ragged samples with gaps and counts that need escapes, some empty, some not whole."""
    rows = draw(st.lists(st.lists(st.integers(0, 3_000), max_size=12, unique=True), max_size=12))
    is_real = draw(st.booleans())
    value = st.floats(0.01, 1e9, allow_subnormal=False) if is_real else st.integers(1, 2**32 - 1)
    genes = [sorted(row) for row in rows]
    counts = [draw(st.lists(value, min_size=len(row), max_size=len(row))) for row in genes]
    indptr = np.cumsum([0, *map(len, genes)]).astype(np.int64)
    dtype = np.float64 if is_real else np.uint32
    return Ragged(indptr, np.array(sum(genes, []), np.uint16), np.array(sum(counts, []), dtype))


@given(ragged=samples(), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_what_is_spilled_comes_back_in_any_order(ragged, seed):
    packed, n = pack(ragged), len(ragged)
    records = np.zeros(n, spill.record_type([Field("batch", "string")]))
    spill.set_lengths(records, packed)
    words = spill.n_words(records)
    laid = np.empty(int(words.sum()), np.uint64)
    spill.lay(packed, words, laid)
    starts = np.cumsum(words) - words
    order = np.random.default_rng(seed).permutation(n)
    out, checks = np.empty_like(laid), np.empty(n, np.uint64)
    spill.arrange(laid, starts, words, order, out, checks)
    arranged = words[order]
    begins = np.cumsum(arranged) - arranged
    assert spill.first_damaged(out, begins, arranged, checks) == -1
    again = spill.lift(out, begins[np.argsort(order)], records)
    for found, expected in zip(again.arrays, packed.arrays, strict=True):
        np.testing.assert_array_equal(found, expected)
    nnz, sums = (
        np.diff(ragged.indptr),
        np.add.reduceat(np.append(ragged.counts, 0.0), ragged.indptr[:-1]) if n else np.empty(0),
    )
    assert (8 * words <= sample_bytes(nnz, sums, is_real=ragged.counts.dtype.kind == "f") + 8).all()


def test_a_flipped_bit_or_exchanged_words_show():
    words, out, checks = np.array([3, 2]), np.empty(5, np.uint64), np.empty(2, np.uint64)
    source = np.array([1, 2, 3, 4, 5], np.uint64)
    spill.arrange(source, np.array([0, 3]), words, np.array([0, 1]), out, checks)
    for at in range(5):
        for bit in (0, 31, 63):
            wrong = out.copy()
            wrong[at] ^= np.uint64(1 << bit)
            assert spill.first_damaged(wrong, np.array([0, 3]), words, checks) == (0 if at < 3 else 1)
    assert spill.first_damaged(out[[1, 0, 2, 3, 4]], np.array([0, 3]), words, checks) == 0


def test_a_spill_that_is_cut_or_unfinished_is_none(tmp_path):
    records = np.zeros(3, spill.record_type([]))
    records["key"] = [1, 5, 3]
    path = spill.spill_path(tmp_path, 7)
    cuts = (np.array([0, 4], np.uint64), np.array([0], np.uint64))
    assert spill.finished_spill(path) is None
    spill.write_spill(path, np.empty(0, np.uint64), records, np.ones((3, 4)), 2, cuts)
    written = spill.finished_spill(path)
    assert [part.tolist() for part in written.rows] == [[0, 1, 2], [2, 3]] and written.n_samples == (2, 1)
    np.testing.assert_array_equal(spill.read_sums(path, written, records.itemsize), np.ones((3, 4)))
    path.write_bytes(path.read_bytes()[:-1])
    assert spill.finished_spill(path) is None
    with pytest.raises(ValueError, match="is not what pass 1 wrote"):
        spill.read_sums(path, written, records.itemsize)


@given(words=st.lists(st.integers(0, 50), min_size=1, max_size=60), room=st.integers(0, 200), block=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_groups_cover_all_blocks_and_fit_if_they_can(words, room, block):
    starts = np.array([*range(0, len(words), block), len(words)])
    groups = list(_groups(np.array(words), starts, room))
    assert [low for low, _ in groups] == [0, *[high for _, high in groups[:-1]]] and groups[-1][1] == len(starts) - 1
    for low, high in groups:
        assert high > low
        assert high == low + 1 or sum(words[starts[low] : starts[high]]) <= room


def test_train_samples_come_before_val_samples_each_by_key():
    keys = np.array([5, 1, 9, 2, 7], np.uint64)
    np.testing.assert_array_equal(_order(keys, np.array([True, False, False, True, False])), [1, 4, 2, 3, 0])


def plan_of(store, **config):
    opened, settings_ = open_store(store), ShardConfig(**config)
    return make_plan(opened, select(opened, settings_), settings_)


def test_tasks_cover_every_sample_of_one_dataset_each(known_zarr, monkeypatch):
    for name in ("_SMALLEST_TASK", "_LARGEST_TASK"):
        monkeypatch.setattr(shuffle, name, 700)
    plan = plan_of(known_zarr, block_rows=8)
    covered = np.concatenate([np.arange(low, high) for _, low, high in plan.tasks])
    np.testing.assert_array_equal(covered, np.arange(93))
    assert len(plan.tasks) > 9
    for dataset, low, high in plan.tasks:
        assert plan.samples.starts[dataset] <= low < high <= plan.samples.starts[dataset + 1]
        most = sample_bytes(plan.samples.nnz[low:high], plan.samples.library_size[low:high], is_real=False)
        assert most.sum() <= 700 or high == low + 1


def test_the_key_of_a_plan_is_that_of_its_bytes(known_zarr, known_store):
    base = {"block_rows": 8, "lanes": 2, "obs_columns": ("age",)}
    key = plan_of(known_zarr, **base).key
    assert plan_of(known_store, **base).key == key == plan_of(known_zarr, **base, weights={"first": 1.0}).key
    for change in (
        {"seed": 1}, {"block_rows": 9}, {"lanes": 1}, {"obs_columns": ()}, {"weights": {"first": 0.5}}, {"min_cells": 5},
        {"datasets": ("first",)}, {"val_batches": 0.5}, {"shard_bytes": 2**20}, {"mix_blocks": 3}, {"target_sum": 1e4},
    ):  # fmt: skip
        assert plan_of(known_zarr, **(base | change)).key != key, change


def test_the_estimate_of_a_shard_is_that_of_geometric_counts():
    assert shuffle._geometric_bits(1.0) == 0 and shuffle._geometric_bits(2.0) == pytest.approx(2.0)
    values = np.arange(1, 4_000)
    p = 0.05 * 0.95 ** (values - 1)
    assert shuffle._geometric_bits(20.0) == pytest.approx(float(-(p * np.log2(p)).sum()), rel=1e-6)


def test_labels_are_read_from_obs_in_any_order(known_store, known_zarr):
    """TileDB promises no order; texts get the same codes as from Zarr, where rows ascend."""
    config = ShardConfig(
        obs_columns=("tissue", "age", "is_control", "raw_mean_nnz", "note"), datasets=("third", "first")
    )
    tables = []
    for address in (known_store, known_zarr):
        store = open_store(address)
        tables.append(read_samples(store, select(store, config), config))
    assert tables[0].digest() == tables[1].digest() and tables[0].n_bytes > 62 * 40
    note: Column = tables[0].columns[4]
    assert list(note.texts) == sorted(f"note {i}" for i in range(40))
    assert (note.values[:22] == -1).all() and note.texts[note.values[22 + 7]] == "note 7"
    age: Column = tables[0].columns[1]
    assert age.values[:3].tolist() == [0, 3, 6] and age.is_missing is not None and age.is_missing[22:].all()
    assert math.isnan(tables[0].columns[3].values[0]) or tables[0].columns[3].values[0] > 0


def test_an_identifier_is_no_label(known_zarr, monkeypatch):
    from shards import samples as module

    monkeypatch.setattr(module, "MAX_TEXTS", 30)
    store, config = open_store(known_zarr), ShardConfig(obs_columns=("note",))
    with pytest.raises(ValueError, match="'note' has more than 30 values; blocks carry labels, not identifiers"):
        read_samples(store, select(store, config), config)
