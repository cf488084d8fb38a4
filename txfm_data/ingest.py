"""Sources into the store: check every value, match genes, fix library sizes, then append all or nothing.

Two passes over the file: the first reads and checks everything and writes nothing, so bad input leaves no trace.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from txfm_data.matching import Duplicates
from txfm_data.progress import Progress, ignore
from txfm_data.ragged import Ragged
from txfm_data.sources.h5ad import H5adSource, gene_columns
from txfm_data.store import append as store_append
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.soma import SomaStore
from txfm_data.vocabulary import strip_version

EmptySamples = Literal["error", "drop"]
Modality = Literal["sc", "bulk"]
MISSING = "na"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class _Genes:
    """How the columns of a source become genes of a panel.

    column_gene : (n_vars,) int64. Gene of each column, -1 where the column is dropped.
    """

    gene_ids: tuple[str, ...]
    symbols: tuple[str, ...]
    column_gene: np.ndarray


@dataclass
class _Survey:
    """What the first pass found, one entry a sample (kept or not) or a gene."""

    row_sum: np.ndarray
    nnz: np.ndarray
    gene_nnz: np.ndarray


def h5ad(
    path: str | Path,
    store: str | Path,
    dataset: str,
    *,
    layer: str | None = None,
    raw: bool = False,
    gene_ids: str | None = None,
    symbols: str | None = None,
    batch: str | None = None,
    perturbation: str | None = None,
    control: str | None = None,
    cell_type: str | None = None,
    library_size: str | None = None,
    modality: Modality = "sc",
    duplicates: Duplicates = "error",
    empty_samples: EmptySamples = "error",
    progress: Progress = ignore,
) -> dict[str, Any]:
    """Ingest raw counts from an h5ad file as one dataset of a store.

    Parameters
    ----------
    layer, raw
        Read a layer, or ``raw.X``, in place of X.
    gene_ids, symbols
        Columns of var: Ensembl gene ids (default: the index) and symbols.
    batch, perturbation, cell_type
        Columns of obs. `control` is the value of the perturbation column that marks unperturbed samples.
    library_size
        Column of obs with the counts of the whole library, for files that hold a slice of the genes. By default
        the sum over all genes of the file, those without an Ensembl id included.
    duplicates
        What to do when several columns carry one gene id: refuse, sum them, or keep the first.
    empty_samples
        What to do with samples without any count: refuse, or drop and count them.
    progress
        Called with samples done of twice the samples: once for checking, once for writing.

    Returns
    -------
    dict
        dataset, n_obs, n_dropped_empty, genes_matched, genes_in_file, n_panel, total, nnz, store.

    Raises
    ------
    FileNotFoundError, ValueError, TypeError
        If the file or the store cannot be used; nothing is written then.
    """
    path, store = Path(path), Path(store)
    _check_name(dataset)
    with H5adSource(path, layer=layer, raw=raw, gene_ids=gene_ids, symbols=symbols) as source:
        content = _sha256(path)
        if store.exists():
            store_append.check_new(SomaStore(store), dataset, content)
        genes = _match_genes(source, duplicates)
        survey = _survey(source, genes, lambda done, total: progress(done, 2 * total))
        size = survey.row_sum if library_size is None else _checked_sizes(source, 0, survey.row_sum, library_size)
        keep = _kept(source, size, empty_samples)
        labels = _labels(source, dataset, batch=batch, perturbation=perturbation, control=control, cell_type=cell_type)
        obs = _obs_table(source, labels, size, survey, len(genes.gene_ids), modality).filter(pa.array(keep))
        new = store_append.NewDataset(
            name=dataset, gene_ids=genes.gene_ids, symbols=genes.symbols, gene_nnz=survey.gene_nnz, obs=obs,
            values="counts", modality=modality, source=path.name, content_sha256=content,
        )  # fmt: skip
        record = store_append.append(
            store,
            new,
            _rows(source, genes, keep),
            progress=lambda done, total: progress(total + done, 2 * total),
        )
        _check_unchanged(record, survey, keep)
    return {
        "dataset": dataset,
        "store": str(store),
        "n_obs": record.n_obs,
        "n_dropped_empty": int((~keep).sum()),
        "genes_matched": int((genes.column_gene >= 0).sum()),
        "genes_in_file": len(genes.column_gene),
        "n_panel": record.n_panel,
        "nnz": record.nnz,
        "total": record.total,
    }


def _check_name(dataset: str) -> None:
    if not dataset or not all(c.isalnum() or c in "-_." for c in dataset):
        raise ValueError(f"dataset name {dataset!r}: use letters, digits, '-', '_' and '.' only")


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _match_genes(source: H5adSource, duplicates: Duplicates) -> _Genes:
    """Columns with an Ensembl id become the panel; the others count towards the library size alone."""
    is_gene = gene_columns(source.gene_ids)
    if not is_gene.any():
        others = source.columns_with_ensembl_ids()
        hint = (
            f"columns of var that hold some: {others}; pass one as --gene-ids"
            if others
            else "no column of var holds any; add the ids to var first"
        )
        raise ValueError(
            f"{source.path}: 0 of {len(source.gene_ids)} gene ids are Ensembl ids (found for example "
            f"{list(source.gene_ids[:3])}, expected like 'ENSG00000141510'); {hint}"
        )
    ids = [strip_version(gene) if kept else "" for gene, kept in zip(source.gene_ids, is_gene, strict=True)]
    counts = Counter(gene for gene in ids if gene)
    twice = [gene for gene, n in counts.items() if n > 1]
    if twice and duplicates == "error":
        raise ValueError(
            f"{source.path}: {len(twice)} gene ids stand on more than one column, for example {twice[:3]}; "
            "pass --duplicates sum or --duplicates first"
        )
    position: dict[str, int] = {}
    column_gene = np.full(len(ids), -1, np.int64)
    symbols: list[str] = []
    for column, gene in enumerate(ids):
        if not gene:
            continue
        if gene not in position:
            position[gene] = len(position)
            symbols.append(source.symbols[column])
        elif duplicates == "first":
            continue
        column_gene[column] = position[gene]
    return _Genes(tuple(position), tuple(symbols), column_gene)


def _survey(source: H5adSource, genes: _Genes, progress: Progress) -> _Survey:
    """First pass: check every value; sums per sample over all columns, non-zeros per sample and per gene of the panel."""
    row_sum, nnz = np.zeros(source.n_obs), np.zeros(source.n_obs, np.int64)
    gene_nnz = np.zeros(len(genes.gene_ids), np.int64)
    for start, part in source.chunks():
        check_counts(part, source, start)
        rows = slice(start, start + part.shape[0])
        row_sum[rows] = np.asarray(part.sum(axis=1, dtype=np.float64)).ravel()
        kept = _to_panel(part, genes)
        nnz[rows] = np.diff(kept.indptr)
        gene_nnz += np.bincount(kept.indices, minlength=len(gene_nnz))
        progress(start + part.shape[0], source.n_obs)
    return _Survey(row_sum, nnz, gene_nnz)


def check_counts(part: sp.csr_matrix, source: H5adSource, start: int) -> None:
    """Refuse values that are not raw counts, naming the first one.

    Raises
    ------
    ValueError
        On NaN, infinite, negative or fractional values, and on counts that a uint32 cannot hold.
    """
    values = part.data
    checks = (
        (~np.isfinite(values), "is not a finite number", "repair the file"),
        (
            values < 0,
            "is negative",
            "raw counts are never negative: choose the matrix that holds them with --layer or --raw",
        ),
        (
            np.floor(values) != values,
            "is not a whole number",
            "these look like normalised values, not raw counts: choose the matrix that holds counts with --layer or --raw",
        ),
        (
            values > np.iinfo(np.uint32).max,
            "is above the largest count a store holds (4294967295)",
            "check the units of the file",
        ),
    )
    for bad, what, remedy in checks:
        if bad.any():
            first = int(np.argmax(bad))
            row = int(np.searchsorted(part.indptr, first, side="right")) - 1
            sample, gene = source.obs.index[start + row], source.gene_ids[part.indices[first]]
            raise ValueError(
                f"{source.path}: {source.matrix_name} holds {values[first]} for sample {sample!r} (row {start + row}), gene "
                f"{gene!r}, which {what}; {int(bad.sum())} such values in this part of the file; {remedy}"
            )


def _to_panel(part: sp.csr_matrix, genes: _Genes) -> sp.csr_matrix:
    """The same rows over the genes of the panel: dropped columns gone, duplicate columns summed, indices sorted."""
    gene = genes.column_gene[part.indices]
    keep = gene >= 0
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    shape = (part.shape[0], len(genes.gene_ids))
    out = sp.csr_matrix((part.data[keep].astype(np.uint64), gene[keep], kept_before[part.indptr]), shape=shape)
    out.sum_duplicates()
    return out


def library_sizes(source: H5adSource, start: int, part: sp.csr_matrix, column: str | None) -> np.ndarray:
    """Counts of the whole library of consecutive samples: their sums, or a column of obs. (n,) float64.

    start : row of the first sample.  part : their counts over all columns of the file.

    Raises
    ------
    ValueError
        If the column holds something that is not a number of at least the sum.
    """
    sums = np.asarray(part.sum(axis=1, dtype=np.float64)).ravel()
    return sums if column is None else _checked_sizes(source, start, sums, column)


def _checked_sizes(source: H5adSource, start: int, sums: np.ndarray, column: str) -> np.ndarray:
    values = source.obs_column(column, "--library-size").iloc[start : start + len(sums)]
    sizes: np.ndarray = pd.to_numeric(values, errors="coerce").to_numpy(np.float64)
    wrong = ~np.isfinite(sizes) | (sizes < sums)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(
            f"{source.path}: library size {sizes[first]} of sample {source.obs.index[start + first]!r} is not a number of at "
            f"least {sums[first]}, the sum of its counts here ({int(wrong.sum())} such samples); name another --library-size"
        )
    return sizes


def _kept(source: H5adSource, library_size: np.ndarray, empty_samples: EmptySamples) -> np.ndarray:
    """Which samples have a library at all, (n_obs,) bool; one without counts in a slice of the genes does."""
    keep = library_size > 0
    n_empty = int((~keep).sum())
    if n_empty and empty_samples == "error":
        raise ValueError(
            f"{source.path}: {n_empty} of {source.n_obs} samples have no count at all (first: "
            f"{source.obs.index[int(np.argmin(keep))]!r}), so no library size; pass --empty-samples drop to leave them out"
        )
    if not keep.any():
        raise ValueError(f"{source.path}: no sample has any count; nothing to ingest")
    return keep


def _labels(
    source: H5adSource,
    dataset: str,
    *,
    batch: str | None,
    perturbation: str | None,
    control: str | None,
    cell_type: str | None,
) -> dict[str, np.ndarray]:
    """Label columns of obs as arrays of str, and ``is_control``."""

    def column(name: str | None, option: str, default: str) -> np.ndarray:
        if name is None:
            return np.full(source.n_obs, default, dtype=object)
        values = source.obs_column(name, option).astype(object)
        filled = values.where(~values.isna(), MISSING if option == "--batch" else default)
        return np.asarray(filled.astype(str), dtype=object)

    if (perturbation is None) != (control is None):
        raise ValueError(
            "--perturbation and --control go together: the column, and the value that marks unperturbed samples"
        )
    perturbations = column(perturbation, "--perturbation", MISSING)
    if control is not None and not (perturbations == control).any():
        found = sorted(set(perturbations))
        raise ValueError(
            f"{source.path}: no sample has {perturbation} == {control!r}; values are {found[:8]} ({len(found)} in all)"
        )
    return {
        "batch": column(batch, "--batch", dataset),
        "cell_type": column(cell_type, "--cell-type", UNKNOWN),
        "perturbation": perturbations,
        "is_control": perturbations == control if control is not None else np.zeros(source.n_obs, bool),
    }


def _obs_table(
    source: H5adSource,
    labels: dict[str, np.ndarray],
    size: np.ndarray,
    survey: _Survey,
    n_panel: int,
    modality: Modality,
) -> pa.Table:
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(survey.nnz > 0, survey.row_sum / survey.nnz, 0.0)
    return pa.table(
        {
            "observation_joinid": pa.array(source.obs.index.astype(str), pa.large_string()),
            "batch": pa.array(labels["batch"], pa.large_string()).dictionary_encode(),
            "cell_type": pa.array(labels["cell_type"], pa.large_string()).dictionary_encode(),
            "perturbation": pa.array(labels["perturbation"], pa.large_string()).dictionary_encode(),
            "is_control": labels["is_control"],
            "modality": pa.array([modality] * source.n_obs, pa.large_string()).dictionary_encode(),
            "is_primary_data": np.ones(source.n_obs, bool),
            "raw_sum": size,
            "nnz": survey.nnz,
            "raw_mean_nnz": mean,
            "n_measured_vars": np.full(source.n_obs, n_panel, np.int64),
        }
    )


def _rows(source: H5adSource, genes: _Genes, keep: np.ndarray) -> Iterator[Ragged]:
    """Second pass: the kept samples over the panel; gene ids count its genes."""
    for start, part in source.chunks():
        kept = _to_panel(part[keep[start : start + part.shape[0]]], genes)
        if kept.nnz and int(kept.data.max()) > np.iinfo(np.uint32).max:
            raise ValueError(f"{source.path}: summed duplicate columns pass 4294967295; pass --duplicates first")
        yield Ragged(kept.indptr.astype(np.int64), kept.indices.astype(np.uint16), kept.data.astype(np.uint32))


def _check_unchanged(record: DatasetRecord, survey: _Survey, keep: np.ndarray) -> None:
    if record.nnz != int(survey.nnz[keep].sum()):
        raise ValueError(
            f"{record.source}: {survey.nnz[keep].sum()} non-zeros were checked, {record.nnz} were written; the file changed"
        )
