"""One block of a source: read rows, check every value, turn columns into genes, write, and say what was found."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from txfm_data import kernels
from txfm_data.matching import NonInteger
from txfm_data.ragged import Ragged
from txfm_data.sources.protocol import Source
from txfm_data.store.protocol import Sink, Values

_LARGEST_COUNT = np.iinfo(np.uint32).max


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of a source; those kept become rows of the store from `first_row`.

    keep : (stop - start,) bool, or None for all.
    """

    start: int
    stop: int
    first_row: int
    keep: np.ndarray | None = None


@dataclass(frozen=True)
class BlockResult:
    """What a block held: per source row, and per gene of the vocabulary over the rows kept.

    row_sum : (n,) float64 over all columns.  nnz : (n,) int64 over the panel.  gene_nnz : (G,) int64.
    total : sum of all values written.
    """

    start: int
    row_sum: np.ndarray
    nnz: np.ndarray
    gene_nnz: np.ndarray
    total: float


@dataclass(frozen=True)
class BlockWork:
    """What is the same for all blocks of a dataset; can be sent to another process.

    key : names this work among all others.  content : hash of the source, which every process must find.
    open : gives the source, in a process that has not got it.  sink : where rows go, or None to look only.
    token : (n_vars,) int64. Gene of the store's vocabulary of each column, -1 where the column is dropped.
    n_genes : of the vocabulary.  dtype : of the store's values.
    """

    key: str
    content: str
    open: Callable[[], Source]
    sink: Sink | None
    token: np.ndarray
    n_genes: int
    dtype: np.dtype[np.generic]
    values: Values
    non_integer: NonInteger

    def __call__(self, block: Block) -> BlockResult:
        """Work on one block."""
        source = _opened(self)
        rows = source.read(block.start, block.stop)
        row_sum, samples = self._to_genes(rows, source, block.start)
        nnz = np.diff(samples.indptr)
        if block.keep is not None and not block.keep.all():
            samples = _keep_rows(samples, block.keep)
        if self.sink is not None:
            self.sink.write(block.first_row, samples)
        gene_nnz = np.bincount(samples.gene_ids, minlength=self.n_genes)
        total = samples.counts.sum(dtype=np.float64 if self.dtype.kind == "f" else np.uint64)
        return BlockResult(block.start, row_sum, nnz, gene_nnz, total.item())

    @contextmanager
    def lend(self, source: Source) -> Iterator[None]:
        """Let blocks worked on in this process use the source that is open already."""
        _kept_open[self.key] = source
        try:
            yield
        finally:
            del _kept_open[self.key]

    def _to_genes(self, rows: sp.csr_matrix, source: Source, start: int) -> tuple[np.ndarray, Ragged]:
        """Sums of the rows, and the rows over the vocabulary: columns of one gene summed, genes ascending."""
        is_whole = self.values == "counts" and self.non_integer == "error"
        largest = _LARGEST_COUNT if self.values == "counts" else np.finfo(np.float64).max
        row_sum, indptr = np.empty(rows.shape[0]), np.empty(rows.shape[0] + 1, np.int64)
        genes, values = np.empty(rows.nnz, np.uint16), np.empty(rows.nnz, self.dtype if is_whole else np.float64)
        first_bad, is_sorted = kernels.gather_genes(
            rows.indptr, rows.indices, rows.data, self.token, float(largest), is_whole, indptr, genes, values, row_sum
        )
        if first_bad >= 0:
            check_counts(rows, source, start, values=self.values, non_integer=self.non_integer)
        samples = Ragged(indptr, genes[: indptr[-1]], values[: indptr[-1]])
        if not is_sorted:
            samples = _sorted(samples, self.n_genes)
        if self.dtype.kind != "f":
            samples = self._whole(samples, source)
        return row_sum, samples

    def _whole(self, samples: Ragged, source: Source) -> Ragged:
        values = samples.counts
        if values.dtype == self.dtype:
            return samples
        if samples.nnz and values.max() > _LARGEST_COUNT:
            raise ValueError(f"{source.where}: summed duplicate columns pass {_LARGEST_COUNT}; pass --duplicates first")
        if (np.floor(values) != values).any():
            raise ValueError(
                f"{source.where}: {source.matrix_name} holds values that are not whole, but the store keeps whole counts "
                "(uint32); make a store that holds both: txfm store convert STORE NEW --dtype float64"
            )
        return Ragged(samples.indptr, samples.gene_ids, values.astype(self.dtype))


def _sorted(samples: Ragged, n_genes: int) -> Ragged:
    """The same samples with ascending genes, each once; sums are exact in float64 up to 2**53."""
    shape = (len(samples), n_genes)
    out = sp.csr_matrix(
        (samples.counts.astype(np.float64), samples.gene_ids.astype(np.int32), samples.indptr), shape=shape
    )
    out.sum_duplicates()
    return Ragged(out.indptr.astype(np.int64), out.indices.astype(np.uint16), out.data)


def _keep_rows(samples: Ragged, keep: np.ndarray) -> Ragged:
    lengths = np.diff(samples.indptr)
    values = np.repeat(keep, lengths)
    indptr = np.concatenate([[0], np.cumsum(lengths[keep])]).astype(np.int64)
    return Ragged(indptr, samples.gene_ids[values], samples.counts[values])


_kept_open: dict[str, Source] = {}


def _opened(work: BlockWork) -> Source:
    """The source of some work; a process keeps the last one open, since opening reads labels and genes."""
    if work.key not in _kept_open:
        for old in _kept_open.values():
            old.close()
        _kept_open.clear()
        source = work.open()
        if source.content_sha256() != work.content:
            source.close()
            raise ValueError(
                f"{source.where}: other contents on a worker than where the ingest began; workers must see the same files, "
                "at the same paths"
            )
        _kept_open[work.key] = source
    return _kept_open[work.key]


def check_counts(
    rows: sp.csr_matrix, source: Source, start: int, *, values: Values = "counts", non_integer: NonInteger = "error"
) -> None:
    """Refuse values that are not what the user says they are, naming the first one.

    rows : of the source, from row `start`.

    Raises
    ------
    ValueError
        On NaN, infinite or negative values; on counts that are not whole, unless `non_integer` is "ok"; on counts that a
        uint32 cannot hold.
    """
    data = rows.data
    hint = source.matrix_hint
    other = f": {hint}" if hint else ""
    checks = [
        (~np.isfinite(data), "is not a finite number", "repair the file"),
        (
            data < 0,
            "is negative",
            f"raw counts are never negative{other}",
        ),
    ]
    if values == "counts" and non_integer == "error":
        checks.append(
            (
                np.floor(data) != data,
                "is not a whole number",
                f"these look like normalised values{other}; if these are expected counts (RSEM), pass --non-integer ok; if "
                "they are normalised, --values normalized",
            )
        )
    if values == "counts":
        too_large = f"is above the largest count a store holds ({_LARGEST_COUNT})"
        checks.append((data > _LARGEST_COUNT, too_large, "check the units of the file"))
    for bad, what, remedy in checks:
        if bad.any():
            first = int(np.argmax(bad))
            row = int(np.searchsorted(rows.indptr, first, side="right")) - 1
            sample = source.obs(start + row, start + row + 1).index[0]
            gene = source.gene_ids[rows.indices[first]]
            raise ValueError(
                f"{source.where}: {source.matrix_name} holds {data[first]} for sample {sample!r} (row {start + row}), gene "
                f"{gene!r}, which {what}; {int(bad.sum())} such values in this part of the file; {remedy}"
            )
