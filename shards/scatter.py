"""Pass 1 of the shuffle: a range of the store is read once, packed, summed up, and spilled in the order of the shuffle.

Tasks are cut by what the store holds, not by workers or memory, so their sums add up to the same in any setting.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from shards import packing, spill
from shards.buffers import BufferPool
from shards.order import SHUFFLE, sort_keys
from shards.spill import Field, Spill
from txfm_data.ragged import Ragged

if TYPE_CHECKING:  # a machine that only trains has no tiledbsoma
    from txfm_data.store.ledger import DatasetRecord
    from txfm_data.store.protocol import Store

_SCAN_VALUES = 2_000_000
"""Values read at once: as many as fit the buffers of a SOMA store, which take some tens of MiB."""
_LOGARITHMS = 32
"""Counts below this have their logarithm from a table, made once a sample; nearly all are."""


@dataclass(frozen=True)
class ReadTask:
    """Samples of one dataset to spill, in the order of the store.

    number : of the task.  dataset, name : number in the manifest, and its name.
    panel : (P,) uint16, token ids of the new vocabulary.
    first_train, first_val : position in its split of the first train and the first val sample.
    sample_id, library_size, nnz, is_val : (n,) as in `SampleTable`.  labels : one array a field, of missing ones after it.
    """

    number: int
    dataset: int
    name: str
    panel: np.ndarray
    first_train: int
    first_val: int
    sample_id: np.ndarray
    library_size: np.ndarray
    nnz: np.ndarray
    is_val: np.ndarray
    labels: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Scatter:
    """Work of pass 1; can be sent to another process.

    key : names this build among all others.  store : its address.  datasets : of the store, which every process must find.
    store_tokens : (G,) int64, token in the store of each gene of the new vocabulary.
    fields : labels of a sample.  cuts : per split, (n_shards,) uint64, key at which each shard begins.
    folder : where spills go.
    """

    key: str
    store: str
    datasets: "tuple[DatasetRecord, ...]"
    store_tokens: np.ndarray
    fields: tuple[Field, ...]
    cuts: tuple[np.ndarray, np.ndarray]
    seed: int
    target_sum: float
    folder: Path

    def __call__(self, task: ReadTask) -> tuple[int, int]:
        """Spill one task; its number and samples."""
        store, buffers = _opened(self)
        bound = _values_bound(task, store.dtype.kind == "f")
        records = np.zeros(len(task.sample_id), spill.record_type(self.fields))
        values = buffers.take(int(bound), np.uint64)
        sums = np.zeros((3, len(self.store_tokens)))
        token = np.full(len(store.vocabulary), -1, np.int32)
        token[self.store_tokens[task.panel]] = task.panel
        starts, at = np.empty(len(records), np.int64), 0
        for low, part in _read(store, task.sample_id, task.nnz):
            rows = slice(low, low + len(part))
            kept = _restrict(part, token, buffers)
            _sum(kept, task, rows, self.target_sum, sums)
            packed = packing.pack(kept)
            spill.set_lengths(records[rows], packed)
            words = spill.n_words(records[rows])
            starts[rows] = at + np.cumsum(words) - words
            n = int(words.sum())
            if at + n > len(values):  # obs counted fewer values than there are
                raise ValueError(
                    f"{self.store}: dataset {task.name!r} has more values than its obs says; the store is damaged, restore it "
                    "from a copy"
                )
            spill.lay(packed, words, values[at : at + n])
            at += n
        self._fill(records, task)
        order = _order(records["key"], task.is_val)
        out, checks = buffers.take(at, np.uint64)[:at], np.empty(len(records), np.uint64)
        spill.arrange(values[:at], starts, spill.n_words(records), order, out, checks)
        records = records[order]
        records["check"] = checks
        n_train = len(records) - int(task.is_val.sum())
        path = spill.spill_path(self.folder, task.number)
        spill.write_spill(path, out, records, sums[:, task.panel], n_train, self.cuts)
        return task.number, len(records)

    @contextmanager
    def lend(self, store: "Store") -> Iterator[None]:
        """Let tasks worked on in this process use the store that is open already."""
        _kept_open[self.key] = (store, BufferPool())
        try:
            yield
        finally:
            _kept_open.pop(self.key, None)

    def _fill(self, records: np.ndarray, task: ReadTask) -> None:
        """All of the records that does not come from the counts."""
        records["sample_id"], records["library_size"] = task.sample_id, task.library_size
        records["dataset"] = task.dataset
        labels = iter(task.labels)
        for at, field in enumerate(self.fields):
            records[f"label{at}"] = next(labels)
            if field.has_missing:
                records[f"missing{at}"] = next(labels)
        for is_val, first in ((False, task.first_train), (True, task.first_val)):
            rows = np.flatnonzero(task.is_val == is_val)
            keys = sort_keys(first, first + len(rows), seed=self.seed, item=SHUFFLE + is_val)
            records["key"][rows] = keys


def _values_bound(task: ReadTask, is_real: bool) -> int:
    """Words that the values of a task take at most."""
    return int(sample_bytes(task.nnz, task.library_size, is_real=is_real).sum()) // spill.WORD + len(task.nnz)


def sample_bytes(nnz: np.ndarray, library_size: np.ndarray, *, is_real: bool) -> np.ndarray:
    """Bytes that the packed values of each sample take at most, (n,) float64.

    Every value takes two. A gap of 255 genes or more takes two further ones, and there are few in 65,536 genes; a count
    above 255 takes four, and there are few in a small library; `is_real`: a value that is not whole takes eight.
    """
    nnz = nnz.astype(np.float64)
    most: np.ndarray = nnz * (10 if is_real else 2) + 2 * np.minimum(nnz, 257) + 4 * np.minimum(nnz, library_size / 256)
    return most


def _order(keys: np.ndarray, is_val: np.ndarray) -> np.ndarray:
    """Train samples by key, then val samples by key."""
    parts = []
    for split in (False, True):
        rows = np.flatnonzero(is_val == split)
        parts.append(rows[np.argsort(keys[rows], kind="stable")])
    return np.concatenate(parts)


def _read(store: "Store", sample_id: np.ndarray, nnz: np.ndarray) -> Iterator[tuple[int, Ragged]]:
    """Samples of ascending ids in parts of bounded size, each with the position of its first."""
    rows = int(min(1_024, max(16, _SCAN_VALUES // max(1.0, float(nnz.mean())))))
    first, last = int(sample_id[0]), int(sample_id[-1])
    if last - first + 1 == len(sample_id):
        for row, part in store.scan(first, last + 1, rows=rows):
            yield row - first, part
        return
    for low in range(0, len(sample_id), rows):
        yield low, store.read_rows(sample_id[low : low + rows])


@njit(nogil=True, cache=True)
def _keep_genes(indptr, gene_ids, counts, token, out_indptr, out_genes, out_counts):  # type: ignore[no-untyped-def]
    k = np.uint64(0)
    out_indptr[0] = 0
    for b in range(indptr.shape[0] - 1):
        ids, values = gene_ids[indptr[b] : indptr[b + 1]], counts[indptr[b] : indptr[b + 1]]
        for i in range(ids.shape[0]):
            gene = token[ids[i]]
            # Written before it is known to stay: there is no branch, and the next one takes its place if it goes
            out_genes[k] = gene
            out_counts[k] = values[i]
            k += np.uint64(gene >= 0)
        out_indptr[b + 1] = k


def _restrict(part: Ragged, token: np.ndarray, buffers: BufferPool) -> Ragged:
    """The same samples over the kept genes; `token` is the new id of each old one, -1 where it goes."""
    indptr = np.empty(len(part) + 1, np.int64)
    genes = buffers.take(part.nnz + 1, np.uint16)
    counts = buffers.take(part.nnz + 1, part.counts.dtype)
    _keep_genes(part.indptr, part.gene_ids, part.counts, token, indptr, genes, counts)
    return Ragged(indptr, genes[: indptr[-1]], counts[: indptr[-1]])


@njit(nogil=True, cache=True)
def _add(indptr, gene_ids, counts, rows, scale, table, n_nonzero, total, log_sum):  # type: ignore[no-untyped-def]
    """Add samples to the sums of each gene: number above zero, normalised counts, their ln(1 + x)."""
    for r in range(rows.shape[0]):
        b = rows[r]
        ids, values = gene_ids[indptr[b] : indptr[b + 1]], counts[indptr[b] : indptr[b + 1]]
        for c in range(table.shape[0]):
            table[c] = np.log1p(c * scale[r])
        for i in range(ids.shape[0]):
            gene, value = ids[i], values[i]
            n_nonzero[gene] += 1.0
            total[gene] += value * scale[r]
            small = np.uint64(value)
            if value < table.shape[0] and small == value:
                log_sum[gene] += table[small]
            else:
                log_sum[gene] += np.log1p(value * scale[r])


def _sum(kept: Ragged, task: ReadTask, part: slice, target_sum: float, sums: np.ndarray) -> None:
    rows = np.flatnonzero(~task.is_val[part])
    scale = target_sum / task.library_size[part][rows]
    _add(kept.indptr, kept.gene_ids, kept.counts, rows, scale, np.empty(_LOGARITHMS), *sums)


_kept_open: "dict[str, tuple[Store, BufferPool]]" = {}


def _opened(work: Scatter) -> "tuple[Store, BufferPool]":
    """The store of some work and buffers for it; a process keeps the last one open."""
    if work.key not in _kept_open:
        from txfm_data.store.opening import open_store

        _kept_open.clear()
        store = open_store(work.store)
        if store.datasets[: len(work.datasets)] != work.datasets:
            raise ValueError(
                f"{store.path}: other datasets on a worker than where the build began; workers must see the same store, at "
                "the same address"
            )
        _kept_open[work.key] = (store, BufferPool())
    return _kept_open[work.key]


def pending(folder: Path, n_tasks: int) -> tuple[list[int], dict[int, Spill]]:
    """Tasks that have no finished spill yet, and the spills of the others."""
    there = {}
    for number in range(n_tasks):
        found = spill.finished_spill(spill.spill_path(folder, number))
        if found is not None:
            there[number] = found
    return [number for number in range(n_tasks) if number not in there], there
