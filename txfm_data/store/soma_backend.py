"""Extending a SOMA store: where blocks of counts go, and the tables that a commit writes.

On a local disk all of this happens in a copy that takes the store's place at the end (`store.transaction`). On object storage it
happens in place, in an order that leaves readers the least to see, and an append that failed is rolled back by the ledger.
"""

import os
import shutil
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tiledbsoma as soma

from txfm_data.address import is_remote, remove_tree
from txfm_data.ragged import Ragged
from txfm_data.store import layout, ledger
from txfm_data.store.protocol import Tables
from txfm_data.store.soma import SomaStore

_SORTED = soma.TileDBWriteOptions(sort_coords=False)


@dataclass(frozen=True)
class SomaSink:
    """Writes blocks of rows of X, each as one fragment; fragments of disjoint rows may be written at the same time."""

    uri: str

    def write(self, first_row: int, samples: Ragged) -> None:
        """Write samples as rows from `first_row`; OSError if they cannot be written."""
        if not samples.nnz:
            return
        rows = np.repeat(np.arange(len(samples), dtype=np.int64) + first_row, np.diff(samples.indptr))
        columns = {"soma_dim_0": rows, "soma_dim_1": samples.gene_ids.astype(np.int64), "soma_data": samples.counts}
        with layout.writing(self.uri) as matrix:
            matrix.write(pa.table(columns), platform_config=_SORTED)


class SomaBackend:
    """The SOMA side of an append (`txfm_data.store.protocol.Backend`)."""

    name = "soma"

    def create(self, folder: str, dtype: np.dtype[np.generic]) -> None:
        """Make an empty store whose values are of `dtype`."""
        with layout.clear_write_errors(folder):
            layout.create(folder, pa.from_numpy_dtype(dtype))

    def open(self, folder: str) -> SomaStore:
        """Open a store whose files were just checked, or that nobody else reads."""
        return SomaStore(folder, check=False)

    def sink(self, store: SomaStore, start: int, stop: int, n_vars: int) -> SomaSink:
        """Make room in X."""
        uri = f"{store.uri}/{layout.RAW}"
        _grow(uri, stop, max(1, n_vars))
        return SomaSink(uri)

    def commit(self, store: SomaStore, sink: SomaSink, tables: Tables) -> None:
        """Write everything but X, then the ledger's commit."""
        record, at = tables.record, tables.record.dataset_index
        for name, numbers in ((layout.PRESENCE, np.ones(len(tables.tokens), bool)), (layout.GENE_NNZ, tables.gene_nnz)):
            _grow(f"{store.uri}/{name}", at + 1, record.n_vars)
            columns = {
                "soma_dim_0": np.full(len(tables.tokens), at, np.int64),
                "soma_dim_1": tables.tokens,
                "soma_data": numbers,
            }
            with layout.writing(f"{store.uri}/{name}") as matrix:
                matrix.write(pa.table(columns), platform_config=_SORTED)
        n_obs = [d.n_obs for d in (*store.datasets, record)]
        _write_var(store.uri, list(tables.vocabulary.gene_ids), list(tables.vocabulary.symbols), n_obs)
        _grow_frame(f"{store.uri}/{layout.DATASETS}", at + 1)
        row = {
            "soma_joinid": [at], "dataset_id": [record.name], "dataset_title": [record.name],
            "dataset_h5ad_path": [record.source], "dataset_total_cell_count": [record.n_obs], "values": [record.values],
            "modality": [record.modality], "content_sha256": [record.content_sha256],
        }  # fmt: skip
        layout.write_rows(f"{store.uri}/{layout.DATASETS}", pa.table(row, schema=layout.DATASETS_SCHEMA))
        _write_obs(store, tables)
        ledger.record(store.uri, "commit", record.name, asdict(record))

    def begin(self, address: str, dataset: str, source: str) -> None:
        """On object storage: note that an append has begun, so that what it leaves is known."""
        store = self.open(address)
        ledger.record(store.uri, "begin", dataset, {"obs_start": store.n_obs, "source": source})

    def roll_back(self, address: str) -> None:
        """On object storage: delete every row beyond the committed ones and close the pending append."""
        _roll_back(self.open(address))


def _grow(uri: str, rows: int, columns: int) -> None:
    with layout.reading(uri) as matrix:
        shape = matrix.shape
    wanted = (max(shape[0], rows), max(shape[1], columns))
    if wanted != shape:
        with layout.writing(uri) as matrix:
            matrix.resize(wanted)


def _grow_frame(uri: str, rows: int) -> None:
    with layout.reading(uri) as frame:
        known = int(frame.domain[0][1]) + 1
    if rows > known:
        with layout.writing(uri) as frame:
            frame.tiledbsoma_resize_soma_joinid_shape(rows)


def _write_obs(store: SomaStore, tables: Tables) -> None:
    uri = f"{store.uri}/{layout.OBS}"
    schema = store.obs_schema()
    if set(tables.obs_schema.names) != set(schema.names):
        schema = tables.obs_schema
        _widen_obs(store, schema, tables.record.obs_stop)
    _grow_frame(uri, tables.record.obs_stop)
    for part in tables.obs:
        if len(part):
            layout.write_rows(uri, part.select(schema.names).cast(schema))


def _widen_obs(store: SomaStore, schema: pa.Schema, n_obs: int) -> None:
    """Write obs anew with more columns, empty for the rows there are: a column added in place would have no checksum."""
    uri = f"{store.uri}/{layout.OBS}"
    if is_remote(store.uri):
        if not store.datasets:  # no reader knows the store yet
            remove_tree(uri)
            layout.create_frame(uri, schema, n_obs)
            return
        more = sorted(set(schema.names) - set(store.obs_schema().names))
        raise ValueError(
            f"{store.path}: its obs has no columns {more[:8]} ({len(more)} in all), and columns cannot be added safely on "
            "object storage; leave them out with --obs-columns, or build the store on a local disk and copy it"
        )
    part_uri = f"{uri}.wider"
    layout.create_frame(part_uri, schema, n_obs)
    for part in store.obs_parts():
        if len(part):
            columns = [part[f.name] if f.name in part.column_names else pa.nulls(len(part), f.type) for f in schema]
            layout.write_rows(part_uri, pa.table(columns, schema=schema))
    shutil.rmtree(uri)
    os.rename(part_uri, uri)


def _write_var(uri: str, gene_ids: list[str], symbols: list[str], n_obs: list[int]) -> None:
    """Write var whole, its sums taken from the matrices over the datasets that `n_obs` counts the samples of."""
    sums = {}
    weights = {layout.GENE_NNZ: None, layout.PRESENCE: np.array(n_obs)}
    for name, weight in weights.items():
        with layout.reading(f"{uri}/{name}") as matrix:
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
    element: Any
    with layout.reading(uri) as element:
        is_frame = isinstance(element, soma.DataFrame)
        last = int(element.domain[0][1]) if is_frame else element.shape[0] - 1
        if last < first:
            return
        rows = element.read((slice(first, last),), column_names=["soma_joinid"]) if is_frame else None
        if rows is not None and pc.count(rows.concat()["soma_joinid"]).as_py() == 0:
            return
    with layout.writing(uri, "d") as element:
        element.delete_cells((slice(first, last),))
