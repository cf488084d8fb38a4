"""Readers of a store that an append replaces, that stands aside, or that lies at a relative path; and what errors say."""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiledbsoma

from tests.txfm_data.stores import BACKENDS, append, contents, counts_of, dataset, expected, write_datasets
from txfm_data.ragged import Ragged
from txfm_data.store import files as listing
from txfm_data.store import layout, opening, transaction, zarr_arrays
from txfm_data.store.consolidate import consolidate
from txfm_data.store.convert import copy_datasets
from txfm_data.store.opening import open_store
from txfm_data.store.soma_backend import SomaSink
from txfm_data.store.verify import verify

REPLACED = "an append has just replaced the store since it was opened.*open it again"


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
    """One store of one dataset, and one of it and another, for each backend. Read them only."""
    folder = tmp_path_factory.mktemp("stores")
    for backend in BACKENDS:
        append(files["second"], folder / backend, "second", backend=backend)
        shutil.copytree(folder / backend, folder / f"{backend}-grown")
        append(files["first"], folder / f"{backend}-grown", "first")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture
def copy(stores, backend, tmp_path) -> Path:
    """The store of one dataset, to change."""
    return shutil.copytree(stores[backend], tmp_path / "store")


@pytest.fixture
def grown(stores, backend, tmp_path) -> Path:
    """What an append makes of it, beside it."""
    return shutil.copytree(stores[f"{backend}-grown"], tmp_path / ".store.new-1")


def test_a_relative_address_outlasts_a_change_of_folder(copy, backend, tmp_path, monkeypatch, files):
    monkeypatch.chdir(tmp_path)
    first = open_store("store")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert first.path == str(tmp_path / "store") and first.n_obs == len(first.obs()) == 31
    np.testing.assert_array_equal(counts_of(first), expected("second"))
    assert not opening.exists("store")
    assert opening.exists("../store") and opening.backend_at("../store").name == backend
    assert open_store("../store").n_obs == 31
    append(files["third"], "new", "third", backend=backend)  # type: ignore[arg-type]
    assert verify(tmp_path / "elsewhere" / "new")["n_obs"] == 22


@pytest.mark.parametrize("use", [open_store, opening.exists, opening.backend_at, verify])
def test_a_store_that_was_left_aside_is_put_back_by_whoever_looks_for_it(copy, backend, use):
    aside = copy.with_name(".store.old")
    copy.rename(aside)
    found = use(copy)
    assert found is True or getattr(found, "name", backend) == backend
    assert copy.exists() and not aside.exists() and not copy.with_name(".store.lock").exists()
    assert open_store(copy).n_obs == 31


def test_a_reader_waits_for_the_second_step_of_an_exchange(copy, backend, monkeypatch):
    aside = copy.with_name(".store.old")
    with transaction._locked(copy):
        copy.rename(aside)
        later = threading.Timer(0.2, aside.rename, [copy])
        later.start()
        assert open_store(copy).n_obs == 31
        later.join()
        copy.rename(aside)
        monkeypatch.setattr(transaction, "_SETTLE_TRIES", 2)
        with pytest.raises(ValueError, match="another process is writing to this store"):
            open_store(copy)
    assert open_store(copy).n_obs == 31


def test_damaged_metadata_is_told_as_damage(copy, backend):
    name = "zarr.json" if backend == "zarr" else next((copy / "__group").iterdir()).relative_to(copy).as_posix()
    data = (copy / name).read_bytes()
    for other, message in (
        (data[:-5], "cut or changed"),
        (b"?" + data[1:], "its sha256 is not that"),
        (None, "missing"),
    ):
        (copy / name).unlink()
        if other is not None:
            (copy / name).write_bytes(other)
        with pytest.raises(ValueError, match=f"{copy}/{name}: .*{message}.*restore the store from a copy"):
            open_store(copy)


