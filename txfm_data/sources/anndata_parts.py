"""What AnnData in HDF5 and in Zarr have in common: genes as var names them, rows of a matrix that may be stored by columns."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import scipy.sparse as sp

from txfm_data.sources.protocol import CHUNK_BYTES, tidy
from txfm_data.sources.spool import Spool, SpooledMatrix
from txfm_data.vocabulary import is_ensembl_gene

SYMBOL_COLUMNS = ("feature_name", "gene_symbol", "gene_symbols", "symbol", "gene_name")
"""Columns of var that are taken as symbols when none is named: the spellings of Census, 10x and scanpy."""


class StoredMatrix(Protocol):
    """A matrix on disk, by rows or by columns."""

    shape: tuple[int, int]
    dtype: np.dtype
    by_columns: bool

    def cuts(self, max_bytes: int) -> list[tuple[int, int]]:
        """Consecutive row ranges of at most about `max_bytes`; of one by rows."""
        ...

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows [start, stop) as stored; of one by rows."""
        ...

    def entries(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Row, column and value of `size` entries at a time; of one by columns."""
        ...


class MatrixRows:
    """Rows of a stored matrix; one by columns is turned into rows on disk when they are first asked for.

    where : matrix, as messages name it.  reading : context that words the errors of a read.
    spool_bytes : memory to turn a matrix in.  spooled : folder of one that another process has turned.
    """

    def __init__(
        self,
        matrix: StoredMatrix,
        where: str,
        reading: Callable[[], AbstractContextManager[None]],
        spool_bytes: int,
        spooled: str | Path | None,
    ) -> None:
        self._matrix, self._where, self._reading, self._spool_bytes = matrix, where, reading, spool_bytes
        self._turned: SpooledMatrix | None = None if spooled is None else SpooledMatrix(spooled)

    def cuts(self, max_bytes: int = CHUNK_BYTES) -> list[tuple[int, int]]:
        """Consecutive row ranges of at most about `max_bytes` each (one row at the least)."""
        return self._spooled().cuts(max_bytes) if self._matrix.by_columns else self._matrix.cuts(max_bytes)

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows [start, stop): columns sorted and unique in a row, zeros not stored, values of the stored dtype."""
        if self._matrix.by_columns:
            rows = self._spooled().read(start, stop)
            rows.data = rows.data.astype(self._matrix.dtype, copy=False)
            return rows
        with self._reading():
            return tidy(self._matrix.rows(start, stop))

    def folder(self) -> Path | None:
        """Folder of the rows of a matrix by columns, for `spooled` in another process; None for one by rows."""
        return self._spooled().folder if self._matrix.by_columns else None

    def close(self) -> None:
        """Remove what was written."""
        if self._turned is not None:
            self._turned.close()

    def _spooled(self) -> SpooledMatrix:
        if self._turned is None:
            dtype = "float64" if self._matrix.dtype.kind == "f" else "int64"
            spool = Spool(*self._matrix.shape, max_bytes=self._spool_bytes, dtype=dtype, where=self._where)
            try:
                for rows, columns, values in self._entries():
                    spool.add(rows, columns, values)
                self._turned = spool.finish(duplicates="sum")
            except BaseException:
                spool.close()
                raise
        return self._turned

    def _entries(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        with self._reading():  # not around the spool: a full disk is no fault of what is read
            yield from self._matrix.entries(self._spool_bytes // 64)


def genes_of(
    var: pd.DataFrame, gene_ids: str | None, symbols: str | None, where: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Gene id and symbol of each row of var, from the columns named, or the index and the first of `SYMBOL_COLUMNS`.

    Raises
    ------
    ValueError
        If var has no such column.
    """
    ids = tuple(_texts(var, gene_ids, where, "--gene-ids") if gene_ids else var.index.astype(str))
    chosen = symbols or next((column for column in SYMBOL_COLUMNS if column in var.columns), None)
    return ids, tuple(_texts(var, chosen, where, "--symbols")) if chosen else ("",) * len(var)


def columns_with_ensembl_ids(var: pd.DataFrame) -> dict[str, int]:
    """Columns of var (and "index") that hold Ensembl gene ids, with how many: what an error can suggest."""
    kinds = {column: var[column].dtype for column in var.columns}
    names = [c for c, kind in kinds.items() if isinstance(kind, pd.CategoricalDtype) or kind.kind in "OUST"]
    columns = {"index": var.index.astype(str).tolist()} | {c: _texts(var, c, "var", "") for c in names}
    found = {name: sum(map(is_ensembl_gene, values)) for name, values in columns.items()}
    return {name: n for name, n in found.items() if n}


def hint_of(var: pd.DataFrame) -> str:
    """Which columns of var hold Ensembl ids, as the end of a sentence that names the options."""
    found = columns_with_ensembl_ids(var)
    if not found:
        return "no column of var holds Ensembl ids"
    held = ", ".join(f"{name} ({n} of {len(var)})" for name, n in found.items())
    return f"columns of var that hold Ensembl ids: {held}; name the one to use with --gene-ids COLUMN"


def _texts(var: pd.DataFrame, name: str, where: str, option: str) -> list[str]:
    if name not in var.columns:
        raise ValueError(f"{where}: {option}: var has no column {name!r}; it has {sorted(var.columns)} and its index")
    column = var[name].astype(object)
    return ["" if missing else str(value) for value, missing in zip(column, column.isna(), strict=True)]
