"""Selections: written whole, read only against their store, every wrong one refused, and honoured by shard building."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.manifest import Corpus
from shards.select import ShardConfig
from shards.writer import build_shards
from tests.shards.builds import expected_rows, files_of, rows_of
from txfm_data import selection
from txfm_data.selection import read_selection, write_selection
from txfm_data.store.opening import open_store

IDS = np.array([0, 3, 4, 5, 9, 20, 39, *range(71, 93, 2)])


@pytest.fixture(autouse=True, params=[2, 2**20], ids=["pieces", "whole"])
def piece(request, monkeypatch):
    """Samples that are checked at a time."""
    monkeypatch.setattr(selection, "_PIECE", request.param)


@pytest.fixture(scope="module")
def store(known_zarr):
    return open_store(known_zarr)


def panels_of(store):
    """The first ten genes of one dataset, and every gene of another."""
    return {"third": store.panel(store.dataset("third")), "first": store.panel(store.dataset("first"))[:10]}


@pytest.fixture
def folder(tmp_path, store):
    write_selection(tmp_path / "selection", store, IDS, panels_of(store), np.arange(len(IDS)) % 3 == 0)
    return tmp_path / "selection"


def test_what_is_written_is_read(tmp_path, store, folder):
    found = read_selection(folder, store)
    assert [record.name for record in found.records] == ["first", "third"]
    np.testing.assert_array_equal(found.sample_id, IDS)
    np.testing.assert_array_equal(found.is_val, np.arange(len(IDS)) % 3 == 0)
    for record, genes in zip(found.records, found.genes, strict=True):
        np.testing.assert_array_equal(genes, panels_of(store)[record.name])
    written = write_selection(tmp_path / "again", store, IDS, panels_of(store), np.arange(len(IDS)) % 3 == 0)
    assert written.sha256 == found.sha256
    plain = write_selection(tmp_path / "plain", store, IDS, panels_of(store))
    assert read_selection(tmp_path / "plain", store).is_val is None and plain.sha256 != found.sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "plain", "selection"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": []}, "no samples"),
        ({"ids": [0.5, 1.5]}, "not a list of integers"),
        ({"ids": [0, 5, 5, 71]}, "sample 5 is there twice"),
        ({"ids": [0, 9, 5, 71]}, "sample 9 comes before sample 5"),
        ({"ids": [0, 45, 71]}, "sample 45 belongs to none"),
        ({"ids": [0, 71, 93]}, "sample 93 belongs to none"),
        ({"ids": [-1, 0, 71]}, "sample -1 belongs to none"),
        ({"ids": [0, 1]}, "'third' gives no sample"),
        ({"genes": {"fourth": [0]}}, "no dataset 'fourth'"),
        ({"genes": {"third": []}}, "'third' has no genes"),
        ({"genes": {"third": [3, 3]}}, "there twice, or genes do not ascend"),
        ({"genes": {"third": [0]}}, "'third' did not measure gene ENSG"),
        ({"genes": {"third": [9_999]}}, "did not measure gene number 9999"),
        ({"genes": None}, "no samples"),
        ({"is_val": [True]}, "one bool a sample"),
    ],
)
def test_what_is_not_there_is_not_written(tmp_path, store, change, message):
    ids = np.array(change.get("ids", IDS))
    genes = {} if change.get("genes", 1) is None else panels_of(store) | change.get("genes", {})
    genes = {name: np.asarray(panel, np.int64) for name, panel in genes.items()}
    with pytest.raises(ValueError, match=message):
        write_selection(tmp_path / "s", store, ids, genes, change.get("is_val"))
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(store, folder):
    before = files_of(folder)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        write_selection(folder, store, IDS, panels_of(store))
    assert files_of(folder) == before


def rewrite(folder, name, table):
    """Put another table in place, with the right checksum, as somebody else's program might write it."""
    pq.write_table(table, folder / name)
    import hashlib

    data = (folder / name).read_bytes()
    head = json.loads((folder / "selection.json").read_text())
    head["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "selection.json").write_text(json.dumps(head))


def edit(folder, change):
    head = json.loads((folder / "selection.json").read_text())
    change(head)
    (folder / "selection.json").write_text(json.dumps(head))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(format="x"), "its format is not txfm-selection"),
        (lambda h: h.update(version=2), "its version is 2, this release reads 1"),
        (lambda h: h.pop("datasets"), "not a selection that can be read"),
        (lambda h: h["datasets"][0].update(n_obs="40"), "n_obs of a dataset is '40'"),
        (lambda h: h["datasets"][0].pop("n_genes"), "not a selection that can be read"),
        (lambda h: h["files"].pop("panels.parquet"), "it names the files"),
        (lambda h: h["files"].update({"../x": {}}), "it names the files"),
        (lambda h: h["datasets"][0].update(name="other"), "has no dataset 'other'"),
        (lambda h: h["datasets"][0].update(content_sha256="0"), "content_sha256 .*, the selection was made from"),
        (lambda h: h["datasets"][1].update(obs_start=0), "has obs_start 71"),
        (lambda h: h["datasets"].reverse(), "not in the order of the store"),
        (lambda h: h["datasets"].append(h["datasets"][0]), "not in the order of the store"),
        (lambda h: h["datasets"][0].update(n_samples=3), "has 7 samples and 10 genes, expected 3"),
        (lambda h: h["datasets"].pop(), "belongs to none of the datasets"),
        (lambda h: h["files"]["samples.parquet"].update(bytes=1), "its size or sha256 is not"),
    ],
)
def test_a_wrong_head_is_refused(store, folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        read_selection(folder, store)


def ids(values, kind=None):
    return pa.table({"sample_id": pa.array(values, kind or pa.int64())})


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("samples.parquet", ids([0, 0, 71]), "sample 0 is there twice"),
        ("samples.parquet", ids([0, 45, 71]), "belongs to none"),
        ("samples.parquet", ids([0, None, 71]), "a value is missing"),
        ("samples.parquet", ids(["0"], pa.string()), "expected sample_id"),
        ("samples.parquet", ids([0, 71]).append_column("split", pa.array(["train", "test"])), "a split is 'test'"),
        ("samples.parquet", ids([0, 71]), "has 1 samples and 10 genes, expected 7"),
        ("panels.parquet", pa.table({"dataset": ["first"]}), "expected dataset and gene_id"),
        ("panels.parquet", pa.table({"dataset": ["x"], "gene_id": ["y"]}), "dataset 'x' is not one"),
        ("panels.parquet", pa.table({"dataset": ["first"], "gene_id": ["ENSG1"]}), "gene 'ENSG1' is not in"),
        ("panels.parquet", pa.table({"dataset": ["first"], "gene_id": ["ENSG90000000000"]}), "'third' has no genes"),
        (
            "panels.parquet",
            pa.table(
                {"dataset": ["first", "first", "third"], "gene_id": ["ENSG90000000000"] * 2 + ["ENSG90000000003"]}
            ),
            "is there twice",
        ),
        (
            "panels.parquet",
            pa.table({"dataset": ["first", "third"], "gene_id": ["ENSG90000000000", "ENSG90000000001"]}),
            "'third' did not measure gene ENSG90000000001",
        ),
    ],
)
def test_a_wrong_table_is_refused(store, folder, name, table, message):
    rewrite(folder, name, table)
    with pytest.raises(ValueError, match=message):
        read_selection(folder, store)


