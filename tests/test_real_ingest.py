"""Every real data set of the folder goes into both backends and comes back equal to scanpy's reading of its file."""

import os
from pathlib import Path

import numpy as np
import pytest
import scanpy
import scipy.sparse as sp

from txfm_data import ingest
from txfm_data.store.opening import open_store
from txfm_data.store.verify import verify
from txfm_data.vocabulary import is_ensembl_gene, strip_version

FOLDER = os.environ.get("TXFM_DATA")
FILES = sorted(path.name for path in Path(FOLDER).glob("*.h5ad")) if FOLDER else ["(none)"]


def by_gene(adata) -> tuple[sp.csr_matrix, list[str]]:
    """Counts over the Ensembl ids of the file, columns of one id summed, in order of first appearance."""
    ids = [strip_version(gene) if is_ensembl_gene(gene) else "" for gene in adata.var["ensembl_id"].astype(str)]
    genes = list(dict.fromkeys(gene for gene in ids if gene))
    at = {gene: i for i, gene in enumerate(genes)}
    rows = [column for column, gene in enumerate(ids) if gene]
    to_gene = sp.csr_matrix((np.ones(len(rows)), (rows, [at[ids[row]] for row in rows])), shape=(len(ids), len(genes)))
    return sp.csr_matrix(adata.X).astype(np.float64) @ to_gene, genes


@pytest.mark.parametrize("name", FILES)
def test_a_real_data_set_comes_back_equal_from_both_backends(tmp_path, real_data: Path, name):
    adata = scanpy.read_h5ad(real_data / name)
    expected, genes = by_gene(adata)
    total = np.asarray(adata.X.sum(axis=1, dtype=np.float64)).ravel()
    kept = total > 0
    for backend in ("soma", "zarr"):
        result = ingest.h5ad(
            real_data / name, tmp_path / backend, "d", gene_ids="ensembl_id", symbols="gene_symbol", batch="batch",
            duplicates="sum", empty_samples="drop", backend=backend,
        )  # fmt: skip
        store = open_store(tmp_path / backend)
        assert (
            (result["n_obs"], result["n_panel"])
            == (int(kept.sum()), len(genes))
            == (store.n_obs, len(store.vocabulary))
        )
        assert store.vocabulary.gene_ids == tuple(genes) and len(store.panel(store.datasets[0])) == len(genes)
        assert result["total"] == expected[kept].sum()
        obs = store.obs()
        np.testing.assert_array_equal(obs["raw_sum"], total[kept])
        assert obs["observation_joinid"].to_pylist() == adata.obs_names[kept].tolist()
        assert obs["batch"].to_pylist() == adata.obs["batch"][kept].astype(str).tolist()
        for low, part in store.scan(0, store.n_obs):
            found = sp.csr_matrix((part.counts, part.gene_ids, part.indptr), shape=(len(part), len(genes)))
            wanted = expected[np.flatnonzero(kept)[low : low + len(part)]]
            assert (found != wanted).nnz == 0
        assert verify(tmp_path / backend)["nnz"] == expected[kept].nnz
