"""Ingesting h5ad files: every layout, every option, and every bad input with its error and without a trace."""

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from shards.select import ShardConfig
from shards.writer import build_shards
from txfm_data import ingest, parallel
from txfm_data.parallel import Workers, pool
from txfm_data.sources.h5ad import H5adSource
from txfm_data.sources.protocol import chunks
from txfm_data.store.convert import copy_datasets
from txfm_data.store.opening import open_store
from txfm_data.store.verify import verify


def example(n_obs: int = 30) -> ad.AnnData:
    """Counts that tell their own row and gene: 100 * row + gene + 1, with zeros sprinkled in."""
    counts = (100 * np.arange(n_obs)[:, None] + np.arange(8)[None] + 1) * (
        np.arange(n_obs * 8).reshape(n_obs, 8) % 3 > 0
    )
    obs = pd.DataFrame(
        {"plate": pd.Categorical([f"p{i % 2}" for i in range(n_obs)])}, index=[f"s{i}" for i in range(n_obs)]
    )
    var = pd.DataFrame({"name": [f"N{i}" for i in range(8)]}, index=[f"ENSG{i:011d}.{i + 1}" for i in range(8)])
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs, var)


def stored(path, dataset="d") -> tuple[np.ndarray, tuple[str, ...]]:
    """Counts of a dataset as the store gives them, dense, and the genes of the vocabulary."""
    store = open_store(path)
    record = store.dataset(dataset)
    out = np.zeros((record.n_obs, len(store.vocabulary)))
    for low, part in store.scan(record.obs_start, record.obs_stop, rows=4):
        rows = np.repeat(np.arange(len(part)), np.diff(part.indptr)) + low - record.obs_start
        out[rows, part.gene_ids] = part.counts
    return out, store.vocabulary.gene_ids


def write(tmp_path, adata: ad.AnnData, name: str = "in.h5ad"):
    adata.write_h5ad(tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("kind", ["csr", "csc", "dense", "integers"])
def test_every_matrix_layout_gives_the_same_store(tmp_path, kind):
    adata = example()
    expected = adata.X.toarray()
    convert = {
        "csr": sp.csr_matrix,
        "csc": sp.csc_matrix,
        "dense": lambda x: x.toarray(),
        "integers": lambda x: x.astype(np.int64),
    }
    adata.X = convert[kind](adata.X)
    result = ingest.h5ad(write(tmp_path, adata), tmp_path / "store", "d", batch="plate", symbols="name")
    counts, genes = stored(tmp_path / "store")
    np.testing.assert_array_equal(counts, expected)
    assert genes == tuple(f"ENSG{i:011d}" for i in range(8))
    assert open_store(tmp_path / "store").vocabulary.symbols == tuple(f"N{i}" for i in range(8))
    assert (result["n_obs"], result["genes_matched"], result["genes_in_file"], result["total"]) == (
        30,
        8,
        8,
        expected.sum(),
    )


@pytest.mark.parametrize("where", ["layer", "raw"])
def test_a_layer_or_raw_is_read_in_place_of_x(tmp_path, where):
    adata = example()
    expected = adata.X.toarray()
    if where == "raw":
        adata.raw = adata.copy()
        adata = adata[:, :3].copy()
    else:
        adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X.toarray())
    options = {"raw": True} if where == "raw" else {"layer": "counts"}
    ingest.h5ad(write(tmp_path, adata), tmp_path / "store", "d", **options)
    np.testing.assert_array_equal(stored(tmp_path / "store")[0], expected)


def test_chunks_cover_all_rows_within_their_size(tmp_path):
    adata = example(200)
    with H5adSource(write(tmp_path, adata)) as source:
        parts = list(chunks(source, max_bytes=16 * 40))
        assert [start for start, _ in parts] == np.cumsum([0, *(p.shape[0] for _, p in parts)])[:-1].tolist()
        assert len(parts) > 20 and max(p.nnz for _, p in parts) <= 40
        np.testing.assert_array_equal(sp.vstack([p for _, p in parts]).toarray(), adata.X.toarray())


def test_genes_without_ensembl_ids_count_towards_the_library_alone(tmp_path):
    adata = example()
    ids = list(adata.var_names)
    ids[2] = "ERCC-00002"
    adata.var_names = ids
    result = ingest.h5ad(write(tmp_path, adata), tmp_path / "store", "d")
    store = open_store(tmp_path / "store")
    assert (result["genes_matched"], result["genes_in_file"], result["n_panel"]) == (7, 8, 7)
    np.testing.assert_array_equal(store.obs(["raw_sum"])["raw_sum"], adata.X.toarray().sum(axis=1))
    np.testing.assert_array_equal(stored(tmp_path / "store")[0], np.delete(adata.X.toarray(), 2, axis=1))


