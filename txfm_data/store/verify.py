"""Whether a store still holds what was put in: every checksum is read, every sum compared with the ledger."""

from typing import Any

import numpy as np
import pyarrow.compute as pc
import tiledbsoma as soma

from txfm_data.progress import Progress, ignore
from txfm_data.store import layout
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.soma import SomaStore


def verify(store: SomaStore, *, progress: Progress = ignore) -> dict[str, Any]:
    """Read a whole store.

    Returns
    -------
    dict
        n_obs, n_vars, n_datasets, nnz, and ``unfinished``: the name of an append that never ended, or None.

    Raises
    ------
    ValueError
        Names the first dataset whose rows, panel, non-zeros or sums are not as recorded, or the part of the store
        whose checksum does not fit.
    """
    try:
        _tables(store)
        for record in store.datasets:
            _dataset(store, record, lambda done, total: progress(done, total))
    except soma.SOMAError as error:
        raise ValueError(
            f"{store.path}: a part of the store cannot be read ({error}); restore it from a copy or ingest again"
        ) from error
    return {
        "path": str(store.path), "kind": "store", "n_obs": store.n_obs, "n_vars": len(store.vocabulary),
        "n_datasets": len(store.datasets), "nnz": sum(d.nnz for d in store.datasets), "unfinished": store.ledger.pending,
    }  # fmt: skip


def _differs(store: SomaStore, what: str, expected: object, found: object) -> ValueError:
    return ValueError(
        f"{store.path}: {what}: the ledger says {expected}, found {found}; restore the store from a copy or ingest again"
    )


def _tables(store: SomaStore) -> None:
    obs = store.obs()
    if len(obs) != store.n_obs:
        raise _differs(store, "rows of obs", store.n_obs, len(obs))
    if len(store.vocabulary) != store.ledger.n_vars:
        raise _differs(store, "rows of var", store.ledger.n_vars, len(store.vocabulary))
    with layout.open_element(f"{store.uri}/{layout.DATASETS}") as frame:
        table = frame.read((slice(0, max(0, len(store.datasets) - 1)),)).concat() if store.datasets else []
    if len(table) != len(store.datasets):
        raise _differs(store, "rows of the datasets table", len(store.datasets), len(table))


def _dataset(store: SomaStore, record: DatasetRecord, progress: Progress) -> None:
    name = f"dataset {record.name!r}"
    panel = store.panel(record)
    if len(panel) != record.n_panel:
        raise _differs(store, f"{name}: genes of the panel", record.n_panel, len(panel))
    in_panel = np.zeros(len(store.vocabulary), bool)
    in_panel[panel] = True
    nnz = total = 0
    gene_nnz = np.zeros(len(store.vocabulary), np.int64)
    per_sample = []
    for low, part in store.scan(record.obs_start, record.obs_stop):
        part.check(len(store.vocabulary), f"{store.path}: rows from {low}")
        if not in_panel[part.gene_ids].all():
            raise _differs(store, f"{name}: genes with counts", "only genes of its panel", "others")
        nnz, total = nnz + part.nnz, total + int(part.counts.sum(dtype=np.uint64))
        gene_nnz += np.bincount(part.gene_ids, minlength=len(gene_nnz))
        per_sample.append(np.diff(part.indptr))
        progress(low + len(part), store.n_obs)
    obs = store.obs(["nnz", "dataset_id"], value_filter=f"dataset_id == '{record.name}'")
    for what, expected, found in (
        ("samples", record.n_obs, len(obs)), ("non-zero counts", record.nnz, nnz), ("sum of counts", record.total, total),
        ("sum of obs.nnz", record.nnz, pc.sum(obs["nnz"]).as_py() or 0),
    ):  # fmt: skip
        if expected != found:
            raise _differs(store, f"{name}: {what}", expected, found)
    if not np.array_equal(np.concatenate(per_sample), obs["nnz"].to_numpy()):
        raise _differs(store, f"{name}: non-zero counts per sample", "those of obs.nnz", "others")
    if not np.array_equal(gene_nnz, store.gene_nnz(record)):
        raise _differs(store, f"{name}: samples per gene", "those of txfm_dataset_gene_nnz", "others")
