"""One store into another: the other backend, another type of values, fewer datasets, or onto another's end."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from txfm_data.address import redact
from txfm_data.progress import Progress, ignore
from txfm_data.store import opening
from txfm_data.store.append import NewDataset, appending
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.protocol import Store

_ROWS = 8_192
"""Rows of one part in memory, and of one fragment of a SOMA target."""


def copy_datasets(
    source: str | Path,
    target: str | Path,
    *,
    datasets: Sequence[str] = (),
    backend: str | None = None,
    dtype: str | None = None,
    progress: Progress = ignore,
) -> dict[str, Any]:
    """Append datasets of one store to another, which is made if it is not there. Each dataset is all or nothing.

    datasets : names; all if empty. One that the target holds already, with the same contents, is left as it is.
    backend : of a target that this call makes; by default the one that the source has not.
    dtype : of its values, "uint32" or "float64"; by default the source's.

    Returns
    -------
    dict
        source, target, backend, copied (names), there_already (names), n_obs, n_vars.

    Raises
    ------
    FileNotFoundError, ValueError
        If the source is no store, a dataset is unknown, or the target would not take it. Says which datasets are in the
        target already, if there are any, and how to go on.
    """
    store = opening.open_store(source)
    records = [store.dataset(name) for name in datasets] or list(store.datasets)
    if not records:
        raise ValueError(f"{store.path}: the store holds no dataset; nothing to copy")
    if dtype not in (None, "uint32", "float64"):
        raise ValueError(f"--dtype must be uint32 or float64, got {dtype!r}")
    kind = np.dtype(dtype) if dtype is not None else store.dtype
    backend = backend or ("soma" if store.backend == "zarr" else "zarr")
    there = _there_already(target, records)
    done, total = 0, sum(record.n_obs for record in records)
    copied: list[str] = []
    for record in records:
        if record.name not in there:
            with _saying_what_is_in(target, copied):
                _copy(store, record, target, backend, kind, lambda n, before=done: progress(before + n, total))
            copied.append(record.name)
        done += record.n_obs
    result = opening.open_store(target)
    return {
        "source": store.path, "target": result.path, "backend": result.backend, "copied": copied, "there_already": sorted(there),
        "n_obs": result.n_obs, "n_vars": len(result.vocabulary),
    }  # fmt: skip


@contextmanager
def _saying_what_is_in(target: str | Path, copied: Sequence[str]) -> Iterator[None]:
    """Let an error name the datasets that were copied before it, since each is committed by itself."""
    try:
        yield
    except (ValueError, OSError) as error:
        if not copied:
            raise
        where = redact(str(target))
        kinds = (FileNotFoundError, PermissionError, ConnectionError, OSError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), ValueError)
        raise kind(
            f"{redact(str(error))}. In {where} already, each whole: {', '.join(copied)}; those that can be copied are added by: "
            f"txfm store append SOURCE {where} --datasets NAME…; or remove {where}"
        ) from error


def _there_already(target: str | Path, records: Sequence[DatasetRecord]) -> set[str]:
    if not opening.exists(target):
        return set()
    known = {record.name: record.content_sha256 for record in opening.open_store(target).datasets}
    return {record.name for record in records if known.get(record.name) == record.content_sha256}


def _copy(
    store: Store, record: DatasetRecord, target: str | Path, backend: str, dtype: np.dtype[Any], progress: Any
) -> None:
    panel, gene_nnz = store.panel(record), store.gene_nnz(record)
    ids, symbols = store.vocabulary.gene_ids, store.vocabulary.symbols
    new = NewDataset(
        name=record.name, gene_ids=tuple(ids[t] for t in panel), symbols=tuple(symbols[t] for t in panel),
        values=record.values, modality=record.modality, source=record.source, content_sha256=record.content_sha256,
        dtype=dtype, backend=backend,
    )  # fmt: skip
    with appending(target, new, record.n_obs) as append:
        token = np.zeros(len(ids), np.int64)
        token[panel] = append.tokens
        for low, part in store.scan(record.obs_start, record.obs_stop, rows=_ROWS):
            with np.errstate(invalid="ignore"):  # what does not fit differs, and is refused below
                whole = part.counts.astype(append.dtype)
            if not np.array_equal(whole, part.counts):
                raise ValueError(
                    f"{store.path}: dataset {record.name!r} holds values that are not whole, the target keeps uint32; "
                    "copy it into a store of its own, with --dtype float64"
                )
            append.sink.write(append.first_row + low - record.obs_start, _renamed(part, token, whole))
            progress(low + len(part) - record.obs_start)
        nnz = np.zeros(append.n_genes, np.int64)
        nnz[append.tokens] = gene_nnz[panel]
        schema = _union(_target_schema(target), store.obs_schema())
        append.commit(
            gene_nnz=nnz, nnz=record.nnz, total=record.total, obs_schema=schema, obs=_obs(store, record, schema)
        )


def _renamed(part: Any, token: np.ndarray, counts: np.ndarray) -> Any:
    """Samples over the target's genes, ascending again."""
    from txfm_data.ragged import Ragged

    genes = token[part.gene_ids]
    rows = np.repeat(np.arange(len(part)), np.diff(part.indptr))
    order = np.argsort(rows * (1 << 16) + genes, kind="stable")
    return Ragged(part.indptr, genes[order].astype(np.uint16), counts[order])


def _target_schema(target: str | Path) -> pa.Schema:
    return opening.open_store(target).obs_schema() if opening.exists(target) else opening.OBS_SCHEMA


def _union(first: pa.Schema, second: pa.Schema) -> pa.Schema:
    fields = list(first)
    for field in second:
        if field.name not in first.names:
            fields.append(field)
        elif first.field(field.name).type != field.type:
            raise ValueError(
                f"the two stores' label {field.name!r} is {first.field(field.name).type} in one, {field.type} in the other; "
                "copy into a store of its own"
            )
    return pa.schema(fields)


def _obs(store: Store, record: DatasetRecord, schema: pa.Schema) -> list[pa.Table]:
    rows = store.obs(value_filter=f"dataset_id == '{record.name}'")
    fields = [field for field in schema if field.name != "soma_joinid"]
    arrays = [rows[f.name] if f.name in rows.column_names else pa.nulls(len(rows), f.type) for f in fields]
    return [pa.Table.from_arrays(arrays, schema=pa.schema(fields))]
