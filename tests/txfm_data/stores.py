"""Two small datasets whose every number is known, stores of them in either backend, and all that a store says as one value."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from tests.conftest import gene_id
from txfm_data import ingest
from txfm_data.ragged import Ragged
from txfm_data.store.protocol import Store

BACKENDS = ("soma", "zarr")
LABELS = {"batch": "batch", "cell_type": "cell_type"}
OPTIONS: dict[str, dict[str, Any]] = {
    "first": {"perturbation": "guide", "control": "none", "library_size": "library"},
    "second": {"modality": "bulk"},
    "third": {},
}
EMPTY_SAMPLE = 3
"""Sample of the first dataset without a count in the panel; its library has some."""


def adata_of(counts: np.ndarray, genes: list[int], obs: pd.DataFrame) -> ad.AnnData:
    """Counts over genes of `gene_id` as an h5ad file has them."""
    var = pd.DataFrame({"symbol": [f"G{g}" for g in genes]}, index=[gene_id(g) for g in genes])
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float64)), obs, var)


def dataset(name: str) -> ad.AnnData:
    """One of the datasets: "first" and "second" of the stores, and "third" for who appends."""
    seed, n, genes = {
        "first": (1, 40, list(range(30))),
        "second": (2, 31, [*range(59, 39, -1), *range(20, 40)]),
        "third": (3, 22, [70, 3, 71, 25, 58]),
    }[name]
    rng = np.random.default_rng(seed)
    counts = rng.poisson(1.5, (n, len(genes)))
    counts[:, 0] += 1
    labels: dict[str, Any] = {
        "batch": [f"{name}{i % 3}" for i in range(n)],
        "cell_type": np.array(["T cell", "B cell", "NK cell"])[rng.integers(0, 3, n)],
    }
    if name == "first":
        counts[EMPTY_SAMPLE] = 0
        labels["guide"] = np.where(np.arange(n) % 4 == 0, "none", "KO")
        labels["library"] = counts.sum(axis=1) + 7
        labels["note"] = [f"note {i}" for i in range(n)]
    else:
        labels["age"] = np.arange(n) * 3
    if name == "second":
        counts[5, 7], counts[6, 0] = 4_000_000_000, 65_536
        labels["tissue"] = pd.Categorical(["blood" if i % 2 else "skin" for i in range(n)])
    return adata_of(counts, genes, pd.DataFrame(labels, index=[f"{name}-{i}" for i in range(n)]))


def write_datasets(folder: Path) -> dict[str, Path]:
    """All three as h5ad files."""
    paths = {name: folder / f"{name}.h5ad" for name in OPTIONS}
    for name, path in paths.items():
        dataset(name).write_h5ad(path)
    return paths


def append(path: Path, store: Path, name: str, **options: Any) -> dict[str, Any]:
    """Ingest one of the datasets with its labels."""
    return ingest.h5ad(path, store, name, symbols="symbol", **(LABELS | OPTIONS.get(name, {}) | options))


def vocabulary(*names: str) -> list[str]:
    """Gene ids in the order of their tokens, after these datasets were appended."""
    return list(dict.fromkeys(gene for name in names for gene in dataset(name).var_names))


def expected(*names: str, genes: Sequence[str] | None = None) -> np.ndarray:
    """Counts of these datasets over their vocabulary, or over `genes`: (samples, genes) float64."""
    genes, parts = list(genes or vocabulary(*names)), []
    for name in names:
        adata = dataset(name)
        part = np.zeros((adata.n_obs, len(genes)))
        part[:, [genes.index(gene) for gene in adata.var_names]] = adata.X.toarray()
        parts.append(part)
    return np.concatenate(parts)


def dense(samples: Ragged, n_genes: int) -> np.ndarray:
    """Ragged samples as a matrix."""
    return sp.csr_matrix((samples.counts, samples.gene_ids, samples.indptr), (len(samples), n_genes)).toarray()


def counts_of(store: Store, start: int = 0, stop: int | None = None, rows: int = 16) -> np.ndarray:
    """Rows of a store by a scan."""
    parts = [
        dense(part, len(store.vocabulary))
        for _, part in store.scan(start, store.n_obs if stop is None else stop, rows=rows)
    ]
    return np.concatenate(parts) if parts else np.zeros((0, len(store.vocabulary)))


def labels_of(table: pa.Table) -> dict[str, tuple[str, list[Any]]]:
    """Type and values of each column, however its dictionary is ordered."""
    return {name: (str(table.schema.field(name).type), table[name].to_pylist()) for name in sorted(table.column_names)}


def _digest(counts: np.ndarray) -> tuple[tuple[int, ...], str]:
    return counts.shape, hashlib.sha256(counts.astype(np.float64).tobytes()).hexdigest()


def contents(store: Store) -> dict[str, Any]:
    """All that a store says, read by every way there is; equal for equal stores of either backend. Counts as digests."""
    table = store.vocabulary
    scanned = counts_of(store, rows=700)
    rows = dense(store.read_rows(np.arange(store.n_obs)), len(table))
    return {
        "datasets": [asdict(record) for record in store.datasets], "values": store.values, "dtype": str(store.dtype),
        "gene_ids": table.gene_ids, "symbols": table.symbols, "counts": _digest(scanned), "rows": _digest(rows),
        "panels": [store.panel(record).tolist() for record in store.datasets],
        "gene_nnz": [store.gene_nnz(record).tolist() for record in store.datasets],
        "obs": labels_of(store.obs()),
    }  # fmt: skip
