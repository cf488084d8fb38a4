"""Embeddings of samples: of a sparse matrix or AnnData in memory, and of files, stores and shards of any size."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from txfm_data.matching import Duplicates, NonInteger, match_columns
from txfm_data.progress import Progress, ignore
from txfm_model.embedding.encoding import EncodeOptions, Layer, check_options, over_samples, parse_layer, part_of_matrix
from txfm_model.embedding.over_files import FileOptions, run_file
from txfm_model.embedding.samples import Panel, Part, SampleInput
from txfm_model.model import TxFM

if TYPE_CHECKING:
    from scipy.sparse import csr_array, csr_matrix

    from txfm_data.anndata_out import Matrix
    from txfm_model.embedding.encoding import Compute


def embed_anndata(
    model: TxFM,
    adata: Any,
    *,
    counts_layer: str | None = None,
    layer: Layer = "final",
    gene_ids: str | None = None,
    symbols: str | None = None,
    library_size: str | None = None,
    duplicates: Duplicates = "error",
    non_integer: NonInteger = "error",
    n_unmasked: int | None = None,
    views: int = 1,
    seed: int = 0,
    temperature: float = 0.0,
    batch_size: int = 32,
    precision: Literal["auto", "bf16", "no"] = "no",
    dtype: Literal["float32", "float16"] = "float32",
    progress: Progress = ignore,
) -> np.ndarray:
    """Embed the samples of an AnnData object in memory; `embed_file` does the same for what is larger.

    Parameters
    ----------
    adata
        An `anndata.AnnData` (not imported here: a machine that only trains has none) with raw counts in X or `counts_layer`.
    layer
        Layer of the model: "final", or a number as of `TxFM.encode`.
    gene_ids, symbols
        Columns of var with Ensembl gene ids (default: the index) and symbols (used where a column has no such id).
    library_size
        Column of obs with the counts of the whole library, where `adata` holds a slice of the genes; else row sums.
    duplicates
        What to do with several columns of one gene: refuse, sum their counts, or keep the first.
    non_integer
        Refuse values that are not whole, which raw counts are; or take them ("ok"), as expected counts of RSEM or salmon.
    n_unmasked, views, seed, temperature, batch_size, precision
        As in `EncodeOptions`.
    dtype
        Of the result.
    progress
        Called in samples.

    Returns
    -------
    numpy.ndarray
        (n_obs, D), rows as in `adata`.

    Raises
    ------
    KeyError, ValueError
        If a named column does not exist, nothing matches, or values cannot be counts.
    """
    options = EncodeOptions(
        layer=parse_layer(layer), n_unmasked=n_unmasked, views=views, seed=seed, temperature=temperature, batch_size=batch_size,
        precision=precision,
    )  # fmt: skip
    check_options(model, options)
    part, panel = part_of_anndata(
        model, adata, counts_layer=counts_layer, gene_ids=gene_ids, symbols=symbols, library_size=library_size,
        duplicates=duplicates, non_integer=non_integer,
    )  # fmt: skip
    width = model.config.width
    found = over_samples(model, part, [panel], options, width, encoder_of(model, options), progress)
    return found.astype(dtype, copy=False)


def part_of_anndata(
    model: TxFM,
    adata: Any,
    *,
    counts_layer: str | None,
    gene_ids: str | None,
    symbols: str | None,
    library_size: str | None,
    duplicates: Duplicates,
    non_integer: NonInteger,
) -> tuple[Part, Panel]:
    """Samples of an AnnData object in memory as a part, with their panel; arguments as of `embed_anndata`."""
    import scipy.sparse as sp

    counts = sp.csr_matrix(adata.X if counts_layer is None else adata.layers[counts_layer])
    if non_integer == "error" and not (np.floor(counts.data) == counts.data).all():
        where = "X" if counts_layer is None else f"layer {counts_layer!r}"
        raise ValueError(
            f"adata: {where} holds values that are not whole, such as {counts.data[np.floor(counts.data) != counts.data][0]:g}; "
            f"give raw counts (counts_layer names their layer), or non_integer='ok' for expected counts"
        )
    ids = adata.var_names.astype(str) if gene_ids is None else adata.var[gene_ids].astype(str)
    names = [""] * adata.n_vars if symbols is None else adata.var[symbols].astype(str).tolist()
    match = match_columns(model.vocabulary, ids.tolist(), names, duplicates=duplicates, where="adata")
    sizes = counts.sum(axis=1, dtype=np.float64).A1 if library_size is None else adata.obs[library_size].to_numpy(float)
    moved = sp.csr_matrix((counts.data, match.column_of[counts.indices], counts.indptr), shape=counts.shape)
    return part_of_matrix(model, moved, match.token_ids, sizes)


def embed_samples(
    model: TxFM,
    counts: "csr_matrix | csr_array",
    token_ids: np.ndarray,
    library_size: np.ndarray,
    *,
    layer: Layer = "final",
    n_unmasked: int | None = None,
    views: int = 1,
    seed: int = 0,
    temperature: float = 0.0,
    batch_size: int = 32,
    precision: Literal["auto", "bf16", "no"] = "no",
    first_row: int = 0,
    progress: Progress = ignore,
) -> np.ndarray:
    """Embed the samples of a matrix of counts on the model's device.

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
    layer, n_unmasked, views, seed, temperature, batch_size, precision
        As in `EncodeOptions`.
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
    options = EncodeOptions(
        layer=parse_layer(layer), n_unmasked=n_unmasked, views=views, seed=seed, temperature=temperature, batch_size=batch_size,
        precision=precision,
    )  # fmt: skip
    check_options(model, options)
    part, panel = part_of_matrix(model, counts, token_ids, library_size, first_row)
    return over_samples(model, part, [panel], options, model.config.width, encoder_of(model, options), progress)


