"""Building shards from real stores: every sample once with its counts, splits, statistics, labels, and the same bytes always."""

import zlib

import anndata as ad
import numpy as np
import pyarrow as pa
import webdataset

from shards.manifest import Corpus
from shards.order import SHUFFLE
from shards.select import ShardConfig, select
from shards.verify import verify
from shards.writer import build_shards, plan_shards
from tests.shards.builds import blocks_of, expected_rows, files_of, rows_of, small_pieces
from tests.txfm_data import stores
from txfm_data import ingest
from txfm_data.parallel import Workers
from txfm_data.random_order import permutation
from txfm_data.store.opening import open_store

CONFIG = {"block_rows": 8, "lanes": 2, "seed": 3, "shard_bytes": 2**20}
MIB = 1024**2


def test_every_sample_is_there_once_with_its_counts(tmp_path, known_store, monkeypatch):
    small_pieces(monkeypatch)
    result = build_shards(open_store(known_store), tmp_path / "c", ShardConfig(**CONFIG, obs_columns=("cell_type",)))
    found, expected = rows_of(tmp_path / "c"), expected_rows(known_store)
    assert found.keys() == expected.keys() and result["n_train"] + result["n_val"] == len(expected) == 93
    assert result["shards"] > 3  # so that shards, tasks and splits all meet
    for row, truth in expected.items():
        for key in ("dataset", "counts", "library_size"):
            assert found[row][key] == truth[key], (row, key)
        assert found[row]["obs"]["batch"] == truth["batch"]
    assert found[stores.EMPTY_SAMPLE]["counts"] == {} and max(found[45]["counts"].values()) == 4_000_000_000
    assert verify(Corpus(tmp_path / "c"))["n_train"] == result["n_train"]
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_samples_lie_in_the_order_of_the_format(tmp_path, known_store):
    build_shards(open_store(known_store), tmp_path / "c", ShardConfig(**CONFIG))
    corpus = Corpus(tmp_path / "c")
    for number, split in enumerate(("train", "val")):
        blocks = blocks_of(tmp_path / "c", split)
        ids = np.concatenate([block.sample_id for block in blocks])
        order = permutation(len(ids), seed=3, epoch=0, item=SHUFFLE + number)
        np.testing.assert_array_equal(ids, np.sort(ids)[order])
        sizes = [len(block) for block in blocks]
        assert max(sizes) - min(sizes) <= 1 and max(sizes) <= 8
    assert len(corpus.blocks("train")) % 2 == 0


def test_same_bytes_for_workers_budgets_and_backends(tmp_path, known_store, known_zarr, monkeypatch):
    small_pieces(monkeypatch)
    config = ShardConfig(
        **CONFIG, obs_columns=("cell_type", "age", "tissue", "note", "is_control"), weights={"second": 0.5}
    )
    ways = {
        "serial": (known_store, Workers(memory=900 * MIB)), "large": (known_store, Workers(memory=8 * 1024 * MIB)),
        "zarr": (known_zarr, Workers()), "two": (known_store, Workers(n=2)),
    }  # fmt: skip
    for name, (address, workers) in ways.items():
        build_shards(open_store(address), tmp_path / name, config, workers=workers)
    expected = files_of(tmp_path / "serial")
    assert {"manifest.json", "panels.arrow", "train-000001.tar", "train-samples.arrow"} < expected.keys()
    for name in ways:
        assert files_of(tmp_path / name) == expected, name


def test_a_group_of_one_block_gives_the_same_bytes(tmp_path, known_store, monkeypatch):
    from shards import needs

    build_shards(open_store(known_store), tmp_path / "a", ShardConfig(**CONFIG))
    monkeypatch.setattr(needs, "_LARGEST_GROUP", 1)
    build_shards(open_store(known_store), tmp_path / "b", ShardConfig(**CONFIG))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_another_seed_gives_another_order(tmp_path, tiny_store):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_shards(open_store(tiny_store), tmp_path / name, ShardConfig(seed=seed, block_rows=16, lanes=2))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    first, other = (np.concatenate([b.sample_id for b in blocks_of(tmp_path / n, "train")]) for n in "ac")
    assert not np.array_equal(first, other)


def test_whole_batches_are_held_out_of_every_dataset(tiny_shards):
    corpus, rows = Corpus(tiny_shards), rows_of(tiny_shards)
    for entry in corpus.manifest.datasets:
        mine = [row for row in rows.values() if row["dataset"] == entry.name]
        batches = {split: {r["obs"]["batch"] for r in mine if r["split"] == split} for split in ("train", "val")}
        assert entry.held_out == "batches" and len(batches["val"]) == 1
        assert batches["val"] == set(entry.val_batches) and not batches["val"] & batches["train"]
        n_train = [r["obs"]["batch"] for r in mine if r["split"] == "train"]
        assert entry.batches == {name: n_train.count(name) for name in batches["train"]}
        assert (entry.n_train, entry.n_val) == (len(n_train), len(mine) - len(n_train))


