"""AnnData files: rows of X, of a layer or of raw, a bounded number of bytes at a time."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from txfm_data.address import clear_errors, is_remote, join, open_binary, redact
from txfm_data.sources.anndata_parts import MatrixRows, columns_with_ensembl_ids, genes_of, hint_of
from txfm_data.sources.base import SPOOL_BYTES
from txfm_data.sources.h5ad_obs import StoredFrame
from txfm_data.sources.protocol import CHUNK_BYTES, Source, cut_rows

_HASH_BYTES = 4 * 1024**2


class H5adSource:
    """One matrix of an h5ad file, open for reading: a `Source`.

    A matrix stored by columns (CSC) is turned into rows in a temporary folder, in bounded memory, when the first
    row is read.

    Parameters
    ----------
    path
        The file, or an address such as ``s3://bucket/counts.h5ad``.
    layer, raw
        Name of a layer to read in place of X; or read ``raw.X`` and its var.
    gene_ids, symbols
        Columns of var; by default the index, and the first of `SYMBOL_COLUMNS` that exists.
    spool_bytes
        Memory for turning columns into rows.
    spooled
        Folder where the source that made this one's `opener` has done so already.

    Attributes
    ----------
    where, name, matrix_name, n_obs, gene_ids, symbols, obs_columns : as in `Source`.
    var : pandas data frame as stored.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file, the matrix or a named column does not exist, or the file is no h5ad file or damaged.
    PermissionError, ConnectionError
        If an address cannot be reached.
    """

    matrix_hint = "choose the matrix that holds counts with --layer or --raw"

    def __init__(
        self,
        path: str | Path,
        *,
        layer: str | None = None,
        raw: bool = False,
        gene_ids: str | None = None,
        symbols: str | None = None,
        spool_bytes: int = SPOOL_BYTES,
        spooled: str | Path | None = None,
    ) -> None:
        self._address = join(path)
        self._is_remote = is_remote(path)
        self.where = redact(self._address)
        self.name = self.where.partition("?")[0].rpartition("/")[2] if self._is_remote else Path(self._address).name
        if layer is not None and raw:
            raise ValueError(f"{self.where}: a layer and raw are both named; choose one of them")
        self._options = {
            "layer": layer,
            "raw": raw,
            "gene_ids": gene_ids,
            "symbols": symbols,
            "spool_bytes": spool_bytes,
        }
        self._spool_bytes, self._spooled = spool_bytes, spooled
        self._rows: MatrixRows | None = None
        self._handle: Any = None
        self._file: Any = None
        try:
            self._open_file()
            with self._reading("its structure"):
                self._open(layer, raw, gene_ids, symbols)
        except BaseException:
            self.close()
            raise

    def _open_file(self) -> None:
        if not self._is_remote and not Path(self._address).is_file():
            raise FileNotFoundError(f"{self.where}: no such file; give the path of an h5ad file")
        # HDF5 opens a file of this machine itself, which is faster than through Python
        target = self._handle = open_binary(self._address) if self._is_remote else None
        try:
            with clear_errors(self._address):
                self._file = h5py.File(target or self._address, "r")
        except (ConnectionError, PermissionError, FileNotFoundError):
            raise
        except OSError as error:
            if "signature not found" in str(error):
                raise ValueError(
                    f"{self.where}: not an HDF5 file, so not an h5ad file; write it with AnnData.write_h5ad"
                ) from None
            raise ValueError(
                f"{self.where}: cannot be opened as HDF5 ({redact(str(error))}); the file is truncated or damaged: copy it again"
            ) from None

    def _open(self, layer: str | None, raw: bool, gene_ids: str | None, symbols: str | None) -> None:
        for part in ("obs", "var"):
            if part not in self._file:
                raise ValueError(
                    f"{self.where}: has no {part}, so it is not an h5ad file; write it with AnnData.write_h5ad"
                )
        self.matrix_name = f"layers/{layer}" if layer is not None else "raw/X" if raw else "X"
        if self.matrix_name not in self._file:
            layers = sorted(self._file["layers"]) if "layers" in self._file else []
            raise ValueError(
                f"{self.where}: has no {self.matrix_name}; it holds X: {'X' in self._file}, layers: {layers}, "
                f"raw: {'raw/X' in self._file}; name another with --layer or --raw"
            )
        with self._reading("obs and var"):
            self._obs = StoredFrame(self._file["obs"], f"{self.where}: obs")
            var_name = "raw/var" if raw else "var"
            var = StoredFrame(self._file.get(var_name), f"{self.where}: {var_name}")
            self.var: pd.DataFrame = var.rows(0, var.n_rows)
        self.obs_columns = self._obs.columns
        with self._reading(self.matrix_name):
            self._matrix = _Matrix(self._file[self.matrix_name], f"{self.where}: {self.matrix_name}")
        self.n_obs, n_vars = self._matrix.shape
        if (self.n_obs, n_vars) != (self._obs.n_rows, len(self.var)):
            raise ValueError(
                f"{self.where}: {self.matrix_name} is {self.n_obs} x {n_vars}, but obs has {self._obs.n_rows} rows and var "
                f"{len(self.var)}; the file is inconsistent, write it again"
            )
        self.gene_ids, self.symbols = genes_of(self.var, gene_ids, symbols, self.where)
        where, part = f"{self.where}: {self.matrix_name}", self.matrix_name
        self._rows = MatrixRows(self._matrix, where, partial(self._reading, part), self._spool_bytes, self._spooled)

    def obs(self, start: int, stop: int) -> pd.DataFrame:
        """Rows [start, stop) of obs, read from the file; the index holds the samples' names.

        Raises
        ------
        IndexError
            If the rows are not within obs.
        ValueError
            If the file is damaged.
        """
        self._check_range(start, stop)
        with self._reading("obs"):
            return self._obs.rows(start, stop)

    def columns_with_ensembl_ids(self) -> dict[str, int]:
        """Columns of var (and "index") that hold Ensembl gene ids, with how many: what an error can suggest."""
        return columns_with_ensembl_ids(self.var)

    def gene_hint(self) -> str:
        """Which columns of var hold Ensembl ids, as the end of a sentence that names the options."""
        return hint_of(self.var)

    def cuts(self, max_bytes: int = CHUNK_BYTES) -> list[tuple[int, int]]:
        """Consecutive row ranges of at most about `max_bytes` each (one row at the least)."""
        return self._open_rows().cuts(max_bytes)

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows [start, stop): columns sorted and unique in a row, zeros not stored, values of the file's dtype.

        Raises
        ------
        IndexError
            If the rows are not within the matrix.
        ValueError
            If the file is damaged.
        """
        self._check_range(start, stop)
        return self._open_rows().read(start, stop)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.n_obs:
            raise IndexError(f"{self.where}: rows {start} to {stop} of {self.n_obs}")

    def _open_rows(self) -> MatrixRows:
        if self._rows is None:
            raise ValueError(f"{self.where}: it is not open")
        return self._rows

    @contextmanager
    def _reading(self, part: str) -> Iterator[None]:
        """HDF5 says what went wrong in its own terms; add the file, the part and the remedy."""
        try:
            with clear_errors(self._address):
                yield
        except (ConnectionError, PermissionError, FileNotFoundError):
            raise
        except (OSError, KeyError, TypeError, RuntimeError, ValueError) as error:
            said = redact(str(error))
            if said.startswith(f"{self.where}: "):
                raise
            raise ValueError(
                f"{self.where}: {part} cannot be read ({said}); the file is truncated or damaged: copy it or write it again"
            ) from None

    def content_sha256(self) -> str:
        """sha256 of the file's bytes."""
        digest = hashlib.sha256()
        with open_binary(self._address) as handle:
            while block := handle.read(_HASH_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def opener(self) -> Callable[[], Source]:
        """A function that opens the same matrix in another process; a matrix by columns is not turned again."""
        return partial(open_h5ad, self._address, spooled=self._open_rows().folder(), **self._options)

    def close(self) -> None:
        """Close the file and remove what was written for it; a second call does nothing."""
        if self._rows is not None:
            self._rows.close()
        for handle in (self._file, self._handle):
            if handle is not None:
                handle.close()

    def __enter__(self) -> "H5adSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_h5ad(path: str, **options: Any) -> H5adSource:
    """Open an h5ad file with the options of `H5adSource`; what its `opener` calls in another process."""
    return H5adSource(path, **options)


class _Matrix:
    """A dense, CSR or CSC matrix in HDF5, whose sizes have been checked against each other."""

    def __init__(self, element: Any, where: str) -> None:
        self._element, self._where = element, where
        self.by_columns = False
        self._indptr: np.ndarray | None = None
        if isinstance(element, h5py.Dataset):
            if element.ndim != 2:
                raise ValueError(f"{where} has {element.ndim} dimensions, expected samples x genes")
            self.shape: tuple[int, int] = element.shape
            stored = element.dtype
        else:
            stored = self._check_sparse(element)
        if stored.kind not in "biuf":
            raise ValueError(f"{where} holds {stored}, expected numbers; choose another matrix with --layer or --raw")
        # scipy computes neither with float16 nor with the other byte order
        self.dtype = np.dtype(np.float32) if stored == np.float16 else stored.newbyteorder("=")

    def _check_sparse(self, group: Any) -> np.dtype[Any]:
        kind = str(group.attrs.get("encoding-type", group.attrs.get("h5sparse_format", "")))
        kind = {"csr": "csr_matrix", "csc": "csc_matrix"}.get(kind, kind)
        arrays = {name: group.get(name) for name in ("indptr", "indices", "data")}
        if kind not in ("csr_matrix", "csc_matrix") or not all(
            isinstance(array, h5py.Dataset) and array.ndim == 1 for array in arrays.values()
        ):
            raise ValueError(
                f"{self._where} is stored as {kind or 'a group'!r}, expected csr_matrix, csc_matrix or a dense matrix; write "
                "it again with AnnData.write_h5ad, or choose another matrix with --layer or --raw"
            )
        shape = np.asarray(group.attrs.get("shape", group.attrs.get("h5sparse_shape", ())))
        if shape.shape != (2,) or shape.dtype.kind not in "iu" or (shape < 0).any():
            raise ValueError(
                f"{self._where} gives its shape as {shape.tolist()}, expected two sizes; write the file again"
            )
        self.shape = (int(shape[0]), int(shape[1]))
        self.by_columns = kind == "csc_matrix"
        n_major, lengths = self.shape[self.by_columns], {name: len(array) for name, array in arrays.items()}
        if lengths["indptr"] != n_major + 1 or lengths["indices"] != lengths["data"]:
            raise ValueError(
                f"{self._where} has shape {self.shape}, but indptr has {lengths['indptr']} entries (expected {n_major + 1}), "
                f"indices {lengths['indices']} and data {lengths['data']}; the file is inconsistent, write it again"
            )
        if arrays["indptr"].dtype.kind not in "iu" or arrays["indices"].dtype.kind not in "iu":
            raise ValueError(
                f"{self._where} has indices that are not integers; the file is inconsistent, write it again"
            )
        self._indptr = arrays["indptr"][:].astype(np.int64)
        if self._indptr[0] != 0 or self._indptr[-1] != lengths["data"] or (np.diff(self._indptr) < 0).any():
            raise ValueError(
                f"{self._where} has an indptr that does not rise from 0 to the {lengths['data']} values; the file is "
                "inconsistent, write it again"
            )
        dtype: np.dtype[Any] = arrays["data"].dtype
        return dtype

    def cuts(self, max_bytes: int) -> list[tuple[int, int]]:
        if self._indptr is not None:
            return cut_rows(self._indptr, max_bytes)
        n_obs, n_vars = self.shape
        row_bytes = max(1, n_vars * (self.dtype.itemsize + 16))  # dense and, at worst, as many values again as CSR
        step = max(1, max_bytes // row_bytes)
        if self._element.chunks and self._element.chunks[0] <= step:
            step -= step % self._element.chunks[0]  # HDF5 decompresses whole blocks: read each once
        return [(start, min(start + step, n_obs)) for start in range(0, n_obs, step)]

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        if self._indptr is None:
            return sp.csr_matrix(self._element[start:stop].astype(self.dtype, copy=False))
        indptr = self._indptr[start : stop + 1] - self._indptr[start]
        indices, values = self._values(int(self._indptr[start]), int(self._indptr[stop]))
        return sp.csr_matrix((values, indices, indptr), shape=(stop - start, self.shape[1]))

    def entries(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Rows, columns and values of a CSC matrix in the order of the file, `size` at a time."""
        indptr = self._indptr
        if indptr is None:
            return
        size = max(1, size)
        for start in range(0, int(indptr[-1]), size):
            stop = min(start + size, int(indptr[-1]))
            first = int(np.searchsorted(indptr, start, side="right")) - 1
            last = int(np.searchsorted(indptr, stop, side="left"))
            counts = np.diff(np.clip(indptr[first : last + 1], start, stop))
            rows, values = self._values(start, stop)
            yield rows, np.repeat(np.arange(first, last), counts), values

    def _values(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices along the other axis, within bounds, and values of a range of the stored entries."""
        indices, n = self._element["indices"][start:stop], self.shape[not self.by_columns]
        bad = [int(i) for i in (indices.min(), indices.max()) if not 0 <= i < n] if len(indices) else []
        if bad:
            what = "row" if self.by_columns else "column"
            raise ValueError(
                f"{self._where} names {what} {bad[0]}, expected 0 to {n - 1}; the file is damaged: copy it or write it again"
            )
        kind = np.int32 if n < 2**31 else np.int64
        return indices.astype(kind, copy=False), self._element["data"][start:stop].astype(self.dtype, copy=False)
