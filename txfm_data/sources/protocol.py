"""What a source of counts offers: its genes, its samples' labels, and rows of the matrix in bounded memory."""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import pandas as pd
import scipy.sparse as sp

CHUNK_BYTES = 64 * 1024**2
"""Bytes of one part of a matrix in memory, unless the caller says otherwise."""
_BYTES_A_VALUE = 16
"""An index and a value, each of at most 8 bytes."""


class Source(Protocol):
    """One matrix of samples x genes, open for reading.

    Attributes
    ----------
    where : path or address as messages name it, without credentials.
    name : short name for the ledger: the file's or folder's.
    matrix_name : what within it, such as ``X`` or ``raw/X``.
    n_obs : samples.
    gene_ids, symbols : one per column; "" where the source has none.
    obs_columns : names of the sample labels that `obs` returns.
    matrix_hint : how to choose another matrix of the same source, naming the options; "" if there is no other.
    """

    where: str
    name: str
    matrix_name: str
    n_obs: int
    gene_ids: tuple[str, ...]
    symbols: tuple[str, ...]
    obs_columns: tuple[str, ...]
    matrix_hint: str

    def obs(self, start: int, stop: int) -> pd.DataFrame:
        """Labels of samples [start, stop); the index holds their names."""
        ...

    def cuts(self, max_bytes: int = CHUNK_BYTES) -> list[tuple[int, int]]:
        """Consecutive row ranges that cover the matrix, each at most about `max_bytes` (one row at the least)."""
        ...

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows [start, stop): column indices sorted and unique in a row, zeros not stored, values of the source's type."""
        ...

    def content_sha256(self) -> str:
        """Hash that two sources share only if they hold the same bytes (or the same selection of the same release)."""
        ...

    def gene_hint(self) -> str:
        """What to try when the gene ids do not match: columns that hold Ensembl ids, options that name them."""
        ...

    def opener(self) -> "Callable[[], Source]":
        """A function for another process that opens the same matrix, valid while this source is open."""
        ...

    def close(self) -> None:
        """Release files and temporary folders."""
        ...


def chunks(source: Source, max_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, sp.csr_matrix]]:
    """All rows of a source in order, as (first row, rows)."""
    for start, stop in source.cuts(max_bytes):
        yield start, source.read(start, stop)


def cut_rows(indptr: np.ndarray, max_bytes: int) -> list[tuple[int, int]]:
    """Row ranges of a CSR matrix of at most `max_bytes` each, from its index pointers."""
    cuts, start, n = [], 0, len(indptr) - 1
    while start < n:
        stop = int(np.searchsorted(indptr, indptr[start] + max_bytes // _BYTES_A_VALUE, side="right")) - 1
        stop = min(max(stop, start + 1), n)
        cuts.append((start, stop))
        start = stop
    return cuts


def tidy(rows: sp.spmatrix) -> sp.csr_matrix:
    """The same rows as CSR with sorted, unique columns and without stored zeros."""
    out = sp.csr_matrix(rows)
    out.sum_duplicates()
    out.eliminate_zeros()
    return out