def test_blocks_count_their_datasets_and_batches(tiny_shards):
    corpus = Corpus(tiny_shards)
    for split in ("train", "val"):
        for (_, entry), block in zip(corpus.blocks(split), blocks_of(tiny_shards, split), strict=True):
            pairs = set(zip(block.dataset.tolist(), block.obs["batch"].to_pylist(), strict=True))
            assert (entry.samples, entry.datasets, entry.batches) == (
                len(block),
                len({d for d, _ in pairs}),
                len(pairs),
            )


def test_statistics_equal_plain_numpy(tmp_path, known_store, monkeypatch):
    small_pieces(monkeypatch)
    build_shards(open_store(known_store), tmp_path / "c", ShardConfig(**CONFIG))
    corpus = Corpus(tmp_path / "c")
    genes = {gene: at for at, gene in enumerate(corpus.vocabulary.gene_ids)}
    train = [row for row in rows_of(tmp_path / "c").values() if row["split"] == "train"]
    dense, measured = np.zeros((len(train), len(genes))), np.zeros((len(train), len(genes)), bool)
    for at, row in enumerate(train):
        for gene, count in row["counts"].items():
            dense[at, genes[gene]] = count
        measured[at, corpus.panels.genes(row["panel"])] = True
    normalized = dense * (1e5 / np.array([row["library_size"] for row in train])[:, None])
    panel_id = np.array([row["panel"] for row in train])
    for panel in range(3):
        mean = normalized[panel_id == panel].mean(axis=0)[corpus.panels.genes(panel)]
        np.testing.assert_allclose(corpus.panels.mean(panel), mean, rtol=1e-6)
    np.testing.assert_array_equal(corpus.statistics.n_measured, measured.sum(axis=0))
    np.testing.assert_array_equal(corpus.statistics.n_nonzero, (dense > 0).sum(axis=0))
    expected = np.log1p(normalized).sum(axis=0) / np.maximum(1, measured.sum(axis=0))
    np.testing.assert_allclose(corpus.statistics.mean_log1p, expected, rtol=1e-12)


def test_panels_stay_apart_and_follow_the_filter(tmp_path, tiny_shards, tiny_files, tiny_store):
    def genes_of(corpus: Corpus, panel: int) -> list[str]:
        return sorted(corpus.vocabulary.gene_ids[g] for g in corpus.panels.genes(panel))

    corpus = Corpus(tiny_shards)
    build_shards(open_store(tiny_store), tmp_path / "c", ShardConfig(min_cells=40, block_rows=8, lanes=2))
    filtered = Corpus(tmp_path / "c")
    for number, path in enumerate(tiny_files):
        adata = ad.read_h5ad(path)
        assert genes_of(corpus, number) == sorted(adata.var_names)
        kept = adata.var_names[np.asarray((adata.X > 0).sum(axis=0)).ravel() >= 40]
        assert genes_of(filtered, number) == sorted(kept)
    assert len(corpus.vocabulary) == 90 > len(filtered.vocabulary) > 0
    full, few = rows_of(tiny_shards), rows_of(tmp_path / "c")
    for row, sample in few.items():
        panel = set(genes_of(filtered, sample["panel"]))
        assert sample["counts"] == {g: c for g, c in full[row]["counts"].items() if g in panel}
        assert sample["library_size"] == full[row]["library_size"]


def test_webdataset_opens_the_shards(tiny_shards):
    corpus = Corpus(tiny_shards)
    url = str(tiny_shards / corpus.shards("train")[0].name)
    members = list(webdataset.WebDataset(url, shardshuffle=False, empty_check=False))
    assert [m["__key__"] for m in members] == [f"{i:06d}" for i in range(len(corpus.blocks("train")))]
    assert [zlib.crc32(m["arrow"]) for m in members] == [b.crc32 for _, b in corpus.blocks("train")]


def test_columns_of_obs_are_carried_with_what_they_lack(tmp_path, known_zarr):
    names = ("cell_type", "age", "tissue", "note", "is_control", "raw_mean_nnz")
    build_shards(open_store(known_zarr), tmp_path / "c", ShardConfig(**CONFIG, obs_columns=names))
    assert Corpus(tmp_path / "c").manifest.obs_columns == {
        "cell_type": "string", "age": "int64", "tissue": "string", "note": "string", "is_control": "bool",
        "raw_mean_nnz": "float64",
    }  # fmt: skip
    table = {row["soma_joinid"]: row for row in open_store(known_zarr).obs(["batch", *names]).to_pylist()}
    found = rows_of(tmp_path / "c")
    for row, sample in found.items():
        truth = {name: table[row][name] for name in ("batch", *names)}
        if truth["raw_mean_nnz"] is None:
            truth["raw_mean_nnz"] = float("nan")
        np.testing.assert_equal(sample["obs"], truth)
    assert {sample["obs"]["age"] for sample in found.values()} > {None, 0, 3}
    assert {sample["obs"]["tissue"] for sample in found.values()} == {None, "blood", "skin"}


