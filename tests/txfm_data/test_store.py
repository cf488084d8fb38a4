"""The SOMA store: what Census tools read from it, what an interrupted append leaves, what damage is noticed."""

import shutil
from pathlib import Path

import anndata as ad
import cellxgene_census
import numpy as np
import pytest
import scipy.sparse as sp
import tiledbsoma

from txfm_data import ingest
from txfm_data.store import append, layout, ledger
from txfm_data.store.soma import SomaStore
from txfm_data.store.verify import verify


def dense(adata: ad.AnnData) -> np.ndarray:
    return adata.X.toarray() if sp.issparse(adata.X) else np.asarray(adata.X)


def test_census_tools_read_back_the_input(tiny_store, tiny_files, no_network):
    """`open_soma`, `get_anndata` and `get_presence_matrix` work offline and equal what was ingested."""
    first, second = map(ad.read_h5ad, tiny_files)
    with cellxgene_census.open_soma(uri=str(tiny_store)) as census:
        whole = cellxgene_census.get_anndata(census, "Homo sapiens")
        part = cellxgene_census.get_anndata(
            census, "homo_sapiens", obs_value_filter="dataset_id == 'first' and cell_type == 'B cell'",
            obs_column_names=["observation_joinid", "batch"],
        )  # fmt: skip
        presence = cellxgene_census.get_presence_matrix(census, "homo_sapiens").toarray()
        summary = census["census_info"]["summary"].read().concat().to_pandas().set_index("label")["value"]
    ids = whole.var["feature_id"].to_numpy()
    for number, adata in enumerate((first, second)):
        rows = (whole.obs["dataset_id"] == ("first", "second")[number]).to_numpy()
        columns = [int(np.flatnonzero(ids == gene)[0]) for gene in adata.var_names]
        np.testing.assert_array_equal(whole.X[rows].toarray()[:, columns], dense(adata))
        assert whole.X[rows].sum() == dense(adata).sum()
        assert whole.obs["observation_joinid"][rows].tolist() == adata.obs_names.tolist()
        assert whole.obs["batch"][rows].tolist() == adata.obs["batch"].tolist()
        np.testing.assert_array_equal(whole.obs["raw_sum"][rows], dense(adata).sum(axis=1))
        assert set(np.flatnonzero(presence[number])) == set(columns)
        assert set(whole.obs["n_measured_vars"][rows]) == {adata.n_vars}
    expected = first[first.obs["cell_type"] == "B cell"]
    assert part.obs["observation_joinid"].tolist() == expected.obs_names.tolist()
    np.testing.assert_array_equal(part.X.toarray()[:, :60], dense(expected))
    assert summary["census_schema_version"] == layout.CENSUS_SCHEMA_VERSION
    assert whole.obs["is_control"].tolist()[:64] == (first.obs["guide"] == "non-targeting").tolist()
    assert set(whole.obs["modality"][64:]) == {"bulk"} and set(whole.obs["perturbation"][64:]) == {"na"}
    assert whole.var["feature_name"].tolist() == [f"G{i}" for i in range(90)]
    counts = np.zeros((112, 90), np.int64)
    counts[:64, :60], counts[64:, 30:] = dense(first), dense(second)
    np.testing.assert_array_equal(whole.var["nnz"], (counts > 0).sum(axis=0))
    np.testing.assert_array_equal(whole.var["n_measured_obs"], [64] * 30 + [112] * 30 + [48] * 30)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the network is forbidden in this test")

    monkeypatch.setattr("socket.getaddrinfo", refuse)


def test_scans_give_the_rows_in_any_pieces(tiny_store, tiny_files):
    store = SomaStore(tiny_store)
    pieces = list(store.scan(10, 100, rows=7))
    assert [low for low, _ in pieces] == list(range(10, 100, 7))
    first = dense(ad.read_h5ad(tiny_files[0]))
    for low, part in pieces[:7]:
        part.check(90, "here")
        for i in range(len(part)):
            row = np.zeros(90)
            row[part.gene_ids[part.indptr[i] : part.indptr[i + 1]]] = part.counts[part.indptr[i] : part.indptr[i + 1]]
            np.testing.assert_array_equal(row[:60], first[low + i])
    with pytest.raises(ValueError, match="rows 100 to 200 asked for"):
        next(store.scan(100, 200))
    assert store.dataset("second").total == int(dense(ad.read_h5ad(tiny_files[1])).sum()) > 65_535
    with pytest.raises(ValueError, match="no dataset 'x'; it has"):
        store.dataset("x")


class Stop(BaseException):
    """Stands for a process that ends at a chosen point."""


