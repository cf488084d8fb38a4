"""Small files in the formats of 10x, GTEx, GDC and STAR, with values that tell their sample and gene apart."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp

from txfm_data.sources.protocol import Source, chunks

GENE_MODEL = "# gene-model: GENCODE v36"
GDC_HEADER = (
    "gene_id\tgene_name\tgene_type\tunstranded\tstranded_first\tstranded_second\ttpm_unstranded\tfpkm_unstranded\t"
    "fpkm_uq_unstranded"
)
SUMS = ("N_unmapped", "N_multimapping", "N_noFeature", "N_ambiguous")
SHEET = "File ID\tFile Name\tData Category\tData Type\tProject ID\tCase ID\tSample ID\tSample Type"


def counts(n_obs: int, n_vars: int, *, density: float = 0.3, seed: int = 0) -> sp.csr_matrix:
    """Counts of 1000 * sample + gene + 1 where drawn, so that some pass 65,535 in a matrix of 70 samples or more."""
    rng = np.random.default_rng([seed, n_obs, n_vars])
    drawn = rng.random((n_obs, n_vars)) < density
    dense = np.where(drawn, 1000 * np.arange(n_obs)[:, None] + np.arange(n_vars) + 1, 0)
    return sp.csr_matrix(dense.astype(np.int64))


def whole(source: Source, max_bytes: int = 2_000) -> np.ndarray:
    """All rows of a source, read in small pieces that must follow each other."""
    parts, n = [], 0
    for start, rows in chunks(source, max_bytes):
        assert start == n and rows.has_sorted_indices and (rows.data != 0).all()
        parts.append(rows.toarray())
        n += rows.shape[0]
    assert n == source.n_obs
    return np.concatenate(parts)


def ensembl(n: int, version: str = "") -> list[str]:
    return [f"ENSG{i:011d}{version}" for i in range(n)]


def write_text(path: Path, text: str) -> Path:
    """Write text, through gzip if the name ends so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode(), 1))
    else:
        path.write_text(text)
    return path


def write_h5(
    path: Path,
    matrix: sp.csr_matrix,
    *,
    types: Sequence[str] | None = None,
    genomes: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
) -> Path:
    """Matrix of CellRanger 3 and later; symbols are gene0, gene1, ..."""
    n_obs, n = matrix.shape
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        _write_matrix(group, matrix)
        group["barcodes"] = np.array([f"CELL{i}-1" for i in range(n_obs)], "S")
        group["features/id"] = np.array(ids or ensembl(n), "S")
        group["features/name"] = np.array([f"gene{i}" for i in range(n)], "S")
        group["features/feature_type"] = np.array(types or ["Gene Expression"] * n, "S")
        group["features/genome"] = np.array(genomes or ["GRCh38"] * n, "S")
    return path


def write_h5_v2(path: Path, matrices: dict[str, sp.csr_matrix]) -> Path:
    with h5py.File(path, "w") as file:
        for genome, matrix in matrices.items():
            group = file.create_group(genome)
            _write_matrix(group, matrix)
            group["barcodes"] = np.array([f"CELL{i}-1" for i in range(matrix.shape[0])], "S")
            group["genes"] = np.array(ensembl(matrix.shape[1]), "S")
            group["gene_names"] = np.array([f"gene{i}" for i in range(matrix.shape[1])], "S")
    return path


def _write_matrix(group: h5py.Group, matrix: sp.csr_matrix) -> None:
    # genes x cells by columns holds the same numbers as cells x genes by rows
    group["data"] = matrix.data.astype(np.int32)
    group["indices"] = matrix.indices.astype(np.int64)
    group["indptr"] = matrix.indptr.astype(np.int64)
    group["shape"] = np.array(matrix.shape[::-1], np.int32)


def mtx_text(matrix: sp.csr_matrix, order: np.ndarray | None = None) -> str:
    entries = matrix.tocoo()
    order = np.arange(entries.nnz) if order is None else order
    lines = [f"{entries.col[i] + 1} {entries.row[i] + 1} {entries.data[i]}" for i in order]
    head = ["%%MatrixMarket matrix coordinate integer general", '%metadata_json: {"software_version": "x"}']
    return "\n".join([*head, f"{matrix.shape[1]} {matrix.shape[0]} {entries.nnz}", *lines]) + "\n"