@pytest.mark.parametrize("rule", ["sum", "first"])
def test_duplicate_genes_by_a_declared_rule(tmp_path, rule):
    adata = example()
    adata.var_names = ["ENSG00000000000.1", "ENSG00000000000.2", *adata.var_names[2:]]
    ingest.h5ad(write(tmp_path, adata), tmp_path / "store", "d", duplicates=rule)
    dense = adata.X.toarray()
    first = dense[:, :2].sum(axis=1) if rule == "sum" else dense[:, 0]
    np.testing.assert_array_equal(stored(tmp_path / "store")[0], np.column_stack([first, dense[:, 2:]]))


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix])
def test_genes_of_other_organisms_are_left_out_when_that_is_asked_for(tmp_path, layout):
    adata = example()
    names = list(adata.var_names)
    for at in (0, 3, 7):  # in between those of the store's organism
        names[at] = f"ENSMUSG{at:011d}.2"
    names[5] = "ERCC-00002"
    adata.var_names = names
    adata.X = layout(adata.X)
    path, store = write(tmp_path, adata), tmp_path / "store"
    with pytest.raises(
        ValueError, match=r"3 of 7 genes are of another organism \(for example ENSMUSG00000000000: .*--other-organ"
    ):
        ingest.h5ad(path, store, "d")
    planned = ingest.h5ad(path, store, "d", other_organisms="drop", dry_run=True)
    result = ingest.h5ad(path, store, "d", other_organisms="drop")
    for found in (planned, result):
        assert (found["genes_of_other_organisms"], found["genes_matched"], found["genes_in_file"]) == (3, 4, 8)
    dense = adata.X.toarray()
    counts, genes = stored(store)
    assert genes == tuple(f"ENSG{at:011d}" for at in (1, 2, 4, 6))
    np.testing.assert_array_equal(counts, dense[:, [1, 2, 4, 6]])
    obs = open_store(store).obs()
    np.testing.assert_array_equal(obs["raw_sum"], dense.sum(axis=1), "their counts are of the library")
    np.testing.assert_array_equal(obs["nnz"], (counts > 0).sum(axis=1))
    adata.var_names = [f"ENSMUSG{at:011d}" for at in range(8)]
    with pytest.raises(ValueError, match="8 of 8 genes are of another organism .* no gene would be left"):
        ingest.h5ad(write(tmp_path, adata, "mouse.h5ad"), store, "m", other_organisms="drop")


def test_a_library_size_column_and_dropped_empty_samples(tmp_path):
    adata = example()
    counts = adata.X.toarray()
    counts[4] = 0
    adata.X = sp.csr_matrix(counts)
    adata.obs["full"] = adata.X.toarray().sum(axis=1) + 7.0 * (np.arange(30) != 4)
    result = ingest.h5ad(write(tmp_path, adata), tmp_path / "store", "d", library_size="full", empty_samples="drop")
    obs = open_store(tmp_path / "store").obs()
    assert result["n_dropped_empty"] == 1 and obs["observation_joinid"].to_pylist() == [
        f"s{i}" for i in range(30) if i != 4
    ]
    np.testing.assert_array_equal(obs["raw_sum"], np.delete(adata.obs["full"], 4))
    np.testing.assert_array_equal(stored(tmp_path / "store")[0], np.delete(adata.X.toarray(), 4, axis=0))


def test_a_sample_without_counts_in_a_slice_of_the_genes_is_all_zero_not_empty(tmp_path):
    adata = example()
    counts = adata.X.toarray()
    counts[4] = 0
    adata.X = sp.csr_matrix(counts)
    adata.obs["full"] = 1e6
    ingest.h5ad(write(tmp_path, adata), tmp_path / "store", "d", library_size="full")
    np.testing.assert_array_equal(stored(tmp_path / "store")[0], counts)
    adata.obs["full"] = np.where(np.arange(30) == 4, 0.0, 1e6)
    with pytest.raises(ValueError, match="1 of 30 samples have no count"):
        ingest.h5ad(write(tmp_path, adata, "zero.h5ad"), tmp_path / "other", "d", library_size="full")


