"""Adding a dataset to a SOMA store, all or nothing.

Rows of X are written first: no reader sees them, since every query goes through obs. Then var, the two matrices
of datasets x genes, the datasets table and, last of the tables, obs; the ledger's commit ends the append.
"""

import fcntl
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tiledbsoma as soma

from txfm_data.progress import Progress, ignore
from txfm_data.ragged import Ragged
from txfm_data.store import layout, ledger
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.soma import SomaStore
from txfm_data.vocabulary import MAX_GENES

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NewDataset:
    """What is known of a dataset before its rows are written.

    gene_ids, symbols : of its panel, unique, in the order that the rows' gene columns count.
    gene_nnz : (P,) int64. Samples in which each is above zero.
    obs : table with the columns of `layout.OBS_SCHEMA` less soma_joinid and dataset_id, one row a sample.
    """

    name: str
    gene_ids: tuple[str, ...]
    symbols: tuple[str, ...]
    gene_nnz: np.ndarray
    obs: pa.Table
    values: str
    modality: str
    source: str
    content_sha256: str


def check_new(store: SomaStore, name: str, content_sha256: str) -> None:
    """Refuse a name, or a file, that the store holds already."""
    for record in store.datasets:
        if record.name == name:
            raise ValueError(
                f"{store.path}: dataset {name!r} is there already ({record.n_obs} samples from {record.source}); "
                "choose another --dataset name, or another store"
            )
        if record.content_sha256 == content_sha256:
            raise ValueError(
                f"{store.path}: the same file was ingested as dataset {record.name!r} (sha256 {content_sha256[:12]}…); "
                "its samples would be there twice"
            )


def append(store_path: Path, new: NewDataset, rows: Iterable[Ragged], *, progress: Progress = ignore) -> DatasetRecord:
    """Append one dataset.

    store_path : a store; made if there is none.
    rows : the samples in order, gene ids counting the columns of `new.gene_ids`.

    On any exception, an interrupt too, the store is left as it was; one that this call made is removed.

    Raises
    ------
    ValueError
        If the store is not ours, holds the dataset already, or would pass 65,535 genes.
    """
    is_new = not store_path.exists()
    if is_new:
        layout.create(store_path)
    with _lock(store_path):
        try:
            return _append_locked(store_path, new, rows, progress)
        except BaseException:
            if is_new and not SomaStore(store_path).datasets:
                shutil.rmtree(store_path)
            raise


