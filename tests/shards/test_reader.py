"""Ragged batches: what the plan says, holding what the samples hold, whatever ranks, steps and threads."""

import dataclasses
import itertools
import shutil
import threading

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import order, reader
from shards.blocks import BlockReader
from shards.manifest import SPLITS, TRAIN_SAMPLES, Corpus
from shards.packing import pack
from shards.reader import RaggedBatch, epoch_layout, ragged_batches, train_batches, val_batches
from tests.shards.corpus_maker import Plan, make_corpus, reseal, sample_of, write_shards
from txfm_data.kernels import keep_samples
from txfm_data.ragged import Ragged

PER_DATASET, BATCH_ROWS = 56, 14
WEIGHTS = Plan(datasets=3, batch_rows=120, block_rows=50, weights=(0.5, 1.0, 0.125))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return Corpus(make_corpus(tmp_path_factory.mktemp("reader") / "plain"))


@pytest.fixture(scope="module")
def weighted(tmp_path_factory) -> Corpus:
    return Corpus(make_corpus(tmp_path_factory.mktemp("reader") / "weighted", WEIGHTS))


def has_fraction(sample_id: int) -> bool:
    return sample_id % 3 == 0


@pytest.fixture(scope="module")
def fractional(tmp_path_factory) -> Corpus:
    """Every third sample has a quarter more than its counts; there is a column of obs, the sample id itself."""
    folder = make_corpus(tmp_path_factory.mktemp("reader") / "fractional")
    plain = Corpus(folder)
    schema = dataclasses.replace(plain.schema, has_fractions=True, obs_columns={"age": "int64"})
    splits = {}
    for split in SPLITS:
        blocks = []
        for number in range(len(plain.blocks(split))):
            block = BlockReader(plain, split).read(number)
            samples = block.samples()
            more = np.repeat(np.where(has_fraction(block.sample_id), 0.25, 0.0), np.diff(samples.indptr))
            packed = pack(Ragged(samples.indptr, samples.gene_ids, samples.counts + more))
            obs = block.obs.append_column("age", pa.array(block.sample_id))
            blocks.append(dataclasses.replace(block, packed=packed, obs=obs))
        splits[split] = write_shards(folder, split, blocks, schema, 4)
    reseal(folder, splits=splits, has_fractions=True, obs_columns={"age": "int64"})
    return Corpus(folder)


def check_samples(batch: RaggedBatch, per_dataset: int = PER_DATASET, more: float = 0.0) -> None:
    """Every sample of a batch is what its id says."""
    for i, (sample_id, dataset) in enumerate(zip(batch.sample_id.tolist(), batch.dataset.tolist(), strict=True)):
        assert dataset == batch.panel_id[i] == sample_id // per_dataset
        assert batch.library_size[i] == 1.0 + sample_id
        expected = sample_of(sample_id, dataset)
        found = slice(batch.samples.indptr[i], batch.samples.indptr[i + 1])
        np.testing.assert_array_equal(batch.samples.gene_ids[found], expected.gene_ids)
        np.testing.assert_array_equal(batch.samples.counts[found], expected.counts + more * has_fraction(sample_id))


def ids_of(batches) -> list[list[int]]:
    return [batch.sample_id.tolist() for batch in batches]


def stored_ids(corpus: Corpus, split: str = "train") -> list[np.ndarray]:
    blocks = BlockReader(corpus, split)
    return [blocks.read(number).sample_id for number in range(len(blocks))]