def spoil(adata: ad.AnnData, how: str) -> ad.AnnData:
    values = adata.X.toarray()
    if how == "normalised":
        values = np.log1p(values)
    elif how == "empty":
        values[3] = 0
    elif how == "huge":
        values = values.astype(np.float64)
        values[3, 4] = 2.0**32
    elif how in ("negative", "nan", "inf"):
        values[3, 4] = {"negative": -2, "nan": np.nan, "inf": np.inf}[how]
    elif how == "symbols":
        adata.var["ensembl"] = adata.var_names
        adata.var_names = adata.var["name"].to_numpy()
    elif how == "no ids":
        adata.var_names = adata.var["name"].to_numpy()
    elif how == "mouse":
        adata.var_names = [f"ENSMUSG{i:011d}" for i in range(8)]
    elif how == "duplicates":
        adata.var_names = ["ENSG00000000000.1", "ENSG00000000000.2", *adata.var_names[2:]]
    adata.X = sp.csr_matrix(values)
    return adata


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("normalised", r"holds 1\.0986\d+ for sample 's0' \(row 0\), gene .* not a whole number.*--layer or --raw"),
        ("negative", r"holds -2\.0 for sample 's3' \(row 3\), gene 'ENSG00000000004\.5', which is negative"),
        ("nan", "is not a finite number"), ("inf", "is not a finite number"),
        ("huge", "above the largest count"),
        ("empty", r"1 of 30 samples have no count at all \(first: 's3'\).*--empty-samples drop"),
        ("symbols", r"0 of 8 columns match.*'N0'.*ensembl.*--gene-ids"),
        ("no ids", "0 of 8 columns match.*no column of var holds.*--gene-map"),
        ("duplicates", r"1 genes? stands? on more than one column.*ENSG00000000000.*--duplicates sum"),
        ("mouse", r"8 of 8 genes are of another organism \(for example ENSMUSG00000000000: mus_musculus\)"),
    ],
)  # fmt: skip
def test_bad_values_and_genes_are_named_and_leave_nothing(tmp_path, how, message):
    path = write(tmp_path, spoil(example(), how))
    with pytest.raises(ValueError, match=message):
        ingest.h5ad(path, tmp_path / "store", "d")
    assert [p.name for p in tmp_path.iterdir()] == ["in.h5ad"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": "x"}, r"--batch names .x., but its samples have the columns"), ({"gene_ids": "x"}, "var has no column .x."),
        ({"layer": "x"}, r"has no layers/x; it holds X: True, layers: \[\], raw: False"), ({"raw": True}, "has no raw/X"),
        ({"layer": "x", "raw": True}, "choose one"), ({"perturbation": "plate"}, "go together"),
        ({"perturbation": "plate", "control": "zzz"}, r"no sample has plate == 'zzz'; values are \['p0', 'p1'\]"),
        ({"library_size": "plate"}, "is not a number of at least"), ({"dataset": "a b"}, "use letters, digits"),
    ],
)  # fmt: skip
def test_bad_options_are_named_and_leave_nothing(tmp_path, options, message):
    path = write(tmp_path, example())
    with pytest.raises(ValueError, match=message):
        ingest.h5ad(path, tmp_path / "store", **({"dataset": "d"} | options))
    assert [p.name for p in tmp_path.iterdir()] == ["in.h5ad"]


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.h5ad: no such file"):
        ingest.h5ad(tmp_path / "none.h5ad", tmp_path / "store", "d")
    (tmp_path / "text.h5ad").write_text("hello")
    with pytest.raises(ValueError, match="not an HDF5 file"):
        ingest.h5ad(tmp_path / "text.h5ad", tmp_path / "store", "d")
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["x"] = [1]
    with pytest.raises(ValueError, match="has no obs"):
        ingest.h5ad(tmp_path / "other.h5ad", tmp_path / "store", "d")
    path = write(tmp_path, example(), "cut.h5ad")
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = [29, 8]
    with pytest.raises(ValueError, match="inconsistent|shape|indptr"):
        ingest.h5ad(path, tmp_path / "store", "d")
    assert not (tmp_path / "store").exists()


def test_the_same_dataset_twice_is_refused_by_name_and_by_content(tmp_path):
    path = write(tmp_path, example())
    ingest.h5ad(path, tmp_path / "store", "d")
    for name, message in (
        ("d", "dataset 'd' is there already"),
        ("e", "same file was ingested as dataset 'd'"),
    ):
        with pytest.raises(ValueError, match=message):
            ingest.h5ad(path, tmp_path / "store", name)
    assert open_store(tmp_path / "store").n_obs == 30


