"""Reading a SOMA store: vocabulary, panels, obs, and rows of counts in bounded memory."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import tiledbsoma as soma

from txfm_data.ragged import Ragged
from txfm_data.store import layout, ledger
from txfm_data.store.ledger import DatasetRecord
from txfm_data.vocabulary import Vocabulary


class SomaStore:
    """The committed part of a store, as it was when opened.

    Raises
    ------
    FileNotFoundError
        If there is nothing at `path`.
    ValueError
        If what is there is not a TxFM store, or of a version this code does not read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.uri = str(self.path)
        if not self.path.exists():
            raise FileNotFoundError(f"{path}: no store there; make one with: txfm ingest h5ad FILE --store {path} …")
        try:
            with layout.open_element(self.uri) as top:
                found, version = top.metadata.get("txfm_format"), top.metadata.get("txfm_version")
        except (soma.SOMAError, soma.DoesNotExistError, TypeError) as error:
            raise ValueError(
                f"{path}: not a TxFM store (no SOMA collection can be opened there); name another path"
            ) from error
        if found != layout.FORMAT:
            raise ValueError(
                f"{path}: a SOMA collection, but not a TxFM store (format {found!r}, expected {layout.FORMAT!r})"
            )
        if version != layout.VERSION:
            raise ValueError(
                f"{path}: store format version {version}, this release reads {layout.VERSION}; upgrade txfm"
            )
        self.ledger = ledger.read(self.uri)

    @property
    def datasets(self) -> tuple[DatasetRecord, ...]:
        """Committed datasets, in the order they were appended."""
        return self.ledger.committed

    @property
    def n_obs(self) -> int:
        """Committed samples."""
        return self.ledger.n_obs

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
        with layout.open_element(f"{self.uri}/{layout.VAR}") as frame:
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
        with layout.open_element(f"{self.uri}/{name}") as matrix:
            table = matrix.read((row,), result_order="row-major").tables().concat()
        return table["soma_dim_1"].to_numpy(), table["soma_data"].to_numpy()

    def obs(self, columns: Sequence[str] | None = None, value_filter: str | None = None) -> pa.Table:
        """Rows of obs, ascending by ``soma_joinid``, with a filter in SOMA's language (``cell_type == 'B cell'``)."""
        names = None if columns is None else list(dict.fromkeys(["soma_joinid", *columns]))
        if not self.n_obs:
            empty = layout.OBS_SCHEMA.empty_table()
            return empty if names is None else empty.select(names)
        with layout.open_element(f"{self.uri}/{layout.OBS}") as frame:
            rows = frame.read((slice(0, self.n_obs - 1),), column_names=names, value_filter=value_filter)
            return rows.concat().sort_by("soma_joinid")

    def scan(self, start: int, stop: int, *, rows: int = 2_048) -> Iterator[tuple[int, Ragged]]:
        """Counts of rows [start, stop) as (first row, ragged samples), at most `rows` at a time.

        Runs of consecutive rows read with small buffers stay within a few hundred MiB; gathers of scattered rows
        would be hundreds of times slower.
        """
        if not 0 <= start <= stop <= self.n_obs:
            raise ValueError(f"{self.path}: rows {start} to {stop} asked for, but the store has {self.n_obs}")
        with layout.open_element(f"{self.uri}/{layout.RAW}") as matrix:
            for low in range(start, stop, rows):
                high = min(low + rows, stop)
                table = matrix.read((slice(low, high - 1),), result_order="row-major").tables().concat()
                samples = table["soma_dim_0"].to_numpy()
                indptr = np.searchsorted(samples, np.arange(low, high + 1)).astype(np.int64)
                gene_ids = table["soma_dim_1"].to_numpy().astype(np.uint16)
                yield low, Ragged(indptr, gene_ids, table["soma_data"].to_numpy())