def _append_locked(store_path: Path, new: NewDataset, rows: Iterable[Ragged], progress: Progress) -> DatasetRecord:
    store = SomaStore(store_path)
    if store.ledger.pending is not None:
        _log.warning("%s: removing what an unfinished append of %r left", store_path, store.ledger.pending)
        _roll_back(store)
        store = SomaStore(store_path)
    check_new(store, new.name, new.content_sha256)
    tokens, added = _allot_tokens(store, new)
    ledger.record(store.uri, "begin", new.name, {"obs_start": store.n_obs, "source": new.source})
    try:
        nnz, total = _write_counts(store, new, rows, tokens, progress)
        record = DatasetRecord(
            dataset_index=len(store.datasets), name=new.name, obs_start=store.n_obs, obs_stop=store.n_obs + len(new.obs),
            n_vars=store.ledger.n_vars + len(added), n_panel=len(tokens), nnz=nnz, total=total, values=new.values,
            modality=new.modality, source=new.source, content_sha256=new.content_sha256,
        )  # fmt: skip
        _write_tables(store, new, record, tokens, added)
        ledger.record(store.uri, "commit", new.name, asdict(record))
    except BaseException:
        _roll_back(SomaStore(store_path))
        raise
    return record


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One writer at a time; the system frees the lock when a process dies."""
    with open(path / ".txfm.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path}: another process is writing to this store; wait until it has ended") from error
        yield


def _allot_tokens(store: SomaStore, new: NewDataset) -> tuple[np.ndarray, list[int]]:
    """Token of each gene of the panel; new genes follow the vocabulary. Also: which of the panel are new."""
    tokens = store.vocabulary.index_of(new.gene_ids).astype(np.int64)
    added = np.flatnonzero(tokens < 0).tolist()
    size = len(store.vocabulary) + len(added)
    if size > MAX_GENES:
        raise ValueError(
            f"{store.path}: {new.name!r} would bring the vocabulary to {size} genes, at most {MAX_GENES} are possible"
        )
    tokens[added] = np.arange(len(store.vocabulary), size)
    return tokens, added


def _write_counts(
    store: SomaStore, new: NewDataset, rows: Iterable[Ragged], tokens: np.ndarray, progress: Progress
) -> tuple[int, int]:
    """Write the rows of X; number of non-zeros and their sum."""
    nnz = total = done = 0
    uri = f"{store.uri}/{layout.RAW}"
    _grow(uri, store.n_obs + len(new.obs), max(1, int(tokens.max()) + 1))
    with layout.open_element(uri, "w") as matrix:
        for part in rows:
            samples = np.repeat(np.arange(len(part), dtype=np.int64) + store.n_obs + done, np.diff(part.indptr))
            columns = {"soma_dim_0": samples, "soma_dim_1": tokens[part.gene_ids], "soma_data": part.counts}
            if part.nnz:
                matrix.write(pa.table(columns))
            nnz, total, done = nnz + part.nnz, total + int(part.counts.sum(dtype=np.uint64)), done + len(part)
            progress(done, len(new.obs))
    if done != len(new.obs):
        raise ValueError(
            f"{new.source}: {done} samples were read, but obs has {len(new.obs)}; the file changed while it was read"
        )
    return nnz, total


def _grow(uri: str, rows: int, columns: int) -> None:
    with layout.open_element(uri) as matrix:
        shape = matrix.shape
    wanted = (max(shape[0], rows), max(shape[1], columns))
    if wanted != shape:
        with layout.open_element(uri, "w") as matrix:
            matrix.resize(wanted)


def _grow_frame(uri: str, rows: int) -> None:
    with layout.open_element(uri) as frame:
        known = int(frame.domain[0][1]) + 1
    if rows > known:
        with layout.open_element(uri, "w") as frame:
            frame.tiledbsoma_resize_soma_joinid_shape(rows)


def _write_tables(
    store: SomaStore, new: NewDataset, record: DatasetRecord, tokens: np.ndarray, added: list[int]
) -> None:
    """Everything but X, in the order that leaves a reader with the least to see if it stops midway."""
    at = record.dataset_index
    for name, numbers in ((layout.PRESENCE, np.ones(len(tokens), bool)), (layout.GENE_NNZ, new.gene_nnz)):
        _grow(f"{store.uri}/{name}", at + 1, record.n_vars)
        with layout.open_element(f"{store.uri}/{name}", "w") as matrix:
            columns = {
                "soma_dim_0": np.full(len(tokens), at, np.int64),
                "soma_dim_1": tokens,
                "soma_data": numbers,
            }
            matrix.write(pa.table(columns))
    ids = [*store.vocabulary.gene_ids, *(new.gene_ids[i] for i in added)]
    symbols = [*store.vocabulary.symbols, *(new.symbols[i] for i in added)]
    for token, symbol in zip(tokens.tolist(), new.symbols, strict=True):
        symbols[token] = symbols[token] or symbol  # a later dataset may know a symbol that an earlier one lacked
    _write_var(store.uri, ids, symbols, [d.n_obs for d in (*store.datasets, record)])
    _grow_frame(f"{store.uri}/{layout.DATASETS}", at + 1)
    row = {
        "soma_joinid": [at], "dataset_id": [new.name], "dataset_title": [new.name], "dataset_h5ad_path": [new.source],
        "dataset_total_cell_count": [record.n_obs], "values": [new.values], "modality": [new.modality],
        "content_sha256": [new.content_sha256],
    }  # fmt: skip
    layout.write_rows(f"{store.uri}/{layout.DATASETS}", pa.table(row, schema=layout.DATASETS_SCHEMA))
    _grow_frame(f"{store.uri}/{layout.OBS}", record.obs_stop)
    category = layout.OBS_SCHEMA.field("dataset_id").type
    dataset_id = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(len(new.obs), np.int32)), pa.array([new.name], category.value_type)
    )
    joinid = pa.array(np.arange(record.obs_start, record.obs_stop))
    table = new.obs.append_column("soma_joinid", joinid).append_column("dataset_id", dataset_id)
    layout.write_rows(f"{store.uri}/{layout.OBS}", table.select(layout.OBS_SCHEMA.names).cast(layout.OBS_SCHEMA))


def _write_var(uri: str, gene_ids: list[str], symbols: list[str], n_obs: list[int]) -> None:
    """Write var whole, its sums taken from the matrices over the datasets that `n_obs` counts the samples of."""
    sums = {}
    weights = {layout.GENE_NNZ: None, layout.PRESENCE: np.array(n_obs)}
    for name, weight in weights.items():
        with layout.open_element(f"{uri}/{name}") as matrix:
            table = matrix.read((slice(0, len(n_obs) - 1),)).tables().concat()
        values = (
            table["soma_data"].cast(pa.int64()).to_numpy() if weight is None else weight[table["soma_dim_0"].to_numpy()]
        )
        sums[name] = np.bincount(table["soma_dim_1"].to_numpy(), values, len(gene_ids)).astype(np.int64)
    columns = {
        "soma_joinid": np.arange(len(gene_ids)), "feature_id": gene_ids, "feature_name": symbols,
        "nnz": sums[layout.GENE_NNZ], "n_measured_obs": sums[layout.PRESENCE],
    }  # fmt: skip
    _grow_frame(f"{uri}/{layout.VAR}", len(gene_ids))
    layout.write_rows(f"{uri}/{layout.VAR}", pa.table(columns, schema=layout.VAR_SCHEMA))


def _roll_back(store: SomaStore) -> None:
    """Delete every row beyond the committed ones and close the pending append."""
    state = store.ledger
    for name, first in (
        (layout.OBS, state.n_obs), (layout.DATASETS, len(state.committed)), (layout.VAR, state.n_vars),
        (layout.PRESENCE, len(state.committed)), (layout.GENE_NNZ, len(state.committed)), (layout.RAW, state.n_obs),
    ):  # fmt: skip
        _delete_from(f"{store.uri}/{name}", first)
    if state.committed:
        vocabulary = store.vocabulary
        counts = [d.n_obs for d in state.committed]
        _write_var(store.uri, list(vocabulary.gene_ids), list(vocabulary.symbols), counts)
    # Fragments are ordered by the millisecond: what is written next must not share one with the deletion.
    time.sleep(0.005)
    ledger.record(store.uri, "abort", state.pending or "", {})


def _delete_from(uri: str, first: int) -> None:
    with layout.open_element(uri) as element:
        is_frame = isinstance(element, soma.DataFrame)
        last = int(element.domain[0][1]) if is_frame else element.shape[0] - 1
        if last < first:
            return
        rows = element.read((slice(first, last),), column_names=["soma_joinid"]) if is_frame else None
        if rows is not None and pc.count(rows.concat()["soma_joinid"]).as_py() == 0:
            return
    with layout.open_element(uri, "d") as element:
        element.delete_cells((slice(first, last),))
