"""Building shards from a real store and reading them back: contents, splits, bytes, damage."""

import json
import shutil
import zlib
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import webdataset

from shards import codec
from shards.manifest import Corpus
from shards.reader import BlockReader, join
from shards.select import ShardConfig, hold_out, select
from shards.writer import build_shards
from txfm_data.ragged import Ragged
from txfm_data.store.opening import open_store


def all_blocks(corpus: Corpus, split: str) -> codec.Block:
    reader = BlockReader(corpus, split)
    return join([reader.read(i) for i in range(len(corpus.blocks(split)))])


def test_every_sample_is_there_once_with_its_counts(tiny_shards, tiny_files):
    corpus = Corpus(tiny_shards)
    blocks = join([all_blocks(corpus, "train"), all_blocks(corpus, "val")])
    assert np.array_equal(np.sort(blocks.sample_id), np.arange(112))
    offset = 0
    for number, path in enumerate(tiny_files):
        adata = ad.read_h5ad(path)
        token = corpus.vocabulary.index_of(adata.var_names)
        for row in np.flatnonzero(blocks.dataset == number):
            source = blocks.sample_id[row] - offset
            dense = np.zeros(len(corpus.vocabulary))
            part = slice(blocks.samples.indptr[row], blocks.samples.indptr[row + 1])
            dense[blocks.samples.gene_ids[part]] = blocks.samples.counts[part]
            counts = np.asarray(adata[source].X.todense() if hasattr(adata.X, "todense") else adata[source].X).ravel()
            np.testing.assert_array_equal(dense[token], counts)
            assert blocks.library_size[row] == counts.sum()
            assert blocks.batch[row] == adata.obs["batch"].iloc[source]
        offset += adata.n_obs


def test_whole_batches_are_held_out_of_every_dataset(tiny_shards):
    corpus = Corpus(tiny_shards)
    train, val = all_blocks(corpus, "train"), all_blocks(corpus, "val")
    for entry in corpus.manifest.datasets:
        held = set(val.batch[val.dataset == entry.panel_id])
        assert entry.held_out == "batches" and held == set(entry.val_batches) and len(held) == 1
        assert not held & set(train.batch[train.dataset == entry.panel_id])
        assert (entry.n_train, entry.n_val) == tuple(int((b.dataset == entry.panel_id).sum()) for b in (train, val))


def test_statistics_equal_plain_numpy(tiny_shards, tiny_files):
    corpus = Corpus(tiny_shards)
    train = all_blocks(corpus, "train")
    dense = np.zeros((len(train), len(corpus.vocabulary)))
    rows = np.repeat(np.arange(len(train)), np.diff(train.samples.indptr))
    dense[rows, train.samples.gene_ids] = train.samples.counts
    normalized = dense * (1e5 / train.library_size[:, None])
    measured = np.zeros_like(dense, dtype=bool)
    for panel in range(2):
        measured[np.ix_(train.panel_id == panel, corpus.panels.genes(panel))] = True
        mean = normalized[train.panel_id == panel].mean(axis=0)[corpus.panels.genes(panel)]
        np.testing.assert_allclose(corpus.panels.mean(panel), mean, rtol=1e-5)
    np.testing.assert_array_equal(corpus.statistics.n_measured, measured.sum(axis=0))
    np.testing.assert_array_equal(corpus.statistics.n_nonzero, (dense > 0).sum(axis=0))
    expected = np.log1p(normalized).sum(axis=0) / measured.sum(axis=0)
    np.testing.assert_allclose(corpus.statistics.mean_log1p, expected, rtol=1e-5)


def test_panels_stay_apart(tiny_shards, tiny_files):
    corpus = Corpus(tiny_shards)
    for number, path in enumerate(tiny_files):
        ids = [corpus.vocabulary.gene_ids[g] for g in corpus.panels.genes(number)]
        assert sorted(ids) == sorted(ad.read_h5ad(path).var_names)
    assert len(corpus.vocabulary) == 90


def test_gene_filter_counts_samples_of_each_dataset(tiny_store, tiny_files):
    store = open_store(tiny_store)
    selection = select(store, ShardConfig(min_cells=3, min_cell_fraction=0.5))
    for record, panel, path in zip(selection.records, selection.panels, tiny_files, strict=True):
        adata = ad.read_h5ad(path)
        counts = adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X
        expected = adata.var_names[(counts > 0).sum(axis=0) >= max(3, np.ceil(0.5 * record.n_obs))]
        assert [selection.vocabulary.gene_ids[g] for g in panel] == sorted(expected)
    assert 0 < len(selection.vocabulary) < 90


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path, tiny_store):
    store, config = open_store(tiny_store), {"block_rows": 16, "lanes": 2}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_shards(store, tmp_path / name, ShardConfig(seed=seed, **config))
    assert Corpus(tmp_path / "a").fingerprint == Corpus(tmp_path / "b").fingerprint
    assert (tmp_path / "a/train-000000.tar").read_bytes() == (tmp_path / "b/train-000000.tar").read_bytes()
    first, other = (all_blocks(Corpus(tmp_path / n), "train").sample_id for n in "ac")
    assert not np.array_equal(first, other)


def test_webdataset_opens_the_shards(tiny_shards):
    corpus = Corpus(tiny_shards)
    url = str(tiny_shards / corpus.shards("train")[0].name)
    members = list(webdataset.WebDataset(url, shardshuffle=False, empty_check=False))
    assert [m["__key__"] for m in members] == [f"{i:06d}" for i in range(len(corpus.blocks("train")))]
    assert [zlib.crc32(m["arrow"]) for m in members] == [b.crc32 for _, b in corpus.blocks("train")]


