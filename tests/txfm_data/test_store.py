"""The store, in both backends: it gives back what was put in, and takes in nothing that does not fit."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma
import zarr

from tests.conftest import gene_id
from tests.txfm_data.stores import (
    BACKENDS,
    EMPTY_SAMPLE,
    append,
    contents,
    counts_of,
    dataset,
    dense,
    expected,
    labels_of,
    vocabulary,
    write_datasets,
)  # fmt: skip
from txfm_data.store import append as appends
from txfm_data.store import layout, ledger, transaction, zarr_layout
from txfm_data.store.append import NewDataset, appending
from txfm_data.store.consolidate import consolidate
from txfm_data.store.convert import copy_datasets
from txfm_data.store.describe import describe
from txfm_data.store.opening import OBS_SCHEMA, open_store
from txfm_data.store.verify import verify

TWO = ("first", "second")


@pytest.fixture(scope="module", autouse=True)
def without_fsync():
    """What waits for the disk guards against power cuts, which no test here stages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return write_datasets(tmp_path_factory.mktemp("h5ad"))


@pytest.fixture(scope="module")
def stores(tmp_path_factory, files) -> dict[str, Path]:
    """One store of two datasets for each backend. Read them only."""
    folder = tmp_path_factory.mktemp("stores")
    for backend in BACKENDS:
        for name in TWO:
            append(files[name], folder / backend, name, backend=backend)
    return {backend: folder / backend for backend in BACKENDS}


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture
def path(backend, stores) -> Path:
    """A store of two datasets. Read it only."""
    return stores[backend]


@pytest.fixture
def copy(path, tmp_path) -> Path:
    """The same, to change."""
    return shutil.copytree(path, tmp_path / "store")


def names_beside(path: Path) -> list[str]:
    """What else is in the store's folder."""
    return sorted(p.name for p in path.parent.iterdir() if p.name.startswith(f".{path.name}."))


def test_what_was_put_in_comes_back(path, backend):
    store = open_store(path)
    assert (store.backend, store.values, store.dtype, store.n_obs) == (backend, "counts", np.uint32, 71)
    np.testing.assert_array_equal(counts_of(store), expected(*TWO))
    assert counts_of(store).max() == 4_000_000_000
    assert list(store.vocabulary.gene_ids) == vocabulary(*TWO)
    assert [f"G{int(g[4:]) - 90_000_000_000}" for g in store.vocabulary.gene_ids] == list(store.vocabulary.symbols)
    for name, start, stop in (("first", 0, 40), ("second", 40, 71)):
        adata, record = dataset(name), store.dataset(name)
        counts = adata.X.toarray()
        assert (record.obs_start, record.obs_stop, record.n_obs) == (start, stop, adata.n_obs)
        assert (record.n_panel, record.nnz, record.total) == (adata.n_vars, (counts > 0).sum(), counts.sum())
        assert [store.vocabulary.gene_ids[t] for t in store.panel(record)] == sorted(
            adata.var_names, key=vocabulary(*TWO).index
        )
        np.testing.assert_array_equal(store.gene_nnz(record), (expected(*TWO)[start:stop] > 0).sum(axis=0))


