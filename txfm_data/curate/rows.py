"""Chosen samples of a dataset, one row each: their labels, their library sizes, and the .npy file that embeddings go to."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from txfm_data import obs_filter
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.protocol import Store


def labels_of(
    store: Store, record: DatasetRecord, rows: np.ndarray, columns: Sequence[str]
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Labels of some samples of a dataset, in parts of bounded size and no promised order.

    rows : (n,) int64, ascending sample ids of the dataset.

    Yields
    ------
    positions : (m,) int64, ascending, into `rows`.  table : m rows with `columns` (and ``soma_joinid``).
    """
    for part in store.obs_parts(columns, obs_filter.equals("dataset_id", record.name).to_soma()):
        ids = part["soma_joinid"].to_numpy()
        at = positions_in(rows, ids)
        wanted = np.flatnonzero(at >= 0)
        wanted = wanted[np.argsort(at[wanted], kind="stable")]
        if len(wanted):
            yield at[wanted], part.take(pa.array(wanted))


def positions_in(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Where each id is among ascending `rows`: (len(ids),) int64, -1 where it is not."""
    if not len(rows):
        return np.full(len(ids), -1, np.int64)
    at = np.minimum(np.searchsorted(rows, ids), len(rows) - 1)
    return np.where(rows[at] == ids, at, -1).astype(np.int64)


def library_sizes(store: Store, record: DatasetRecord, rows: np.ndarray) -> np.ndarray:
    """Counts of each sample over all genes of its source, ``raw_sum`` of obs: (n,) float64, all above 0.

    Raises
    ------
    ValueError
        Names the first sample without one.
    """
    sizes = np.full(len(rows), np.nan)
    for at, table in labels_of(store, record, rows, ["raw_sum"]):
        sizes[at] = table["raw_sum"].to_numpy()
    bad = np.flatnonzero(~(np.isfinite(sizes) & (sizes > 0)))
    if len(bad):
        raise ValueError(
            f"{store.path}: dataset {record.name!r}: {len(bad)} sample(s) have no library size above 0, such as sample "
            f"{rows[bad[0]]} with raw_sum {sizes[bad[0]]}; leave them out by a rule before, such as filter with where: raw_sum > 0"
        )
    return sizes


class RowFile:
    """An .npy file of (n, d) float32, C order, written by plain file writes; it has its name once every row is there.

    where : what messages call the embedding.  rows : (n,) int64, the sample id of each row.
    """

    def __init__(self, path: Path, rows: np.ndarray, d: int, where: str) -> None:
        self._path, self._part = path, path.with_name(f".{path.name}.part")
        self._rows, self._d, self._where = rows, d, where
        self._is_there = np.zeros(len(rows), bool)
        self._file = self._part.open("wb+")
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype("<f4")),
            "fortran_order": False,
            "shape": (len(rows), d),
        }
        np.lib.format.write_array_header_1_0(self._file, header)
        self._start = self._file.tell()

    def put(self, positions: np.ndarray, values: np.ndarray) -> None:
        """Write some rows, a run of neighbours at a time.

        positions : (m,) int64, ascending.  values : (m, d) floats; none may be NaN or infinite.

        Raises
        ------
        ValueError
            Names the first sample with a value that is not finite, or given before.
        """
        values = np.ascontiguousarray(values, "<f4")
        if values.shape != (len(positions), self._d):
            raise ValueError(f"{self._where}: expected {(len(positions), self._d)} values, got {values.shape}")
        bad = ~np.isfinite(values)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise ValueError(
                f"{self._where}: the embedding of sample {self._rows[positions[row]]} is {values[row, column]} in column "
                f"{column}, expected finite numbers; leave the sample out by a rule before, or embed it again"
            )
        if len(positions) and (self._is_there[positions].any() or (np.diff(positions) <= 0).any()):
            twice = positions[self._is_there[positions]] if self._is_there[positions].any() else positions
            raise ValueError(f"{self._where}: sample {self._rows[twice[0]]} has several rows; it must have one")
        for run in np.split(np.arange(len(positions)), np.flatnonzero(np.diff(positions) != 1) + 1):
            if len(run):
                self._file.seek(self._start + int(positions[run[0]]) * self._d * 4)
                self._file.write(values[run[0] : run[-1] + 1].data)
        self._is_there[positions] = True

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the file its name if all went well and all rows are there; else remove it."""
        self._file.close()
        try:
            if kind is None:
                missing = np.flatnonzero(~self._is_there)
                if len(missing):
                    raise ValueError(
                        f"{self._where}: {len(missing):,} of {len(self._rows):,} samples have no embedding, such as sample "
                        f"{self._rows[missing[0]]}; embed the samples that the rule looks at"
                    )
                os.replace(self._part, self._path)
        finally:
            self._part.unlink(missing_ok=True)
