"""The Zarr store: AnnData's CSR layout in sharded, checksummed Zarr v3 (docs/format_store_zarr.md)."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from txfm_data import obs_filter
from txfm_data.address import is_remote, local_path, redact
from txfm_data.ragged import Ragged, concatenate
from txfm_data.store import files
from txfm_data.store import zarr_layout as layout
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.protocol import Sink, Store, Tables, Values
from txfm_data.store.zarr_arrays import Appender, Reader, read_part
from txfm_data.store.zarr_blocks import ZarrSink
from txfm_data.store.zarr_obs import Column, append_obs
from txfm_data.vocabulary import Vocabulary

_AHEAD = 16 * layout.CHUNK
"""Values that a scan decodes at once: a few MiB, enough for the codec's threads."""

_Readers = tuple[Reader, Reader, Reader | None]
"""Of indptr, gene ids and counts; counts are 1 where they are not read."""


class ZarrStore:
    """The committed part of a store, as it was when opened (`txfm_data.store.protocol.Store`).

    Reading raises ValueError if a part of the store is damaged, or an append has replaced what was asked for.

    check : compare the store's files with its list first; only an append, which has just done so, leaves it out.

    Raises
    ------
    FileNotFoundError
        If there is nothing at `folder`.
    ValueError
        If what is there is not a TxFM store, of a version this code does not read, or damaged; or if `folder` is an
        address on object storage.
    """

    backend = "zarr"

    def __init__(self, folder: str | Path, *, check: bool = True) -> None:
        if is_remote(folder):
            raise ValueError(
                f"{redact(str(folder))}: a Zarr store is read from a local disk; copy it there, or keep a SOMA store there"
            )
        self.path = str(local_path(folder))
        self._stamp = files.stamp(self.path)
        if check and self._stamp is not None:
            files.check_list(Path(self.path))  # first: it names the file without which nothing can be opened
        attributes = layout.unseal(self.path)
        if check and self._stamp is None:
            files.check_list(Path(self.path))
        try:
            self._records = tuple(DatasetRecord(**detail) for detail in attributes["txfm_datasets"])
            self.dtype: np.dtype[np.generic] = np.dtype(attributes["txfm_dtype"])
        except (KeyError, TypeError, ValueError) as error:
            raise layout.damaged(self.path, "zarr.json", f"the list of datasets cannot be read ({error})") from error
        self._created_on = str(attributes.get("created_on", ""))
        self._check_records()
        self.values: Values | None = None
        if self._records:
            self.values = "counts" if self._records[0].values == "counts" else "normalized"
        self._root = layout.open_root(self.path)
        self._check_shapes()

    def _check_records(self) -> None:
        row = genes = 0
        for number, record in enumerate(self._records):
            is_next = record.dataset_index == number and record.obs_start == row <= record.obs_stop
            if not is_next or not genes <= record.n_vars <= layout.GENES or not 0 <= record.n_panel <= record.n_vars:
                raise layout.damaged(self.path, "zarr.json", f"dataset {record.name!r} does not follow those before it")
            row, genes = record.obs_stop, record.n_vars
        if self.dtype not in layout.VALUE_DTYPES:
            raise layout.damaged(self.path, "zarr.json", f"values of {self.dtype}")

    def _check_shapes(self) -> None:
        nnz, genes, n_datasets = sum(r.nnz for r in self._records), self._n_vars, len(self._records)
        self._indptr = layout.get_array(self._root, layout.INDPTR, shape=(self.n_obs + 1,), kind="i")
        self._indices = layout.get_array(self._root, layout.INDICES, shape=(nnz,), kind="i")
        self._data = layout.get_array(self._root, layout.DATA, shape=(nnz,), kind=self.dtype.kind)
        if self._data.dtype != self.dtype:
            raise layout.damaged(self.path, layout.DATA, f"holds {self._data.dtype}, expected {self.dtype}")
        layout.get_array(self._root, layout.OBS_INDEX, shape=(self.n_obs,))
        self._measured = layout.get_array(self._root, layout.MEASURED, shape=(genes, n_datasets), kind="b")
        self._gene_nnz = layout.get_array(self._root, layout.NNZ, shape=(genes, n_datasets), kind="i")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """What seems damaged is none of that if an append has replaced the store since it was opened.

        It leaves most files as they are; those that it writes whole (var, the categories of a label) this store cannot read.
        """
        try:
            yield
        except (ValueError, OSError) as error:
            if files.replaced(self.path, self._stamp):
                raise files.replaced_error(self.path) from error
            raise

    @property
    def datasets(self) -> tuple[DatasetRecord, ...]:
        """Committed datasets, in the order they were appended."""
        return self._records

    @property
    def n_obs(self) -> int:
        """Committed samples."""
        return self._records[-1].obs_stop if self._records else 0

    @property
    def _n_vars(self) -> int:
        return self._records[-1].n_vars if self._records else 0

    def dataset(self, name: str) -> DatasetRecord:
        """One dataset by name; ValueError if there is none."""
        for record in self._records:
            if record.name == name:
                return record
        raise ValueError(f"{self.path}: has no dataset {name!r}; it has {[d.name for d in self._records]}")

    def _var(self, name: str, kind: str) -> np.ndarray:
        with self._reading():
            array = layout.get_array(self._root, f"{layout.VAR}/{name}", shape=(self._n_vars,), kind=kind)
            return read_part(array, (slice(0, self._n_vars),))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """All genes of the store; a gene's row number in var is its token id."""
        return Vocabulary(tuple(self._var("feature_id", "T").tolist()), tuple(self._var("feature_name", "T").tolist()))

    def _of_dataset(self, array: Any, record: DatasetRecord) -> np.ndarray:
        at = record.dataset_index
        if not 0 <= at < len(self._records):
            raise ValueError(f"{self.path}: dataset {record.name!r} is number {at}, the store has {len(self._records)}")
        with self._reading():
            return read_part(array, (slice(0, self._n_vars), slice(at, at + 1)))[:, 0]

    def panel(self, record: DatasetRecord) -> np.ndarray:
        """Genes a dataset measured: ascending token ids, int64."""
        panel: np.ndarray = np.flatnonzero(self._of_dataset(self._measured, record)).astype(np.int64)
        if len(panel) != record.n_panel:
            raise layout.damaged(
                self.path, layout.MEASURED, f"{record.name!r} has {len(panel)} genes, expected {record.n_panel}"
            )
        return panel

    def gene_nnz(self, record: DatasetRecord) -> np.ndarray:
        """Per gene of the vocabulary, samples of the dataset in which it is not zero: (G,) int64."""
        return self._of_dataset(self._gene_nnz, record)

    def _column_names(self) -> list[str]:
        try:
            return [str(name) for name in self._root[layout.OBS].attrs["column-order"]]
        except (KeyError, TypeError) as error:
            raise layout.damaged(self.path, layout.OBS, f"the list of columns cannot be read ({error})") from error

    def obs_schema(self) -> pa.Schema:
        """Columns of obs and their types; ``soma_joinid``, the row number, comes first."""
        with self._reading():
            fields = [(name, Column(self._root, name, self.n_obs).type) for name in self._column_names()]
        return pa.schema([("soma_joinid", pa.int64()), *fields])

    def obs(self, columns: Sequence[str] | None = None, value_filter: str | None = None) -> pa.Table:
        """Rows of obs ascending by ``soma_joinid``, filtered in SOMA's language (``cell_type == 'B cell'``)."""
        return pa.concat_tables(self.obs_parts(columns, value_filter))

    def obs_parts(self, columns: Sequence[str] | None = None, value_filter: str | None = None) -> Iterator[pa.Table]:
        """The rows of `obs` in parts of bounded size, in order."""
        known = self._column_names()
        wanted = [name for name in dict.fromkeys(known if columns is None else columns) if name != "soma_joinid"]
        missing = [name for name in wanted if name not in known]
        if missing:
            raise ValueError(f"{self.path}: obs has no columns {missing}; it has {['soma_joinid', *known]}")
        chosen = None if value_filter is None else obs_filter.parse(value_filter)
        asked = () if chosen is None else chosen.columns
        with self._reading():
            held = {name: Column(self._root, name, self.n_obs) for name in known if name in wanted or name in asked}
        names = ["soma_joinid", *wanted]
        for low in range(0, max(1, self.n_obs), layout.CHUNK):
            high = min(low + layout.CHUNK, self.n_obs)
            with self._reading():
                arrays = [column.read(low, high) for column in held.values()]
            part = pa.table([pa.array(np.arange(low, high)), *arrays], names=["soma_joinid", *held])
            yield (part if chosen is None else part.filter(pa.array(chosen.mask(part)))).select(names)

    def scan(self, start: int, stop: int, *, rows: int = 2_048) -> Iterator[tuple[int, Ragged]]:
        """Counts of rows [start, stop) as (first row, ragged samples), at most `rows` at a time.

        Each chunk is decoded once; held are the rows of one part and about a million values besides.
        """
        return self._scan(start, stop, rows, self._data)

    def scan_genes(self, start: int, stop: int, *, rows: int = 2_048) -> Iterator[tuple[int, Ragged]]:
        """As `scan`, every count given as 1: the array of the counts, more than half of the work, is not read."""
        return self._scan(start, stop, rows, None)

    def _scan(self, start: int, stop: int, rows: int, data: Any) -> Iterator[tuple[int, Ragged]]:
        if not 0 <= start <= stop <= self.n_obs:
            raise ValueError(f"{self.path}: rows {start} to {stop} asked for, but the store has {self.n_obs}")
        if rows < 1:
            raise ValueError(f"{self.path}: a scan of {rows} rows at a time asked for, at least 1 is needed")
        if start == stop:
            return
        with self._reading():
            end = int(Reader(self._indptr).read(stop, stop + 1)[0])
        readers = (
            Reader(self._indptr), Reader(self._indices, ahead=_AHEAD, stop=end),
            None if data is None else Reader(data, ahead=_AHEAD, stop=end),
        )  # fmt: skip
        for low in range(start, stop, rows):
            yield low, self._read(readers, low, min(low + rows, stop))

    def read_rows(self, sample_ids: np.ndarray) -> Ragged:
        """Counts of the samples of ascending ids, in that order; neighbouring samples share their reads."""
        ids = np.asarray(sample_ids, np.int64)
        if not len(ids):
            return Ragged(np.zeros(1, np.int64), np.empty(0, np.uint16), np.empty(0, self.dtype))
        if ids[0] < 0 or ids[-1] >= self.n_obs or (np.diff(ids) <= 0).any():
            raise ValueError(
                f"{self.path}: sample ids must be strictly ascending and below {self.n_obs}, "
                f"found {len(ids)} from {ids.min()} to {ids.max()}; sort them first"
            )
        readers = (Reader(self._indptr), Reader(self._indices), Reader(self._data))
        cuts = np.flatnonzero(np.diff(ids) > 1) + 1
        parts = [self._read(readers, int(run[0]), int(run[-1]) + 1) for run in np.split(ids, cuts)]
        return parts[0] if len(parts) == 1 else concatenate(parts)

    def _read(self, readers: _Readers, low: int, high: int) -> Ragged:
        """Rows [low, high), checked: nothing that the arrays claim is believed before it fits the rest."""
        with self._reading():
            return self._read_checked(readers, low, high)

    def _read_checked(self, readers: _Readers, low: int, high: int) -> Ragged:
        where = f"{self.path}: rows {low} to {high}"
        indptr = readers[0].read(low, high + 1).astype(np.int64)
        first, last = int(indptr[0]), int(indptr[-1])
        if not 0 <= first <= last <= self._data.shape[0] or (np.diff(indptr) < 0).any():
            raise ValueError(f"{where}: indptr falls, or leaves the {self._data.shape[0]} values; the data is damaged")
        genes = readers[1].read(first, last)
        if len(genes) and (int(genes.min()) < 0 or int(genes.max()) >= self._n_vars):
            raise ValueError(
                f"{where}: gene ids {genes.min()} to {genes.max()}, the vocabulary has {self._n_vars} genes; "
                "the data is damaged"
            )
        if readers[2] is None:
            values = np.broadcast_to(self.dtype.type(1), last - first)  # one number, shown many times
        else:
            values = readers[2].read(first, last).copy()
        samples = Ragged(indptr - first, genes.astype(np.uint16), values)
        samples.check(self._n_vars, where)
        return samples


