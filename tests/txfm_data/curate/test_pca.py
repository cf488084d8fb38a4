"""Streaming PCA: equal to scikit-learn's on dense values, the same bytes whatever the workers, bad input refused by name."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from tests.conftest import gene_id
from tests.txfm_data.curate.contexts import Reversed, context_of
from txfm_data import ingest
from txfm_data.curate import blocks, pca
from txfm_data.curate.rows import library_sizes
from txfm_data.parallel import Workers, pool
from txfm_data.store.opening import open_store
from txfm_data.store.protocol import Store

N_OBS, N_GENES, N_FACTORS = 330, 260, 6


def screen() -> ad.AnnData:
    """Counts with six factors of falling strength over noise; libraries hold genes that the file does not."""
    rng = np.random.default_rng(0)
    factors = rng.normal(0, 1, (N_OBS, N_FACTORS)) * np.linspace(1.0, 0.4, N_FACTORS)
    rate = np.exp(rng.normal(0.2, 1, N_GENES) + factors @ rng.normal(0, 0.6, (N_FACTORS, N_GENES)))
    counts = rng.poisson(np.minimum(rate, 5_000)).astype(np.float64)
    counts[:, 0] += 1
    obs = pd.DataFrame(
        {"batch": "b", "library": counts.sum(axis=1) + rng.integers(0, 500, N_OBS)},
        index=[f"c{i}" for i in range(N_OBS)],
    )
    return ad.AnnData(sp.csr_matrix(counts), obs, pd.DataFrame(index=[gene_id(g) for g in range(N_GENES)]))


@pytest.fixture(scope="module", params=["soma", "zarr"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The screen after another dataset, so that its samples and genes do not begin at 0."""
    folder = tmp_path_factory.mktemp(request.param)
    other = screen()[:20, ::-1][:, :30].copy()
    for name, adata in (("other", other), ("screen", screen())):
        adata.write_h5ad(folder / f"{name}.h5ad")
        ingest.h5ad(
            folder / f"{name}.h5ad",
            folder / "store",
            name,
            batch="batch",
            library_size="library",
            backend=request.param,
        )
    return open_store(folder / "store")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 64)
    monkeypatch.setattr(blocks, "_READ_ROWS", 25)


def log1p_of(store: Store, rows: np.ndarray, panel: np.ndarray) -> np.ndarray:
    """Dense values from the definition, (rows, panel) float64."""
    samples = store.read_rows(rows)
    counts = sp.csr_matrix((samples.counts, samples.gene_ids, samples.indptr), (len(rows), len(store.vocabulary)))
    sizes = store.obs(["raw_sum"])["raw_sum"].to_numpy()[rows]
    return np.log1p(1e5 * counts.toarray()[:, panel] / sizes[:, None])


def run(store: Store, folder: Path, n_components: int, **fields: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scores of every third sample left out and of three genes in four, and the values they are of."""
    record = store.dataset("screen")
    rows = np.array([r for r in range(record.obs_start, record.obs_stop) if r % 3 or r % 7 == 0])
    panel = store.panel(record)[np.arange(N_GENES) % 4 > 0]
    out = folder / "screen.npy"
    pca.streaming_pca(store, record, rows, panel, out, n_components, context_of(folder, **fields))
    assert [path.name for path in folder.iterdir() if path.suffix != ".soma"].count("screen.npy") == 1
    return np.load(out), log1p_of(store, rows, panel)


def aligned(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Columns with the signs of those expected."""
    return found * np.sign((found * expected).sum(axis=0))


@pytest.mark.usefixtures("small_blocks")
def test_a_small_panel_gives_exact_components(store: Store, tmp_path: Path) -> None:
    found, values = run(store, tmp_path, 20)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    expected = PCA(20, svd_solver="full").fit_transform(values)
    np.testing.assert_allclose(aligned(found, expected), expected, atol=2e-3)
    np.testing.assert_allclose(found.var(axis=0), expected.var(axis=0), rtol=1e-4)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("pilot_rows", [60, 4_096])
def test_a_sketch_gives_the_leading_components(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pilot_rows: int
) -> None:
    monkeypatch.setattr(pca, "EXACT_GENES", 0)
    monkeypatch.setattr(pca, "_PILOT_ROWS", pilot_rows)
    monkeypatch.setattr(pca, "_PILOT_RUN", 8)
    found, values = run(store, tmp_path, 10)
    expected = PCA(10, svd_solver="full").fit_transform(values)
    near = aligned(found, expected)
    correlation = np.array([np.corrcoef(near[:, k], expected[:, k])[0, 1] for k in range(N_FACTORS)])
    assert (correlation[:4] > 0.999).all()  # the last factor's variance is twice that of noise
    assert (correlation > 0.98).all()
    assert found.var(axis=0).sum() > (0.99 if pilot_rows < N_OBS else 0.999) * expected.var(axis=0).sum()
    # Principal axes: centred, uncorrelated, by falling variance
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-4)
    covariance = np.cov(found.astype(np.float64).T)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-4 * covariance[0, 0])
    assert (np.diff(found.var(axis=0)) < 0).all()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("exact_genes", [0, 2_000])