def test_weights_are_recorded_with_the_samples_they_are_for(tmp_path, tiny_store):
    store = open_store(tiny_store)
    build_shards(store, tmp_path / "w", ShardConfig(weights={"second": 0.25}, block_rows=8, lanes=2))
    build_shards(store, tmp_path / "one", ShardConfig(weights={"second": 1.0}, block_rows=8, lanes=2))
    corpus, plain = Corpus(tmp_path / "w"), Corpus(tmp_path / "one")
    assert [d.weight for d in corpus.manifest.datasets] == [1.0, 0.25]
    assert "train-samples.arrow" in corpus.manifest.files and "train-samples.arrow" not in plain.manifest.files
    with pa.memory_map(str(tmp_path / "w" / "train-samples.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    blocks = blocks_of(tmp_path / "w", "train")
    for name in ("sample_id", "dataset"):
        stored = np.concatenate([getattr(block, name) for block in blocks])
        np.testing.assert_array_equal(table[name].to_numpy(), stored)
    assert files_of(tmp_path / "w")["train-000000.tar"] == files_of(tmp_path / "one")["train-000000.tar"]


def test_expected_counts_come_back_exactly(tmp_path, known_store):
    """One dataset of fractions beside one of whole counts, in a store that holds both."""
    whole, expected = stores.dataset("third"), stores.dataset("second")
    expected.X = expected.X * 0.37
    for name, adata in (("whole", whole), ("expected", expected)):
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
        ingest.h5ad(
            tmp_path / f"{name}.h5ad", tmp_path / "store", name, batch="batch", non_integer="ok", symbols="symbol"
        )
    build(tmp_path / "c", tmp_path / "store")
    corpus, found = Corpus(tmp_path / "c"), rows_of(tmp_path / "c")
    assert corpus.manifest.has_fractions
    dense, ids = expected.X.toarray(), list(expected.var_names)
    for at in range(expected.n_obs):
        assert found[22 + at]["counts"] == {ids[g]: dense[at, g] for g in np.flatnonzero(dense[at])}
    only_whole = build_shards(
        open_store(tmp_path / "store"), tmp_path / "w", ShardConfig(**CONFIG, datasets=("whole",))
    )
    assert not Corpus(tmp_path / "w").manifest.has_fractions and only_whole["n_train"] + only_whole["n_val"] == 22
    from_integers = rows_of(build(tmp_path / "i", known_store, datasets=("third",)))
    same = {row - 71: sample["counts"] for row, sample in from_integers.items()}
    assert {row: sample["counts"] for row, sample in rows_of(tmp_path / "w").items()} == same


def build(out, address, **config):
    build_shards(open_store(address), out, ShardConfig(**CONFIG, **config))
    return out


def test_a_dry_run_says_what_the_build_then_does(tmp_path, known_store):
    config = ShardConfig(**CONFIG, obs_columns=("age",), weights={"first": 0.5})
    plan = plan_shards(open_store(known_store), tmp_path / "c", config)
    assert not list(tmp_path.iterdir())
    built = build_shards(open_store(known_store), tmp_path / "c", config)
    for key in ("n_train", "n_val", "n_genes", "shards", "blocks", "lanes", "datasets", "out"):
        assert plan[key] == built[key], key
    assert 0.5 < plan["spill_bytes_estimated"] / built["spill_bytes"] < 3
    assert plan["dry_run"] and plan["memory_bytes"] < 2 * 1024 * MIB and plan["obs_columns"] == {"age": "int64"}
    assert built["seconds"] > 0 and not built["resumed"]


def test_datasets_come_in_the_order_asked_for(tmp_path, known_store):
    build(tmp_path / "c", known_store, datasets=("third", "first"))
    corpus, rows = Corpus(tmp_path / "c"), rows_of(tmp_path / "c")
    assert [d.name for d in corpus.manifest.datasets] == ["third", "first"]
    assert sorted(rows) == [*range(40), *range(71, 93)]
    expected = expected_rows(known_store)
    assert all(rows[row]["counts"] == expected[row]["counts"] for row in rows)
    assert select(open_store(known_store), ShardConfig(datasets=("third", "first"))).records[0].name == "third"


def test_progress_counts_every_sample_twice(tmp_path, known_store, monkeypatch):
    small_pieces(monkeypatch)
    seen = []
    build_shards(
        open_store(known_store), tmp_path / "c", ShardConfig(**CONFIG), progress=lambda *step: seen.append(step)
    )
    done = [n for n, _ in seen]
    assert done == sorted(done) and seen[-1] == (186, 186) and 93 in done and len(seen) > 10
