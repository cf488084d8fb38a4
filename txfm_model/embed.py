"""Embeddings of samples given as a sparse matrix of counts."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from txfm_data.matching import Duplicates, match_columns
from txfm_data.progress import Progress, ignore
from txfm_model.model import TxFM

if TYPE_CHECKING:
    from scipy.sparse import csr_array, csr_matrix


def embed_anndata(
    model: TxFM,
    adata: Any,
    *,
    layer: str | None = None,
    gene_ids: str | None = None,
    symbols: str | None = None,
    library_size: str | None = None,
    duplicates: Duplicates = "error",
    batch_size: int = 32,
    n_unmasked: int | None = None,
    seed: int = 0,
    progress: Progress = ignore,
) -> np.ndarray:
    """Embed the samples of an AnnData object in memory; `txfm embed` does the same for a file of any size.

    Parameters
    ----------
    adata
        An `anndata.AnnData` (not imported here: a machine that only trains has none) with raw counts in X or `layer`.
    gene_ids, symbols
        Columns of var with Ensembl gene ids (default: the index) and symbols (used where a column has no such id).
    library_size
        Column of obs with the counts of the whole library, where `adata` holds a slice of the genes; else row sums.
    duplicates
        What to do with several columns of one gene: refuse, sum their counts, or keep the first.
    batch_size, n_unmasked, seed, progress
        As in `embed_samples`.

    Returns
    -------
    numpy.ndarray
        (n_obs, D) float32, rows as in `adata`.

    Raises
    ------
    KeyError, ValueError
        If a named column does not exist, nothing matches, or values cannot be counts.
    """
    import scipy.sparse as sp

    counts = sp.csr_matrix(adata.X if layer is None else adata.layers[layer])
    ids = adata.var_names.astype(str) if gene_ids is None else adata.var[gene_ids].astype(str)
    names = [""] * adata.n_vars if symbols is None else adata.var[symbols].astype(str).tolist()
    match = match_columns(model.vocabulary, ids.tolist(), names, duplicates=duplicates, where="adata")
    sizes = counts.sum(axis=1, dtype=np.float64).A1 if library_size is None else adata.obs[library_size].to_numpy(float)
    moved = sp.csr_matrix((counts.data, match.column_of[counts.indices], counts.indptr), shape=counts.shape)
    return embed_samples(
        model,
        moved,
        match.token_ids,
        sizes,
        batch_size=batch_size,
        n_unmasked=n_unmasked,
        seed=seed,
        progress=progress,
    )


def embed_samples(
    model: TxFM,
    counts: "csr_matrix | csr_array",
    token_ids: np.ndarray,
    library_size: np.ndarray,
    *,
    batch_size: int = 32,
    n_unmasked: int | None = None,
    seed: int = 0,
    first_row: int = 0,
    progress: Progress = ignore,
) -> np.ndarray:
    """Embed samples on the model's device, in float32.

    A row's embedding depends on the row alone (to rounding), not on the batch it is computed in. Memory is
    that of one batch: about batch_size x genes shown x width x 40 bytes.

    Parameters
    ----------
    model
        The model; evaluated without stochastic depth, left in the mode it came in.
    counts
        (n, n_vars) scipy CSR. Raw counts; repeated entries are summed.
    token_ids
        (n_vars,) integer. Token id of each column, -1 where the vocabulary has no such gene.
    library_size
        (n,) float64. Counts of each sample over all genes profiled in its source, matched or not.
    batch_size
        Samples computed at a time.
    n_unmasked
        Genes shown of each sample, as (seed, row) decide; None, or more than there are, shows all matched.
    first_row
        Number of the first row, for draws and messages, when a matrix is embedded in parts.
    progress
        Called in samples.

    Returns
    -------
    numpy.ndarray
        (n, D) float32.

    Raises
    ------
    ValueError
        On NaN, infinite or negative counts, a library size that is not above 0, columns that match no gene of
        the vocabulary, or two columns for one gene.
    """
    token_ids = np.asarray(token_ids)
    library_size = np.asarray(library_size, dtype=np.float64)
    place, genes_P = _shown_columns(model, counts, token_ids)
    _check_samples(counts, library_size, first_row)
    for name, value in (("batch_size", batch_size), ("n_unmasked", n_unmasked)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    embeddings_ND = np.empty((counts.shape[0], model.config.width), dtype=np.float32)
    was_training = model.training
    model.eval()
    for start in range(0, counts.shape[0], batch_size):
        stop = min(start + batch_size, counts.shape[0])
        values_BP = _log1p_rows(counts, start, stop, place, len(genes_P), library_size, model.config.target_sum)
        gene_ids_BP = np.broadcast_to(genes_P, values_BP.shape)
        if n_unmasked is not None and n_unmasked < len(genes_P):
            position_BK = _draw_positions(len(genes_P), n_unmasked, seed, first_row + start, first_row + stop)
            values_BP = np.take_along_axis(values_BP, position_BK, axis=1)
            gene_ids_BP = np.take_along_axis(gene_ids_BP, position_BK, axis=1)
        embeddings_ND[start:stop] = _encode(model, gene_ids_BP, values_BP)
        progress(stop, counts.shape[0])
    model.train(was_training)
    return embeddings_ND


@torch.inference_mode()
def _encode(model: TxFM, gene_ids_BK: np.ndarray, values_BK: np.ndarray) -> np.ndarray:
    device = model.head.weight.device
    gene_ids = torch.from_numpy(np.array(gene_ids_BK)).to(device)  # a copy: it may be a read-only view
    return model.encode(gene_ids, torch.from_numpy(values_BK).to(device)).cpu().numpy()


def _shown_columns(
    model: TxFM, counts: "csr_matrix | csr_array", token_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Place of each column among the shown genes (n_vars,), -1 for none; token ids of those genes (P,)."""
    if token_ids.shape != (counts.shape[1],):
        raise ValueError(f"token_ids: expected one for each of the {counts.shape[1]} columns, got {token_ids.shape}")
    if len(token_ids) and token_ids.max() >= len(model.vocabulary):
        raise ValueError(f"token_ids: {token_ids.max()} is not in the vocabulary of {len(model.vocabulary)} genes")
    columns = np.flatnonzero(token_ids >= 0)
    if len(columns) == 0:
        raise ValueError(
            f"none of the {counts.shape[1]} genes is in the model's vocabulary of {len(model.vocabulary)}; "
            f"check that ids are Ensembl gene ids of the same species"
        )
    columns = columns[np.argsort(token_ids[columns], kind="stable")]
    genes_P = token_ids[columns].astype(np.int64)
    twice = genes_P[1:][genes_P[1:] == genes_P[:-1]]
    if len(twice):
        raise ValueError(
            f"{len(twice)} gene(s) have more than one column, for example "
            f"{model.vocabulary.gene_ids[twice[0]]}; keep one column for each gene"
        )
    place = np.full(counts.shape[1], -1, dtype=np.int64)
    place[columns] = np.arange(len(columns))
    return place, genes_P


