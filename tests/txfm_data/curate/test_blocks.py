"""Blocks of rows: each wanted row once, whatever is wanted, and the same counts as the store gives by itself."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.txfm_data.stores import BACKENDS, append, counts_of, dense, expected, write_datasets
from txfm_data.curate import blocks
from txfm_data.store.opening import open_store
from txfm_data.store.protocol import Store

on_a_fixture = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_datasets(tmp_path_factory.mktemp("h5ad"))


@pytest.fixture(scope="module", params=BACKENDS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, files: dict[str, Path]) -> Store:
    """Two datasets of 40 and 31 samples."""
    path = tmp_path_factory.mktemp(request.param) / "store"
    for name in ("first", "second"):
        append(files[name], path, name, backend=request.param)
    return open_store(path)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 rows, read 5 at a time; 4 that nobody wants are left out; gathered below one in four."""
    for name, value in (("BLOCK_ROWS", 16), ("_READ_ROWS", 5), ("_GAP", 4), ("_SPARSE", 0.25)):
        monkeypatch.setattr(blocks, name, value)


@on_a_fixture
@given(wanted=st.sets(st.integers(0, 30)))
@pytest.mark.parametrize("genes_only", [False, True])
def test_every_wanted_row_comes_once_with_its_counts(
    store: Store, small: None, genes_only: bool, wanted: set[int]
) -> None:
    record = store.dataset("second")
    rows = np.array(sorted(wanted), np.int64) + record.obs_start
    cut = blocks.blocks_of(record, rows)
    assert [b.number for b in cut] == sorted({(row - record.obs_start) // 16 for row in rows.tolist()})
    all_counts, seen = expected("first", "second"), []
    for block in cut:
        assert 0 < blocks.cost_of(block) <= block.rows[-1] - block.rows[0] + 1
        for ids, samples in blocks.read_block(store, block):
            assert len(samples) == len(ids) <= 5
            np.testing.assert_array_equal(dense(samples, all_counts.shape[1]), all_counts[ids])
            seen += ids.tolist()
        for ids, at, part in blocks.scan_block(store, block, genes_only=genes_only):
            np.testing.assert_array_equal(dense(part, all_counts.shape[1])[at] > 0, all_counts[ids] > 0)
    assert seen == rows.tolist()


def test_rows_that_nobody_wants_are_not_scanned(store: Store, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    record, scanned = store.dataset("first"), []
    scan = store.scan

    def recorded(start: int, stop: int, *, rows: int = 2_048) -> object:
        scanned.append((start, stop))
        return scan(start, stop, rows=rows)

    monkeypatch.setattr(store, "scan", recorded)
    rows = np.array([0, 1, 2, 9, 10, 15, 20, 31])
    assert [ids.tolist() for b in blocks.blocks_of(record, rows) for ids, _ in blocks.read_block(store, b)] == [
        [0, 1, 2], [9, 10], [15], [20], [31],
    ]  # fmt: skip
    assert scanned == [(0, 3), (9, 11), (15, 16), (20, 21), (31, 32)]


def test_rich_samples_are_read_fewer_at_a_time(store: Store, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    record = store.dataset("first")
    block = blocks.blocks_of(record, np.arange(16))[0]
    monkeypatch.setattr(blocks, "_READ_VALUES", 2 * record.nnz // record.n_obs)
    assert max(len(ids) for ids, _ in blocks.read_block(store, block)) <= 2
    monkeypatch.setattr(blocks, "_READ_VALUES", 0)
    assert [len(ids) for ids, _ in blocks.read_block(store, block)] == [1] * 16


def test_a_scan_of_genes_is_a_scan_whose_counts_are_one(store: Store) -> None:
    for start, stop in ((0, store.n_obs), (7, 43), (5, 5)):
        parts = list(store.scan_genes(start, stop, rows=10))
        assert [low for low, _ in parts] == list(range(start, stop, 10))
        for low, part in parts:
            np.testing.assert_array_equal(
                dense(part, len(store.vocabulary)), counts_of(store, low, low + len(part)) > 0
            )
            assert part.counts.dtype == store.dtype
    with pytest.raises(ValueError, match="rows 0 to 72 asked for, but the store has 71"):
        list(store.scan_genes(0, 72))


def opened_at(path: Path) -> Store:
    """The store as a task gets it that is made now."""
    return blocks.opened(str(path), blocks.version_of(open_store(path)))


def test_a_store_that_has_grown_is_opened_anew(tmp_path: Path, files: dict[str, Path]) -> None:
    path = tmp_path / "store"
    append(files["first"], path, "first", backend="zarr")
    first = opened_at(path)
    assert opened_at(path) is first
    append(files["second"], path, "second")
    assert opened_at(path).n_obs == 71


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_store_made_anew_at_the_same_path_and_size_is_opened_anew(
    tmp_path: Path, files: dict[str, Path], backend: str
) -> None:
    path = tmp_path / "store"
    for names in (("first", "second"), ("second", "first")):
        shutil.rmtree(path, ignore_errors=True)
        for name in names:
            append(files[name], path, name, backend=backend)
        store = opened_at(path)
        assert [record.name for record in store.datasets] == list(names)
        assert store.vocabulary.gene_ids == open_store(path).vocabulary.gene_ids
        np.testing.assert_array_equal(store.read_rows(np.arange(71)).counts, counts_in(path))


def counts_in(path: Path) -> np.ndarray:
    """All counts of a store that is opened for this."""
    return open_store(path).read_rows(np.arange(71)).counts


@pytest.mark.parametrize("changed", ["content_sha256", "obs_start", "nnz", "name"])
def test_a_version_tells_stores_apart_by_what_they_hold(tmp_path: Path, files: dict[str, Path], changed: str) -> None:
    append(files["first"], tmp_path / "store", "first", backend="zarr")
    store = open_store(tmp_path / "store")
    record = store.datasets[0]
    old = getattr(record, changed)
    other: Any = SimpleNamespace(
        backend=store.backend, vocabulary=store.vocabulary, datasets=(replace(record, **{changed: old + type(old)(1)}),)
    )
    assert blocks.version_of(store) == blocks.version_of(open_store(tmp_path / "store")) != blocks.version_of(other)
