"""Matrices that come by genes, or in no order, turned into rows on disk in bounded memory."""

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from txfm_data.sources.protocol import CHUNK_BYTES, cut_rows

_N_BUCKETS = 64
_SORT_BYTES = 64
"""Memory that sorting takes for one value: the record, its key, its place and the copies in between."""
_MAX_ROWS, _MAX_COLUMNS = 2**32, 2**31 - 1
_DTYPES = ("float64", "int64", "uint32")

Repeats = Literal["error", "sum"]


class SpooledMatrix:
    """Samples x genes in a folder that `Spool.finish` wrote; rows are read from disk when asked for.

    folder : the folder. Another process opens the same matrix by ``SpooledMatrix(folder)``, which is also what a
    pickle of this object does; it stays valid until the spool that wrote it is closed.

    Attributes
    ----------
    shape : (n_obs, n_vars).
    dtype : of the values.
    indptr : (n_obs + 1,) int64. First value of each row.

    Raises
    ------
    FileNotFoundError
        If the folder holds no matrix, or the spool that wrote it has been closed.
    """

    def __init__(self, folder: str | Path, *, _spool: "Spool | None" = None) -> None:
        self.folder = Path(folder)
        self._spool = _spool  # the folder lives as long as the spool does
        try:
            header = json.loads((self.folder / "header.json").read_text())
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.folder}: no spooled matrix here; the source that made it was closed"
            ) from error
        self.shape: tuple[int, int] = (header["n_obs"], header["n_vars"])
        self.dtype = np.dtype(header["dtype"])
        self.indptr: np.ndarray = np.fromfile(self.folder / "indptr", np.int64)

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return int(self.indptr[-1])

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows [start, stop): columns sorted and unique in a row, zeros not stored.

        Raises
        ------
        IndexError
            If the rows are not within the matrix.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start} to {stop} of a spooled matrix with {self.shape[0]} rows")
        first, last = int(self.indptr[start]), int(self.indptr[stop])
        n = last - first
        columns = np.fromfile(self.folder / "indices", np.int32, n, offset=4 * first)
        values = np.fromfile(self.folder / "data", self.dtype, n, offset=self.dtype.itemsize * first)
        out = sp.csr_matrix(
            (values, columns, self.indptr[start : stop + 1] - first), shape=(stop - start, self.shape[1])
        )
        out.has_canonical_format = True
        return out

    def cuts(self, max_bytes: int = CHUNK_BYTES) -> list[tuple[int, int]]:
        """Consecutive row ranges of at most `max_bytes` each (one row at the least)."""
        return cut_rows(self.indptr, max_bytes)

    def close(self) -> None:
        """Remove the folder, if `Spool.finish` gave this object; a matrix opened by its folder leaves it alone."""
        if self._spool is not None:
            self._spool.close()

    def __reduce__(self) -> tuple[type["SpooledMatrix"], tuple[Path]]:
        return SpooledMatrix, (self.folder,)


