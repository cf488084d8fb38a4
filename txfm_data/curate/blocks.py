"""The counts of a dataset in blocks of rows, which do not depend on how many workers there are."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from txfm_data.ragged import Ragged
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.protocol import Store

BLOCK_ROWS = 8_192
"""Rows of one task. Sums of floats are taken block by block in this order, so it is part of what a seed means."""
_READ_ROWS = 1_024
_READ_VALUES = 1_800_000
"""Non-zeros of one part, about: one round reads them, since their coordinates fit TileDB's 16 MiB buffers (`layout.context`)."""
_GAP = 1_024
"""Rows that nobody wants, in a row, which a scan leaves out."""
_SPARSE = 0.04
"""Below this share of wanted rows a block is gathered in place of scanned: with fewer, both backends are faster so."""


@dataclass(frozen=True)
class RowBlock:
    """Rows of one dataset that one task reads.

    number : of the block in its dataset.  rows : sample ids that are wanted, int64, ascending.
    """

    number: int
    rows: np.ndarray


def blocks_of(record: DatasetRecord, rows: np.ndarray) -> list[RowBlock]:
    """Cut the wanted rows of a dataset at every `BLOCK_ROWS` rows of the dataset; blocks without any are left out.

    rows : (n,) int64, ascending sample ids of the dataset.
    """
    edges = np.arange(record.obs_start, record.obs_stop + BLOCK_ROWS, BLOCK_ROWS)
    cuts = np.searchsorted(rows, edges)
    parts = [
        RowBlock(number, rows[low:high]) for number, (low, high) in enumerate(zip(cuts[:-1], cuts[1:], strict=True))
    ]
    return [part for part in parts if len(part.rows)]


def read_block(store: Store, block: RowBlock) -> Iterator[tuple[np.ndarray, Ragged]]:
    """Counts of the wanted rows, in parts of bounded memory: (their sample ids, their ragged samples), in order."""
    for ids, at, samples in scan_block(store, block):
        yield ids, samples if len(at) == len(samples) else _take(samples, at)


def scan_block(
    store: Store, block: RowBlock, *, genes_only: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray, Ragged]]:
    """As `read_block`, without a copy of the wanted samples alone: (sample ids, their places in the part, the part).

    genes_only : only the genes matter, and the counts may be 1 (`Store.scan_genes`).
    """
    if len(block.rows) < _SPARSE * _n_spanned(block):
        yield block.rows, np.arange(len(block.rows)), store.read_rows(block.rows)
        return
    rows = _rows_of_part(store, int(block.rows[0]))
    for run in _runs(block.rows):
        first, last = int(run[0]), int(run[-1]) + 1
        parts = store.scan_genes(first, last, rows=rows) if genes_only else store.scan(first, last, rows=rows)
        for start, samples in parts:
            low, high = np.searchsorted(run, (start, start + len(samples)))
            if low < high:
                yield run[low:high], run[low:high] - start, samples


def cost_of(block: RowBlock) -> float:
    """What reading the block takes, in rows of a scan."""
    return min(_n_spanned(block), len(block.rows) / _SPARSE)


def _n_spanned(block: RowBlock) -> int:
    """Rows that a scan of the block reads: the wanted ones, and the others between them."""
    return sum(int(run[-1] - run[0]) + 1 for run in _runs(block.rows))


def _runs(rows: np.ndarray) -> list[np.ndarray]:
    """Ascending rows, cut where more than `_GAP` are missing."""
    return np.split(rows, np.flatnonzero(np.diff(rows) > _GAP) + 1)


def _rows_of_part(store: Store, row: int) -> int:
    """Rows to read at once in the dataset of a row, by how many non-zeros its samples have."""
    record = next(record for record in store.datasets if record.obs_start <= row < record.obs_stop)
    return min(_READ_ROWS, max(1, _READ_VALUES * record.n_obs // max(1, record.nnz)))


def _take(samples: Ragged, at: np.ndarray) -> Ragged:
    """Some of the samples, by ascending position."""
    is_wanted = np.zeros(len(samples), bool)
    is_wanted[at] = True
    lengths = np.diff(samples.indptr)
    entries = np.repeat(is_wanted, lengths)
    indptr = np.concatenate([[0], np.cumsum(lengths[is_wanted])]).astype(np.int64)
    return Ragged(indptr, samples.gene_ids[entries], samples.counts[entries])


def version_of(store: Store) -> str:
    """A sha256 of the ledger of a store and its genes: another one once a dataset is added, or the store is made anew."""
    ledger = "\n".join([store.backend, store.vocabulary.fingerprint, *map(repr, store.datasets)])
    return hashlib.sha256(ledger.encode()).hexdigest()


@lru_cache(maxsize=2)
def opened(path: str, version: str) -> Store:
    """A store for tasks of this process, opened once.

    version : of the store when the task was made (`version_of`), so that one that has changed since is opened anew.
    """
    from txfm_data.store.opening import open_store

    return open_store(path)