def test_labels_come_back_with_their_types(path):
    store, first, second = open_store(path), dataset("first").obs, dataset("second").obs
    obs = labels_of(store.obs())
    category, text = str(layout.CATEGORY), "large_string"
    for name, kind, values in (
        ("soma_joinid", "int64", list(range(71))),
        ("dataset_id", category, ["first"] * 40 + ["second"] * 31),
        ("observation_joinid", text, [*first.index, *second.index]),
        ("batch", category, [*first["batch"], *second["batch"]]),
        ("cell_type", category, [*first["cell_type"], *second["cell_type"]]),
        ("perturbation", category, [*first["guide"], *["na"] * 31]),
        ("is_control", "bool", [*(first["guide"] == "none"), *[False] * 31]),
        ("modality", category, ["sc"] * 40 + ["bulk"] * 31),
        ("is_primary_data", "bool", [True] * 71),
        ("raw_sum", "double", [*first["library"].astype(float), *dataset("second").X.sum(axis=1).A1.tolist()]),
        ("nnz", "int64", (expected(*TWO) > 0).sum(axis=1).tolist()),
        ("n_measured_vars", "int64", [30] * 40 + [40] * 31),
        ("note", text, [*first["note"], *[None] * 31]),
        ("age", "int64", [*[None] * 40, *second["age"]]),
        ("tissue", category, [*[None] * 40, *second["tissue"]]),
    ):
        assert obs[name] == (kind, values), name
    sums, nnz = np.array(obs["raw_sum"][1]), (expected(*TWO) > 0).sum(axis=1)
    # The mean is over the panel's counts, of which a library size column says nothing.
    counted = expected(*TWO).sum(axis=1)
    np.testing.assert_allclose(obs["raw_mean_nnz"][1], np.where(nnz > 0, counted / np.maximum(nnz, 1), 0), rtol=1e-12)
    assert obs["nnz"][1][EMPTY_SAMPLE] == 0 and sums[EMPTY_SAMPLE] == 7
    assert set(obs) == set(store.obs_schema().names) and store.obs_schema().names[: len(OBS_SCHEMA)] == OBS_SCHEMA.names


def test_zero_and_unknown_stay_apart(path):
    """A gene outside a dataset's panel was not measured there; one inside it without counts was."""
    store = open_store(path)
    first, second = (set(store.panel(store.dataset(name)).tolist()) for name in TWO)
    genes = vocabulary(*TWO)
    assert first == {genes.index(gene_id(g)) for g in range(30)}
    assert second == {genes.index(gene_id(g)) for g in range(20, 60)}
    both = describe(path)["genes_in_common"]
    assert both == {"first": {"first": 30, "second": 10}, "second": {"first": 10, "second": 40}}
    empty = dense(store.read_rows(np.array([EMPTY_SAMPLE])), len(genes))
    assert not empty.any() and not (expected("first") == 0).all(axis=0).any()


@pytest.mark.parametrize(("start", "stop", "rows"), [(0, 71, 1), (0, 71, 7), (10, 60, 1000), (39, 41, 1), (5, 5, 3)])
def test_scans_give_the_rows_in_any_pieces(path, start, stop, rows):
    store = open_store(path)
    assert [low for low, _ in store.scan(start, stop, rows=rows)] == list(range(start, stop, rows))
    np.testing.assert_array_equal(counts_of(store, start, stop, rows), expected(*TWO)[start:stop])


@pytest.mark.parametrize("ids", [[], [0], [70], [3], [0, 1, 2], [0, 35, 36, 39, 40, 70], list(range(71))])
def test_rows_by_id(path, ids):
    store = open_store(path)
    samples = store.read_rows(np.array(ids, np.int64))
    assert samples.counts.dtype == np.uint32 and samples.gene_ids.dtype == np.uint16
    np.testing.assert_array_equal(dense(samples, 60), expected(*TWO)[ids])


@pytest.mark.parametrize("ids", [[-1], [71], [5, 4], [4, 4]])
def test_ids_that_cannot_be_are_refused(path, ids):
    with pytest.raises(ValueError, match="ascend"):
        open_store(path).read_rows(np.array(ids))


@pytest.mark.parametrize(("start", "stop"), [(0, 72), (-1, 5), (9, 8), (100, 200)])
def test_ranges_that_cannot_be_are_refused(path, start, stop):
    with pytest.raises(ValueError, match=f"rows {start} to {stop} asked for, but the store has 71"):
        next(open_store(path).scan(start, stop))


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("dataset_id == 'second'", lambda o: o["dataset_id"] == "second"),
        ("dataset_id == 'first' and cell_type == 'B cell'", lambda o: o["dataset_id"] == "first" and o["cell_type"] == "B cell"),
        ("cell_type in ['B cell', 'T cell']", lambda o: o["cell_type"] in ("B cell", "T cell")),
        ("cell_type != 'NK cell'", lambda o: o["cell_type"] != "NK cell"),
        ("is_control == True or raw_sum > 4e9", lambda o: o["is_control"] or o["raw_sum"] > 4e9),
        ("nnz >= 20 and modality == 'sc'", lambda o: o["nnz"] >= 20 and o["modality"] == "sc"),
        ("age < 30", lambda o: o["age"] is not None and o["age"] < 30),
        ("tissue == 'blood'", lambda o: o["tissue"] == "blood"),
        ("tissue != 'blood'", lambda o: o["tissue"] == "skin"),
        ("note == 'note 7'", lambda o: o["note"] == "note 7"),
        ("cell_type == 'no such'", lambda o: False),
    ],
)  # fmt: skip
def test_filters_of_obs(path, text, keep):
    store = open_store(path)
    rows = [row for row in store.obs().to_pylist() if keep(row)]
    assert store.obs(value_filter=text).to_pylist() == rows
    assert bool(rows) == ("no such" not in text)
    ids = store.obs(["soma_joinid"], value_filter=text)["soma_joinid"].to_pylist()
    assert ids == [row["soma_joinid"] for row in rows]