class ZarrBackend:
    """How a Zarr store is made and extended, in a folder that nobody else reads meanwhile.

    No file is changed in place: every write makes a new file and renames it, so a folder of hard links may be extended
    while the files it was linked from stay as they are.
    """

    name = "zarr"

    def create(self, folder: str, dtype: np.dtype[np.generic]) -> None:
        """Make an empty store whose values are of `dtype` (uint32 or float64)."""
        layout.create(folder, dtype)

    def open(self, folder: str) -> ZarrStore:
        """Open a store whose files were just checked, or that nobody else reads."""
        return ZarrStore(folder, check=False)

    def sink(self, store: Store, start: int, stop: int, n_vars: int) -> ZarrSink:
        """Prepare for rows [start, stop) and genes up to `n_vars` of the whole store."""
        blocks = layout.blocks_folder(store.path, start)
        shutil.rmtree(blocks, ignore_errors=True)
        blocks.mkdir(parents=True)
        return ZarrSink(folder=store.path, start=start, stop=stop, n_vars=n_vars, dtype=store.dtype.name)

    def commit(self, store: Store, sink: Sink, tables: Tables) -> None:
        """Write the blocks in row order, then obs, var and the panels, and seal the whole.

        Raises
        ------
        ValueError
            If rows are missing or came twice, or `tables` do not agree with the store or with the rows.
        """
        if not isinstance(store, ZarrStore) or not isinstance(sink, ZarrSink):
            raise TypeError(f"{store.path}: a Zarr store and its sink are needed, found {type(store)} and {type(sink)}")
        record = tables.record
        _check_tables(store, tables)
        root = layout.open_for_writing(store.path)
        _append_counts(root, store, sink, tables)
        root["X"].attrs["shape"] = [record.obs_stop, record.n_vars]
        where = f"{store.path}: dataset {record.name!r}"
        append_obs(root, where, tables.obs_schema, tables.obs, record.obs_start, record.obs_stop)
        _write_genes(root, store, tables)
        records = [*store.datasets, record]
        layout.add_whole(root, layout.DATASET_NAMES, np.array([r.name for r in records], object))
        blocks = layout.blocks_folder(store.path, sink.start)
        shutil.rmtree(blocks)
        if not any(blocks.parent.iterdir()):  # the last of the datasets that are appended together
            blocks.parent.rmdir()
        layout.seal(
            store.path,
            {
                "txfm_dtype": store.dtype.name, "created_on": store._created_on,
                "txfm_datasets": [asdict(r) for r in records],
            },
        )  # fmt: skip


