"""Reading a SOMA store: vocabulary, panels, obs, and rows of counts in bounded memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tiledbsoma as soma

from txfm_data import kernels
from txfm_data.address import clear_errors, explain, is_remote, local_path, redact
from txfm_data.ragged import Ragged
from txfm_data.store import files, layout, ledger, objects
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.protocol import Values
from txfm_data.vocabulary import Vocabulary

_SMALL_PART = 1_024
"""Rows of a part of a scan that count as few."""
_SPREAD = 8
"""Rows are read as one run while a run holds at least one wanted row in so many."""
_TRIES = 5
"""How often an array is opened while appends take the store's place."""


class SomaStore:
    """The committed part of a store, as it was when opened (`txfm_data.store.protocol.Store`).

    Reading raises ValueError if a part of the store is damaged, and OSError if object storage does not answer.

    check : compare the store's files with its list first; only an append, which has just done so, leaves it out.

    Attributes
    ----------
    n_listed : datasets whose files were compared; fewer than there are where an append was killed on object storage.

    Raises
    ------
    FileNotFoundError
        If there is nothing at `path`.
    PermissionError, ConnectionError
        If object storage cannot be reached with the keys there are.
    ValueError
        If what is there is not a TxFM store, of a version this code does not read, or has lost or cut files.
    """

    backend = "soma"

    def __init__(self, path: str | Path, *, check: bool = True) -> None:
        if is_remote(path):
            self._open_remote(objects.plain_address(path), check)
            return
        self.uri = self.path = str(local_path(path))
        if not Path(self.uri).exists():
            raise FileNotFoundError(
                f"{self.path}: no store there; make one with: txfm ingest KIND … --store {self.path}"
            )
        self._stamp = files.stamp(self.uri)
        if check and self._stamp is not None:
            files.check_list(Path(self.uri))  # first: it names the file without which nothing can be opened
        self._check_format()
        if check and self._stamp is None:
            files.check_list(Path(self.uri))
        self.ledger = ledger.read(self.uri)
        self.n_listed = len(self.datasets)

    def _open_remote(self, uri: str, check: bool) -> None:
        self.uri, self.path = uri, redact(uri)
        self._stamp = None
        if check:
            objects.check_finished(uri)
        with clear_errors(uri):
            self._check_format()
            listed = objects.check_list(uri) if check else None
            self.ledger = ledger.read(uri)
            if listed is not None and listed < len(self.datasets):  # an append may just be writing the list
                listed = objects.check_list(uri)
        self.n_listed = len(self.datasets) if listed is None else min(listed, len(self.datasets))

    def _check_format(self) -> None:
        try:
            with layout.open_element(self.uri) as top:
                found, version = top.metadata.get("txfm_format"), top.metadata.get("txfm_version")
        except (soma.SOMAError, TypeError) as error:
            if (clear := explain(error, self.uri)) is not None:
                raise clear from None
            raise ValueError(
                f"{self.path}: not a TxFM store (no SOMA collection can be opened there); name another path"
            ) from error
        if found != layout.FORMAT:
            raise ValueError(
                f"{self.path}: a SOMA collection, but not a TxFM store (format {found!r}, expected {layout.FORMAT!r})"
            )
        if version != layout.VERSION:
            raise ValueError(
                f"{self.path}: store format version {version}, this release reads {layout.VERSION}; upgrade txfm"
            )

    @contextmanager
    def _element(self, name: str, *, keeps_memory: bool = False) -> Iterator[Any]:
        """Open one array or data frame for reading, all of it from one state of the store.

        TileDB looks for an array's files when it is opened. Between the folders of two states it would miss some.
        """
        if is_remote(self.uri):
            with layout.reading(f"{self.uri}/{name}", keeps_memory=keeps_memory) as element:
                yield element
            return
        for _ in range(_TRIES):
            before, is_open = files.stamp(self.uri), False
            try:
                with layout.reading(f"{self.uri}/{name}", keeps_memory=keeps_memory) as element:
                    is_open = files.stamp(self.uri) == before
                    if is_open:
                        yield element
                        return
            except (ValueError, OSError) as error:
                if not is_open and files.replaced(self.uri, before):
                    continue
                if files.replaced(self.uri, self._stamp):
                    raise files.replaced_error(self.path) from error
                raise
        raise files.replaced_error(self.path)

    @property
    def datasets(self) -> tuple[DatasetRecord, ...]:
        """Committed datasets, in the order they were appended."""
        return self.ledger.committed

    @property
    def n_obs(self) -> int:
        """Committed samples."""
        return self.ledger.n_obs

    @property
    def values(self) -> Values | None:
        """Unit of all values; None while there is no dataset."""
        return self.datasets[0].values if self.datasets else None

    @cached_property
    def dtype(self) -> np.dtype[np.generic]:
        """Of the values as stored: uint32, or float64 where they need not be whole."""
        with self._element(layout.RAW) as matrix:
            kind: np.dtype[np.generic] = np.dtype(matrix.schema.field("soma_data").type.to_pandas_dtype())
        return kind

    def dataset(self, name: str) -> DatasetRecord:
        """One dataset by name."""
        for record in self.datasets:
            if record.name == name:
                return record
        raise ValueError(f"{self.path}: has no dataset {name!r}; it has {[d.name for d in self.datasets]}")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """All genes of the store; a gene's row number is its ``var.soma_joinid``."""
        if not self.ledger.n_vars:
            return Vocabulary((), ())
        with self._element(layout.VAR) as frame:
            rows = frame.read(
                (slice(0, self.ledger.n_vars - 1),),
                column_names=["soma_joinid", "feature_id", "feature_name"],
            )
            table = rows.concat().sort_by("soma_joinid")
        return Vocabulary(tuple(table["feature_id"].to_pylist()), tuple(table["feature_name"].to_pylist()))

    def panel(self, record: DatasetRecord) -> np.ndarray:
        """Genes a dataset measured: ascending token ids, int64."""
        return self._matrix_row(layout.PRESENCE, record.dataset_index)[0]

    def gene_nnz(self, record: DatasetRecord) -> np.ndarray:
        """Per gene of the vocabulary, samples of the dataset in which it is above zero: (G,) int64."""
        genes, numbers = self._matrix_row(layout.GENE_NNZ, record.dataset_index)
        out = np.zeros(len(self.vocabulary), np.int64)
        out[genes] = numbers
        return out

    def _matrix_row(self, name: str, row: int) -> tuple[np.ndarray, np.ndarray]:
        with self._element(name) as matrix:
            table = matrix.read((row,), result_order="row-major").tables().concat()
        return table["soma_dim_1"].to_numpy(), table["soma_data"].to_numpy()

    def obs_schema(self) -> pa.Schema:
        """Columns of obs and their types."""
        with self._element(layout.OBS) as frame:
            return layout.plain_schema(frame.schema)

    def obs(self, columns: Sequence[str] | None = None, value_filter: str | None = None) -> pa.Table:
        """Rows of obs, ascending by ``soma_joinid``, with a filter in SOMA's language (``cell_type == 'B cell'``)."""
        return pa.concat_tables(self.obs_parts(columns, value_filter)).unify_dictionaries().sort_by("soma_joinid")

    def obs_parts(self, columns: Sequence[str] | None = None, value_filter: str | None = None) -> Iterator[pa.Table]:
        """The rows of `obs` in parts of bounded size, in no promised order."""
        names = None if columns is None else list(dict.fromkeys(["soma_joinid", *columns]))
        with self._element(layout.OBS) as frame:
            empty = layout.plain_schema(frame.schema).empty_table()
            missing = [name for name in names or () if name not in empty.column_names]
            if missing:
                raise ValueError(f"{self.path}: obs has no columns {missing}; it has {empty.column_names}")
            yield empty if names is None else empty.select(names)
            if not self.n_obs:
                return
            for part in self._filtered(frame, names, value_filter):
                # TileDB adds the columns that the filter names
                yield layout.plain(part if names is None else part.select(names))

    def _filtered(self, frame: Any, names: list[str] | None, value_filter: str | None) -> Any:
        try:
            return frame.read((slice(0, self.n_obs - 1),), column_names=names, value_filter=value_filter)
        except soma.SOMAError as error:
            if value_filter is None:
                raise
            why = str(error).splitlines()[0]
            raise ValueError(
                f"{self.path}: obs cannot be filtered by {value_filter!r} ({why}); write for example: "
                "cell_type == 'T cell' and raw_sum >= 500"
            ) from error

    def scan(self, start: int, stop: int, *, rows: int = 2_048) -> Iterator[tuple[int, Ragged]]:
        """Counts of rows [start, stop) as (first row, ragged samples), at most `rows` at a time.

        Runs of consecutive rows read with small buffers stay within a few hundred MiB; gathers of scattered rows
        would be hundreds of times slower. Parts of at most 1,024 rows are read with less CPU time (`layout.context`).
        """
        if not 0 <= start <= stop <= self.n_obs:
            raise ValueError(f"{self.path}: rows {start} to {stop} asked for, but the store has {self.n_obs}")
        with self._element(layout.RAW, keeps_memory=rows <= _SMALL_PART) as matrix:
            for low in range(start, stop, rows):
                high = min(low + rows, stop)
                table = matrix.read((slice(low, high - 1),)).tables().concat()
                yield low, _ragged(table, np.arange(low, high))

    def scan_genes(self, start: int, stop: int, *, rows: int = 2_048) -> Iterator[tuple[int, Ragged]]:
        """As `scan`, every count given as 1. They are read all the same: tiledbsoma offers no way to leave them out."""
        for low, samples in self.scan(start, stop, rows=rows):
            yield low, Ragged(samples.indptr, samples.gene_ids, np.broadcast_to(self.dtype.type(1), samples.nnz))

    def read_rows(self, sample_ids: np.ndarray, *, rows: int = 2_048) -> Ragged:
        """Counts of the samples of strictly ascending ids."""
        ids = np.asarray(sample_ids, np.int64)
        if len(ids) and (ids[0] < 0 or ids[-1] >= self.n_obs or (np.diff(ids) <= 0).any()):
            raise ValueError(f"{self.path}: sample ids must ascend strictly within 0 to {self.n_obs - 1}")
        empty = pa.table({"soma_dim_0": ids[:0], "soma_dim_1": ids[:0], "soma_data": np.empty(0, self.dtype)})
        parts: list[pa.Table] = []
        with self._element(layout.RAW) as matrix:
            for low in range(0, len(ids), rows):
                wanted = ids[low : low + rows]
                is_run = wanted[-1] - wanted[0] < _SPREAD * len(wanted)
                where = slice(int(wanted[0]), int(wanted[-1])) if is_run else pa.array(wanted)
                for table in matrix.read((where,)).tables():
                    parts.append(table.filter(pa.array(np.isin(table["soma_dim_0"].to_numpy(), wanted))))
        return _ragged(pa.concat_tables(parts) if parts else empty, ids)


def _ragged(table: pa.Table, rows: np.ndarray) -> Ragged:
    """Cells of X as ragged samples, one for each of the ascending `rows`."""
    samples, genes = table["soma_dim_0"].to_numpy(), table["soma_dim_1"].to_numpy()
    counts = table["soma_data"].to_numpy()
    indptr, out = np.empty(len(rows) + 1, np.int64), np.empty(len(genes), np.uint16)
    # Cells come in the order of tiles, which is that of rows unless two writes met within a tile.
    if not kernels.split_cells(samples, genes, rows, indptr, out):
        order = np.lexsort((genes, samples))
        counts = counts[order]
        if not kernels.split_cells(samples[order], genes[order], rows, indptr, out):
            raise ValueError("a gene of a sample is stored twice; the store is damaged: restore it from a copy")
    return Ragged(indptr, out, counts)