def test_bytes_do_not_depend_on_the_order_of_results_nor_on_workers(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_genes: int
) -> None:
    monkeypatch.setattr(pca, "EXACT_GENES", exact_genes)
    first, _ = run(store, tmp_path, 7)
    again, _ = run(store, tmp_path, 7)
    turned, _ = run(store, tmp_path, 7, pool=Reversed())
    assert first.tobytes() == again.tobytes() == turned.tobytes()
    if store.backend == "zarr" and exact_genes == 0:
        with pool(Workers(n=2)) as workers:
            spread, _ = run(store, tmp_path, 7, pool=workers, n_workers=2)
        assert first.tobytes() == spread.tobytes()


class Windowed(Reversed):
    """Results last first; notes how many tasks it is handed at a time."""

    def __init__(self) -> None:
        self.handed: list[int] = []

    def run(self, work: Any, tasks: Any) -> Iterator[Any]:
        tasks = list(tasks)
        self.handed.append(len(tasks))
        return super().run(work, tasks)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("exact_genes", "more"), [(0, 0), (0, 120_000), (2_000, 0)])
def test_no_more_blocks_are_handed_out_than_may_wait(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_genes: int, more: int
) -> None:
    monkeypatch.setattr(pca, "EXACT_GENES", exact_genes)
    monkeypatch.setattr(pca, "BLOCK_ROWS", 64)
    monkeypatch.setattr(pca, "_PILOT_NNZ", 10_000)
    whole, _ = run(store, tmp_path, 7)
    # 195 genes, and a basis of 64 columns for a sketch: the first pass holds most
    array = 195 * (195 if exact_genes else 64)
    result = array * (8 if exact_genes else 4)
    least = 24 * array + 4 * result + (0 if exact_genes else 80_000)
    with pytest.raises(ValueError, match="give a larger --memory-budget"):
        run(store, tmp_path, 7, memory=least - 1)
    windowed = Windowed()
    found, _ = run(store, tmp_path, 7, memory=least + more, pool=windowed)
    assert found.tobytes() == whole.tobytes()
    window = 2 + more // result
    n_blocks = -(-N_OBS // 64)
    assert windowed.handed[: -(-n_blocks // window)] == [
        min(window, n_blocks - at) for at in range(0, n_blocks, window)
    ]
    assert sum(windowed.handed) == 2 * n_blocks, "each block twice"


def test_the_seed_changes_no_more_than_the_rest(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pca, "EXACT_GENES", 0)
    first, _ = run(store, tmp_path, 3, seed=0)
    other, _ = run(store, tmp_path, 3, seed=1)
    np.testing.assert_allclose(first, other, atol=0.05 * np.abs(first).max())


def test_too_many_components(store: Store, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="PCA of dataset 'screen': n_components is 196, but .* 195 genes .* at most 195"
    ):
        run(store, tmp_path, 196)
    record = store.dataset("other")
    rows = np.arange(record.obs_start, record.obs_start + 5)
    with pytest.raises(ValueError, match="5 samples and 30 genes have at most 4"):
        pca.streaming_pca(store, record, rows, store.panel(record), tmp_path / "o.npy", 5, context_of(tmp_path))
    pca.streaming_pca(store, record, rows, store.panel(record), tmp_path / "o.npy", 4, context_of(tmp_path))
    assert np.load(tmp_path / "o.npy").shape == (5, 4)


def test_too_little_memory_names_what_would_do(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="195 columns over 195 genes takes about 2MiB, .* larger --memory-budget"):
        run(store, tmp_path, 3, memory=1_000_000)
    assert not (tmp_path / "screen.npy").exists()


def test_progress_counts_both_passes(store: Store, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    labels: list[str] = []

    def progress(label: str) -> Any:
        labels.append(label)
        return lambda done, total: seen.append((done, total))

    found, _ = run(store, tmp_path, 3, progress=progress)
    assert labels == ["PCA of dataset 'screen'"]
    assert seen == [(0, 2 * len(found)), (len(found), 2 * len(found)), (2 * len(found), 2 * len(found))]


class Relabelled:
    """A store whose sample `sample` has another library size; ingest writes none that is not above 0."""

    def __init__(self, store: Store, sample: int, size: float | None) -> None:
        self.path, self._store, self._sample, self._size = store.path, store, sample, size

    def obs_parts(self, columns: Sequence[str], value_filter: str) -> Iterator[pa.Table]:
        for part in self._store.obs_parts(columns, value_filter):
            sizes = part["raw_sum"].to_pylist()
            ids = part["soma_joinid"].to_pylist()
            changed = [self._size if i == self._sample else s for i, s in zip(ids, sizes, strict=True)]
            yield part.set_column(part.column_names.index("raw_sum"), "raw_sum", pa.array(changed, pa.float64()))


@pytest.mark.parametrize(("size", "said"), [(0.0, "0.0"), (None, "nan"), (np.inf, "inf")])
def test_samples_without_a_library_size_are_refused(store: Store, size: float | None, said: str) -> None:
    record = store.dataset("screen")
    rows = np.arange(record.obs_start, record.obs_stop, 2)
    known = library_sizes(store, record, rows)
    np.testing.assert_array_equal(known, store.obs(["raw_sum"])["raw_sum"].to_numpy()[rows])
    changed: Any = Relabelled(store, int(rows[3]), size)
    with pytest.raises(
        ValueError, match=rf"1 sample\(s\) have no library size .* sample {rows[3]} with raw_sum {said}"
    ):
        library_sizes(changed, record, rows)
    np.testing.assert_array_equal(library_sizes(changed, record, rows[4:]), known[4:])


@st.composite
def ragged_rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Dense counts (n, genes), some rows empty, and which genes have a place."""
    n, n_genes = draw(st.integers(0, 6)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = rng.poisson(rng.gamma(0.3, 4.0, (n, n_genes)))
    counts[rng.random(n) < 0.2] = 0
    return counts, rng.random(n_genes) < 0.7


@settings(max_examples=60, deadline=None)
@given(ragged_rows(), st.integers(1, 5))
def test_kernels_equal_numpy(drawn: tuple[np.ndarray, np.ndarray], width: int) -> None:
    counts, has_place = drawn
    n, n_places = len(counts), int(has_place.sum())
    rng = np.random.default_rng(1)
    sizes = counts.sum(axis=1) + 3.0
    csr = sp.csr_matrix(counts.astype(np.uint32))
    place = np.full(counts.shape[1], -1, np.int32)
    place[has_place] = np.arange(n_places)
    indptr, columns, values = np.empty(n + 1, np.int64), np.empty(csr.nnz, np.int32), np.empty(csr.nnz, np.float32)
    ragged = csr.indptr.astype(np.int64), csr.indices.astype(np.uint16), csr.data
    pca.log1p_columns(*ragged, place, sizes, 1e5, indptr, columns, values)
    dense = np.log1p(1e5 * counts[:, has_place] / sizes[:, None])
    got = sp.csr_matrix((values[: indptr[-1]], columns[: indptr[-1]], indptr), (n, n_places)).toarray()
    np.testing.assert_allclose(got, dense, rtol=1e-6)
    omega = rng.normal(size=(n_places, width)).astype(np.float32)
    total, sketch = np.zeros(n_places), np.zeros((n_places, width), np.float32)
    pca.add_sketch(indptr, columns, values, omega, total, sketch, np.empty(width, np.float32))
    np.testing.assert_allclose(total, dense.sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(sketch, dense.T @ (dense @ omega), rtol=1e-3, atol=1e-2)
    total, gram = np.zeros(n_places), np.zeros((n_places, n_places))
    pca.add_gram(indptr, columns, values, total, gram)
    np.testing.assert_allclose(total, dense.sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(gram, np.triu(dense.T @ dense), rtol=1e-5)
    offset, out = rng.normal(size=width), np.empty((n, width), np.float32)
    pca.project(indptr, columns, values, omega, offset, np.empty(width), out)
    np.testing.assert_allclose(out, dense @ omega - offset, rtol=1e-4, atol=1e-4)
