"""The samples of a corpus in the order of the store: labels as numbers, streamed from obs. Reads no counts.

A sample costs a few bytes here, whatever its labels are called: texts are held once, as codes into a sorted list.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from shards.select import VAL_BATCHES, Chosen, ShardConfig
from txfm_data.hold_out import hold_out

if TYPE_CHECKING:  # a machine that only trains has no tiledbsoma
    from txfm_data.store.protocol import Store

_OWN = (
    "sample_id", "dataset", "panel_id", "library_size", "genes", "counts", "gene_escapes", "count_escapes", "fractions", "batch",
    "soma_joinid",
)  # fmt: skip
"""Columns that blocks have anyway, under these names."""
MAX_TEXTS = 2**20
"""A label with more values than this is an identifier, which blocks do not carry."""
NO_TEXT = -1
"""Code of a text that is missing."""
DTYPES: dict[str, type[np.generic]] = {"string": np.int32, "bool": np.int8, "int64": np.int64, "float64": np.float64}
"""How a value of each type of column is held: texts by code, booleans as -1 (missing), 0 or 1."""


@dataclass(frozen=True)
class Column:
    """One column of obs.

    kind : of `shards.codec.OBS_TYPES`.  values : (n,) of `DTYPES`; a missing float is NaN.
    is_missing : (n,) bool, of int64 alone, where some are.  texts : ascending; codes are positions in it.
    """

    name: str
    kind: str
    values: np.ndarray
    is_missing: np.ndarray | None = None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class SampleTable:
    """Samples of all datasets, one dataset after the other; a position in it names a sample.

    starts : (n_datasets + 1,) int64. Position at which each dataset begins.
    sample_id : (n,) int64, row of the store, ascending within a dataset.
    library_size : (n,) float64.  nnz : (n,) int32, non-zero values over all genes of the store.
    batch : codes.  columns : those that were asked for.
    is_val : (n,) bool.  held_out, val_batches : per dataset, as the manifest says it.
    """

    starts: np.ndarray
    sample_id: np.ndarray
    library_size: np.ndarray
    nnz: np.ndarray
    batch: Column
    columns: tuple[Column, ...]
    is_val: np.ndarray
    held_out: tuple[str, ...]
    val_batches: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.sample_id)

    @property
    def n_bytes(self) -> int:
        """Memory that the arrays take."""
        labels = (self.batch, *self.columns)
        arrays = [self.sample_id, self.library_size, self.nnz, self.is_val]
        arrays += [array for c in labels for array in (c.values, c.is_missing) if array is not None]
        return sum(array.nbytes for array in arrays) + sum(100 * len(c.texts) for c in labels)

    def digest(self) -> str:
        """sha256 over all of it."""
        found = hashlib.sha256()
        for array in (self.starts, self.sample_id, self.library_size, self.nnz, self.is_val):
            found.update(np.ascontiguousarray(array).data)
        for column in (self.batch, *self.columns):
            found.update(repr((column.name, column.kind, column.texts)).encode())
            found.update(np.ascontiguousarray(column.values).data)
            if column.is_missing is not None:
                found.update(np.ascontiguousarray(column.is_missing).data)
        return found.hexdigest()


def read_samples(store: "Store", chosen: Chosen, config: ShardConfig) -> SampleTable:
    """Stream obs and say what is known of each sample.

    Raises
    ------
    ValueError
        If obs lacks a column, a column is of a type that blocks do not carry, or a sample has no batch or library size.
    """
    kinds = obs_kinds(store, config.obs_columns)
    starts, sample_id = _rows(chosen)
    n = len(sample_id)
    library_size, nnz = np.full(n, np.nan), np.zeros(n, np.int32)
    batch = _Filling("batch", "string", n)
    fillings = [_Filling(name, kind, n) for name, kind in kinds.items()]
    n_found = 0
    for part, at, rows in _parts(store, chosen, starts, sample_id, list(kinds)):
        library_size[at] = part["raw_sum"].to_numpy()[rows]
        nnz[at] = part["nnz"].to_numpy()[rows]
        for filling in (batch, *fillings):
            filling.add(part[filling.name], at, rows)
        n_found += len(at)
    if n_found != n:
        raise ValueError(
            f"{store.path}: obs has {n_found} of {n} samples; the store is damaged, restore it from a copy"
        )
    batches = batch.column()
    _check(store, chosen, starts, sample_id, library_size, batches)
    is_val, held_out, val_batches = _hold_out(chosen, config, starts, batches)
    columns = tuple(filling.column() for filling in fillings)
    return SampleTable(starts, sample_id, library_size, nnz, batches, columns, is_val, held_out, val_batches)


def obs_kinds(store: "Store", names: tuple[str, ...]) -> dict[str, str]:
    """Type of each column of obs, of `shards.codec.OBS_TYPES`.

    Raises
    ------
    ValueError
        If blocks cannot carry one, or there is none of that name.
    """
    schema, found = store.obs_schema(), {}
    for name in names:
        if name in _OWN:
            raise ValueError(
                f"--obs {name}: blocks have {'sample_id' if name == 'soma_joinid' else name} anyway; leave it out"
            )
        if name not in schema.names:
            raise ValueError(f"--obs {name}: obs of {store.path} has no such column; it has {schema.names}")
        kind = _kind(schema.field(name).type)
        if kind is None:
            raise ValueError(
                f"--obs {name}: is of type {schema.field(name).type}; blocks carry text, booleans, integers and floats"
            )
        found[name] = kind
    return found


def _kind(found: pa.DataType) -> str | None:
    types = pa.types
    text = found.value_type if types.is_dictionary(found) else found
    if types.is_string(text) or types.is_large_string(text):
        return "string"
    if types.is_boolean(found):
        return "bool"
    if types.is_integer(found) and not types.is_uint64(found):
        return "int64"
    return "float64" if types.is_floating(found) else None


def _rows(chosen: Chosen) -> tuple[np.ndarray, np.ndarray]:
    """Where each dataset begins, and the row of the store of each sample."""
    if chosen.selection is None:
        parts = [np.arange(record.obs_start, record.obs_stop) for record in chosen.records]
    else:
        ids = chosen.selection.sample_id
        cuts = np.searchsorted(ids, [(r.obs_start, r.obs_stop) for r in chosen.records])
        parts = [ids[low:high] for low, high in cuts]
    starts = np.cumsum([0, *map(len, parts)]).astype(np.int64)
    return starts, np.concatenate(parts)


def _parts(
    store: "Store", chosen: Chosen, starts: np.ndarray, sample_id: np.ndarray, columns: list[str]
) -> Iterator[tuple[pa.Table, np.ndarray, np.ndarray]]:
    """Parts of obs, in no promised order: the part, positions of the samples that are taken, and their rows in the part."""
    first = np.array([record.obs_start for record in chosen.records])
    stop = np.array([record.obs_stop for record in chosen.records])
    by_row = np.argsort(first, kind="stable")
    for part in store.obs_parts(["batch", "raw_sum", "nnz", *columns]):
        ids = part["soma_joinid"].to_numpy()
        at = np.searchsorted(first[by_row], ids, side="right") - 1
        number = by_row[np.maximum(at, 0)]
        inside = np.flatnonzero((at >= 0) & (ids < stop[number]))
        if chosen.selection is None:
            yield part, starts[number[inside]] + ids[inside] - first[number[inside]], inside
            continue
        position = np.searchsorted(sample_id, ids[inside])
        is_taken = position < len(sample_id)
        is_taken[is_taken] = sample_id[position[is_taken]] == ids[inside][is_taken]
        yield part, position[is_taken], inside[is_taken]


class _Filling:
    """A column while parts of it come in."""

    def __init__(self, name: str, kind: str, n: int) -> None:
        self.name, self._kind = name, kind
        self._values = np.zeros(n, DTYPES[kind])
        self._is_missing: np.ndarray | None = None
        self._codes: dict[str, int] = {}

    def add(self, part: pa.ChunkedArray, at: np.ndarray, rows: np.ndarray) -> None:
        """Take the rows of a part as the values at positions `at`."""
        for chunk, first in _chunks(part):
            low, high = np.searchsorted(rows, (first, first + len(chunk)))
            self._add(chunk, at[low:high], rows[low:high] - first)

    def _add(self, chunk: pa.Array, at: np.ndarray, rows: np.ndarray) -> None:
        if self._kind == "string":
            self._values[at] = self._encode(chunk)[rows]
        elif self._kind == "bool":
            missing = chunk.is_null().to_numpy(zero_copy_only=False)
            values = chunk.fill_null(False).to_numpy(zero_copy_only=False).astype(np.int8)
            self._values[at] = np.where(missing, -1, values)[rows]
        elif self._kind == "int64":
            self._values[at] = chunk.fill_null(0).to_numpy(zero_copy_only=False)[rows]
            if chunk.null_count:
                if self._is_missing is None:
                    self._is_missing = np.zeros(len(self._values), bool)
                self._is_missing[at] = chunk.is_null().to_numpy(zero_copy_only=False)[rows]
        else:
            self._values[at] = chunk.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False)[rows]

    def _encode(self, chunk: pa.Array) -> np.ndarray:
        if not pa.types.is_dictionary(chunk.type):
            chunk = chunk.dictionary_encode()
        codes = chunk.indices.fill_null(NO_TEXT).to_numpy(zero_copy_only=False).astype(np.int32)
        known = np.full(len(chunk.dictionary) + 1, NO_TEXT, np.int32)  # its last entry is what -1 points at
        there = np.unique(codes[codes >= 0])
        for at, text in zip(there.tolist(), chunk.dictionary.take(pa.array(there)).to_pylist(), strict=True):
            known[at] = NO_TEXT if text is None else self._codes.setdefault(text, len(self._codes))
        if len(self._codes) > MAX_TEXTS:
            raise ValueError(
                f"obs column {self.name!r} has more than {MAX_TEXTS} values; blocks carry labels, not identifiers: leave it out of "
                "--obs (sample_id finds the row of obs)"
            )
        encoded: np.ndarray = known[codes]
        return encoded

    def column(self) -> Column:
        """The whole column; texts ascend, so that codes do not depend on the order in which parts came."""
        if self._kind != "string":
            return Column(self.name, self._kind, self._values, self._is_missing)
        texts = sorted(self._codes)
        code = np.full(len(texts) + 1, NO_TEXT, np.int32)
        code[[self._codes[text] for text in texts]] = np.arange(len(texts), dtype=np.int32)
        return Column(self.name, self._kind, code[self._values], None, tuple(texts))


def _chunks(part: pa.ChunkedArray) -> Iterator[tuple[pa.Array, int]]:
    first = 0
    for chunk in part.chunks:
        yield chunk, first
        first += len(chunk)


def _check(
    store: "Store", chosen: Chosen, starts: np.ndarray, sample_id: np.ndarray, library_size: np.ndarray, batch: Column
) -> None:
    for bad, what in (
        (~(np.isfinite(library_size) & (library_size > 0)), "a library size (raw_sum) that is no positive number"),
        (batch.values == NO_TEXT, "no batch"),
    ):
        if bad.any():
            at = int(np.argmax(bad))
            name = chosen.records[int(np.searchsorted(starts, at, side="right")) - 1].name
            raise ValueError(
                f"{store.path}: sample {sample_id[at]} of dataset {name!r} has {what} ({int(bad.sum())} such); ingest the dataset "
                "again, or leave it out with --datasets"
            )


def _hold_out(
    chosen: Chosen, config: ShardConfig, starts: np.ndarray, batch: Column
) -> tuple[np.ndarray, tuple[str, ...], tuple[tuple[str, ...], ...]]:
    n = len(chosen.records)
    if chosen.selection is not None and chosen.selection.is_val is not None:
        return chosen.selection.is_val, ("selection",) * n, ((),) * n
    share = VAL_BATCHES if config.val_batches is None else config.val_batches
    parts: list[Any] = [
        hold_out(batch.values[low:high], batch.texts, share=share, seed=config.seed)
        for low, high in zip(starts[:-1], starts[1:], strict=True)
    ]
    return np.concatenate([p[0] for p in parts]), tuple(p[1] for p in parts), tuple(p[2] for p in parts)