def write_mtx(
    folder: Path,
    matrix: sp.csr_matrix,
    *,
    types: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    end: str = ".gz",
    version: int = 3,
    prefix: str = "",
    order: np.ndarray | None = None,
) -> Path:
    n_obs, n = matrix.shape
    ids = ids or ensembl(n)
    types = types or ["Gene Expression"] * n
    rows = [f"{ids[i]}\tgene{i}" + (f"\t{types[i]}" if version == 3 else "") for i in range(n)]
    write_text(folder / f"{prefix}matrix.mtx{end}", mtx_text(matrix, order))
    write_text(folder / f"{prefix}barcodes.tsv{end}", "".join(f"CELL{i}-1\n" for i in range(n_obs)))
    write_text(folder / f"{prefix}{'features' if version == 3 else 'genes'}.tsv{end}", "\n".join(rows) + "\n")
    return folder


def write_gct(path: Path, matrix: sp.csr_matrix, *, numbered: bool = False) -> Path:
    """Genes x samples as GTEx has them; `numbered` as in its files of one tissue."""
    dense = matrix.toarray().T
    n_genes, n_obs = dense.shape
    samples = "\t".join(f"GTEX-{i}" for i in range(n_obs))
    lines = ["#1.2", f"{n_genes}\t{n_obs}", ("id\t" if numbered else "") + f"Name\tDescription\t{samples}"]
    for i, row in enumerate(dense):
        lead = (f"{i}\t" if numbered else "") + f"{ensembl(n_genes, '.5')[i]}\tgene{i}\t"
        lines.append(lead + "\t".join(map(str, row)))
    return write_text(path, "\n".join(lines) + "\n")


def gdc_text(values: np.ndarray, *, model: str = GENE_MODEL, ids: Sequence[str] | None = None) -> str:
    """values : (genes,) unstranded; stranded_first is twice, stranded_second three times as much."""
    ids = ids or ensembl(len(values), ".15")
    lines = [model, GDC_HEADER]
    lines += [f"{name}\t\t\t{10 * i + 1}\t{10 * i + 2}\t{10 * i + 3}\t\t\t" for i, name in enumerate(SUMS)]
    lines += [
        f"{gene}\tgene{i}\tprotein_coding\t{v}\t{2 * v}\t{3 * v}\t0.5\t0.25\t0.125"
        for i, (gene, v) in enumerate(zip(ids, values, strict=True))
    ]
    return "\n".join(lines) + "\n"


def star_text(values: np.ndarray) -> str:
    lines = [f"{name}\t{10 * i + 1}\t{10 * i + 2}\t{10 * i + 3}" for i, name in enumerate(SUMS)]
    lines += [f"{gene}\t{v}\t{2 * v}\t{3 * v}" for gene, v in zip(ensembl(len(values)), values, strict=True)]
    return "\n".join(lines) + "\n"


def gdc_name(i: int) -> str:
    return f"0000-{i}.rna_seq.augmented_star_gene_counts.tsv"


def write_gdc(folder: Path, matrix: sp.csr_matrix, sheet: Path | None = None) -> Path:
    """A folder for each file, as gdc-client makes them, and the sample sheet."""
    lines = [SHEET]
    for i, row in enumerate(matrix.toarray()):
        write_text(folder / f"id-{i}" / gdc_name(i), gdc_text(row))
        write_text(folder / f"id-{i}" / "logs" / f"{gdc_name(i)}.parcel", "x")
        lines.append(
            f"id-{i}\t{gdc_name(i)}\tTranscriptome Profiling\tGene Expression Quantification\tTCGA-BRCA\tTCGA-{i}\t"
            f"TCGA-{i}-01A\tPrimary Tumor"
        )
    if sheet is not None:
        write_text(sheet, "\n".join(lines) + "\n")
    return folder