@pytest.mark.parametrize("at", ["_write_counts", "_write_var", "write_rows:datasets", "write_rows:obs", "commit"])
@pytest.mark.parametrize("how", ["exception", "killed"])
def test_an_append_that_stops_anywhere_leaves_the_store_as_it_was(
    tmp_path, tiny_store, tiny_files, monkeypatch, at, how
):
    """Stopped by an exception, or so hard that nothing could be cleaned up; then the same command completes it."""
    path = shutil.copytree(tiny_store, tmp_path / "store")
    adata = ad.read_h5ad(tiny_files[0])
    adata.X = adata.X * 2
    adata.var_names = [f"ENSG8{int(g[5:]) % 10**10:010d}" if i % 2 else g for i, g in enumerate(adata.var_names)]
    adata.write_h5ad(tmp_path / "third.h5ad")
    before = verify(SomaStore(path))
    with monkeypatch.context() as patch:
        stop_at(patch, at)
        if how == "killed":
            patch.setattr(append, "_roll_back", lambda store: None)
        with pytest.raises(Stop):
            ingest.h5ad(tmp_path / "third.h5ad", path, "third", batch="batch")
    after = verify(SomaStore(path))
    assert after | {"unfinished": None} == before
    assert after["unfinished"] == ("third" if how == "killed" else None)
    if how == "exception":
        with cellxgene_census.open_soma(uri=str(path)) as census:
            assert cellxgene_census.get_anndata(census, "homo_sapiens").shape == (112, 90)
    ingest.h5ad(tmp_path / "third.h5ad", path, "third", batch="batch")
    store = SomaStore(path)
    assert verify(store)["n_obs"] == 176 and store.ledger.pending is None
    assert store.dataset("third").total == int(dense(adata).sum())
    with cellxgene_census.open_soma(uri=str(path)) as census:
        whole = cellxgene_census.get_anndata(census, "homo_sapiens")
        assert cellxgene_census.get_presence_matrix(census, "homo_sapiens").toarray().sum(axis=1).tolist() == [
            60,
            60,
            60,
        ]
    assert whole.shape == (176, 120) and whole.X[112:].sum() == dense(adata).sum()
    assert whole.var["n_measured_obs"].sum() == 64 * 60 + 48 * 60 + 64 * 60


def test_a_first_append_that_stops_leaves_no_store(tmp_path, tiny_files):
    def interrupt(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest.h5ad(tiny_files[0], tmp_path / "store", "first", progress=interrupt)
    assert not list(tmp_path.iterdir())
    ingest.h5ad(tiny_files[0], tmp_path / "store", "first")
    assert verify(SomaStore(tmp_path / "store"))["n_obs"] == 64


def stop_at(patch, at: str) -> None:
    """Make the append stop right after step `at` (of `write_rows`, after that table; before the commit event)."""
    name, _, table = at.partition(":")
    if name == "commit":
        record = ledger.record

        def stop_before_commit(uri, event, dataset, detail):
            if event == "commit":
                raise Stop
            record(uri, event, dataset, detail)

        patch.setattr(append.ledger, "record", stop_before_commit)
        return
    module = layout if name == "write_rows" else append
    original = getattr(module, name)
    calls = []

    def stop_after(*args, **kwargs):
        result = original(*args, **kwargs)
        if (not table or str(args[0]).endswith(table)) and not calls:
            calls.append(1)
            raise Stop
        return result

    patch.setattr(module, name, stop_after)


def test_only_one_process_writes_at_a_time(tmp_path, tiny_store, tiny_files):
    path = shutil.copytree(tiny_store, tmp_path / "store")
    adata = ad.read_h5ad(tiny_files[0])[:9]
    adata.write_h5ad(tmp_path / "part.h5ad")
    with append._lock(path), pytest.raises(ValueError, match="another process is writing"):
        ingest.h5ad(tmp_path / "part.h5ad", path, "part")
    ingest.h5ad(tmp_path / "part.h5ad", path, "part")


def test_what_is_not_our_store_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no store there"):
        SomaStore(tmp_path / "none")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="not a TxFM store"):
        SomaStore(tmp_path / "folder")
    tiledbsoma.Collection.create(str(tmp_path / "other")).close()
    with pytest.raises(ValueError, match="but not a TxFM store"):
        SomaStore(tmp_path / "other")
    with tiledbsoma.Collection.create(str(tmp_path / "newer")) as top:
        top.metadata["txfm_format"], top.metadata["txfm_version"] = layout.FORMAT, 99
    with pytest.raises(ValueError, match="version 99"):
        SomaStore(tmp_path / "newer")
    with pytest.raises(FileExistsError):
        layout.create(tmp_path / "folder")


def fragment_files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*.tdb") if "__fragments" in p.parts and "__fragment_metadata" not in p.name)


def test_flipped_bits_in_counts_are_noticed(tmp_path, tiny_store):
    """One bit flipped in the middle of each data file of X: reading never returns wrong numbers silently."""
    files = fragment_files(tiny_store / layout.RAW)
    assert len(files) >= 6
    for number, file in enumerate(files):
        path = shutil.copytree(tiny_store, tmp_path / f"copy{number}")
        damaged = path / file.relative_to(tiny_store)
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 16
        damaged.write_bytes(bytes(data))
        with pytest.raises(ValueError, match="cannot be read"):
            verify(SomaStore(path))


def test_lost_rows_are_noticed(tmp_path, tiny_store):
    path = shutil.copytree(tiny_store, tmp_path / "store")
    with tiledbsoma.open(str(path / layout.RAW), "d") as matrix:
        matrix.delete_cells((slice(3, 3),))
    with pytest.raises(ValueError, match="dataset 'first': non-zero counts"):
        verify(SomaStore(path))


def test_the_ledger_folds_events():
    assert ledger.fold([("begin", "a", "{}")]).pending == "a"
    assert ledger.fold([("begin", "a", "{}"), ("abort", "a", "{}")]).pending is None
    empty = ledger.fold([])
    assert (empty.n_obs, empty.n_vars, empty.committed) == (0, 0, ())
