"""Rules on quality: equal to plain NumPy whatever is left before them, equal to scanpy, and no counts read without need."""

import math
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import gene_id
from tests.txfm_data.curate.contexts import Reversed, context_of
from tests.txfm_data.stores import BACKENDS, counts_of
from txfm_data import ingest
from txfm_data.curate import blocks, quality
from txfm_data.curate.recipe import CellsByGenes, GenesByCells
from txfm_data.curate.state import State
from txfm_data.parallel import Workers, pool
from txfm_data.store.opening import open_store
from txfm_data.store.protocol import Store

on_a_fixture = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = {"lead": (23, 40), "cells": (90, 70)}


def adata_of(name: str) -> ad.AnnData:
    """Cells of uneven depth over genes of uneven rates; the datasets share some genes, in another order."""
    n, n_genes = SIZES[name]
    rng = np.random.default_rng(n)
    rate = np.exp(rng.normal(-1, 1.5, n_genes)) * np.exp(rng.normal(0, 0.8, (n, 1)))
    counts = rng.poisson(rate)
    counts[np.arange(n), np.arange(n) % n_genes] += 1  # no sample without counts
    obs = pd.DataFrame(
        {"batch": [f"b{i % 3}" for i in range(n)], "guide": ["none" if i % 5 == 0 else "KO" for i in range(n)]},
        index=[f"{name}-{i}" for i in range(n)],
    )
    genes = rng.permutation(100)[:n_genes]
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs, pd.DataFrame(index=[gene_id(g) for g in genes]))