def test_a_store_that_is_not_ours_is_left_alone(tmp_path):
    path = write(tmp_path, example())
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="not a TxFM store"):
        ingest.h5ad(path, tmp_path / "store", "d")
    assert [p.name for p in (tmp_path / "store").iterdir()] == ["mine.txt"]


def test_too_many_genes_are_refused(tmp_path):
    wide = ad.AnnData(
        sp.csr_matrix(np.ones((2, 65_536), np.float32)),
        var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(65_536)]),
    )
    with pytest.raises(ValueError, match="65536 genes"):
        ingest.h5ad(write(tmp_path, wide), tmp_path / "store", "d")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("rule", "expected"), [("error", [(30, 30)]), ("drop", [(30, 60), (60, 60)])])
def test_progress_counts_every_pass(tmp_path, rule, expected):
    calls = []
    ingest.h5ad(
        write(tmp_path, example()), tmp_path / "store", "d", empty_samples=rule,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls == expected


def labelled(n_obs: int = 30) -> ad.AnnData:
    adata = example(n_obs)
    rows = np.arange(n_obs)
    adata.obs["age"] = rows
    adata.obs["score"] = np.where(rows % 5 == 0, np.nan, rows / 7)
    adata.obs["smoker"] = rows % 2 == 0
    adata.obs["barcode"] = [f"AAC{i}" for i in rows]
    adata.obs["donor"] = pd.Categorical(np.where(rows % 4 == 0, None, "d" + (rows % 3).astype(str).astype(object)))
    adata.obs["nnz"] = -1
    return adata


def test_labels_of_the_source_are_kept_and_those_of_other_datasets_are_empty(tmp_path):
    first, second = labelled(), labelled()
    second.obs = second.obs[["plate", "donor"]].rename(columns={"plate": "age"})
    second.X = second.X * 2
    ingest.h5ad(write(tmp_path, first), tmp_path / "store", "a", batch="plate")
    ingest.h5ad(write(tmp_path, second, "second.h5ad"), tmp_path / "store", "b")
    obs = open_store(tmp_path / "store").obs().to_pandas()
    assert obs["batch"].tolist() == [*first.obs["plate"], *["b"] * 30]
    one, two = obs[:30], obs[30:]
    for name in ("age", "smoker", "barcode"):
        assert one[name].tolist() == first.obs[name].tolist() and two[name].isna().all()
    np.testing.assert_array_equal(one["score"], first.obs["score"])
    for part, source in ((one, first), (two, second)):
        assert part["donor"].astype(object).where(part["donor"].notna(), None).tolist() == [
            value if isinstance(value, str) else None for value in source.obs["donor"]
        ]
    assert one["source_nnz"].tolist() == [-1] * 30 and one["nnz"].tolist() == np.diff(first.X.indptr).tolist()
    assert two["age_text"].tolist() == second.obs["age"].tolist() and one["age_text"].isna().all()
    ingest.h5ad(write(tmp_path, example(20), "third.h5ad"), tmp_path / "store", "c", obs_columns=())
    assert "plate" not in open_store(tmp_path / "store").obs_schema().names
    with pytest.raises(ValueError, match="--obs-columns names 'x'"):
        ingest.h5ad(tmp_path / "in.h5ad", tmp_path / "other", "d", obs_columns=("x",))


@pytest.mark.parametrize("backend", ["soma", "zarr"])
def test_expected_counts_that_are_not_whole(tmp_path, backend):
    adata = example()
    adata.X = adata.X.astype(np.float64) * 1.37
    path = write(tmp_path, adata)
    with pytest.raises(ValueError, match=r"not a whole number.*--non-integer ok.*--values normalized"):
        ingest.h5ad(path, tmp_path / "store", "d", backend=backend)
    ingest.h5ad(path, tmp_path / "store", "d", non_integer="ok", backend=backend)
    store = open_store(tmp_path / "store")
    assert store.values == "counts" and store.dtype == np.float64
    np.testing.assert_array_equal(stored(tmp_path / "store")[0], adata.X.toarray())
    assert verify(tmp_path / "store")["nnz"] == adata.X.nnz
    ingest.h5ad(write(tmp_path, example(), "whole.h5ad"), tmp_path / "store", "whole")
    np.testing.assert_array_equal(stored(tmp_path / "store", "whole")[0], example().X.toarray())


def test_expected_counts_do_not_go_into_a_store_of_whole_ones(tmp_path):
    ingest.h5ad(write(tmp_path, example()), tmp_path / "store", "whole")
    adata = example()
    adata.X = adata.X * 1.5
    path = write(tmp_path, adata, "rsem.h5ad")
    with pytest.raises(ValueError, match="keeps whole counts.*txfm store convert STORE NEW --dtype float64"):
        ingest.h5ad(path, tmp_path / "store", "rsem", non_integer="ok")
    copy_datasets(tmp_path / "store", tmp_path / "wide", backend="soma", dtype="float64")
    ingest.h5ad(path, tmp_path / "wide", "rsem", non_integer="ok")
    np.testing.assert_array_equal(stored(tmp_path / "wide", "rsem")[0], adata.X.toarray())
    np.testing.assert_array_equal(stored(tmp_path / "wide", "whole")[0], example().X.toarray())


def test_normalised_values_are_recorded_and_kept_apart(tmp_path):
    adata = example()
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))
    path = write(tmp_path, adata)
    ingest.h5ad(path, tmp_path / "store", "d", values="normalized")
    store = open_store(tmp_path / "store")
    assert store.values == "normalized" and store.datasets[0].values == "normalized"
    np.testing.assert_array_equal(stored(tmp_path / "store")[0], adata.X.toarray())
    assert np.isnan(store.obs(["raw_sum"])["raw_sum"].to_numpy()).all()
    with pytest.raises(ValueError, match="holds normalized, but 'e' holds counts; a store has one unit"):
        ingest.h5ad(write(tmp_path, example(), "counts.h5ad"), tmp_path / "store", "e")
    with pytest.raises(ValueError, match=r"holds normalized values.*raw counts"):
        build_shards(store, tmp_path / "shards", ShardConfig(block_rows=4, lanes=1))