def test_chosen_columns_of_obs(path):
    store = open_store(path)
    table = store.obs(["nnz", "batch"], value_filter="cell_type == 'T cell'")
    assert sorted(table.column_names) == ["batch", "nnz", "soma_joinid"]
    rows = [row for row in store.obs().to_pylist() if row["cell_type"] == "T cell"]
    for name in table.column_names:
        assert table[name].to_pylist() == [row[name] for row in rows]
    assert sum(len(part) for part in store.obs_parts(["soma_joinid"])) == 71


def test_an_unknown_dataset_is_named(path):
    with pytest.raises(ValueError, match=r"no dataset 'x'; it has \['first', 'second'\]"):
        open_store(path).dataset("x")


def test_both_backends_say_the_same(stores):
    assert contents(open_store(stores["soma"])) == contents(open_store(stores["zarr"]))


def test_verify_and_describe(path, backend):
    result = verify(path)
    files = sum(len(names) for _, _, names in os.walk(path)) - 1
    assert result == {
        "path": str(path), "kind": "store", "backend": backend, "n_obs": 71, "n_vars": 60, "n_datasets": 2,
        "nnz": (expected(*TWO) > 0).sum(), "n_files": files, "unfinished": False,
    }  # fmt: skip
    found = describe(path)
    assert (found["n_obs"], found["n_vars"], found["dtype"]) == (71, 60, "uint32")
    assert found["samples_by_modality"] == {"sc": 40, "bulk": 31} and found["bytes"] > 0


def test_a_third_dataset(copy, files):
    before = contents(open_store(copy))
    result = append(files["third"], copy, "third")
    assert (result["n_obs"], result["n_panel"], result["total"]) == (22, 5, dataset("third").X.sum())
    store = open_store(copy)
    np.testing.assert_array_equal(counts_of(store), expected(*TWO, "third"))
    assert list(store.vocabulary.gene_ids) == vocabulary(*TWO, "third")
    after = contents(store)
    assert after["datasets"][:2] == before["datasets"] and after["panels"][:2] == before["panels"]
    assert after["obs"]["age"][1][71:] == dataset("third").obs["age"].tolist()
    for name, (kind, values) in before["obs"].items():
        assert (after["obs"][name][0], after["obs"][name][1][:71]) == (kind, values), name
    assert verify(copy)["n_obs"] == 93 and not names_beside(copy)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("first", "third", {}, r"dataset 'first' is there already \(40 samples from first\.h5ad\).*--dataset"),
        ("third", "first", {}, r"same file was ingested as dataset 'first' \(sha256 [0-9a-f]{12}…\)"),
        ("third", "third", {"values": "normalized"}, "holds counts, but 'third' holds normalized.*another --store"),
    ],
)
def test_what_would_come_twice_or_in_another_unit_is_refused(copy, files, name, content, options, message):
    before = contents(open_store(copy))
    with pytest.raises(ValueError, match=message):
        append(files[content], copy, name, **({"perturbation": None, "control": None, "library_size": None} | options))
    assert contents(open_store(copy)) == before and not names_beside(copy)