def _check_samples(counts: "csr_matrix | csr_array", library_size: np.ndarray, first_row: int) -> None:
    if counts.format != "csr":
        raise TypeError(f"counts must be a scipy CSR matrix, got format {counts.format}; call .tocsr()")
    if library_size.shape != (counts.shape[0],):
        raise ValueError(f"library_size: expected one for each of {counts.shape[0]} rows, got {library_size.shape}")
    bad_entries = np.flatnonzero(~(np.isfinite(counts.data) & (counts.data >= 0)))
    if len(bad_entries):
        row = int(np.searchsorted(counts.indptr, bad_entries[0], side="right")) - 1 + first_row
        value = counts.data[bad_entries[0]]
        raise ValueError(f"row {row}: counts must be finite and not negative, got {value}; embed raw counts")
    bad_rows = np.flatnonzero(~(np.isfinite(library_size) & (library_size > 0)))
    if len(bad_rows):
        raise ValueError(
            f"row {bad_rows[0] + first_row}: library size must be above 0, got {library_size[bad_rows[0]]} "
            f"({len(bad_rows)} such row(s)); remove samples without counts"
        )


def _log1p_rows(
    counts: "csr_matrix | csr_array",
    start: int,
    stop: int,
    place: np.ndarray,
    n_shown: int,
    library_size: np.ndarray,
    target_sum: float,
) -> np.ndarray:
    """Rows start..stop as dense ln(1 + L c / library size) over the shown genes, (B, P) float32."""
    entries = slice(counts.indptr[start], counts.indptr[stop])
    rows = np.repeat(np.arange(stop - start), np.diff(counts.indptr[start : stop + 1]))
    columns = place[counts.indices[entries]]
    shown = columns >= 0
    dense_BP = np.zeros((stop - start, n_shown), dtype=np.float64)
    np.add.at(dense_BP, (rows[shown], columns[shown]), counts.data[entries][shown])
    dense_BP *= (target_sum / library_size[start:stop])[:, None]
    return np.log1p(dense_BP).astype(np.float32)


def _draw_positions(n_genes: int, n_unmasked: int, seed: int, first_row: int, stop_row: int) -> np.ndarray:
    """Positions drawn for each row, (B, K) int64: a function of (seed, row)."""
    from txfm_data.kernels import draw_rows  # numba, needed only here

    identity, swaps = np.arange(n_genes, dtype=np.uint16), np.empty(n_unmasked, dtype=np.uint32)
    drawn_BK = np.empty((stop_row - first_row, n_unmasked), dtype=np.uint16)
    draw_rows(seed, 0, np.arange(first_row, stop_row), identity, swaps, drawn_BK)
    return drawn_BK.astype(np.int64)
