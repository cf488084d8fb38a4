"""What both backends of the store offer to those who read it, and to an append."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from txfm_data.ragged import Ragged
from txfm_data.store.ledger import DatasetRecord, Values
from txfm_data.vocabulary import Vocabulary

__all__ = ["Backend", "Sink", "Store", "Tables", "Values"]


class Store(Protocol):
    """The committed part of a store, as it was when opened.

    Attributes
    ----------
    path : folder or address.
    backend : "soma" or "zarr".
    """

    path: str
    backend: str

    @property
    def values(self) -> Values | None:
        """Unit of all values, "counts" or "normalized"; None while there is no dataset."""
        ...

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of the values as stored: uint32, or float64 where they need not be whole."""
        ...

    @property
    def datasets(self) -> tuple[DatasetRecord, ...]:
        """Committed datasets, in the order they were appended."""
        ...

    @property
    def n_obs(self) -> int:
        """Committed samples."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """All genes of the store."""
        ...

    def dataset(self, name: str) -> DatasetRecord:
        """One dataset by name; ValueError if there is none."""
        ...

    def panel(self, record: DatasetRecord) -> np.ndarray:
        """Genes a dataset measured: ascending token ids, int64."""
        ...

    def gene_nnz(self, record: DatasetRecord) -> np.ndarray:
        """Per gene of the vocabulary, samples of the dataset in which it is not zero: (G,) int64."""
        ...

    def obs_schema(self) -> pa.Schema:
        """Columns of obs and their types."""
        ...

    def obs_parts(self, columns: Sequence[str] | None = None, value_filter: str | None = None) -> Iterator[pa.Table]:
        """The rows of `obs` in parts of bounded size, in no promised order."""
        ...

    def obs(self, columns: Sequence[str] | None = None, value_filter: str | None = None) -> pa.Table:
        """Rows of obs ascending by ``soma_joinid``, filtered in SOMA's language (``cell_type == 'B cell'``)."""
        ...

    def scan(self, start: int, stop: int, *, rows: int = 2_048) -> Iterator[tuple[int, Ragged]]:
        """Counts of rows [start, stop) as (first row, ragged samples), at most `rows` at a time."""
        ...

    def scan_genes(self, start: int, stop: int, *, rows: int = 2_048) -> Iterator[tuple[int, Ragged]]:
        """As `scan`, every count given as 1: for who asks which genes are above zero. Faster where counts lie apart."""
        ...

    def read_rows(self, sample_ids: np.ndarray) -> Ragged:
        """Counts of the samples of ascending ids, in that order."""
        ...


class Sink(Protocol):
    """Where blocks of an append go; can be sent to another process. Blocks may come in any order, once each."""

    def write(self, first_row: int, samples: Ragged) -> None:
        """Write samples as rows from `first_row` (of the store); gene ids are tokens of the store, ascending."""
        ...


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What a commit writes besides the counts.

    record : of the new dataset.  vocabulary : of the store with the new genes at its end.
    tokens : (P,) int64. Panel of the new dataset, ascending.  gene_nnz : (P,) int64, as `tokens`.
    obs_schema : union of the store's columns and the new ones.
    obs : rows of the new dataset in order, in pieces, with all columns of `obs_schema`.
    """

    record: DatasetRecord
    vocabulary: Vocabulary
    tokens: np.ndarray
    gene_nnz: np.ndarray
    obs_schema: pa.Schema
    obs: Iterable[pa.Table]


class Backend(Protocol):
    """How one backend makes, opens and extends a store in a folder that nobody else reads meanwhile.

    Stores and sinks that are handed back are its own, hence of any type here.
    """

    name: str

    def create(self, folder: str, dtype: np.dtype[np.generic]) -> None:
        """Make an empty store whose values are of `dtype` (uint32 or float64)."""
        ...

    def open(self, folder: str) -> Any:
        """Open what is there."""
        ...

    def sink(self, store: Any, start: int, stop: int, n_vars: int) -> Any:
        """Prepare for rows [start, stop) and genes up to `n_vars` of the whole store."""
        ...

    def commit(self, store: Any, sink: Any, tables: Tables) -> None:
        """Write everything else."""
        ...