@settings(max_examples=30, deadline=None)
@given(
    share=st.integers(1, 4), epoch=st.integers(0, 3), world_size=st.sampled_from([1, 2, 4]), start=st.integers(0, 12),
    step=st.integers(1, 4), threads=st.sampled_from([None, 1, 3]),
)  # fmt: skip
def test_batches_are_those_of_the_plan(corpus, share, epoch, world_size, start, step, threads):
    ids = stored_ids(corpus)
    for rank in range(world_size):
        where = {"seed": 9, "epoch": epoch, "global_batch": 4 * share, "rank": rank, "world_size": world_size}
        where |= {"start_batch": start, "step": step}
        served = 0
        plans = order.rank_plan(corpus.layout, **where)
        for batch, plan in zip(train_batches(corpus, **where, threads=threads), plans, strict=True):
            assert batch.number == plan.batch == start + served * step
            expected = [ids[block][row] for block, row in zip(plan.block, plan.row, strict=True)]
            assert batch.sample_id.tolist() == expected
            assert batch.samples.counts.dtype == np.uint32
            check_samples(batch)
            served += 1


def test_an_epoch_is_a_permutation_of_the_split_up_to_a_remainder_that_differs(corpus):
    everything = set(np.concatenate(stored_ids(corpus)).tolist())
    left = []
    for epoch in range(6):
        ids = list(itertools.chain(*ids_of(train_batches(corpus, seed=0, epoch=epoch, global_batch=16))))
        assert len(ids) == len(set(ids)) == 80 and set(ids) < everything
        left.append(frozenset(everything - set(ids)))
    assert len(everything) == 84
    assert len(set(left)) > 1


def test_order_differs_between_epochs_and_seeds_and_repeats_itself(corpus):
    orders = {
        (seed, epoch): str(ids_of(train_batches(corpus, seed=seed, epoch=epoch, global_batch=8)))
        for seed in range(3) for epoch in range(3)
    }  # fmt: skip
    assert len(set(orders.values())) == 9
    assert str(ids_of(train_batches(corpus, seed=1, epoch=2, global_batch=8))) == orders[1, 2]


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_val_split_is_served_once_as_stored(corpus, world_size):
    whole = list(itertools.chain(*(block.tolist() for block in stored_ids(corpus, "val"))))
    ranks = [list(val_batches(corpus, batch_size=5, rank=r, world_size=world_size)) for r in range(world_size)]
    for batch in itertools.chain(*ranks):
        check_samples(batch)
        assert batch.sample_id.tolist() == whole[5 * batch.number : 5 * batch.number + 5]
    assert sorted(batch.number for batch in itertools.chain(*ranks)) == list(range(6))


@settings(max_examples=20, deadline=None)
@given(batch_size=st.integers(1, 100), shuffle=st.booleans(), split=st.sampled_from(SPLITS), threads=st.integers(0, 3))
def test_ragged_batches_serve_every_sample_once_the_remainder_too(corpus, batch_size, shuffle, split, threads):
    stored = list(itertools.chain(*(block.tolist() for block in stored_ids(corpus, split))))
    batches = list(ragged_batches(corpus, split, batch_size=batch_size, shuffle=shuffle, threads=threads))
    for batch in batches:
        check_samples(batch)
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    ids = list(itertools.chain(*ids_of(batches)))
    assert sorted(ids) == sorted(stored)
    assert (ids == stored) != shuffle


def test_shuffled_ragged_batches_differ_by_epoch_and_seed(corpus):
    found = {
        (seed, epoch): str(ids_of(ragged_batches(corpus, batch_size=32, shuffle=True, seed=seed, epoch=epoch)))
        for seed in range(2) for epoch in range(2)
    }  # fmt: skip
    assert len(set(found.values())) == 4
    assert str(ids_of(ragged_batches(corpus, batch_size=32, shuffle=True))) == found[0, 0]


def test_obs_comes_along_in_order(fractional):
    for batches in (
        train_batches(fractional, seed=1, epoch=1, global_batch=8, with_obs=True),
        ragged_batches(fractional, "val", batch_size=9, with_obs=True),
        ragged_batches(fractional, batch_size=9, shuffle=True, with_obs=True),
    ):
        for batch in batches:
            assert batch.obs["age"].to_pylist() == batch.sample_id.tolist()
            assert batch.obs["batch"].to_pylist() == [f"b{i % PER_DATASET // BATCH_ROWS}" for i in batch.sample_id]
    assert next(ragged_batches(fractional, batch_size=9)).obs is None