@pytest.fixture(scope="module", params=BACKENDS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The cells after another dataset, so that their samples and genes do not begin at 0."""
    folder = tmp_path_factory.mktemp(request.param)
    for name in SIZES:
        adata_of(name).write_h5ad(folder / f"{name}.h5ad")
        ingest.h5ad(
            folder / f"{name}.h5ad", folder / "store", name, batch="batch", perturbation="guide", control="none",
            backend=request.param,
        )  # fmt: skip
    return open_store(folder / "store")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 16)
    monkeypatch.setattr(blocks, "_READ_ROWS", 5)
    monkeypatch.setattr(blocks, "_GAP", 6)
    monkeypatch.setattr(blocks, "_SPARSE", 0.2)


class Counted:
    """An obs of many samples whose panel has lost no counts, so that none of them need be read."""

    path = "counted"

    def __init__(self, n_obs: int) -> None:
        self.n_obs = n_obs

    def gene_nnz(self, record: Any) -> np.ndarray:
        return np.zeros(1_000, np.int64)

    def obs_schema(self) -> pa.Schema:
        return pa.schema([("nnz", pa.int64()), ("is_control", pa.bool_())])

    def obs_parts(self, columns: list[str]) -> Iterator[pa.Table]:
        for low in range(0, self.n_obs, 10_000):
            ids = np.arange(low, low + 10_000)
            table = pa.table({"soma_joinid": ids, "nnz": ids % 1_000, "is_control": ids % 7 == 0})
            yield table.select(["soma_joinid", *columns])


class Recorded:
    """A pool that remembers its tasks."""

    def __init__(self) -> None:
        self.tasks: list[Any] = []

    def run(self, work: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        self.tasks += tasks
        return map(work, self.tasks)


@st.composite
def left(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Samples and genes of "cells" that earlier rules left: (90,) and (70,) bool, at least one of each."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    parts = []
    for n in SIZES["cells"]:
        mask = rng.random(n) < draw(st.sampled_from([0.02, 0.1, 0.5, 0.9, 0.99, 1.0]))
        mask[rng.integers(n)] = True
        parts.append(mask)
    return parts[0], parts[1]


def state_of(store: Store, alive: np.ndarray, in_panel: np.ndarray) -> tuple[State, np.ndarray]:
    """A state of "lead", whole, and of these parts of "cells"; and the dense counts of what is left of "cells"."""
    state, record = State.of(store, store.datasets), store.dataset("cells")
    state.alive[record.obs_start : record.obs_stop] = alive
    state.panels["cells"] = state.panels["cells"][in_panel]
    return state, counts_of(store)[state.rows(record)][:, state.panels["cells"]]


@on_a_fixture
@given(left=left(), min_cells=st.integers(0, 60), min_fraction=st.sampled_from([0.0, 0.1, 0.3, 1.0]))
def test_genes_by_cells_equals_numpy(
    store: Store, tmp_path: Path, left: tuple[np.ndarray, np.ndarray], min_cells: int, min_fraction: float
) -> None:
    state, counts = state_of(store, *left)
    record, before, panel = store.dataset("cells"), state.alive.copy(), state.panels["cells"]
    rule, context = GenesByCells(min_cells=min_cells, min_fraction=min_fraction), context_of(tmp_path, pool=Reversed())
    details = quality.apply_genes_by_cells(rule, state, (record,), context)["cells"]
    n_cells = (counts > 0).sum(axis=0)
    is_kept = (n_cells >= min_cells) & (n_cells / len(counts) >= min_fraction)
    np.testing.assert_array_equal(state.panels["cells"], panel[is_kept])
    np.testing.assert_array_equal(state.alive, before)
    np.testing.assert_array_equal(state.panels["lead"], store.panel(store.dataset("lead")))
    assert details["rows_read"] in (len(counts), record.n_obs - len(counts))
    assert ("warning" in details) is not is_kept.any()


@on_a_fixture
@given(
    left=left(), min_genes=st.integers(0, 50), more=st.none() | st.integers(0, 20), keep_controls=st.booleans(),
)  # fmt: skip
def test_cells_by_genes_equals_numpy(
    store: Store,
    tmp_path: Path,
    left: tuple[np.ndarray, np.ndarray],
    min_genes: int,
    more: int | None,
    keep_controls: bool,
) -> None:
    state, counts = state_of(store, *left)
    record, rows = store.dataset("cells"), state.rows(store.dataset("cells"))
    max_genes = None if more is None else min_genes + more
    rule = CellsByGenes(min_genes=min_genes, max_genes=max_genes, keep_controls=keep_controls)
    details = quality.apply_cells_by_genes(rule, state, (record,), context_of(tmp_path, pool=Reversed()))["cells"]
    n_genes = (counts > 0).sum(axis=1)
    passes = (n_genes >= min_genes) & (n_genes <= (np.inf if max_genes is None else max_genes))
    is_control = (rows - record.obs_start) % 5 == 0
    np.testing.assert_array_equal(state.rows(record), rows[passes | (is_control & keep_controls)])
    assert state.n_samples(store.dataset("lead")) == SIZES["lead"][0]
    assert len(state.panels["cells"]) == left[1].sum()
    assert details.get("controls_kept", 0) == keep_controls * (is_control & ~passes).sum()


@pytest.mark.parametrize("first", ["genes", "cells"])
def test_both_equal_scanpy_in_either_order(store: Store, tmp_path: Path, first: str) -> None:
    rules = [GenesByCells(min_cells=20), CellsByGenes(min_genes=15)]
    state, context = State.of(store, store.datasets), context_of(tmp_path)
    applied = [quality.apply_genes_by_cells, quality.apply_cells_by_genes]
    for rule, apply in list(zip(rules, applied, strict=True))[:: 1 if first == "genes" else -1]:
        apply(rule, state, state.records, context)  # type: ignore[operator]
    for record in store.datasets:
        adata = adata_of(record.name)
        for step in ("genes", "cells") if first == "genes" else ("cells", "genes"):
            sc.pp.filter_genes(adata, min_cells=20) if step == "genes" else sc.pp.filter_cells(adata, min_genes=15)
        kept = [store.vocabulary.gene_ids[token] for token in state.panels[record.name]]
        assert sorted(kept) == sorted(adata.var_names)
        assert [f"{record.name}-{row - record.obs_start}" for row in state.rows(record)] == list(adata.obs_names)
    sizes = {r.name: (state.n_samples(r), len(state.panels[r.name])) for r in store.datasets}
    assert 0 < sizes["cells"][0] < 90 and 0 < sizes["cells"][1] < 70


def test_no_counts_are_read_where_the_store_has_counted(store: Store, tmp_path: Path) -> None:
    state, running = State.of(store, store.datasets), Recorded()
    context = context_of(tmp_path, pool=running)
    details = quality.apply_cells_by_genes(CellsByGenes(min_genes=1), state, state.records, context)
    details |= {"genes": quality.apply_genes_by_cells(GenesByCells(min_cells=1), state, state.records, context)}
    # The genes that have just left had no counts at all, so nothing has changed for any sample.
    quality.apply_cells_by_genes(CellsByGenes(min_genes=12, max_genes=30), state, state.records, context)
    assert not running.tasks and details["lead"] == {"rows_read": 0}
    assert details["genes"]["cells"] == {"min_cells": 1, "rows_read": 0}
    np.testing.assert_array_equal(state.alive, np.isin((counts_of(store) > 0).sum(axis=1), np.arange(12, 31)))


def test_only_samples_are_read_whose_verdict_hangs_on_which_genes_left(store: Store, tmp_path: Path) -> None:
    record, running = store.dataset("cells"), Recorded()
    counts = counts_of(store, record.obs_start, record.obs_stop) > 0
    rare = np.argsort(np.where(counts.any(axis=0), counts.sum(axis=0), 10**9))[:3]
    state = State.of(store, store.datasets)
    state.panels["cells"] = np.setdiff1d(state.panels["cells"], rare)
    nnz, most_lost = counts.sum(axis=1), min(3, counts[:, rare].sum())
    quality.apply_cells_by_genes(CellsByGenes(min_genes=15), state, (record,), context_of(tmp_path, pool=running))
    asked = np.flatnonzero((nnz >= 15) & (nnz < 15 + most_lost)) + record.obs_start
    assert np.concatenate([task.rows for task in running.tasks]).tolist() == asked.tolist() and len(asked) < 30


def test_a_panel_smaller_than_what_is_asked_keeps_nothing_unread(store: Store, tmp_path: Path) -> None:
    state, _ = state_of(store, np.ones(90, bool), np.arange(70) < 8)
    record = store.dataset("cells")
    details = quality.apply_cells_by_genes(CellsByGenes(min_genes=9), state, (record,), context_of(tmp_path))
    assert not state.n_samples(record) and details == {"cells": {"rows_read": 0}}


def test_the_fewer_rows_are_read(store: Store, tmp_path: Path) -> None:
    record = store.dataset("cells")
    for n_gone, n_read in ((10, 10), (80, 10)):
        state, _ = state_of(store, np.arange(90) >= n_gone, np.ones(70, bool))
        details = quality.apply_genes_by_cells(GenesByCells(min_cells=3), state, (record,), context_of(tmp_path))
        assert details["cells"]["rows_read"] == n_read


def test_a_share_of_the_samples_is_not_rounded_up_by_its_binary_form(store: Store, tmp_path: Path) -> None:
    assert math.ceil(0.28 * 25) == 8
    state, _ = state_of(store, np.arange(90) < 25, np.ones(70, bool))
    rule = GenesByCells(min_cells=0, min_fraction=0.28)
    details = quality.apply_genes_by_cells(rule, state, (store.dataset("cells"),), context_of(tmp_path))
    assert details["cells"]["min_cells"] == 7


@pytest.mark.parametrize("store", ["soma"], indirect=True)
def test_two_processes_give_what_one_gives_and_tell_of_every_row(store: Store, tmp_path: Path) -> None:
    found = []
    for workers in (Workers(), Workers(n=2)):
        state, _ = state_of(store, np.arange(90) % 3 > 0, np.arange(70) % 4 > 0)
        told: list[tuple[int, int]] = []

        def tell(done: int, total: int, told: list[tuple[int, int]] = told) -> None:
            told.append((done, total))

        with pool(workers) as running:
            context = context_of(tmp_path, pool=running, progress=lambda label, tell=tell: tell)
            details = [
                quality.apply_genes_by_cells(GenesByCells(min_cells=10), state, state.records, context),
                quality.apply_cells_by_genes(CellsByGenes(min_genes=12), state, state.records, context),
            ]
        found.append((state.alive.tolist(), {name: p.tolist() for name, p in state.panels.items()}, details))
        read = [step[name]["rows_read"] for step in details for name in SIZES if step[name]["rows_read"]]
        assert [n for n, total in told if n == total] == read
    assert found[0] == found[1]


def test_what_cannot_be_is_told_as_damage(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = store.dataset("cells")
    block = blocks.blocks_of(record, np.arange(record.obs_start, record.obs_stop))[0]
    with pytest.raises(ValueError, match="rows 23 to 38 hold gene [0-9]+, but the vocabulary has 40 genes"):
        quality.GeneCounts(store.path, blocks.version_of(store), 40)(block)
    monkeypatch.setattr(quality, "read_nnz", lambda store: np.full(store.n_obs, -1, np.int32))
    with pytest.raises(ValueError, match="obs has no nnz for sample 0"):
        quality.apply_cells_by_genes(
            CellsByGenes(), State.of(store, store.datasets), store.datasets, context_of(tmp_path)
        )


def test_samples_that_are_not_read_cost_no_more_than_masks(tmp_path: Path) -> None:
    store: Any = Counted(400_000)
    record = SimpleNamespace(name="many", obs_start=0, obs_stop=store.n_obs, n_obs=store.n_obs)
    state = State(store, (record,), np.ones(store.n_obs, bool), {"many": np.arange(1_000)})  # type: ignore[arg-type]
    context = context_of(tmp_path)
    quality.apply_cells_by_genes(CellsByGenes(min_genes=1_000_000), state, state.records, context)
    tracemalloc.start()
    try:
        for rule in (CellsByGenes(min_genes=300), CellsByGenes(min_genes=400, max_genes=600, keep_controls=True)):
            state.alive[:] = True
            quality.apply_cells_by_genes(rule, state, state.records, context)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    nnz, is_control = np.arange(store.n_obs) % 1_000, np.arange(store.n_obs) % 7 == 0
    np.testing.assert_array_equal(state.alive, ((nnz >= 400) & (nnz <= 600)) | is_control)
    assert peak < 10 * store.n_obs, peak / store.n_obs


@given(seed=st.integers(0, 2**32), n=st.integers(1, 12), n_genes=st.integers(1, 40))
def test_kernels_equal_numpy(seed: int, n: int, n_genes: int) -> None:
    rng = np.random.default_rng(seed)
    dense = rng.random((n, n_genes)) < rng.random((n, 1))
    matrix = sp.csr_matrix(dense)
    tokens = np.sort(rng.choice(2**16, n_genes, replace=False))
    at = np.flatnonzero(rng.random(n) < 0.6)
    is_counted = rng.random(2**16) < 0.5
    arrays = matrix.indptr.astype(np.int64), tokens[matrix.indices].astype(np.uint16), at
    by_gene, by_sample = np.ones(2**16, np.int64), np.empty(len(at), np.int64)
    quality.count_by_gene(*arrays, by_gene)
    quality.count_by_sample(*arrays, is_counted, by_sample)
    reference = np.ones(2**16, np.int64)
    reference[tokens] += dense[at].sum(axis=0)
    np.testing.assert_array_equal(by_gene, reference)
    np.testing.assert_array_equal(by_sample, dense[at][:, is_counted[tokens]].sum(axis=1))
