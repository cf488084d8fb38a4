"""Fixtures that several packages' tests share: small real files, a store and a shard corpus made by the real code."""

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import settings

# A test asserts no time: on a shared machine an example may take any.
settings.register_profile("txfm", deadline=None)
settings.load_profile("txfm")

GENES_A, GENES_B = range(0, 60), range(30, 90)


def gene_id(number: int) -> str:
    """Ensembl-like id of gene `number`."""
    return f"ENSG{90_000_000_000 + number}"


def make_adata(seed: int, genes: range, *, n_obs: int = 64, n_batches: int = 4, scale: float = 1.0) -> ad.AnnData:
    """Counts drawn for one dataset: two cell types that differ, several batches, a few thousand counts a sample."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 2, n_obs)
    rate = np.exp(rng.normal(0, 1, (2, len(genes))))[kind] * scale
    counts = rng.poisson(rate)
    counts[:, 0] += 1  # no sample without counts
    obs = pd.DataFrame(
        {
            "batch": [f"b{i % n_batches}" for i in range(n_obs)],
            "cell_type": np.array(["T cell", "B cell"])[kind],
            "guide": np.where(np.arange(n_obs) % 3 == 0, "non-targeting", "KO"),
        },
        index=[f"cell{i}" for i in range(n_obs)],
    )
    var = pd.DataFrame({"symbol": [f"G{i}" for i in genes]}, index=[gene_id(i) for i in genes])
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs, var)


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two h5ad files with overlapping panels; the second has counts beyond 65,535, as bulk data has."""
    folder = tmp_path_factory.mktemp("h5ad")
    first, second = make_adata(1, GENES_A), make_adata(2, GENES_B, n_obs=48, n_batches=3)
    second.X = (second.X.toarray() * 1.0).astype(np.float32)
    second.X[5, 7] = 3_000_000
    first.write_h5ad(folder / "first.h5ad")
    second.write_h5ad(folder / "second.h5ad")
    return folder / "first.h5ad", folder / "second.h5ad"


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory, tiny_files: tuple[Path, Path]) -> Path:
    """A store of the two files. Read it only."""
    from txfm_data import ingest

    store = tmp_path_factory.mktemp("store") / "store.soma"
    labels = {"batch": "batch", "cell_type": "cell_type"}
    ingest.h5ad(tiny_files[0], store, "first", **labels, perturbation="guide", control="non-targeting")
    ingest.h5ad(tiny_files[1], store, "second", **labels, modality="bulk")
    return store


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    """A shard corpus of the store: 4 lanes, blocks of at most 8 samples. Read it only."""
    from shards.select import ShardConfig
    from shards.writer import build_shards
    from txfm_data.store.opening import open_store

    out = tmp_path_factory.mktemp("shards") / "corpus.shards"
    build_shards(open_store(tiny_store), out, ShardConfig(val_batches=0.25, block_rows=8, lanes=4, seed=5))
    return out


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real data sets, named by the environment variable TXFM_DATA."""
    folder = os.environ.get("TXFM_DATA")
    if not folder:
        pytest.skip("TXFM_DATA does not name a folder of real data sets")
    return Path(folder)