def _check_tables(store: ZarrStore, tables: Tables) -> None:
    record, tokens, old = tables.record, tables.tokens, store.vocabulary.gene_ids
    where = f"{store.path}: dataset {record.name!r}"
    for what, expected, found in (
        ("its number", len(store.datasets), record.dataset_index), ("its first row", store.n_obs, record.obs_start),
        ("genes of the vocabulary", len(tables.vocabulary), record.n_vars), ("genes of its panel", len(tokens), record.n_panel),
        ("genes with a number of samples", len(tokens), len(tables.gene_nnz)),
    ):  # fmt: skip
        if expected != found:
            raise ValueError(
                f"{where}: {what} should be {expected}, found {found}; append it to the store as it is now"
            )
    if tables.vocabulary.gene_ids[: len(old)] != old:
        raise ValueError(f"{where}: its vocabulary does not begin with the store's; append to the store as it is now")
    if len(tokens) and (tokens[0] < 0 or tokens[-1] >= record.n_vars or (np.diff(tokens) <= 0).any()):
        raise ValueError(f"{where}: tokens of the panel must ascend within the {record.n_vars} genes of the vocabulary")


def _append_counts(root: Any, store: ZarrStore, sink: ZarrSink, tables: Tables) -> None:
    """Stream the blocks into X; what they hold must be what the tables say."""
    record = tables.record
    indptr, indices, data = (Appender(root[path]) for path in (layout.INDPTR, layout.INDICES, layout.DATA))
    before = end = sum(r.nnz for r in store.datasets)
    counted = np.zeros(record.n_vars, np.int64)
    for block in sink.blocks(record.obs_start, record.obs_stop):
        block.check(record.n_vars, f"{store.path}: dataset {record.name!r}")
        indptr.add(block.indptr[1:] + end)
        indices.add(block.gene_ids)
        data.add(block.counts)
        counted += np.bincount(block.gene_ids, minlength=len(counted))
        end += block.nnz
    for appender in (indptr, indices, data):
        appender.finish()
    if end - before != record.nnz:
        raise ValueError(
            f"{store.path}: dataset {record.name!r}: {end - before} values were written, the record says {record.nnz}; "
            "the source changed while it was read, ingest it again"
        )
    expected = np.zeros_like(counted)
    expected[tables.tokens] = tables.gene_nnz
    if not np.array_equal(counted, expected):
        gene = int(np.flatnonzero(counted != expected)[0])
        raise ValueError(
            f"{store.path}: dataset {record.name!r}: gene {tables.vocabulary.gene_ids[gene]} is not zero in "
            f"{counted[gene]} samples as written, in {expected[gene]} as announced; ingest the source again"
        )


def _write_genes(root: Any, store: ZarrStore, tables: Tables) -> None:
    record, n_old = tables.record, len(store.vocabulary)
    sums = []
    for name, added in (("nnz", tables.gene_nnz), ("n_measured_obs", record.n_obs)):
        total = np.zeros(record.n_vars, np.int64)
        total[:n_old] = store._var(name, "i")
        total[tables.tokens] += added
        sums.append(total)
    layout.write_var(root, tables.vocabulary.gene_ids, tables.vocabulary.symbols, sums[0], sums[1])
    at = record.dataset_index
    for path, values in ((layout.MEASURED, True), (layout.NNZ, tables.gene_nnz)):
        array = root[path].with_config({"write_empty_chunks": True})
        column = np.zeros((record.n_vars, 1), array.dtype)
        column[tables.tokens, 0] = values
        # Older columns need no writing: their one chunk already has room, and zeros, for genes that come later.
        array.resize((record.n_vars, at + 1))
        array[:, at : at + 1] = column