def test_symbols_match_through_a_table_and_by_default_through_the_stores_own_genes(tmp_path):
    adata = example()
    by_symbol = adata.copy()
    by_symbol.var_names = adata.var["name"].to_numpy()
    path = write(tmp_path, by_symbol, "symbols.h5ad")
    table = tmp_path / "features.tsv"
    table.write_text("".join(f"ENSG{i:011d}\tN{i}\tGene Expression\n" for i in range(8)))
    ingest.h5ad(path, tmp_path / "store", "a", gene_map=str(table))
    np.testing.assert_array_equal(stored(tmp_path / "store", "a")[0], adata.X.toarray())
    ingest.h5ad(write(tmp_path, adata), tmp_path / "other", "a", symbols="name")
    ingest.h5ad(path, tmp_path / "other", "b")
    np.testing.assert_array_equal(stored(tmp_path / "other", "b")[0], adata.X.toarray())
    few = by_symbol.copy()
    few.var_names = ["N0", "N1", *(f"x{i}" for i in range(6))]
    few.write_h5ad(tmp_path / "few.h5ad")
    with pytest.raises(ValueError, match=r"2 of 8 columns match.*x0.*--min-matched"):
        ingest.h5ad(tmp_path / "few.h5ad", tmp_path / "other", "c")
    assert ingest.h5ad(tmp_path / "few.h5ad", tmp_path / "other", "c", min_matched=0.2)["genes_matched"] == 2


def test_a_dry_run_writes_nothing_and_says_what_it_would(tmp_path):
    found = ingest.h5ad(write(tmp_path, example()), tmp_path / "store", "d", dry_run=True, batch="plate")
    assert (found["dry_run"], found["n_obs"], found["n_panel"], found["genes_matched"]) == (True, 30, 8, 8)
    assert found["nnz_estimated"] == example().X.nnz and found["store_bytes_estimated"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["in.h5ad"]
    with pytest.raises(ValueError, match="--batch names 'x'"):
        ingest.h5ad(tmp_path / "in.h5ad", tmp_path / "store", "d", dry_run=True, batch="x")


def test_a_budget_that_holds_no_block_is_refused(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"--memory-budget 100MiB is too small for 1 process\(es\); give at least \d+MiB"
    ):
        ingest.h5ad(write(tmp_path, example()), tmp_path / "store", "d", workers=Workers(memory=100 * 1024**2))
    with pytest.raises(ValueError, match="--workers and --dask-scheduler are two ways"):
        Workers(n=2, scheduler="tcp://x:1")
    monkeypatch.setattr(parallel, "_ANSWER_S", 1)
    with pytest.raises(ValueError, match="no Dask scheduler answers"), pool(Workers(scheduler="tcp://127.0.0.1:9")):
        pass
