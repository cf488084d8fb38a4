"""The ledger of a store: an append-only list of events that says which appends are complete.

An append begins (a range of rows is allotted), then commits or aborts. Readers believe commits alone; what a
process killed in between left behind lies beyond the committed ranges and is removed by the next append.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from txfm_data.store import layout

Values = Literal["counts", "normalized"]
"""Units that values can have."""


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """One committed dataset.

    obs_start, obs_stop : its rows of obs.  n_vars : genes of the whole vocabulary after it.
    total : sum of its counts in X.  values : "counts" or "normalized".  modality : "sc" or "bulk".
    source : name of the file it came from.  content_sha256 : of that file.
    """

    dataset_index: int
    name: str
    obs_start: int
    obs_stop: int
    n_vars: int
    n_panel: int
    nnz: int
    total: float
    values: Values
    modality: str
    source: str
    content_sha256: str

    @property
    def n_obs(self) -> int:
        """Number of samples."""
        return self.obs_stop - self.obs_start


@dataclass(frozen=True)
class Ledger:
    """The events of a store, folded: committed datasets in order, the append that never ended, and how many events."""

    committed: tuple[DatasetRecord, ...]
    pending: str | None
    n_events: int

    @property
    def n_obs(self) -> int:
        """Rows of obs that are committed."""
        return self.committed[-1].obs_stop if self.committed else 0

    @property
    def n_vars(self) -> int:
        """Rows of var that are committed."""
        return self.committed[-1].n_vars if self.committed else 0


def fold(events: list[tuple[str, str, str]]) -> Ledger:
    """State after a list of (event, dataset, detail as JSON)."""
    committed: list[DatasetRecord] = []
    pending: str | None = None
    for event, dataset, detail in events:
        if event == "commit":
            committed.append(DatasetRecord(**json.loads(detail)))
        pending = dataset if event == "begin" else None
    return Ledger(tuple(committed), pending, len(events))


def read(store_uri: str) -> Ledger:
    """Read and fold the ledger of a store."""
    with layout.reading(f"{store_uri}/{layout.LEDGER}") as frame:
        table = frame.read().concat().sort_by("soma_joinid")
    columns = (table[name].to_pylist() for name in ("event", "dataset", "detail"))
    return fold(list(zip(*columns, strict=True)))


def record(store_uri: str, event: str, dataset: str, detail: Mapping[str, Any]) -> None:
    """Add one event: "begin", "commit" or "abort". It is one TileDB fragment, so it is there whole or not at all."""
    row = read(store_uri).n_events
    columns = {
        "soma_joinid": [row],
        "event": [event],
        "dataset": [dataset],
        "detail": [json.dumps(dict(detail))],
    }
    layout.write_rows(f"{store_uri}/{layout.LEDGER}", pa.table(columns, schema=layout.LEDGER_SCHEMA))
