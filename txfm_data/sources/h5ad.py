"""AnnData files: rows of X, of a layer or of raw, a bounded number of bytes at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem, sparse_dataset

from txfm_data.vocabulary import is_ensembl_gene

SYMBOL_COLUMNS = ("feature_name", "gene_symbol", "gene_symbols", "symbol", "gene_name")
"""Columns of var that are taken as symbols when none is named: the spellings of Census, 10x and scanpy."""
_CSC_LIMIT_BYTES = 2 * 1024**3


class H5adSource:
    """One matrix of an h5ad file, opened for reading.

    path : the file.  layer : name of a layer to read in place of X.  raw : read ``raw.X`` and its var.
    gene_ids, symbols : columns of var; by default the index, and the first of `SYMBOL_COLUMNS` that exists.

    Attributes
    ----------
    obs, var : pandas data frames as stored.
    gene_ids, symbols : tuples of str, one per column of the matrix.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file, the matrix or a named column does not exist, or the matrix cannot be read by rows.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        layer: str | None = None,
        raw: bool = False,
        gene_ids: str | None = None,
        symbols: str | None = None,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give the path of an h5ad file")
        if layer is not None and raw:
            raise ValueError(f"{path}: a layer and raw are both named; choose one of them")
        if not h5py.is_hdf5(self.path):
            raise ValueError(f"{path}: not an HDF5 file, so not an h5ad file; write it with AnnData.write_h5ad")
        self._file = h5py.File(self.path, "r")
        try:
            self._open(layer, raw, gene_ids, symbols)
        except BaseException:
            self._file.close()
            raise

    def _open(self, layer: str | None, raw: bool, gene_ids: str | None, symbols: str | None) -> None:
        for part in ("obs", "var"):
            if part not in self._file:
                raise ValueError(
                    f"{self.path}: has no {part}, so it is not an h5ad file; write it with AnnData.write_h5ad"
                )
        self.matrix_name = f"layers/{layer}" if layer is not None else "raw/X" if raw else "X"
        if self.matrix_name not in self._file:
            layers = sorted(self._file["layers"]) if "layers" in self._file else []
            has_raw = "raw/X" in self._file
            raise ValueError(
                f"{self.path}: has no {self.matrix_name}; it holds X: {'X' in self._file}, layers: {layers}, raw: {has_raw}"
            )
        self.obs: pd.DataFrame = read_elem(self._file["obs"])
        self.var: pd.DataFrame = read_elem(self._file["raw/var" if raw else "var"])
        self._matrix, self.n_obs, n_vars = _open_matrix(
            self._file[self.matrix_name], f"{self.path}: {self.matrix_name}"
        )
        if (self.n_obs, n_vars) != (len(self.obs), len(self.var)):
            raise ValueError(
                f"{self.path}: {self.matrix_name} is {self.n_obs} x {n_vars}, but obs has {len(self.obs)} rows and var "
                f"{len(self.var)}; the file is inconsistent"
            )
        self.gene_ids = tuple(self._var_column(gene_ids) if gene_ids else self.var.index.astype(str))
        chosen = symbols or next((c for c in SYMBOL_COLUMNS if c in self.var.columns), None)
        self.symbols = tuple(self._var_column(chosen)) if chosen else ("",) * n_vars

    def _var_column(self, name: str) -> list[str]:
        if name not in self.var.columns:
            raise ValueError(
                f"{self.path}: var has no column {name!r}; it has {sorted(self.var.columns)} and its index"
            )
        column = self.var[name].astype(object)
        return ["" if missing else str(value) for value, missing in zip(column, column.isna(), strict=True)]

    def obs_column(self, name: str, option: str) -> pd.Series:
        """One column of obs; `option` is what the user called it, for the error."""
        if name not in self.obs.columns:
            raise ValueError(f"{self.path}: {option} names {name!r}, but obs has columns {sorted(self.obs.columns)}")
        return self.obs[name]

    def columns_with_ensembl_ids(self) -> dict[str, int]:
        """Columns of var (and "index") that hold Ensembl gene ids, with how many: what an error can suggest."""
        columns = {"index": self.var.index.astype(str).tolist()}
        columns |= {c: self._var_column(c) for c in self.var.columns if self.var[c].dtype.kind in "OUST"}
        columns |= {
            c: self._var_column(c) for c in self.var.columns if isinstance(self.var[c].dtype, pd.CategoricalDtype)
        }
        found = {name: sum(map(is_ensembl_gene, values)) for name, values in columns.items()}
        return {name: n for name, n in found.items() if n}

    def chunks(self, max_bytes: int = 64 * 1024**2) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Rows in order as (first row, CSR), each at most about `max_bytes` (one row at the least).

        Column indices are sorted and unique within a row, zeros are not stored; values keep the file's dtype.
        """
        for start, stop in self._cuts(max_bytes):
            rows = self._matrix[start:stop]
            part = sp.csr_matrix(rows)
            part.sum_duplicates()
            part.eliminate_zeros()
            yield start, part

    def _cuts(self, max_bytes: int) -> Iterator[tuple[int, int]]:
        if isinstance(self._matrix, h5py.Dataset):
            row_bytes = max(1, self._matrix.shape[1] * self._matrix.dtype.itemsize)
            step = max(1, max_bytes // row_bytes)
            for start in range(0, self.n_obs, step):
                yield start, min(start + step, self.n_obs)
            return
        indptr = np.asarray(self._matrix.indptr if sp.issparse(self._matrix) else self._matrix.group["indptr"][:])
        per_value = 16  # an index and a value, each of at most 8 bytes
        start = 0
        while start < self.n_obs:
            stop = int(np.searchsorted(indptr, indptr[start] + max_bytes // per_value, side="right")) - 1
            stop = min(max(stop, start + 1), self.n_obs)
            yield start, stop
            start = stop

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "H5adSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_matrix(element: Any, where: str) -> tuple[Any, int, int]:
    """Something that can be sliced by rows, and its shape."""
    if isinstance(element, h5py.Dataset):
        if element.ndim != 2:
            raise ValueError(f"{where} has {element.ndim} dimensions, expected samples x genes")
        return element, *element.shape
    matrix = sparse_dataset(element)
    if matrix.format == "csr":
        return matrix, *matrix.shape
    size = sum(element[part].nbytes for part in ("data", "indices", "indptr"))
    if size > _CSC_LIMIT_BYTES:
        raise ValueError(
            f"{where} is stored by columns (CSC) and holds {size / 1e9:.1f} GB, too much to turn into rows in memory; "
            "save it as CSR: adata.X = adata.X.tocsr()"
        )
    return matrix.to_memory().tocsr(), *matrix.shape


def gene_columns(gene_ids: Sequence[str]) -> np.ndarray:
    """Which columns carry an Ensembl gene id, (n_vars,) bool."""
    return np.fromiter((is_ensembl_gene(g) for g in gene_ids), bool, len(gene_ids))