def test_values_that_are_not_whole_are_float64_throughout(fractional):
    n_whole = 0
    for batch in train_batches(fractional, seed=0, epoch=0, global_batch=4):
        assert batch.samples.counts.dtype == np.float64
        check_samples(batch, more=0.25)
        n_whole += not has_fraction(batch.sample_id).any()
    assert n_whole > 0


def test_weights_serve_that_share_of_each_dataset_and_other_samples_each_epoch(weighted):
    per_dataset = WEIGHTS.batches * WEIGHTS.batch_rows
    stored = np.concatenate(stored_ids(weighted))
    n_train = np.bincount(stored // per_dataset)
    served = []
    for epoch in range(8):
        kept = np.empty(len(stored), bool)
        keep_samples(5, epoch, stored, np.array(WEIGHTS.weights)[stored // per_dataset], kept)
        layout = epoch_layout(weighted, seed=5, epoch=epoch)
        assert layout.window == weighted.layout.window and layout.block_samples.sum() == kept.sum()
        batches = list(train_batches(weighted, seed=5, epoch=epoch, global_batch=16, threads=2))
        for batch in batches[::5]:
            check_samples(batch, per_dataset)
        ids = list(itertools.chain(*ids_of(batches)))
        assert len(ids) == 16 * order.batches_in_epoch(layout, 16, seed=5, epoch=epoch) == len(set(ids))
        assert set(ids) <= set(stored[kept].tolist())
        assert len(ids) > 0.85 * kept.sum()
        served.append(np.bincount(stored[kept] // per_dataset, minlength=3))
    share = np.sum(served, axis=0) / (8 * n_train)
    weight = np.array(WEIGHTS.weights)
    assert (np.abs(share - weight) <= 4 * np.sqrt(weight * (1 - weight) / (8 * n_train))).all()
    assert len({tuple(counts) for counts in served}) > 1


def test_weights_are_counted_in_pieces_as_at_once(weighted, monkeypatch):
    whole = epoch_layout(weighted, seed=2, epoch=3)
    for chunk in (1, 7, 64, 10_000):
        monkeypatch.setattr(reader, "_CHUNK", chunk)
        np.testing.assert_array_equal(epoch_layout(weighted, seed=2, epoch=3).block_samples, whole.block_samples)


def test_raw_batches_leave_weights_aside(weighted):
    ids = list(itertools.chain(*ids_of(ragged_batches(weighted, batch_size=100, shuffle=True))))
    assert len(ids) == weighted.n_samples("train") == len(set(ids))


def test_a_table_of_other_samples_is_refused(weighted, tmp_path):
    folder = shutil.copytree(weighted.path, tmp_path / "copy")
    with pa.OSFile(str(folder / TRAIN_SAMPLES), "rb") as source:
        table = pa.ipc.open_file(source).read_all()
    table = table.set_column(1, "dataset", pa.array(np.roll(table["dataset"].to_numpy(), 1)))
    with pa.OSFile(str(folder / TRAIN_SAMPLES), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    reseal(folder)
    with pytest.raises(ValueError, match=f"{TRAIN_SAMPLES}: says that epoch 0 serves .* of another corpus"):
        list(train_batches(Corpus(folder), seed=5, epoch=0, global_batch=16))


def test_damage_is_an_error_and_threads_end(corpus, tmp_path):
    folder = shutil.copytree(corpus.path, tmp_path / "copy")
    damaged = Corpus(folder)
    name, entry = damaged.blocks("train")[5]
    data = bytearray((folder / name).read_bytes())
    data[entry.offset + 700] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(ValueError, match=f"{name}: block at byte {entry.offset}: .*damaged"):
        list(train_batches(damaged, seed=0, epoch=0, global_batch=8, threads=3))
    early = train_batches(damaged, seed=0, epoch=0, global_batch=8, threads=3)
    early.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("txfm")]


def test_settings_that_cannot_be_are_refused_at_the_call(corpus):
    with pytest.raises(ValueError, match="6 samples cannot be shared by 4 lanes; use a multiple of 4, for example"):
        train_batches(corpus, seed=0, epoch=0, global_batch=6)
    with pytest.raises(ValueError, match=r"3 processes cannot share 4 lanes evenly; start one of \[1, 2, 4\]"):
        train_batches(corpus, seed=0, epoch=0, global_batch=8, world_size=3)
    with pytest.raises(ValueError, match="too few for one global batch of 400; use at most 84"):
        train_batches(corpus, seed=0, epoch=0, global_batch=400)
    with pytest.raises(ValueError, match="threads must be 0 or more, got -1"):
        ragged_batches(corpus, batch_size=8, threads=-1)
    with pytest.raises(ValueError, match="batch_size must be at least 1 sample, got 0"):
        ragged_batches(corpus, batch_size=0)
    with pytest.raises(ValueError, match="rank 2 of 2 processes does not exist"):
        val_batches(corpus, batch_size=8, rank=2, world_size=2)
    with pytest.raises(ValueError, match="split 'test' does not exist"):
        ragged_batches(corpus, "test", batch_size=8)


class Fetched:
    """Loads blocks as the reader does, and remembers which and when."""

    def __init__(self, corpus: Corpus) -> None:
        self.blocks = BlockReader(corpus, "train")
        self.numbers: list[int] = []

    def __call__(self, number: int) -> reader._Loaded:
        self.numbers.append(number)
        return reader._load(self.blocks, None, number)


@pytest.mark.parametrize(("rank", "world_size", "step"), [(0, 1, 1), (1, 2, 1), (0, 1, 3)])
def test_blocks_are_read_once_in_order_of_need_and_held_no_longer(corpus, rank, world_size, step):
    sizes = corpus.layout.block_samples
    plan = {"seed": 4, "epoch": 0, "global_batch": 4, "rank": rank, "world_size": world_size, "step": step}
    held, load = reader._Held(sizes, np.uint32, reader.BufferPool()), Fetched(corpus)
    plans = order.rank_plan(corpus.layout, **plan)
    most = 0
    for _ in reader._serve(held, plans, load, sizes, 1, with_obs=False):
        most = max(most, len(held._blocks))
    needed = list(dict.fromkeys(itertools.chain(*(p.block.tolist() for p in order.rank_plan(corpus.layout, **plan)))))
    assert load.numbers == needed
    assert most <= 3 * corpus.lanes // world_size  # two blocks a round, and one that two rounds share
    assert held._blocks == {}


def test_a_consumer_that_waits_has_few_blocks_read_ahead(corpus):
    sizes = corpus.layout.block_samples
    load = Fetched(corpus)
    plans = order.rank_plan(corpus.layout, seed=0, epoch=0, global_batch=4, rank=0, world_size=4)
    looked = reader._look_ahead(plans, len(sizes), 1, lambda number: load.numbers.append(number))
    first, fetched = next(looked)
    assert set(first.block.tolist()) == fetched.keys()
    assert len(load.numbers) == len(fetched) + 1
    assert len(list(looked)) == 20 and len(load.numbers) == 3


def test_buffers_are_used_again_and_a_batch_that_is_kept_stays_as_it_was(tmp_path):
    big = Corpus(make_corpus(tmp_path / "big", Plan(datasets=1, batch_rows=2000, batches=3, block_rows=1000)))

    def where(batch: RaggedBatch) -> int:
        return batch.samples.counts.__array_interface__["data"][0]

    settings = {"seed": 0, "epoch": 0, "global_batch": 800}
    places = [where(batch) for batch in train_batches(big, **settings)]
    assert len(places) == 5 and len(set(places)) <= 2
    kept = list(train_batches(big, **settings))
    assert len({where(batch) for batch in kept}) == 5
    for batch in kept:
        check_samples(batch, 6000)