HOLD = """
import fcntl, sys
handle = open(sys.argv[1], "w")
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_only_one_process_writes_at_a_time(copy, files):
    lock = copy.with_name(".store.lock")
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process is writing to this store"):
            append(files["third"], copy, "third")
        assert open_store(copy).n_obs == 71  # reading goes on
        holder.communicate("")
    append(files["third"], copy, "third")
    assert open_store(copy).n_obs == 93 and not names_beside(copy)


def test_a_lock_that_vanishes_while_it_is_taken_is_taken_again(tmp_path, monkeypatch):
    """Its last holder removes it between another's opening and locking it; then two would write at once."""
    path, real, calls = tmp_path / "store", fcntl.flock, []

    def remove_first(handle, how):
        if not calls:
            calls.append(1)
            (tmp_path / ".store.lock").unlink()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with transaction._locked(path):
        assert (tmp_path / ".store.lock").exists()
        with pytest.raises(ValueError, match="another process is writing"), transaction._locked(path):
            pass


def test_what_is_not_our_store_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no store there; make one with: txfm ingest"):
        open_store(tmp_path / "none")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("x")
    for name in ("folder", "text"):
        with pytest.raises(ValueError, match="not a TxFM store"):
            open_store(tmp_path / name)
    tiledbsoma.Collection.create(str(tmp_path / "other.soma")).close()
    zarr.create_group(tmp_path / "other.zarr")
    for name in ("other.soma", "other.zarr"):
        with pytest.raises(ValueError, match="but not a TxFM store"):
            open_store(tmp_path / name)
    with tiledbsoma.Collection.create(str(tmp_path / "newer.soma")) as top:
        top.metadata["txfm_format"], top.metadata["txfm_version"] = layout.FORMAT, 99
    zarr.create_group(tmp_path / "newer.zarr", attributes={"txfm_format": zarr_layout.FORMAT, "txfm_version": 99})
    for name in ("newer.soma", "newer.zarr"):
        with pytest.raises(ValueError, match="version 99, this release reads 1; upgrade"):
            open_store(tmp_path / name)
        with pytest.raises(ValueError, match="version 99|list of files|txfm_files"):
            append(write_datasets(tmp_path)["third"], tmp_path / name, "third")


def test_conversion_there_and_back_is_equal_in_everything(stores, tmp_path):
    for start, other in (("soma", "zarr"), ("zarr", "soma")):
        there = copy_datasets(stores[start], tmp_path / f"{start}-1")
        assert (there["backend"], there["copied"], there["there_already"]) == (other, ["first", "second"], [])
        back = copy_datasets(tmp_path / f"{start}-1", tmp_path / f"{start}-2")
        assert back["backend"] == start and (back["n_obs"], back["n_vars"]) == (71, 60)
        wanted = contents(open_store(stores[start]))
        for number in (1, 2):
            assert contents(open_store(tmp_path / f"{start}-{number}")) == wanted
            assert verify(tmp_path / f"{start}-{number}")["n_obs"] == 71


def test_var_is_equal_after_conversion(stores, tmp_path):
    tables = []
    copy_datasets(stores["zarr"], tmp_path / "back", backend="soma")
    for path in (stores["soma"], tmp_path / "back"):
        with tiledbsoma.open(f"{path}/{layout.VAR}") as frame:
            tables.append(frame.read().concat().to_pydict())
    assert tables[0] == tables[1]
    counts = expected(*TWO)
    assert tables[0]["nnz"] == (counts > 0).sum(axis=0).tolist()
    assert tables[0]["n_measured_obs"] == [40] * 20 + [71] * 10 + [31] * 30


def test_a_copy_goes_on_where_it_was_stopped(path, tmp_path):
    def stop(done: int, total: int) -> None:
        assert total == 71
        if done > 40:
            raise KeyboardInterrupt

    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt):
        copy_datasets(path, target, progress=stop)
    assert [d.name for d in open_store(target).datasets] == ["first"] and not names_beside(target)
    result = copy_datasets(path, target)
    assert (result["copied"], result["there_already"]) == (["second"], ["first"])
    assert contents(open_store(target)) == contents(open_store(path))
    inode = os.stat(target).st_ino
    assert copy_datasets(path, target)["copied"] == [] and os.stat(target).st_ino == inode


