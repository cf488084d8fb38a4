"""Embeddings for phenoprints: rows in the order of the samples that are left, from each kind; refusals that name what is wrong."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import GENES_A, GENES_B, make_adata
from tests.txfm_data.curate.contexts import context_of
from txfm_data import ingest
from txfm_data.anndata_out import Matrix, write_anndata
from txfm_data.curate.embedding import check_embedding, fingerprint_of, make_embedding, numbered_columns
from txfm_data.curate.recipe import EmbeddingSpec
from txfm_data.curate.rows import RowFile, labels_of, positions_in
from txfm_data.curate.state import State
from txfm_data.obs_columns import INDEX
from txfm_data.store.opening import open_store
from txfm_data.store.protocol import Store

WIDTH = 5


def embedded(ids: np.ndarray) -> np.ndarray:
    """A value that tells its sample and its column, (n, WIDTH) float32."""
    return (np.asarray(ids)[:, None] + np.arange(WIDTH) / 8).astype(np.float32)


def write_source(folder: Path, name: str, seed: int, genes: range, n_obs: int) -> Path:
    """Counts with two sets of numbered columns: PC_1 to PC_12, whole, and U2, U10 with a sample that has none."""
    adata = make_adata(seed, genes, n_obs=n_obs)
    numbers = pd.DataFrame({f"PC_{k}": 100.0 * np.arange(n_obs) + k for k in range(12, 0, -1)}, index=adata.obs.index)
    numbers["PC_quality"], numbers["U10"], numbers["U2"] = 1.0, np.arange(n_obs), np.arange(n_obs) + 0.5
    numbers.loc[numbers.index[5], "U2"] = np.nan
    numbers["V1"], numbers["V_1"], numbers["W1"] = 1.0, 2.0, "text"
    adata.obs = pd.concat([adata.obs, numbers], axis=1)
    adata.write_h5ad(folder / f"{name}.h5ad")
    return folder / f"{name}.h5ad"


@pytest.fixture(scope="module", params=["soma", "zarr"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp(request.param)
    for name, seed, genes, n_obs in (("a", 1, GENES_A, 40), ("b", 2, GENES_B, 70)):
        path = write_source(folder, name, seed, genes, n_obs)
        ingest.h5ad(path, folder / "store", name, batch="batch", backend=request.param)
    make_adata(3, GENES_A, n_obs=30).write_h5ad(folder / "plain.h5ad")
    ingest.h5ad(folder / "plain.h5ad", folder / "store", "plain", batch="batch", backend=request.param)
    return open_store(folder / "store")


@pytest.fixture
def state(store: Store) -> State:
    """Every third sample is left, and all but the first two genes."""
    state = State.of(store, store.datasets)
    state.alive &= np.arange(store.n_obs) % 3 == 1
    state.panels = {name: panel[2:] for name, panel in state.panels.items()}
    return state


def embed_store(store: Store, path: Path, ids: np.ndarray, **changes: Any) -> EmbeddingSpec:
    """Write an embedding of some samples as `txfm embed STORE` does.

    changes : key, dtype, values, kind (of the input, in uns), columns (of obs, in place of all).
    """
    key, dtype = changes.get("key", "X_txfm"), np.dtype(changes.get("dtype", np.float32))
    values = changes.get("values", embedded(ids)).astype(dtype)
    labels = store.obs(changes.get("columns")).take(pa.array(ids))

    def obs() -> Iterator[tuple[np.ndarray, pa.Table]]:
        names = pa.array([str(i) for i in ids.tolist()], pa.large_string())
        yield np.arange(len(ids)), labels.append_column(INDEX, names)

    matrix = Matrix(element=f"obsm/{key}", width=values.shape[1], dtype=dtype, parts=iter([values]))
    about = {"input": changes.get("kind", "store"), "layer": "final"}
    write_anndata(path, n_obs=len(ids), obs=obs, var=None, matrices=[matrix], uns={f"txfm_{key}": about})
    return EmbeddingSpec(kind="file", path=str(path), key=key)


def test_columns_are_taken_in_the_order_of_their_number(store: Store, state: State, tmp_path: Path) -> None:
    spec = EmbeddingSpec(kind="columns", prefix="PC")
    check_embedding(spec, store, store.datasets[:2])
    for record in store.datasets[:2]:
        path = make_embedding(spec, state, record, context_of(tmp_path))
        assert path == tmp_path / "scratch" / f"{record.name}.npy"
        found = np.load(path)
        assert found.dtype == np.float32
        expected = 100.0 * (state.rows(record) - record.obs_start)[:, None] + np.arange(1, 13)
        np.testing.assert_array_equal(found, expected)
    assert numbered_columns(store, "PC_") == [f"PC_{k}" for k in range(1, 13)]
    assert numbered_columns(store, "U") == ["U2", "U10"]


def test_a_missing_value_names_its_sample(store: Store, tmp_path: Path) -> None:
    spec, state = EmbeddingSpec(kind="columns", prefix="U"), State.of(store, store.datasets)
    second = store.datasets[1]
    with pytest.raises(ValueError, match=rf"columns U2 to U10 .* sample {second.obs_start + 5} is nan in column 0"):
        make_embedding(spec, state, second, context_of(tmp_path))
    state.alive[second.obs_start + 5] = False
    make_embedding(spec, state, second, context_of(tmp_path))
    with pytest.raises(ValueError, match=rf"sample {store.datasets[2].obs_start} is nan"):
        make_embedding(spec, state, store.datasets[2], context_of(tmp_path))
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["b.npy"]


@pytest.mark.parametrize(
    ("prefix", "problem"),
    [
        ("pc", "no column of obs is named 'pc' and a number, such as 'pc1'; near it: .*'PC_9'"),
        ("V", "columns 'V1' and 'V_1' of obs are both number 1"),
        ("W", "column 'W1' of obs is of type .*, expected numbers"),
    ],
)
def test_columns_that_do_not_do(store: Store, prefix: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_embedding(EmbeddingSpec(kind="columns", prefix=prefix), store, store.datasets)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("columns", [None, ["cell_type"]])
def test_a_file_gives_its_rows_by_sample_id(
    store: Store, state: State, tmp_path: Path, dtype: Any, columns: list[str] | None
) -> None:
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.flatnonzero(state.alive | (np.arange(store.n_obs) % 2 == 0)))
    spec = embed_store(store, tmp_path / "e.h5ad", ids, dtype=dtype, columns=columns, key="X_own")
    if columns is not None:
        with h5py.File(tmp_path / "e.h5ad", "r+") as file:
            del file["obs/soma_joinid"]  # then the names of the samples say their row
    check_embedding(spec, store, store.datasets)
    for record in store.datasets:
        found = np.load(make_embedding(spec, state, record, context_of(tmp_path)))
        np.testing.assert_array_equal(found, embedded(state.rows(record)))


def test_a_file_that_lacks_samples(store: Store, state: State, tmp_path: Path) -> None:
    first, second, third = store.datasets
    ids = np.arange(3, second.obs_stop)
    spec = embed_store(store, tmp_path / "e.h5ad", ids)
    check_embedding(spec, store, (first, second))
    with pytest.raises(ValueError, match=rf"30 of 30 samples of dataset 'plain' .* such as row {third.obs_start}"):
        check_embedding(spec, store, store.datasets)
    with pytest.raises(ValueError, match="1 of 13 samples of dataset 'a' are not in it, such as row 1 of"):
        make_embedding(spec, state, first, context_of(tmp_path))
    assert len(np.load(make_embedding(spec, state, second, context_of(tmp_path)))) == state.n_samples(second)


def test_a_file_of_another_store(store: Store, state: State, tmp_path: Path) -> None:
    first, second = store.datasets[:2]
    ids = np.arange(second.obs_stop)
    spec = embed_store(store, tmp_path / "e.h5ad", ids)
    with h5py.File(tmp_path / "e.h5ad", "r+") as file:
        file["obs/raw_sum"][7] += 1
        file["obs/dataset_id/codes"][60] = 1 - file["obs/dataset_id/codes"][60]
    with pytest.raises(ValueError, match="sample 7 has the library size .* it was made of another store"):
        check_embedding(spec, store, (first,))
    with pytest.raises(ValueError, match="sample 60 belongs to dataset 'a', but to 'b' in the store"):
        make_embedding(spec, State.of(store, store.datasets), second, context_of(tmp_path))
    shards = embed_store(store, tmp_path / "shards.h5ad", ids, kind="shards")
    with pytest.raises(ValueError, match="those of an input of kind 'shards', expected a store"):
        check_embedding(shards, store, (first,))


def noise(path: Path, store: Store, index: list[str] | None = None, **columns: Any) -> EmbeddingSpec:
    """An h5ad that anndata wrote, with random numbers in obsm, and samples named 0 to n - 1 unless told."""
    n = store.n_obs
    names = [str(i) for i in range(n)] if index is None else index
    values = np.random.default_rng(0).normal(size=(n, WIDTH)).astype(np.float32)
    ad.AnnData(obs=pd.DataFrame(columns, index=names), obsm={"X_txfm": values}).write_h5ad(path)
    return EmbeddingSpec(kind="file", path=str(path))


def test_a_file_that_says_nothing_of_the_store_is_refused(store: Store, tmp_path: Path) -> None:
    for columns in ({}, {"batch": "b"}, {"raw_sum": "many", "dataset_id": 3}, {"soma_joinid": np.arange(store.n_obs)}):
        with pytest.raises(
            ValueError, match=r"nothing in it says that .* uns\['txfm_X_txfm'\], nor raw_sum or dataset_id"
        ):
            check_embedding(noise(tmp_path / "e.h5ad", store, **columns), store, store.datasets)
    obs = store.obs(["raw_sum", "dataset_id"]).to_pandas()
    for name in ("raw_sum", "dataset_id"):
        own = obs[name].to_numpy()
        check_embedding(noise(tmp_path / "e.h5ad", store, **{name: own}), store, store.datasets)
        with pytest.raises(ValueError, match="it was made of another store, embed this one"):
            check_embedding(noise(tmp_path / "e.h5ad", store, **{name: own[::-1]}), store, store.datasets)


@pytest.mark.parametrize("broken", [3.5, np.nan, np.inf])
def test_samples_that_are_not_named_by_whole_numbers_are_refused(store: Store, tmp_path: Path, broken: float) -> None:
    sizes = store.obs(["raw_sum"])["raw_sum"].to_numpy()
    ids = np.arange(store.n_obs, dtype=np.float64)
    check_embedding(noise(tmp_path / "e.h5ad", store, raw_sum=sizes, soma_joinid=ids), store, store.datasets)
    ids[3] = broken
    with pytest.raises(ValueError, match=rf"sample 3 is named {broken}, which is no row of a store; write it with"):
        check_embedding(noise(tmp_path / "e.h5ad", store, raw_sum=sizes, soma_joinid=ids), store, store.datasets)
    names = [str(i) if i != 3 else str(broken) for i in range(store.n_obs)]
    with pytest.raises(ValueError, match="samples are not named by their row of a store"):
        check_embedding(noise(tmp_path / "e.h5ad", store, names, raw_sum=sizes), store, store.datasets)


def test_files_and_models_are_told_apart_by_their_bytes(store: Store, tmp_path: Path) -> None:
    assert fingerprint_of(EmbeddingSpec(kind="pca")) == fingerprint_of(EmbeddingSpec(kind="columns", prefix="PC")) == {}
    file = EmbeddingSpec(kind="file", path=str(tmp_path / "e.h5ad"))
    (tmp_path / "e.h5ad").write_bytes(b"one")
    before = fingerprint_of(file)
    assert before == {"e.h5ad": hashlib.sha256(b"one").hexdigest()}
    (tmp_path / "e.h5ad").write_bytes(b"two")
    assert fingerprint_of(file) != before
    assert fingerprint_of(EmbeddingSpec(kind="checkpoint", path="someone/txfm-s")) == {"hub": "someone/txfm-s"}
    folder = tmp_path / "run" / "checkpoint"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "vocabulary.parquet"):
        (folder / name).write_text(name)
    expected = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("config.json", "model.safetensors")}
    for path in (folder, folder.parent):
        assert fingerprint_of(EmbeddingSpec(kind="checkpoint", path=str(path))) == expected


def test_files_that_do_not_do(store: Store, state: State, tmp_path: Path) -> None:
    path, ids, records = tmp_path / "e.h5ad", np.arange(store.n_obs), store.datasets
    spec = embed_store(store, path, ids, columns=["cell_type"])
    with pytest.raises(ValueError, match=r"obsm has no 'X_pca'; it has \['X_txfm'\]"):
        check_embedding(EmbeddingSpec(kind="file", path=str(path), key="X_pca"), store, records)
    missing = str(tmp_path / "none.h5ad")
    with pytest.raises(FileNotFoundError, match=r"none.h5ad: no such file; write it with txfm embed STORE"):
        check_embedding(EmbeddingSpec(kind="file", path=missing), store, records)
    (tmp_path / "text.h5ad").write_text("no HDF5")
    with pytest.raises(ValueError, match="text.h5ad: not an h5ad file, or damaged"):
        check_embedding(EmbeddingSpec(kind="file", path=str(tmp_path / "text.h5ad")), store, records)
    with h5py.File(path, "r+") as file:
        file["obs/soma_joinid"][4] = 9
    with pytest.raises(ValueError, match="sample 9 is there more than once"):
        check_embedding(spec, store, records)
    with h5py.File(path, "r+") as file:
        del file["obs/soma_joinid"]
        file[f"obs/{INDEX}"][0] = "AAACCTG-1"
    with pytest.raises(ValueError, match="samples are not named by their row of a store"):
        check_embedding(spec, store, records)
    with h5py.File(path, "r+") as file:
        del file["obsm/X_txfm"]
        file["obsm/X_txfm"] = np.zeros((len(ids), 3), np.int32)
    with pytest.raises(ValueError, match="is no dense matrix of floating-point numbers"):
        check_embedding(spec, store, records)


def test_nan_in_a_file_names_its_sample(store: Store, state: State, tmp_path: Path) -> None:
    values = embedded(np.arange(store.n_obs))
    values[1, 3] = np.nan
    spec = embed_store(store, tmp_path / "e.h5ad", np.arange(store.n_obs), values=values)
    with pytest.raises(ValueError, match="dataset 'a': the embedding of sample 1 is nan in column 3"):
        make_embedding(spec, state, store.datasets[0], context_of(tmp_path))


def test_pca_is_of_what_is_left(store: Store, state: State, tmp_path: Path) -> None:
    spec, record = EmbeddingSpec(kind="pca", n_components=4), store.datasets[1]
    check_embedding(spec, store, store.datasets)
    assert np.load(make_embedding(spec, state, record, context_of(tmp_path))).shape == (state.n_samples(record), 4)
    with pytest.raises(ValueError, match="PCA of dataset 'a': n_components is 50, but 40 samples .* at most 39"):
        check_embedding(EmbeddingSpec(kind="pca"), store, store.datasets)


def test_a_checkpoint_goes_to_who_can_open_it(store: Store, state: State, tmp_path: Path) -> None:
    spec, record = EmbeddingSpec(kind="checkpoint"), store.datasets[1]
    check_embedding(spec, store, store.datasets)
    with pytest.raises(ValueError, match="no model can be opened here"):
        make_embedding(spec, state, record, context_of(tmp_path))

    def embed(spec: Any, of: Any, record: Any, rows: Any, panel: np.ndarray, out: Path, progress: Any) -> None:
        assert of is store
        np.testing.assert_array_equal(panel, state.panels[record.name])
        with RowFile(out, rows, WIDTH, "test") as file:
            file.put(np.arange(len(rows)), embedded(rows))

    path = make_embedding(spec, state, record, context_of(tmp_path, embed=embed))
    np.testing.assert_array_equal(np.load(path), embedded(state.rows(record)))


def test_checkpoints_that_are_none(store: Store, tmp_path: Path) -> None:
    def check(path: str) -> None:
        check_embedding(EmbeddingSpec(kind="checkpoint", path=path), store, store.datasets)

    check("someone/txfm-s")  # may be a model on the hub
    with pytest.raises(FileNotFoundError, match="no checkpoint at /nowhere/model"):
        check("/nowhere/model")
    with pytest.raises(
        ValueError, match=r"is no checkpoint, it lacks config.json, model.safetensors, vocabulary.parquet"
    ):
        check(str(tmp_path))


def test_a_dataset_without_samples(store: Store, state: State, tmp_path: Path) -> None:
    state.alive[:] = False
    with pytest.raises(ValueError, match="dataset 'a' has no samples left to embed"):
        make_embedding(EmbeddingSpec(kind="pca"), state, store.datasets[0], context_of(tmp_path))


@given(st.sets(st.integers(0, 60)), st.lists(st.integers(0, 60)))
def test_positions_are_those_of_a_dict(rows: set[int], ids: list[int]) -> None:
    ascending = sorted(rows)
    place = {row: at for at, row in enumerate(ascending)}
    found = positions_in(np.array(ascending, np.int64), np.array(ids, np.int64))
    assert found.tolist() == [place.get(i, -1) for i in ids]


def test_labels_of_some_rows(store: Store) -> None:
    record = store.datasets[1]
    rows = np.arange(record.obs_start, record.obs_stop, 4)
    parts = list(labels_of(store, record, rows, ["PC_2"]))
    at = np.concatenate([positions for positions, _ in parts])
    values = np.concatenate([table["PC_2"].to_numpy() for _, table in parts])
    assert sorted(at.tolist()) == list(range(len(rows)))
    np.testing.assert_array_equal(values, 100.0 * (rows[at] - record.obs_start) + 2)


@given(st.permutations(range(9)), st.integers(1, 4))
def test_rows_come_to_their_place_in_any_order(tmp_path_factory: Any, order: list[int], step: int) -> None:
    path, rows = tmp_path_factory.mktemp("rows") / "e.npy", np.arange(9) * 5
    with RowFile(path, rows, WIDTH, "here") as file:
        for start in range(0, 9, step):
            at = np.sort(order[start : start + step])
            file.put(at, embedded(rows[at]).astype(np.float64))
        assert not path.exists()
    found = np.load(path, allow_pickle=False)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, embedded(rows))
    assert [p.name for p in path.parent.iterdir()] == ["e.npy"]


@pytest.mark.parametrize(
    ("at", "values", "problem"),
    [
        ([0, 1], np.zeros((2, WIDTH)), "here: 1 of 3 samples have no embedding, such as sample 30"),
        ([0, 1], np.full((2, WIDTH), np.inf), "the embedding of sample 10 is inf in column 0"),
        ([1, 1], np.zeros((2, WIDTH)), "sample 20 has several rows"),
        ([0, 1], np.zeros((2, 2)), r"expected \(2, 5\) values, got \(2, 2\)"),
    ],
)
def test_nothing_is_left_of_a_file_that_is_not_whole(tmp_path: Path, at: list[int], values: Any, problem: str) -> None:
    with (
        pytest.raises(ValueError, match=problem),
        RowFile(tmp_path / "e.npy", np.array([10, 20, 30]), WIDTH, "here") as file,
    ):
        file.put(np.array(at), values)
    assert list(tmp_path.iterdir()) == []