def test_damage_is_named(store, folder, tmp_path):
    path = folder / "samples.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"samples\.parquet: its size or sha256"):
        read_selection(folder, store)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"samples\.parquet: missing"):
        read_selection(folder, store)
    (folder / "selection.json").write_text("{")
    with pytest.raises(ValueError, match="not a selection that can be read"):
        read_selection(folder, store)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="no finished selection"):
        read_selection(folder, store)


def test_a_selection_of_another_store_is_refused(folder, tiny_store):
    with pytest.raises(ValueError, match="has content_sha256 .* the selection was made from one with"):
        read_selection(folder, open_store(tiny_store))


@pytest.mark.parametrize("address", ["known_store", "known_zarr"])
def test_shards_hold_what_was_selected_and_nothing_else(tmp_path, folder, request, address):
    path = request.getfixturevalue(address)
    store = open_store(path)
    config = {"selection": str(folder), "block_rows": 4, "lanes": 2}
    build_shards(store, tmp_path / "c", ShardConfig(**config))
    corpus, found, expected = Corpus(tmp_path / "c"), rows_of(tmp_path / "c"), expected_rows(path)
    assert sorted(found) == IDS.tolist()
    assert corpus.manifest.selection == read_selection(folder, store).sha256
    kept = {name: {store.vocabulary.gene_ids[t] for t in tokens.tolist()} for name, tokens in panels_of(store).items()}
    for at, row in enumerate(IDS.tolist()):
        sample, truth = found[row], expected[row]
        assert sample["split"] == ("val" if at % 3 == 0 else "train")
        assert sample["library_size"] == truth["library_size"]
        assert sample["counts"] == {g: c for g, c in truth["counts"].items() if g in kept[truth["dataset"]]}
    for entry in corpus.manifest.datasets:
        genes = {corpus.vocabulary.gene_ids[g] for g in corpus.panels.genes(entry.panel_id)}
        assert genes == kept[entry.name] and entry.held_out == "selection" and entry.val_batches == ()


def test_a_selection_of_everything_gives_the_shards_of_the_store(tmp_path, store):
    panels = {record.name: store.panel(record) for record in store.datasets}
    write_selection(tmp_path / "all", store, np.arange(store.n_obs), panels)
    config = {"block_rows": 8, "lanes": 2, "seed": 3}
    build_shards(store, tmp_path / "a", ShardConfig(**config))
    build_shards(store, tmp_path / "b", ShardConfig(**config, selection=str(tmp_path / "all")))
    first, second = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert first.pop("manifest.json") != second.pop("manifest.json") and first == second


def test_options_that_a_selection_rules_out(tmp_path, store, folder):
    for wrong in ({"datasets": ("first",)}, {"min_cells": 3}, {"min_cell_fraction": 0.1}):
        with pytest.raises(ValueError, match="a selection chooses datasets and genes already; leave out"):
            ShardConfig(selection=str(folder), **wrong)
    with pytest.raises(ValueError, match="says which samples are held out; leave out --val-batches"):
        build_shards(store, tmp_path / "c", ShardConfig(selection=str(folder), val_batches=0.2))
    write_selection(tmp_path / "val", store, IDS, panels_of(store), np.ones(len(IDS), bool))
    with pytest.raises(ValueError, match="every sample is held out"):
        build_shards(store, tmp_path / "c", ShardConfig(selection=str(tmp_path / "val")))
    assert not (tmp_path / "c").exists()