def test_blocks_of_extreme_samples_survive_encoding():
    counts = np.array([2**32 - 1, 1, 65_536, 255, 256], np.uint32)
    ragged = Ragged(np.array([0, 0, 2, 5, 5]), np.array([0, 65_534, 1, 300, 301], np.uint16), counts)
    block = codec.Block(
        np.array([7, 2**40, 0, 1]), np.zeros(4, np.int32), np.array([0, 1, 0, 1], np.int32),
        np.array(["a", "b", "a", ""], dtype=object), np.array([1.0, 2.5, 1e9, 3.0]), ragged,
    )  # fmt: skip
    data = codec.encode(block)
    assert data == codec.encode(block)
    back = codec.decode(data, n_samples=4, n_genes=65_535, n_panels=2, where="here")
    for name in ("sample_id", "dataset", "panel_id", "batch", "library_size"):
        np.testing.assert_array_equal(getattr(back, name), getattr(block, name))
    for name in ("indptr", "gene_ids", "counts"):
        np.testing.assert_array_equal(getattr(back.samples, name), getattr(ragged, name))
    for wrong, message in (
        ({"n_samples": 5}, "5"),
        ({"n_genes": 300}, "sample 1"),
        ({"n_panels": 1}, "panel 1 of 1"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.decode(data, **({"n_samples": 4, "n_genes": 65_535, "n_panels": 2, "where": "here"} | wrong))


@pytest.fixture
def copy(tiny_shards, tmp_path) -> Path:
    return shutil.copytree(tiny_shards, tmp_path / "copy")


@pytest.mark.parametrize("where", ["header", "payload"])
def test_a_flipped_bit_is_named(copy, where):
    corpus = Corpus(copy)
    name, entry = corpus.blocks("train")[2]
    data = bytearray((copy / name).read_bytes())
    data[entry.offset + (3 if where == "header" else 512 + entry.bytes // 2)] ^= 4
    (copy / name).write_bytes(bytes(data))
    with pytest.raises(ValueError, match=f"{name}: block at byte {entry.offset}.*damaged"):
        BlockReader(corpus, "train").read(2)
    assert len(BlockReader(corpus, "train").read(1)) > 0


def test_a_cut_or_missing_shard_is_named(copy):
    corpus = Corpus(copy)
    name, entry = corpus.blocks("train")[-1]
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: entry.offset + 600])
    with pytest.raises(ValueError, match="ends too early"):
        BlockReader(corpus, "train").read(len(corpus.blocks("train")) - 1)
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        BlockReader(corpus, "train").read(0)


def test_damaged_or_foreign_manifests_are_refused(copy):
    file = copy / "manifest.json"
    tree = json.loads(file.read_text())
    for change, message in (
        ({"format": "mds"}, "not a manifest"), ({"version": 9}, "version 9"), ({"vocabulary_sha256": "0" * 64}, "another corpus"),
        ({"splits": {"train": [{"name": 1}]}}, "damaged"),
    ):  # fmt: skip
        file.write_text(json.dumps(tree | change))
        with pytest.raises(ValueError, match=message):
            Corpus(copy)
    file.write_text("{")
    with pytest.raises(ValueError, match="damaged or not a manifest"):
        Corpus(copy)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no finished shard corpus"):
        Corpus(copy)


def test_another_vocabulary_or_panels_are_refused(copy, tmp_path):
    data = (copy / "panels.arrow").read_bytes()
    (copy / "panels.arrow").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"panels\.arrow: sha256"):
        Corpus(copy)


def test_what_cannot_be_built_is_refused_and_leaves_nothing(tmp_path, tiny_store):
    store = open_store(tiny_store)
    out = tmp_path / "out"
    for config, message in (
        ({"datasets": ("third",)}, "no dataset 'third'"), ({"min_cells": 1_000}, "min-cells"),
        ({"datasets": ("first", "first")}, "twice"), ({"memory_budget": 2**20, "min_cells": 0}, None),
    ):  # fmt: skip
        if message is not None:
            with pytest.raises(ValueError, match=message):
                build_shards(store, out, ShardConfig(**config))
    monstrous = ShardConfig(memory_budget=1024**2)
    object.__setattr__(monstrous, "memory_budget", 1_000)
    with pytest.raises(ValueError, match="memory budget"):
        build_shards(store, out, monstrous)
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        build_shards(store, out, ShardConfig())
    for wrong in (
        {"val_batches": 1.0},
        {"min_cell_fraction": 2},
        {"lanes": 0},
        {"seed": -1},
        {"min_cells": -1},
        {"shard_bytes": 1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ShardConfig(**wrong)


def test_an_interrupt_while_writing_leaves_nothing(tmp_path, tiny_store):
    def interrupt(done: int, total: int) -> None:
        if done > total * 0.7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards(open_store(tiny_store), tmp_path / "out", ShardConfig(block_rows=8), progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_single_batch_is_split_by_samples_and_says_so():
    is_val, how, names = hold_out(["one"] * 50, 50, share=0.1, seed=0)
    assert (int(is_val.sum()), how, names) == (5, "samples", ())
    assert hold_out(["a", "b"], 2, share=0.0, seed=0)[1] == "none"
    is_val, how, names = hold_out(["a", "b", "b"], 3, share=0.9, seed=0)
    assert how == "batches" and len(names) == 1 and 0 < is_val.sum() < 3