@pytest.mark.parametrize("steps", ["exchange", "two renames"])
def test_a_swap_in_the_middle_of_opening(copy, grown, backend, monkeypatch, steps):
    """The listing of one state and the files of another are not taken for damage."""
    real, calls = listing.check_list, []

    def swap_then_check(root: Path) -> None:
        calls.append(root)
        if len(calls) == 1:
            if steps == "exchange":
                transaction._exchange(grown, copy)
            else:
                os.rename(copy, copy.with_name(".store.old"))
                threading.Timer(0.1, os.rename, [grown, copy]).start()
        real(root)

    monkeypatch.setattr(listing, "check_list", swap_then_check)
    if steps == "exchange":
        store = open_store(copy)
    else:
        with transaction._locked(copy):
            store = open_store(copy)
    assert store.n_obs == 71 and len(calls) >= 2
    np.testing.assert_array_equal(counts_of(store), expected("second", "first"))


def what_it_says(store: Any, name: str) -> Any:
    return {
        "vocabulary": lambda: store.vocabulary,
        "panel": lambda: store.panel(store.datasets[0]).tolist(),
        "gene_nnz": lambda: store.gene_nnz(store.datasets[0]).tolist(),
        "schema": lambda: [store.obs_schema().field(name) for name in opening.OBS_SCHEMA.names],
        "numbers of obs": lambda: store.obs(["nnz", "raw_sum"]).to_pylist(),
        "a label that has nulls now": lambda: store.obs(["age"]).to_pylist(),
        "labels of obs": lambda: store.obs(["dataset_id", "cell_type"]).to_pylist(),
        "filtered obs": lambda: store.obs(["nnz"], value_filter="cell_type == 'B cell'").to_pylist(),
        "scan": lambda: [part.counts.tolist() for _, part in store.scan(0, 31, rows=10)],
        "rows": lambda: store.read_rows(np.arange(0, 31, 3)).counts.tolist(),
    }[name]()


WRITTEN_WHOLE = ("vocabulary", "schema", "a label that has nulls now", "labels of obs", "filtered obs")
READS = (*WRITTEN_WHOLE, "panel", "gene_nnz", "numbers of obs", "scan", "rows")


@pytest.mark.parametrize("name", READS)
def test_an_open_store_after_an_append_says_the_same_or_that_it_was_replaced(stores, copy, grown, backend, name):
    before = what_it_says(open_store(stores[backend]), name)
    store = open_store(copy)
    transaction._exchange(grown, copy)
    shutil.rmtree(grown)
    try:
        after = what_it_says(store, name)
    except ValueError as error:
        assert "an append has just replaced the store" in str(error) and "damaged" not in str(error)
        assert backend == "zarr" and name in WRITTEN_WHOLE
    else:
        assert after == before
    assert what_it_says(open_store(copy), name)


def test_a_scan_goes_on_through_an_append(copy, grown, backend):
    store = open_store(copy)
    parts = store.scan(0, 31, rows=10)
    found = [next(parts)[1].counts]
    transaction._exchange(grown, copy)
    shutil.rmtree(grown)
    found += [part.counts for _, part in parts]
    np.testing.assert_array_equal(
        np.concatenate(found), np.concatenate([p.counts for _, p in open_store(copy).scan(0, 31)])
    )


def test_real_appends_while_a_reader_reads(files, tmp_path, backend):
    """A thread opens and reads again and again while three datasets come: it sees whole states only."""
    path = tmp_path / "store"
    append(files["second"], path, "second", backend=backend)
    stop, seen, errors = threading.Event(), set(), []

    def read() -> None:
        while not stop.is_set():
            try:
                store = open_store(path)
                names = [d.name for d in store.datasets]
                assert np.array_equal(counts_of(store), expected(*names, genes=store.vocabulary.gene_ids))
                seen.add(len(names))
            except ValueError as error:
                if "an append has just replaced the store" not in str(error):
                    errors.append(error)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a failure
                errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for name in ("first", "third"):
            append(files[name], path, name)
        if backend == "soma":
            consolidate(path)
    finally:
        stop.set()
        reader.join()
    assert errors == [] and seen
    assert open_store(path).n_obs == 93


@pytest.mark.parametrize("backend", ["zarr"], indirect=True)
def test_a_part_that_was_read_between_two_folders_is_read_again(copy, grown, monkeypatch):
    """Zarr takes a file that is not there for zeros."""
    store = open_store(copy)
    real, calls = zarr_arrays._read_once, []

    def zeros_once(array: Any, folder: str, part: tuple[slice, ...]) -> np.ndarray:
        calls.append(part)
        values = real(array, folder, part)
        if len(calls) > 1:
            return values
        transaction._exchange(grown, copy)
        return np.zeros_like(values)

    monkeypatch.setattr(zarr_arrays, "_read_once", zeros_once)
    np.testing.assert_array_equal(store.gene_nnz(store.datasets[0]), (expected("second") > 0).sum(axis=0))
    assert len(calls) == 2


