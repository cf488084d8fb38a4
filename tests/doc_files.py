"""What the commands of a how-to page find in their folder: small files in the true formats, named as the page does."""

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from tests.txfm_data import text_files as text
from tests.txfm_data.census_fixture import build_census

N_GENES, N_OBS = 40, 24


def _adata(seed: int, n_obs: int, genes: range) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(2.0, (n_obs, len(genes)))
    counts[:, 0] += 1  # no sample without counts
    obs = pd.DataFrame(
        {
            "donor": [f"donor{i % 3}" for i in range(n_obs)],
            "cell_type": np.array(["T cell", "B cell"])[np.arange(n_obs) % 2],
            "guide": np.where(np.arange(n_obs) % 3 == 0, "non-targeting", "KO"),
        },
        index=[f"cell{i}" for i in range(n_obs)],
    )
    var = pd.DataFrame({"gene_name": [f"gene{i}" for i in genes]}, index=[f"ENSG{i:011d}.2" for i in genes])
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs, var)


def _table(path: Path, header: str, rows: list[str]) -> None:
    text.write_text(path, "\n".join([header, *rows]) + "\n")


def h5ad(folder: Path) -> None:
    """A file with Ensembl ids; one with symbols, normalised X and counts in a layer; a gene map."""
    _adata(1, N_OBS, range(N_GENES)).write_h5ad(folder / "pbmc.h5ad")
    named = _adata(2, N_OBS, range(10, 10 + N_GENES))
    named.var_names = named.var["gene_name"].to_numpy()
    named.layers["counts"] = named.X.copy()
    named.X = sp.csr_matrix(np.log1p(named.X.toarray()))
    del named.var["gene_name"]
    named.write_h5ad(folder / "symbols.h5ad")
    _table(folder / "genes.tsv", "gene_id\tgene_name", [f"ENSG{i:011d}\tgene{i}" for i in range(60)])


def tenx(folder: Path) -> None:
    """The h5 file of CellRanger, its folder with antibodies, and labels of the cells."""
    matrix = text.counts(N_OBS, N_GENES)
    types = ["Gene Expression"] * (N_GENES - 4) + ["Antibody Capture"] * 4
    ids = [*text.ensembl(N_GENES - 4), *(f"CD{i}" for i in range(4))]
    text.write_h5(folder / "filtered_feature_bc_matrix.h5", matrix)
    text.write_mtx(folder / "filtered_feature_bc_matrix", text.counts(N_OBS, N_GENES, seed=1), types=types, ids=ids)
    rows = [f"CELL{i}-1,donor{i % 3},{'T cell' if i % 2 else 'B cell'}" for i in range(N_OBS)]
    _table(folder / "cells.csv", "barcode,donor,cell_type", rows)


def gct(folder: Path) -> None:
    """GTEx's counts and its table of sample attributes, which has samples that the counts have not."""
    text.write_gct(folder / "gene_reads.gct.gz", text.counts(N_OBS, N_GENES))
    rows = [f"GTEX-{i}\t{6 + i % 4}.5\tBrain\tBrain - Cortex\tLCSET-{i % 3}" for i in range(N_OBS + 5)]
    _table(folder / "SampleAttributesDS.txt", "SAMPID\tSMRIN\tSMTS\tSMTSD\tSMGEBTCH", rows)


def star(folder: Path) -> None:
    """A download of gdc-client with its sample sheet, and a folder of STAR's own files."""
    matrix = text.counts(N_OBS, N_GENES)
    text.write_gdc(folder / "gdc", matrix, folder / "gdc_sample_sheet.tsv")
    for i, row in enumerate(text.counts(6, N_GENES, seed=2).toarray()):
        text.write_text(folder / "star" / f"patient{i}.ReadsPerGene.out.tab", text.star_text(row))
    rows = [f"patient{i}\tplate{i % 2}\t{'case' if i % 2 else 'control'}" for i in range(6)]
    _table(folder / "patients.tsv", "sample\tplate\tgroup", rows)


