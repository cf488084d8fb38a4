"""The road's first half on real counts: what is ingested is what Census tools and shards give back."""

from pathlib import Path

import anndata as ad
import cellxgene_census
import numpy as np
import scipy.sparse as sp

from shards.blocks import BlockReader
from shards.manifest import Corpus
from shards.packing import join, unpack
from shards.select import ShardConfig
from shards.verify import verify as verify_shards
from shards.writer import build_shards
from txfm_data import ingest
from txfm_data.store.opening import open_store
from txfm_data.store.verify import verify as verify_store

COLUMNS = {"gene_ids": "ensembl_id", "symbols": "gene_symbol", "batch": "batch", "duplicates": "sum"}


def genes_by_id(adata: ad.AnnData) -> dict[str, np.ndarray]:
    """Counts of each Ensembl id, columns of one id summed."""
    dense = sp.csc_matrix(adata.X).astype(np.int64)
    out: dict[str, np.ndarray] = {}
    for column, gene in enumerate(adata.var["ensembl_id"].astype(str)):
        if gene.startswith("ENSG"):
            out[gene] = out.get(gene, 0) + dense[:, column].toarray().ravel()
    return out


def test_single_cells_bulk_and_a_screen_survive_the_road(tmp_path, real_data: Path):
    names = ("sc_pbmc3k", "bulk_gtex_skin_bladder", "perturb_papalexi_thp1")
    options = (
        {"cell_type": "cell_type"},
        {"modality": "bulk"},
        {"perturbation": "perturbation", "control": "non-targeting"},
    )
    for name, extra in zip(names, options, strict=True):
        size = {"library_size": "full_n_umi"} if name.startswith("perturb") else {}
        ingest.h5ad(real_data / f"{name}.h5ad", tmp_path / "store", name, **COLUMNS, **extra, **size)
    store = open_store(tmp_path / "store")
    assert verify_store(tmp_path / "store")["n_datasets"] == 3
    build_shards(store, tmp_path / "shards", ShardConfig(min_cell_fraction=0.05, lanes=8))
    corpus = Corpus(tmp_path / "shards")
    assert verify_shards(corpus)["n_train"] + corpus.n_samples("val") == store.n_obs
    blocks = [BlockReader(corpus, s).read(i) for s in ("train", "val") for i in range(len(corpus.blocks(s)))]
    dataset, sample_id = (
        np.concatenate([getattr(block, name) for block in blocks]) for name in ("dataset", "sample_id")
    )
    samples = unpack(join([block.packed for block in blocks]))
    with cellxgene_census.open_soma(uri=str(tmp_path / "store")) as census:
        for number, name in enumerate(names):
            adata = ad.read_h5ad(real_data / f"{name}.h5ad")
            expected = genes_by_id(adata)
            got = cellxgene_census.get_anndata(census, "homo_sapiens", obs_value_filter=f"dataset_id == '{name}'")
            counts = sp.csc_matrix(got.X)
            assert int(counts.sum()) == sum(int(c.sum()) for c in expected.values())
            position = {gene: i for i, gene in enumerate(got.var["feature_id"])}
            for gene in list(expected)[::97]:
                np.testing.assert_array_equal(counts[:, [position[gene]]].toarray().ravel(), expected[gene])
            rows = np.flatnonzero(dataset == number)
            start = store.dataset(name).obs_start
            for row in rows[::401]:
                part = slice(samples.indptr[row], samples.indptr[row + 1])
                for gene, count in list(zip(samples.gene_ids[part], samples.counts[part], strict=True))[::13]:
                    assert expected[corpus.vocabulary.gene_ids[gene]][sample_id[row] - start] == count
