"""Adding a dataset to a store of either backend, all or nothing.

Genes get their tokens and samples their ids before a row is written; rows are written in blocks, by any process; one process
commits. On a local disk all of it happens in a copy that takes the store's place at the end.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from txfm_data import address as addresses
from txfm_data.store import opening
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.protocol import Backend, Sink, Store, Tables, Values
from txfm_data.store.transaction import staged
from txfm_data.vocabulary import MAX_GENES, Vocabulary


@dataclass(frozen=True, kw_only=True)
class NewDataset:
    """What is known of a dataset before its rows are written.

    gene_ids, symbols : of its panel, unique.
    dtype : of its values.  backend : of the store, if this append makes it.
    """

    name: str
    gene_ids: tuple[str, ...]
    symbols: tuple[str, ...]
    values: Values
    modality: str
    source: str
    content_sha256: str
    dtype: np.dtype[np.generic] = np.dtype(np.uint32)
    backend: str = "soma"


@dataclass
class Append:
    """An append in progress.

    sink : where blocks go.  first_row : sample id of the dataset's first sample.
    tokens : (P,) int64. Token of each gene of the panel, in the panel's order.
    n_genes : of the vocabulary with those of all datasets that are appended together.
    dtype : of the store's values.
    """

    sink: Sink
    first_row: int
    tokens: np.ndarray
    n_genes: int
    dtype: np.dtype[np.generic]
    _folder: str
    _backend: Backend
    _new: NewDataset
    _n_obs: int
    _vocabulary: Vocabulary
    is_committed: bool = False

    def commit(
        self, *, gene_nnz: np.ndarray, nnz: int, total: float, obs_schema: pa.Schema, obs: Iterable[pa.Table]
    ) -> DatasetRecord:
        """Write the tables.

        gene_nnz : (n_genes,) int64.  nnz, total : of all values written.
        obs : rows in order, in pieces, with the columns of `obs_schema` but ``soma_joinid``.

        Raises
        ------
        ValueError
            If obs has not as many rows as were allotted, or has a column in another type than the store.
        """
        new, store = self._new, self._backend.open(self._folder)
        if store.n_obs != self.first_row:
            raise RuntimeError(
                f"{new.name!r} begins at row {self.first_row}, but {store.n_obs} rows are committed: commit in order"
            )
        schema = self._with_all_columns(store, obs_schema)
        order = np.sort(self.tokens)
        record = DatasetRecord(
            dataset_index=len(store.datasets), name=new.name, obs_start=self.first_row,
            obs_stop=self.first_row + self._n_obs, n_vars=len(self._vocabulary), n_panel=len(order), nnz=nnz, total=total,
            values=new.values, modality=new.modality, source=new.source, content_sha256=new.content_sha256,
        )  # fmt: skip
        tables = Tables(
            record=record, vocabulary=self._vocabulary, tokens=order, gene_nnz=gene_nnz[order], obs_schema=schema,
            obs=self._numbered(obs, schema),
        )  # fmt: skip
        self._backend.commit(store, self.sink, tables)
        self.is_committed = True
        return record

    def _with_all_columns(self, store: Store, schema: pa.Schema) -> pa.Schema:
        """The new rows' columns and those that only the store has: another append may have added some since they were planned."""
        fields = list(schema)
        for field in store.obs_schema():
            if field.name not in schema.names:
                fields.append(field)
            elif schema.field(field.name).type != field.type:
                raise ValueError(
                    f"{self._new.source}: label {field.name!r} is {schema.field(field.name).type}, in the store {field.type}; if "
                    "another append has just ended, run this one again"
                )
        return pa.schema(fields)

    def _numbered(self, obs: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
        row, stop = self.first_row, self.first_row + self._n_obs
        for part in obs:
            for field in schema:
                if field.name not in part.column_names and field.name != "soma_joinid":
                    part = part.append_column(field, pa.nulls(len(part), field.type))
            yield part.append_column("soma_joinid", pa.array(np.arange(row, row + len(part))))
            row += len(part)
        if row != stop:
            raise ValueError(
                f"{self._new.source}: {row - self.first_row} samples were read, {self._n_obs} were announced; the source "
                "changed while it was read"
            )


@contextmanager
def appending(address: str | Path, new: NewDataset, n_obs: int) -> Iterator[Append]:
    """Append one dataset of `n_obs` samples; see `appending_all`."""
    with appending_all(address, [new], [n_obs]) as appends:
        yield appends[0]


@contextmanager
def appending_all(address: str | Path, news: Sequence[NewDataset], n_obs: Sequence[int]) -> Iterator[list[Append]]:
    """Append datasets to the store at `address`, made if there is none; all of them or none.

    The block writes rows through each append's sink and then calls the `commit` of each, in order. If it ends otherwise, on any
    exception, the store is as it was, and one that this call would have made is not there. On object storage, where each commit
    stands for itself, only one dataset can be appended at a time.

    n_obs : samples of each.

    Raises
    ------
    ValueError
        If the store is damaged or not ours, holds a dataset already or another unit, or would pass 65,535 genes.
    """
    with _changing(address, news) as folder:
        # Looked at under the lock: before it, another append may have made the store.
        backend = opening.backend_at(folder)
        store = backend.open(folder)
        allotted = [(np.empty(0, np.int64), store.vocabulary)]
        for new in news:
            opening.check_new(store, new.name, new.content_sha256, new.values)
            allotted.append(_allot_tokens(store.path, allotted[-1][1], new))
        n_genes = len(allotted[-1][1])
        starts = store.n_obs + np.concatenate([[0], np.cumsum(n_obs)]).astype(np.int64)
        appends = []
        for at, (new, (tokens, vocabulary)) in enumerate(zip(news, allotted[1:], strict=True)):
            start, stop = int(starts[at]), int(starts[at + 1])
            sink = backend.sink(store, start, stop, n_genes)
            appends.append(
                Append(sink, start, tokens, n_genes, store.dtype, folder, backend, new, stop - start, vocabulary)
            )
        yield appends
        if not all(append.is_committed for append in appends):
            raise RuntimeError("an append ended without its commit")


@contextmanager
def _changing(address: str | Path, news: Sequence[NewDataset]) -> Iterator[str]:
    """The folder or address to write to."""
    new = news[0]
    if not addresses.is_remote(address):

        def create(folder: str) -> None:
            opening.backend(new.backend).create(folder, new.dtype)

        with staged(addresses.local_path(address), create) as copy:
            yield str(copy)
        return
    if len(news) > 1:
        raise ValueError(f"{addresses.redact(str(address))}: datasets go to object storage one at a time")
    from txfm_data.store.in_place import changing_in_place

    backend = opening.backend_at(address) if opening.exists(address) else opening.backend(new.backend)
    name = addresses.join(address)
    with changing_in_place(name, backend, new.name, new.source, new.dtype):
        yield name


def _allot_tokens(where: str, known: Vocabulary, new: NewDataset) -> tuple[np.ndarray, Vocabulary]:
    """Token of each gene of the panel, new genes following the known ones; and the vocabulary with them."""
    tokens = known.index_of(new.gene_ids).astype(np.int64)
    added = np.flatnonzero(tokens < 0).tolist()
    size = len(known) + len(added)
    if size > MAX_GENES:
        raise ValueError(
            f"{where}: {new.name!r} would bring the vocabulary to {size} genes, at most {MAX_GENES} are possible"
        )
    tokens[added] = np.arange(len(known), size)
    symbols = [*known.symbols, *(new.symbols[i] for i in added)]
    for token, symbol in zip(tokens.tolist(), new.symbols, strict=True):
        symbols[token] = symbols[token] or symbol  # a later dataset may know a symbol that an earlier one lacked
    return tokens, Vocabulary((*known.gene_ids, *(new.gene_ids[i] for i in added)), tuple(symbols))