def test_damage_to_an_open_store_is_still_damage(copy, backend):
    store = open_store(copy)
    for file in copy.rglob("*"):
        if file.is_file() and (
            file.name.startswith("a") and file.suffix == ".tdb" or "c" in file.relative_to(copy).parts
        ):
            file.unlink()
    for name in ("panel", "gene_nnz", "numbers of obs", "scan", "rows"):
        with pytest.raises(ValueError, match="restore it from a copy or ingest again") as found:
            what_it_says(store, name)
        assert str(copy) in str(found.value) and "append" not in str(found.value)


def test_a_filter_or_a_column_that_obs_has_not(copy, backend):
    store = open_store(copy)
    with pytest.raises(ValueError, match=r"obs has no columns \['nope'\]; it has \['soma_joinid'"):
        store.obs(["nope"])
    for text in ("cell_type === 'x'", "nope == 'x'", "nnz == 'x'"):
        with pytest.raises(ValueError) as found:
            store.obs(value_filter=text)
        assert "restore" not in str(found.value)


def test_what_cannot_be_written_is_an_error_of_the_system(stores, tmp_path):
    one = Ragged(np.array([0, 1]), np.array([0], np.uint16), np.array([1], np.uint32))
    path = shutil.copytree(stores["soma"], tmp_path / "store")
    with pytest.raises(OSError, match=f"{layout.RAW}: cannot be written .*outside.*the store is as it was.*free space"):
        SomaSink(str(path / layout.RAW)).write(10**6, one)
    with pytest.raises(OSError, match="nothing: cannot be written"):
        SomaSink(str(tmp_path / "nothing")).write(0, one)


def test_an_error_within_an_append_names_the_store_and_not_its_copy(copy, backend):
    before = contents(open_store(copy))
    for kind, error in (
        (ValueError, ValueError("{}: too many")),
        (RuntimeError, RuntimeError("{}: ended")),
        (FileNotFoundError, FileNotFoundError(2, "No such file", "{}/x")),
        (tiledbsoma.SOMAError, tiledbsoma.SOMAError("cannot open '{}/obs'")),
    ):
        with pytest.raises(kind) as found, transaction.staged(copy, lambda folder: None) as hidden:
            error.args = tuple(arg.format(hidden) if isinstance(arg, str) else arg for arg in error.args)
            if isinstance(error, OSError):
                error.filename = f"{hidden}/x"
            raise error
        assert found.value is error and str(copy) in str(error) and ".new-" not in str(error)
    assert contents(open_store(copy)) == before


def test_an_ingest_that_fails_names_the_store(files, copy, monkeypatch):
    def fail(*args: Any) -> None:
        raise ValueError(f"{args[1].path}: it fails")

    monkeypatch.setattr(type(opening.backend_at(copy)), "commit", fail)
    with pytest.raises(ValueError, match=rf"^{copy}: it fails$"):
        append(files["third"], copy, "third")


def test_a_copy_that_fails_later_says_what_is_in_and_how_to_go_on(stores, backend, tmp_path):
    adata = dataset("third")
    adata.X = adata.X * 0.25
    adata.write_h5ad(tmp_path / "third.h5ad")
    source, target = tmp_path / "source", tmp_path / "target"
    copy_datasets(stores[backend], source, dtype="float64")
    append(tmp_path / "third.h5ad", source, "third", non_integer="ok")
    with pytest.raises(ValueError) as found:
        copy_datasets(source, target, dtype="uint32")
    for part in (
        "dataset 'third' holds values that are not whole", f"In {target} already, each whole: second; ",
        f"txfm store append SOURCE {target} --datasets", f"or remove {target}",
    ):  # fmt: skip
        assert part in str(found.value)
    assert [d.name for d in open_store(target).datasets] == ["second"]
    with pytest.raises(ValueError) as found:
        copy_datasets(source, tmp_path / "other", datasets=["third", "second"], dtype="uint32")
    assert "already" not in str(found.value) and not (tmp_path / "other").exists()