def table(folder: Path) -> None:
    """featureCounts' table, expected counts with symbols, and samples x genes with symbols alone."""
    dense = text.counts(6, N_GENES).toarray()
    ids = text.ensembl(N_GENES)
    names = [f"liver{i}" for i in range(6)]
    coordinates = "chr1;chr1\t1;90\t50;120\t+;+\t80"
    rows = [f"{gene}\t{coordinates}\t" + "\t".join(map(str, dense[:, g])) for g, gene in enumerate(ids)]
    header = "# Program:featureCounts v2.0.6\nGeneid\tChr\tStart\tEnd\tStrand\tLength\t" + "\t".join(names)
    _table(folder / "featurecounts.txt", header, rows)
    rows = [f"{gene}\tgene{g}\t" + "\t".join(f"{v / 4}" for v in dense[:, g]) for g, gene in enumerate(ids)]
    _table(folder / "gene_counts.tsv", "gene_id\tgene_name\t" + "\t".join(names), rows)
    rows = [f"{name}," + ",".join(map(str, dense[i] + 1)) for i, name in enumerate(names)]
    _table(folder / "matrix.csv", "," + ",".join(f"gene{g}" for g in range(N_GENES)), rows)
    _table(folder / "genes.tsv", "gene_id\tgene_name", [f"{gene}\tgene{g}" for g, gene in enumerate(ids)])
    _table(
        folder / "samples.csv", "sample,plate,age", [f"{name},plate{i % 2},{40 + i}" for i, name in enumerate(names)]
    )


def census(folder: Path) -> None:
    """A local collection of the Census' shape and a file that names two of its datasets."""
    build_census(folder / "census")
    (folder / "datasets.txt").write_text("# the lung and blood of the pilot\naaaa-lung\nbbbb-blood\n")


def stores(folder: Path) -> None:
    """A SOMA store of two datasets, another one of one, and a file of expected counts."""
    from txfm_data import ingest

    for number, (name, store) in enumerate((("pbmc", "store.soma"), ("lung", "store.soma"), ("liver", "new.soma"))):
        path = folder / f"{name}.h5ad"
        _adata(number, N_OBS, range(5 * number, 5 * number + N_GENES)).write_h5ad(path)
        ingest.h5ad(path, folder / store, name, batch="donor")
    expected = _adata(9, N_OBS, range(N_GENES))
    expected.X = expected.X * np.float32(0.25)
    expected.write_h5ad(folder / "salmon.h5ad")


def large(folder: Path) -> None:
    """A file to read in blocks, and two more for a list of sources."""
    _adata(1, 200, range(N_GENES)).write_h5ad(folder / "atlas.h5ad")
    for number, name in enumerate(("lines", "screen"), 2):
        _adata(number, N_OBS, range(number, number + N_GENES)).write_h5ad(folder / f"{name}.h5ad")


def shard(folder: Path) -> None:
    """A store of two datasets with labels."""
    from txfm_data import ingest

    for number, name in enumerate(("pbmc", "lung")):
        _adata(number, 60, range(5 * number, 5 * number + N_GENES)).write_h5ad(folder / f"{name}.h5ad")
        ingest.h5ad(folder / f"{name}.h5ad", folder / "store.soma", name, batch="donor", cell_type="cell_type")


def embed(folder: Path) -> None:
    """Counts as h5ad and Zarr, a store, shards, a list of genes, and an untrained model of the shards' genes."""
    import torch

    from shards.manifest import Corpus
    from shards.select import ShardConfig
    from shards.writer import build_shards
    from tests.zarr_files import write_zarr
    from txfm_data.store.opening import open_store
    from txfm_model.config import ModelConfig
    from txfm_model.model import TxFM

    shard(folder)
    adata = ad.read_h5ad(folder / "pbmc.h5ad")
    write_zarr(adata, folder / "pbmc.zarr")
    adata.layers["counts"] = adata.X.copy()
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))
    adata.write_h5ad(folder / "normalised.h5ad")
    build_shards(open_store(folder / "store.soma"), folder / "corpus.shards", ShardConfig(block_rows=16, lanes=2))
    torch.manual_seed(0)
    config = ModelConfig(width=16, blocks=6, heads=2, decoder_blocks=2)
    TxFM(config, Corpus(folder / "corpus.shards").vocabulary).save_pretrained(folder / "run" / "checkpoint")
    (folder / "markers.txt").write_text("# markers\ngene7\nENSG00000000042\n")


PAGES: dict[str, Callable[[Path], None]] = {
    "ingest_h5ad": h5ad, "ingest_10x": tenx, "ingest_gct": gct, "ingest_star": star, "ingest_table": table,
    "ingest_census": census, "store": stores, "parallel_ingest": large,
    "shard": shard, "embed": embed,
}  # fmt: skip