def encoder_of(model: TxFM, options: EncodeOptions) -> "Compute":
    """Return the function that gives the chosen layer of shown samples."""

    def encode(gene_ids_BK: Tensor, values_BK: Tensor, panel: Panel) -> np.ndarray:
        found: np.ndarray = model.encode(gene_ids_BK, values_BK, layer=options.layer).float().cpu().numpy()
        return found

    return encode


def embed_file(
    model: TxFM,
    source: str | Path,
    out: str | Path,
    *,
    embed_key: str = "X_txfm",
    options: EncodeOptions | None = None,
    files: FileOptions | None = None,
) -> dict[str, Any]:
    """Embed all samples of a file, store or shard corpus, in bounded memory, into an h5ad or Zarr file that is there whole or not.

    An h5ad file goes to a copy of itself with the embedding in obsm; all else to a new object with obs and obsm. With several
    processes each computes its parts and the first writes the result, which is the one that one process gives.

    Parameters
    ----------
    source
        An h5ad file, AnnData in Zarr, a store or a shard corpus.
    out
        Name that ends in .h5ad or .zarr; there must be nothing yet.
    embed_key
        Name in obsm.
    options, files
        How samples are shown, and how files are read and written.

    Returns
    -------
    dict
        out, obsm, n_obs, width and what else `run_file` returns; empty but for the first process.

    Raises
    ------
    FileExistsError, FileNotFoundError, ValueError, OSError
        With nothing left at `out` or beside it.
    """
    options, files = options or EncodeOptions(), files or FileOptions()
    if not embed_key or "/" in embed_key:
        raise ValueError(f"--embed-key must be a name without a slash, got {embed_key!r}")

    def write(opened: SampleInput, path: Path, matrix: "Matrix", about: dict[str, Any]) -> None:
        from txfm_data.anndata_out import copy_with, output_format, write_anndata

        uns = {f"txfm_{embed_key}": about}
        if opened.kind == "h5ad" and output_format(path) == "h5ad":
            copy_with(source, path, n_obs=opened.n_obs, matrices=[matrix], uns=uns)
        else:
            write_anndata(path, n_obs=opened.n_obs, obs=opened.obs(), var=None, matrices=[matrix], uns=uns)

    result = run_file(
        model, source, out, element=f"obsm/{embed_key}", width=model.config.width, compute=encoder_of(model, options),
        options=options, files=files, write=write,
    )  # fmt: skip
    return {**result, "obsm": embed_key} if result else {}
