"""AnnData in Zarr (v2 or v3): rows of X, of a layer or of raw, a bounded number of bytes at a time."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from txfm_data.address import is_remote, local_path, redact
from txfm_data.sources.anndata_parts import MatrixRows, genes_of, hint_of
from txfm_data.sources.base import SPOOL_BYTES
from txfm_data.sources.protocol import CHUNK_BYTES, Source, cut_rows
from txfm_data.sources.zarr_frame import ZarrFrame

_MARKS = ("zarr.json", ".zgroup")


def is_zarr_group(path: str | Path) -> bool:
    """Whether a folder of this machine is a Zarr group of either version."""
    return any((Path(path) / mark).is_file() for mark in _MARKS)


class AnnDataZarrSource:
    """One matrix of an AnnData object that was written with ``write_zarr``, open for reading: a `Source`.

    A matrix stored by columns (CSC) is turned into rows in a temporary folder, in bounded memory, when the first
    row is read.

    Parameters
    ----------
    path
        The folder, on this machine.
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
        If the folder, the matrix or a named column does not exist, or the folder is no AnnData object or damaged.
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
        self.where = redact(str(path))
        if is_remote(path):
            raise ValueError(f"{self.where}: AnnData in Zarr is read from a local disk; copy it there")
        if layer is not None and raw:
            raise ValueError(f"{self.where}: a layer and raw are both named; choose one of them")
        self._folder = local_path(path)
        self.name = self._folder.name
        self._options = {
            "layer": layer,
            "raw": raw,
            "gene_ids": gene_ids,
            "symbols": symbols,
            "spool_bytes": spool_bytes,
        }
        self._spool_bytes, self._spooled = spool_bytes, spooled
        self._rows: MatrixRows | None = None
        if not self._folder.is_dir():
            raise FileNotFoundError(f"{self.where}: no such folder; give the path of what AnnData.write_zarr wrote")
        with self._reading("its structure"):
            self._open(layer, raw, gene_ids, symbols)

    def _open(self, layer: str | None, raw: bool, gene_ids: str | None, symbols: str | None) -> None:
        import zarr

        if not is_zarr_group(self._folder):
            raise ValueError(f"{self.where}: not a Zarr group, so no AnnData; write it with AnnData.write_zarr")
        root = zarr.open_group(self._folder, mode="r", use_consolidated=False)
        for part in ("obs", "var"):
            if part not in root:
                raise ValueError(f"{self.where}: has no {part}, so it is no AnnData; write it with AnnData.write_zarr")
        self.matrix_name = f"layers/{layer}" if layer is not None else "raw/X" if raw else "X"
        if self.matrix_name not in root:
            layers = (
                sorted(key.partition("/")[2] for key in root if key.startswith("layers/")) if "layers" in root else []
            )
            raise ValueError(
                f"{self.where}: has no {self.matrix_name}; it holds X: {'X' in root}, layers: {layers}, raw: {'raw/X' in root}; "
                "name another with --layer or --raw"
            )
        self._obs = ZarrFrame(root["obs"], f"{self.where}: obs")
        var_name = "raw/var" if raw else "var"
        var = ZarrFrame(root[var_name], f"{self.where}: {var_name}")
        self.var: pd.DataFrame = var.rows(0, var.n_rows)
        self.obs_columns = self._obs.columns
        self._matrix = _Matrix(root[self.matrix_name], f"{self.where}: {self.matrix_name}")
        self.n_obs, n_vars = self._matrix.shape
        if (self.n_obs, n_vars) != (self._obs.n_rows, len(self.var)):
            raise ValueError(
                f"{self.where}: {self.matrix_name} is {self.n_obs} x {n_vars}, but obs has {self._obs.n_rows} rows and var "
                f"{len(self.var)}; the folder is inconsistent, write it again"
            )
        self.gene_ids, self.symbols = genes_of(self.var, gene_ids, symbols, self.where)
        where, part = f"{self.where}: {self.matrix_name}", self.matrix_name
        self._rows = MatrixRows(self._matrix, where, partial(self._reading, part), self._spool_bytes, self._spooled)

    def obs(self, start: int, stop: int) -> pd.DataFrame:
        """Rows [start, stop) of obs; the index holds the samples' names.

        Raises
        ------
        IndexError
            If the rows are not within obs.
        ValueError
            If a file is damaged.
        """
        self._check_range(start, stop)
        with self._reading("obs"):
            return self._obs.rows(start, stop)

    def gene_hint(self) -> str:
        """Which columns of var hold Ensembl ids, as the end of a sentence that names the options."""
        return hint_of(self.var)

    def cuts(self, max_bytes: int = CHUNK_BYTES) -> list[tuple[int, int]]:
        """Consecutive row ranges of at most about `max_bytes` each (one row at the least)."""
        return self._open_rows().cuts(max_bytes)

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows [start, stop): columns sorted and unique in a row, zeros not stored, values of the stored dtype.

        Raises
        ------
        IndexError
            If the rows are not within the matrix.
        ValueError
            If a file is damaged.
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
        """Zarr says what went wrong in its own terms; add the folder, the part and the remedy."""
        try:
            yield
        except (OSError, KeyError, TypeError, RuntimeError, ValueError, IndexError) as error:
            said = redact(str(error))
            if said.startswith(f"{self.where}: "):
                raise
            raise ValueError(
                f"{self.where}: {part} cannot be read ({said}); a file is truncated or damaged: copy it or write it again"
            ) from error

    def content_sha256(self) -> str:
        """sha256 over names and bytes of all files, in the order of names."""
        digest = hashlib.sha256()
        for path in sorted(p for p in self._folder.rglob("*") if p.is_file()):
            digest.update(f"{path.relative_to(self._folder)}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(4 * 1024**2):
                    digest.update(block)
        return digest.hexdigest()

    def opener(self) -> Callable[[], Source]:
        """A function that opens the same matrix in another process; a matrix by columns is not turned again."""
        return partial(open_anndata_zarr, str(self._folder), spooled=self._open_rows().folder(), **self._options)

    def close(self) -> None:
        """Remove what was written for it; a second call does nothing."""
        if self._rows is not None:
            self._rows.close()

    def __enter__(self) -> "AnnDataZarrSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_anndata_zarr(path: str, **options: Any) -> AnnDataZarrSource:
    """Open AnnData in Zarr with the options of `AnnDataZarrSource`; what its `opener` calls in another process."""
    return AnnDataZarrSource(path, **options)


class _Matrix:
    """A dense, CSR or CSC matrix in Zarr, whose sizes have been checked against each other."""

    def __init__(self, element: Any, where: str) -> None:
        import zarr

        self._element, self._where = element, where
        self.by_columns = False
        self._indptr: np.ndarray | None = None
        if isinstance(element, zarr.Array):
            if element.ndim != 2:
                raise ValueError(f"{where} has {element.ndim} dimensions, expected samples x genes")
            self.shape: tuple[int, int] = (int(element.shape[0]), int(element.shape[1]))
            stored = element.dtype
        else:
            stored = self._check_sparse(element)
        if stored.kind not in "biuf":
            raise ValueError(f"{where} holds {stored}, expected numbers; choose another matrix with --layer or --raw")
        self.dtype = np.dtype(np.float32) if stored == np.float16 else stored.newbyteorder("=")

    def _check_sparse(self, group: Any) -> Any:
        kind = str(group.attrs.get("encoding-type", ""))
        arrays = {name: group.get(name) for name in ("indptr", "indices", "data")}
        if kind not in ("csr_matrix", "csc_matrix") or any(getattr(a, "ndim", 0) != 1 for a in arrays.values()):
            raise ValueError(
                f"{self._where} is stored as {kind or 'a group'!r}, expected csr_matrix, csc_matrix or a dense matrix; write "
                "it again with AnnData.write_zarr, or choose another matrix with --layer or --raw"
            )
        shape = [int(size) for size in group.attrs.get("shape", ())]
        if len(shape) != 2 or min(shape) < 0:
            raise ValueError(f"{self._where} gives its shape as {shape}, expected two sizes; write it again")
        self.shape = (shape[0], shape[1])
        self.by_columns = kind == "csc_matrix"
        n_major, lengths = self.shape[self.by_columns], {name: a.shape[0] for name, a in arrays.items()}
        if lengths["indptr"] != n_major + 1 or lengths["indices"] != lengths["data"]:
            raise ValueError(
                f"{self._where} has shape {self.shape}, but indptr has {lengths['indptr']} entries (expected {n_major + 1}), "
                f"indices {lengths['indices']} and data {lengths['data']}; it is inconsistent, write it again"
            )
        if arrays["indptr"].dtype.kind not in "iu" or arrays["indices"].dtype.kind not in "iu":
            raise ValueError(f"{self._where} has indices that are not integers; it is inconsistent, write it again")
        self._indptr = np.asarray(arrays["indptr"][:]).astype(np.int64)
        if self._indptr[0] != 0 or self._indptr[-1] != lengths["data"] or (np.diff(self._indptr) < 0).any():
            raise ValueError(
                f"{self._where} has an indptr that does not rise from 0 to the {lengths['data']} values; it is inconsistent, "
                "write it again"
            )
        return arrays["data"].dtype

    def cuts(self, max_bytes: int) -> list[tuple[int, int]]:
        if self._indptr is not None:
            return cut_rows(self._indptr, max_bytes)
        n_obs, n_vars = self.shape
        step = max(1, max_bytes // max(1, n_vars * (self.dtype.itemsize + 16)))  # at worst as much again as CSR
        if self._element.chunks[0] <= step:
            step -= step % self._element.chunks[0]  # each chunk is decoded once
        return [(start, min(start + step, n_obs)) for start in range(0, n_obs, step)]

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        if self._indptr is None:
            return sp.csr_matrix(np.asarray(self._element[start:stop]).astype(self.dtype, copy=False))
        indptr = self._indptr[start : stop + 1] - self._indptr[start]
        indices, values = self._values(int(self._indptr[start]), int(self._indptr[stop]))
        return sp.csr_matrix((values, indices, indptr), shape=(stop - start, self.shape[1]))

    def entries(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Rows, columns and values of a CSC matrix in the order of storage, `size` at a time."""
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
        indices, n = np.asarray(self._element["indices"][start:stop]), self.shape[not self.by_columns]
        bad = [int(i) for i in (indices.min(), indices.max()) if not 0 <= i < n] if len(indices) else []
        if bad:
            what = "row" if self.by_columns else "column"
            raise ValueError(
                f"{self._where} names {what} {bad[0]}, expected 0 to {n - 1}; it is damaged: copy it again"
            )
        values = np.asarray(self._element["data"][start:stop])
        kind = np.int32 if n < 2**31 else np.int64
        return indices.astype(kind, copy=False), values.astype(self.dtype, copy=False)
