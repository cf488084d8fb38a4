"""Whether a store still holds what was put in: every file is hashed, every value read, every sum compared with the ledger."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from txfm_data.address import clear_errors, is_remote, local_path, redact
from txfm_data.progress import Progress, ignore
from txfm_data.store import files, objects, opening, transaction
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.protocol import Store


def verify(address: str | Path, *, progress: Progress = ignore) -> dict[str, Any]:
    """Read a whole store.

    progress : called with samples read of all.

    Returns
    -------
    dict
        path, backend, n_obs, n_vars, n_datasets, nnz, n_files, and ``unfinished``: whether a
        killed append left something that the next one will remove.

    Raises
    ------
    FileNotFoundError
        If there is no store.
    ValueError
        Names the first file that is missing, cut or changed; or the dataset whose rows, panel, non-zeros or sums are not as
        recorded; or the part of the store whose checksum does not fit.
    """
    n_files = None
    if not is_remote(address):
        transaction.settle(local_path(address))
    if not is_remote(address) and (local_path(address) / files.LIST).exists():
        n_files = files.verify_list(
            local_path(address)
        )  # first: it names the file, whatever cannot be opened without it
    store = opening.open_store(address)
    if is_remote(address):
        n_files = len(objects.read_list(objects.plain_address(address)).files)
    else:
        n_files = files.verify_list(local_path(address))
    check_datasets(store, store.datasets, progress)
    return {
        "path": store.path, "kind": "store", "backend": store.backend, "n_obs": store.n_obs, "n_vars": len(store.vocabulary),
        "n_datasets": len(store.datasets), "nnz": sum(d.nnz for d in store.datasets), "n_files": n_files,
        "unfinished": _unfinished(address, store),
    }  # fmt: skip


def check_datasets(store: Store, records: Sequence[DatasetRecord], progress: Progress = ignore) -> None:
    """Read datasets of a store and compare them with the ledger.

    Raises
    ------
    ValueError
        If rows, panel, non-zeros or sums are not as recorded, or cannot be read.
    PermissionError, ConnectionError
        If object storage cannot be reached.
    """
    try:
        with clear_errors(store.path):
            _tables(store)
            for record in records:
                _dataset(store, record, progress)
    except (ValueError, FileNotFoundError, PermissionError, ConnectionError):
        raise
    except Exception as error:  # each backend has its own classes for what cannot be read
        raise ValueError(
            f"{store.path}: a part of the store cannot be read ({redact(str(error))}); restore it from a copy or ingest again"
        ) from error


def _unfinished(address: str | Path, store: Store) -> bool:
    if is_remote(address):
        return getattr(store, "ledger").pending is not None  # noqa: B009 - only a SOMA store can be remote
    return transaction.unfinished(local_path(address))


def _differs(store: Store, what: str, expected: object, found: object) -> ValueError:
    return ValueError(
        f"{store.path}: {what}: the ledger says {expected}, found {found}; restore the store from a copy or ingest again"
    )


def _tables(store: Store) -> None:
    n_obs = sum(len(part) for part in store.obs_parts(["soma_joinid"]))
    if n_obs != store.n_obs:
        raise _differs(store, "rows of obs", store.n_obs, n_obs)
    n_vars = store.datasets[-1].n_vars if store.datasets else 0
    if len(store.vocabulary) != n_vars:
        raise _differs(store, "rows of var", n_vars, len(store.vocabulary))


def _dataset(store: Store, record: DatasetRecord, progress: Progress) -> None:
    name = f"dataset {record.name!r}"
    panel = store.panel(record)
    if len(panel) != record.n_panel:
        raise _differs(store, f"{name}: genes of the panel", record.n_panel, len(panel))
    in_panel = np.zeros(len(store.vocabulary), bool)
    in_panel[panel] = True
    nnz, total = 0, 0.0
    gene_nnz = np.zeros(len(store.vocabulary), np.int64)
    per_sample = [np.empty(0, np.int64)]
    for low, part in store.scan(record.obs_start, record.obs_stop):
        part.check(len(store.vocabulary), f"{store.path}: rows from {low}")
        if not in_panel[part.gene_ids].all():
            raise _differs(store, f"{name}: genes with counts", "only genes of its panel", "others")
        nnz, total = nnz + part.nnz, total + float(part.counts.sum(dtype=np.float64))
        gene_nnz += np.bincount(part.gene_ids, minlength=len(gene_nnz))
        per_sample.append(np.diff(part.indptr))
        progress(low + len(part), store.n_obs)
    obs = _obs_of(store, record)
    is_whole = store.dtype.kind != "f"
    for what, expected, found in (
        ("samples", record.n_obs, len(obs)), ("non-zero counts", record.nnz, nnz),
        ("sum of obs.nnz", record.nnz, pc.sum(obs["nnz"]).as_py() or 0),
    ):  # fmt: skip
        if expected != found:
            raise _differs(store, f"{name}: {what}", expected, found)
    if total != record.total if is_whole else not np.isclose(total, record.total, rtol=1e-9):
        raise _differs(store, f"{name}: sum of counts", record.total, total)
    if not np.array_equal(np.concatenate(per_sample), obs["nnz"].to_numpy()):
        raise _differs(store, f"{name}: non-zero counts per sample", "those of obs.nnz", "others")
    if not np.array_equal(gene_nnz, store.gene_nnz(record)):
        raise _differs(store, f"{name}: samples per gene", "those that are recorded", "others")


def _obs_of(store: Store, record: DatasetRecord) -> pa.Table:
    return store.obs(["nnz", "dataset_id"], value_filter=f"dataset_id == '{record.name}'")