class Spool:
    """Samples x genes built from (row, column, value) parts in any order, on disk, in bounded memory.

    Parts are cut into files by ranges of rows; `finish` sorts one file, or a piece of it, at a time. The disk holds
    16 bytes a value while parts come, and at most twice that for one file while it is sorted.

    Parameters
    ----------
    n_obs, n_vars
        Shape of the matrix.
    max_bytes
        Memory for one sort (one row at the least), besides 16 bytes a row.
    folder
        Where the temporary folder is made; by default where ``TMPDIR`` says.
    dtype
        "float64" (whole numbers are exact up to 2**53), "int64" or "uint32". A value it cannot hold exactly is refused.
    where
        Source of the parts, as messages name it.

    Raises
    ------
    ValueError
        If the shape, the memory or the dtype cannot be used.
    """

    def __init__(
        self,
        n_obs: int,
        n_vars: int,
        *,
        max_bytes: int = 256 * 1024**2,
        folder: str | Path | None = None,
        dtype: str = "float64",
        where: str = "matrix",
    ) -> None:
        if not (0 <= n_obs <= _MAX_ROWS and 0 <= n_vars <= _MAX_COLUMNS):
            raise ValueError(f"{where}: {n_obs} x {n_vars} is not a shape of at most {_MAX_ROWS} x {_MAX_COLUMNS}")
        if max_bytes < _SORT_BYTES:
            raise ValueError(f"{where}: max_bytes is {max_bytes}, expected at least {_SORT_BYTES} to sort one value")
        if dtype not in _DTYPES:
            raise ValueError(f"{where}: values cannot be spooled as {dtype!r}, choose one of {list(_DTYPES)}")
        self.shape = (n_obs, n_vars)
        self._where = where
        self._dtype = np.dtype(dtype)
        self._record = np.dtype([("row", "<u4"), ("column", "<u4"), ("value", self._dtype.newbyteorder("<"))])
        self._capacity = max_bytes // _SORT_BYTES
        self._buffer: np.ndarray = np.empty(self._capacity, self._record)
        self._buffered = 0
        self._bucket_rows = max(1, -(-n_obs // _N_BUCKETS))
        self._row_counts = np.zeros(n_obs, np.int64)
        self._state = "open"
        self.folder = Path(tempfile.mkdtemp(prefix="txfm-spool-", dir=folder))
        # Also at interpreter exit. A forked child inherits the finaliser, but not the right to remove the folder.
        self._remove = weakref.finalize(self, _remove_folder, self.folder, os.getpid())

    def add(self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
        """Take a part: (n,) integer rows and columns, (n,) values. Zeros are dropped, NaN is kept.

        Raises
        ------
        ValueError, TypeError
            If a row or column is outside the matrix or no integer, the lengths differ, or the dtype of the spool
            cannot hold a value. The spool is closed then.
        OSError
            If the disk is full; the spool is closed then.
        """
        self._check_open()
        try:
            rows = self._checked_index(rows, "row", self.shape[0])
            columns = self._checked_index(columns, "column", self.shape[1])
            values = np.asarray(values)
            if not len(rows) == len(columns) == len(values):
                raise ValueError(
                    f"{self._where}: {len(rows)} rows, {len(columns)} columns, {len(values)} values in one part"
                )
            for start in range(0, len(rows), self._capacity):  # the copies below stay within the memory of one sort
                piece = slice(start, start + self._capacity)
                self._add(rows[piece], columns[piece], values[piece])
        except BaseException as error:
            self._fail(error)
            raise

    def _add(self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
        values = self._exact(values)
        stored = values != 0  # true for NaN
        if not stored.all():
            rows, columns, values = rows[stored], columns[stored], values[stored]
        taken = 0
        while taken < len(rows):
            n = min(self._capacity - self._buffered, len(rows) - taken)
            into, of = slice(self._buffered, self._buffered + n), slice(taken, taken + n)
            self._buffer["row"][into], self._buffer["column"][into] = rows[of], columns[of]
            self._buffer["value"][into] = values[of]
            self._buffered, taken = self._buffered + n, taken + n
            if self._buffered == self._capacity:
                self._flush()

    def _checked_index(self, index: np.ndarray, what: str, size: int) -> np.ndarray:
        index = np.asarray(index)
        if index.ndim != 1 or (index.dtype.kind not in "iu" and len(index)):
            raise TypeError(f"{self._where}: {what}s must be one-dimensional integers, got {index.dtype} {index.shape}")
        if len(index) and not (0 <= int(index.min()) and int(index.max()) < size):
            bad = next(int(i) for i in (index.min(), index.max()) if not 0 <= i < size)
            raise ValueError(f"{self._where}: {what} {bad} is not one of the {size} {what}s (0 to {size - 1})")
        return index

    def _exact(self, values: np.ndarray) -> np.ndarray:
        """The values in the spool's dtype, refused where that changes one."""
        if values.dtype.kind not in "biuf":
            raise TypeError(f"{self._where}: values must be numbers, got {values.dtype}")
        if values.dtype == self._dtype:
            return values
        with np.errstate(invalid="ignore", over="ignore"):
            out = values.astype(self._dtype)
            back = out.astype(values.dtype)
        changed = (back != values) & ~((values != values) & (out != out))
        if self._dtype.kind != "f":
            changed |= (values < 0) != (out < 0)  # 2**63 wraps to a negative number and back
        if changed.any():
            value = values[int(np.argmax(changed))]
            raise ValueError(f"{self._where}: holds {value}, which {self._dtype} cannot hold exactly; repair the file")
        return out

    def _flush(self) -> None:
        records = self._buffer[: self._buffered]
        self._row_counts += np.bincount(records["row"], minlength=self.shape[0])
        _append_by(records, records["row"] // self._bucket_rows, self.folder, "bucket")
        self._buffered = 0

    def finish(self, duplicates: Repeats = "error") -> SpooledMatrix:
        """Sort everything and give the matrix; no more parts can be added.

        duplicates : what to do with several values for one row and column: refuse, or sum them.

        Raises
        ------
        ValueError
            On such duplicates, naming the first; on a sum that the dtype cannot hold. The spool is closed then.
        OSError
            If the disk is full; the spool is closed then.
        """
        self._check_open()
        if duplicates not in ("error", "sum"):
            raise ValueError(f"{self._where}: duplicates is {duplicates!r}, expected 'error' or 'sum'")
        try:
            self._flush()
            self._buffer = np.empty(0, self._record)
            self._write(duplicates)
        except BaseException as error:
            self._fail(error)
            raise
        self._state = "finished"
        return SpooledMatrix(self.folder, _spool=self)

    def _write(self, duplicates: Repeats) -> None:
        lengths = np.zeros(self.shape[0], np.int64)
        with open(self.folder / "indices", "wb") as indices, open(self.folder / "data", "wb") as data:
            for start, stop, file in self._sorted_pieces():
                columns, values, lengths[start:stop] = self._sorted(file, start, stop, duplicates)
                columns.tofile(indices)
                values.tofile(data)
                file.unlink(missing_ok=True)
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        indptr.tofile(self.folder / "indptr")
        header = {"n_obs": self.shape[0], "n_vars": self.shape[1], "dtype": self._dtype.name}
        (self.folder / "header.json").write_text(json.dumps(header))

    def _sorted_pieces(self) -> Iterator[tuple[int, int, Path]]:
        """Row ranges in order, each with a file of its values that is small enough to sort."""
        for bucket, low in enumerate(range(0, self.shape[0], self._bucket_rows)):
            high = min(low + self._bucket_rows, self.shape[0])
            file = self.folder / f"bucket{bucket}"
            before = np.concatenate([[0], np.cumsum(self._row_counts[low:high])])
            if before[-1] <= self._capacity:
                yield low, high, file
                continue
            cuts = cut_rows(before, 16 * self._capacity)
            piece_of_row = np.repeat(np.arange(len(cuts)), [stop - start for start, stop in cuts])
            with open(file, "rb") as handle:
                while len(records := np.fromfile(handle, self._record, self._capacity)):
                    _append_by(
                        records, piece_of_row[records["row"].astype(np.int64) - low], self.folder, f"piece{bucket}-"
                    )
            file.unlink()
            for piece, (start, stop) in enumerate(cuts):
                yield low + start, low + stop, self.folder / f"piece{bucket}-{piece}"

    def _sorted(
        self, file: Path, start: int, stop: int, duplicates: Repeats
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Columns, values and row lengths of one piece, rows in order, columns in order within a row."""
        records = np.fromfile(file, self._record) if file.exists() else np.empty(0, self._record)
        key = (records["row"].astype(np.int64) - start) * self.shape[1] + records["column"]
        order = np.argsort(key, kind="stable")
        key, values = key[order], records["value"][order]
        del records, order
        is_first = np.ones(len(key), bool)
        is_first[1:] = key[1:] != key[:-1]
        if not is_first.all():
            if duplicates == "error":
                row, column = divmod(int(key[int(np.argmin(is_first))]), self.shape[1])
                raise ValueError(
                    f"{self._where}: row {start + row} (from 0), column {column} occurs more than once; each sample and "
                    "gene must occur once: repair the file"
                )
            values = self._sums(values, np.flatnonzero(is_first))
            key = key[is_first]
        stored = values != 0
        if not stored.all():
            key, values = key[stored], values[stored]
        row, column = np.divmod(key, max(1, self.shape[1]))
        return column.astype(np.int32), values, np.bincount(row, minlength=stop - start)

    def _sums(self, values: np.ndarray, first: np.ndarray) -> np.ndarray:
        if self._dtype.kind == "f":
            return np.asarray(np.add.reduceat(values, first))
        # float64 tells an overflow of an int64 sum from a sum; near the limit it may refuse one that just fits
        limit = float(np.iinfo(self._dtype).max)
        if (np.abs(np.add.reduceat(values, first, dtype=np.float64)) >= limit).any():
            raise ValueError(
                f"{self._where}: a sum of duplicates passes {limit:.0f}, the limit of {self._dtype}; repair the file"
            )
        return np.asarray(np.add.reduceat(values, first, dtype=np.int64)).astype(self._dtype)

    def _check_open(self) -> None:
        if self._state != "open":
            raise ValueError(f"{self._where}: the spool is {self._state}; make another")

    def _fail(self, error: BaseException) -> None:
        """Leave nothing behind; say of a full disk what can be done."""
        self.close()
        if isinstance(error, OSError):
            error.add_note(f"Temporary files of {self._where} go to {self.folder.parent}; set TMPDIR to a larger disk.")

    def close(self) -> None:
        """Remove the temporary folder; a second call does nothing."""
        self._state = "closed"
        self._buffer = np.empty(0, self._record)
        self._remove()

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _append_by(records: np.ndarray, target: np.ndarray, folder: Path, prefix: str) -> None:
    """Append each record to the file of its target, in the order in which they came."""
    order = np.argsort(target, kind="stable")
    targets, first = np.unique(target[order], return_index=True)
    for number, piece in zip(targets, np.split(order, first[1:]), strict=True) if len(targets) else ():
        with open(folder / f"{prefix}{number}", "ab") as handle:
            records[piece].tofile(handle)


def _remove_folder(folder: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)