def test_one_store_onto_the_end_of_another(backend, path, files, tmp_path):
    """Genes, labels and samples of the source take their places among those of the target, whichever backends."""
    for other in BACKENDS:
        target = tmp_path / f"{other}-target"
        append(files["third"], target, "third", backend=other)
        result = copy_datasets(path, target, datasets=["second", "first"], backend="ignored, since there is one")
        assert result["backend"] == other and result["copied"] == ["second", "first"]
        store = open_store(target)
        names = ("third", "second", "first")
        genes = store.vocabulary.gene_ids
        np.testing.assert_array_equal(counts_of(store), expected(*names, genes=genes))
        assert set(genes) == set(vocabulary(*names)) and len(genes) == len(vocabulary(*names))
        assert store.obs(["note"])["note"].to_pylist() == [None] * 53 + [f"note {i}" for i in range(40)]
        assert verify(target)["n_datasets"] == 3


def test_part_of_a_store(path, tmp_path):
    copy_datasets(path, tmp_path / "part", datasets=["second"])
    store = open_store(tmp_path / "part")
    np.testing.assert_array_equal(counts_of(store), expected("second", genes=store.vocabulary.gene_ids))
    record = store.dataset("second")
    assert (record.obs_start, record.dataset_index, record.n_vars) == (0, 0, 40)
    for options, message in (
        ({"datasets": ["x"]}, "no dataset 'x'"),
        ({"dtype": "int8"}, "--dtype must be uint32 or float64, got 'int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            copy_datasets(path, tmp_path / "more", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["part"]


def test_an_empty_store_is_not_copied(tmp_path):
    layout.create(str(tmp_path / "empty"), pa.uint32())
    transaction.files.write_list(tmp_path / "empty")
    assert open_store(tmp_path / "empty").n_obs == 0 and open_store(tmp_path / "empty").values is None
    with pytest.raises(ValueError, match="holds no dataset; nothing to copy"):
        copy_datasets(tmp_path / "empty", tmp_path / "target")


def test_another_file_under_a_name_that_the_target_has_is_refused(path, files, tmp_path):
    append(files["third"], tmp_path / "target", "first", perturbation=None, control=None, library_size=None)
    with pytest.raises(ValueError, match="dataset 'first' is there already"):
        copy_datasets(path, tmp_path / "target")
    assert [d.name for d in open_store(tmp_path / "target").datasets] == ["first"]


def fractions(tmp_path: Path, factor: float = 0.25) -> Path:
    """The third dataset with other numbers."""
    adata = dataset("third")
    adata.X = adata.X * factor
    adata.write_h5ad(tmp_path / "fractions.h5ad")
    return tmp_path / "fractions.h5ad"


def test_values_that_are_not_whole(backend, path, files, tmp_path):
    """Expected counts need float64 from the start, or a converted store; whole ones stay as they are there."""
    source = fractions(tmp_path)
    target = shutil.copytree(path, tmp_path / "whole")
    with pytest.raises(ValueError, match="not whole, but the store keeps whole counts.*--dtype float64"):
        append(source, target, "third", non_integer="ok")
    assert contents(open_store(target)) == contents(open_store(path))
    copy_datasets(path, tmp_path / "wide", backend=backend, dtype="float64")
    append(source, tmp_path / "wide", "third", non_integer="ok")
    store = open_store(tmp_path / "wide")
    counts = expected(*TWO, "third")
    counts[71:] *= 0.25
    assert (store.backend, store.dtype) == (backend, np.float64)
    np.testing.assert_array_equal(counts_of(store), counts)
    assert verify(tmp_path / "wide")["n_obs"] == 93
    with pytest.raises(
        ValueError, match="'third' holds values that are not whole, the target keeps uint32.*--dtype float64"
    ):
        copy_datasets(tmp_path / "wide", tmp_path / "narrow", datasets=["third"], dtype="uint32")
    copy_datasets(tmp_path / "wide", tmp_path / "narrow", datasets=list(TWO), dtype="uint32", backend=backend)
    assert contents(open_store(tmp_path / "narrow")) == contents(open_store(path))


def a_new(**changes) -> NewDataset:
    fields = {
        "name": "new", "gene_ids": (gene_id(0), gene_id(99)), "symbols": ("A", "B"), "values": "counts", "modality": "sc",
        "source": "new.h5ad", "content_sha256": "0" * 64,
    }  # fmt: skip
    return NewDataset(**(fields | changes))


def test_an_append_without_its_commit_leaves_nothing(copy, tmp_path):
    before = contents(open_store(copy))
    for target in (copy, tmp_path / "fresh"):
        with pytest.raises(RuntimeError, match="without its commit"), appending(target, a_new(), 3):
            pass
    assert contents(open_store(copy)) == before
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_too_many_genes_are_refused(copy):
    many = tuple(gene_id(1000 + i) for i in range(65_500))
    with pytest.raises(ValueError, match="would bring the vocabulary to 65560 genes, at most 65535"):
        with appending(copy, a_new(gene_ids=many, symbols=many), 1):
            raise AssertionError("never comes here")
    assert open_store(copy).n_obs == 71 and not names_beside(copy)


def before_the_lock(monkeypatch, another) -> None:
    """Let another append come between the planning of the next one and its lock."""
    staged, calls = appends.staged, []

    def later(path, create):
        if not calls:
            calls.append(1)
            another()
        return staged(path, create)

    monkeypatch.setattr(appends, "staged", later)


def test_labels_that_another_append_added_meanwhile_are_kept(backend, files, tmp_path, monkeypatch):
    """An ingest plans its labels before it takes the lock; a column that came in between must not get lost."""
    target = tmp_path / "store"
    append(files["first"], target, "first", backend=backend)
    before_the_lock(monkeypatch, lambda: append(files["second"], target, "second"))
    append(files["third"], target, "third", obs_columns=())
    obs = labels_of(open_store(target).obs())
    assert obs["tissue"][1] == [*[None] * 40, *dataset("second").obs["tissue"], *[None] * 22]
    assert verify(target)["n_obs"] == 93


def test_a_store_made_meanwhile_by_another_append_keeps_its_backend(backend, files, tmp_path, monkeypatch):
    before_the_lock(monkeypatch, lambda: append(files["first"], tmp_path / "store", "first", backend=backend))
    append(files["second"], tmp_path / "store", "second", backend={"soma": "zarr", "zarr": "soma"}[backend])
    store = open_store(tmp_path / "store")
    assert store.backend == backend and verify(tmp_path / "store")["n_obs"] == 71
    np.testing.assert_array_equal(counts_of(store), expected(*TWO))


def fragments(path: Path, name: str) -> int:
    return len(list((path / name / "__fragments").iterdir()))


def test_consolidation_keeps_everything_in_fewer_files(stores, files, tmp_path):
    path = shutil.copytree(stores["soma"], tmp_path / "store")
    append(files["third"], path, "third")
    wanted, before = contents(open_store(path)), {name: fragments(path, name) for name in consolidated()}
    steps = []
    result = consolidate(path, progress=lambda done, total: steps.append((done, total)))
    assert contents(open_store(path)) == wanted and verify(path)["n_obs"] == 93 and not names_beside(path)
    assert before[layout.LEDGER] == before[layout.PRESENCE] == 3
    assert {name: fragments(path, name) for name in consolidated()} == dict.fromkeys(consolidated(), 1)
    assert result["files_after"] < result["files_before"] and steps == [(i, 7) for i in range(1, 8)]
    assert consolidate(path)["files_after"] <= result["files_after"]
    append(fractions(tmp_path, 2), path, "fourth")
    np.testing.assert_array_equal(counts_of(open_store(path), 93), 2 * expected(*TWO, "third")[71:])


def consolidated() -> list[str]:
    return [layout.OBS, layout.VAR, layout.DATASETS, layout.LEDGER, layout.PRESENCE, layout.GENE_NNZ]


def test_consolidation_is_all_or_nothing(stores, tmp_path):
    path = shutil.copytree(stores["soma"], tmp_path / "store")
    files = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consolidate(path, progress=stop)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == files and not names_beside(path)
    with pytest.raises(ValueError, match="a Zarr store has nothing to consolidate"):
        consolidate(stores["zarr"])


def test_the_ledger_folds_events():
    assert ledger.fold([("begin", "a", "{}")]).pending == "a"
    assert ledger.fold([("begin", "a", "{}"), ("abort", "a", "{}")]).pending is None
    empty = ledger.fold([])
    assert (empty.n_obs, empty.n_vars, empty.committed) == (0, 0, ())
