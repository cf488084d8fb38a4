"""Principal components of a dataset's log1p counts in two passes over the store, the values never dense nor all in memory.

x = ln(1 + 1e5 c / raw_sum) over the genes of the panel, centred and not scaled. The first pass finds a basis, the second
projects on it, and the projections are turned to their principal axes. Small panels have their covariance computed, and their
components are exact; for larger ones the basis is the range of C Omega, with C the covariance (Halko, Martinsson and Tropp
2011), so that a row costs its non-zero genes times the basis' width. Omega is the leading subspace of a few thousand rows spread
over the dataset: from a random one the components of shallow counts, whose variance falls slowly, would be far off.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numba import njit

from txfm_data.curate.blocks import BLOCK_ROWS, RowBlock, blocks_of, opened, read_block, version_of
from txfm_data.curate.rows import RowFile, library_sizes
from txfm_data.curate.state import Context
from txfm_data.parallel import Pool
from txfm_data.progress import Progress
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.protocol import Store

T = TypeVar("T")
TARGET_SUM = 1e5
"""Counts that each sample is scaled to before the logarithm (paper, section 3)."""
EXACT_GENES = 2_000
"""Up to so many genes the covariance itself is computed."""
_LEAST_SKETCH = 64
_ROTATED_ROWS = 8_192
_PILOT_ROWS, _PILOT_RUN, _PILOT_NNZ, _PILOT_ROUNDS = 4_096, 64, 2**24, 5
"""Rows that Omega is found on, in runs of neighbours, no more than have so many values; rounds of subspace iteration on them."""


def sketch_width(n_components: int, n_genes: int, n_samples: int) -> int:
    """Columns of the random basis: twice the components and ten, at least 64, never more than the data's rank can be."""
    return min(max(2 * n_components + 10, _LEAST_SKETCH), n_genes, n_samples)


def most_components(n_genes: int, n_samples: int) -> int:
    """How many components so many genes and samples can have at most, once they are centred."""
    return max(0, min(n_genes, n_samples - 1))


def check_components(n_components: int, n_genes: int, n_samples: int, where: str) -> None:
    """Refuse more components than there can be.

    Raises
    ------
    ValueError
        Names the most.
    """
    most = most_components(n_genes, n_samples)
    if n_components > most:
        raise ValueError(
            f"{where}: n_components is {n_components}, but {n_samples:,} samples and {n_genes:,} genes have at most {most}; "
            "lower it"
        )


@njit(nogil=True, cache=True)
def log1p_columns(indptr, gene_ids, counts, place, size, target_sum, out_indptr, out_columns, out_values):  # type: ignore[no-untyped-def]
    """Values ln(1 + L c / size) of the genes that have a place, in the order they come.

    indptr : (n + 1,) int64.  gene_ids : (nnz,).  counts : (nnz,).  place : (G,) int32, column of each gene or -1.
    size : (n,) float64.  target_sum : L.
    out_indptr : (n + 1,) int64.  out_columns : (nnz,) int32.  out_values : (nnz,) float32. Filled from the start.
    """
    at = 0
    out_indptr[0] = 0
    for i in range(indptr.shape[0] - 1):
        scale = target_sum / size[i]
        for j in range(indptr[i], indptr[i + 1]):
            column = place[gene_ids[j]]
            if column >= 0:
                out_columns[at] = column
                out_values[at] = np.float32(np.log1p(counts[j] * scale))
                at += 1
        out_indptr[i + 1] = at


@njit(nogil=True, cache=True)
def add_gram(indptr, columns, values, sum_P, gram_PP):  # type: ignore[no-untyped-def]
    """Add rows x to the sums of x and of x x^T, the latter above and on the diagonal only.

    indptr, columns, values : rows as of `log1p_columns`, columns ascending in each.  sum_P, gram_PP : float64.
    """
    for i in range(indptr.shape[0] - 1):
        for j in range(indptr[i], indptr[i + 1]):
            x = np.float64(values[j])
            into = gram_PP[columns[j]]
            sum_P[columns[j]] += x
            for k in range(j, indptr[i + 1]):
                into[columns[k]] += x * values[k]


@njit(nogil=True, cache=True)
def add_sketch(indptr, columns, values, omega_PW, sum_P, sketch_PW, z_W):  # type: ignore[no-untyped-def]
    """Add rows x to the sums of x and of x (x Omega).

    indptr, columns, values : rows as of `log1p_columns`.  omega_PW, sketch_PW : float32.  sum_P : float64.  z_W : float32, scratch.
    """
    W = z_W.shape[0]
    for i in range(indptr.shape[0] - 1):
        z_W[:] = np.float32(0)
        for j in range(indptr[i], indptr[i + 1]):
            x, row = values[j], omega_PW[columns[j]]
            for w in range(W):
                z_W[w] += x * row[w]
        for j in range(indptr[i], indptr[i + 1]):
            x, into = values[j], sketch_PW[columns[j]]
            sum_P[columns[j]] += x
            for w in range(W):
                into[w] += x * z_W[w]


@njit(nogil=True, cache=True)
def project(indptr, columns, values, basis_PW, offset_W, z_W, out_BW):  # type: ignore[no-untyped-def]
    """Products of rows with a basis, less an offset, summed in float64.

    indptr, columns, values : rows as of `log1p_columns`.  basis_PW : float32.  offset_W : float64.  z_W : float64, scratch.
    out_BW : float32.
    """
    W = z_W.shape[0]
    for i in range(indptr.shape[0] - 1):
        for w in range(W):
            z_W[w] = -offset_W[w]
        for j in range(indptr[i], indptr[i + 1]):
            x, row = np.float64(values[j]), basis_PW[columns[j]]
            for w in range(W):
                z_W[w] += x * row[w]
        for w in range(W):
            out_BW[i, w] = np.float32(z_W[w])


@dataclass(frozen=True)
class _Task:
    """Rows of one block. start : of the first among all rows.  sizes : (n,) float64."""

    start: int
    block: RowBlock
    sizes: np.ndarray


@dataclass(frozen=True)
class _Rows:
    """Reads log1p values of a block. path, version : of the store.  panel : (P,) ascending tokens of it."""

    path: str
    version: str
    panel: np.ndarray

    def parts(self, task: _Task) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """CSR arrays (indptr, columns, values) of consecutive rows of the task."""
        store = opened(self.path, self.version)
        place = np.full(len(store.vocabulary), -1, np.int32)
        place[self.panel] = np.arange(len(self.panel), dtype=np.int32)
        at = 0
        for ids, samples in read_block(store, task.block):
            indptr = np.empty(len(ids) + 1, np.int64)
            columns, values = np.empty(samples.nnz, np.int32), np.empty(samples.nnz, np.float32)
            log1p_columns(
                samples.indptr, samples.gene_ids, samples.counts, place, task.sizes[at : at + len(ids)], TARGET_SUM,
                indptr, columns, values,
            )  # fmt: skip
            at += len(ids)
            yield indptr, columns, values


@dataclass(frozen=True)
class _Sums:
    """First pass over a block: sums of x, and of x (x Omega), or of x x^T where there is no Omega."""

    rows: _Rows
    omega_PW: np.ndarray | None

    def __call__(self, task: _Task) -> tuple[_Task, tuple[np.ndarray, np.ndarray]]:
        n_genes = len(self.rows.panel)
        sum_P = np.zeros(n_genes)
        if self.omega_PW is None:
            products = np.zeros((n_genes, n_genes))
            for part in self.rows.parts(task):
                add_gram(*part, sum_P, products)
            return task, (sum_P, products)
        products, z_W = np.zeros_like(self.omega_PW), np.empty(self.omega_PW.shape[1], np.float32)
        for part in self.rows.parts(task):
            add_sketch(*part, self.omega_PW, sum_P, products, z_W)
        return task, (sum_P, products)


@dataclass(frozen=True)
class _Project:
    """Second pass over a block: its centred rows in the basis, (n, W) float32."""

    rows: _Rows
    basis_PW: np.ndarray
    offset_W: np.ndarray

    def __call__(self, task: _Task) -> tuple[_Task, np.ndarray]:
        out_BW = np.empty((len(task.block.rows), len(self.offset_W)), np.float32)
        z_W, at = np.empty(len(self.offset_W)), 0
        for indptr, columns, values in self.rows.parts(task):
            n = len(indptr) - 1
            project(indptr, columns, values, self.basis_PW, self.offset_W, z_W, out_BW[at : at + n])
            at += n
        return task, out_BW


def _in_order(
    pool: Pool, work: Callable[[_Task], tuple[_Task, T]], tasks: list[_Task], window: int
) -> Iterator[tuple[_Task, T]]:
    """Give results in the order of the rows, since sums of floats depend on theirs.

    window : tasks that are handed out at a time. However late the first of them is, no more results wait for it.
    """
    for low in range(0, len(tasks), window):
        part, held = tasks[low : low + window], dict[int, tuple[_Task, T]]()
        following = iter(part)
        due = next(following).start
        for task, result in pool.run(work, part):
            held[task.start] = (task, result)
            while due in held:
                yield held.pop(due)
                due = next((task.start for task in following), -1)


def streaming_pca(
    store: Store,
    record: DatasetRecord,
    rows: np.ndarray,
    panel: np.ndarray,
    out: Path,
    n_components: int,
    context: Context,
) -> None:
    """Write the principal component scores of some samples of a dataset.

    Two runs, in this process or with workers, write the same bytes. Counts are read twice, a few thousand rows once more. Memory is
    that of three arrays of genes times the basis' width, of four more for each worker, of the few thousand rows (at most
    128 MiB), and of 17 bytes for each sample. Where more is allowed, more blocks are handed out at a time.

    Parameters
    ----------
    rows
        (n,) int64, ascending sample ids.
    panel
        (P,) int64, ascending tokens of the store: the genes that count, zero where a sample has no count of them.
    out
        .npy file to write, (n, n_components) float32; columns in the order of their variance, each with the sign that makes
        its largest loading positive.

    Raises
    ------
    ValueError
        If there are fewer components, a sample has no library size, or the memory does not do.
    """
    where = f"PCA of dataset {record.name!r}"
    check_components(n_components, len(panel), len(rows), where)
    width = _width(n_components, len(panel), len(rows))
    windows = _windows(width, n_components, len(panel), len(rows), context, where)
    sizes, at = library_sizes(store, record, rows), 0
    tasks = []
    for block in blocks_of(record, rows):
        tasks.append(_Task(at, block, sizes[at : at + len(block.rows)]))
        at += len(block.rows)
    reader = _Rows(store.path, version_of(store), panel)
    progress = context.progress(where)
    progress(0, 2 * len(rows))
    mean_P, basis_PW = _find_basis(reader, tasks, n_components, width, record, context, progress, windows[0])
    work = _Project(reader, basis_PW.astype(np.float32), mean_P @ basis_PW)
    W = basis_PW.shape[1]
    with tempfile.TemporaryFile(dir=out.parent) as scores:
        sum_W, square_WW = np.zeros(W), np.zeros((W, W))
        for task, part_BW in _in_order(context.pool, work, tasks, windows[1]):
            scores.write(part_BW.data)
            part_BW = part_BW.astype(np.float64)
            sum_W += part_BW.sum(axis=0)
            square_WW += part_BW.T @ part_BW
            progress(len(rows) + task.start + len(part_BW), 2 * len(rows))
        axes_WK = _rotation(sum_W, square_WW, len(rows), n_components, basis_PW)
        scores.seek(0)
        with RowFile(out, rows, n_components, where) as file:
            for start in range(0, len(rows), _ROTATED_ROWS):
                stop = min(start + _ROTATED_ROWS, len(rows))
                part = np.frombuffer(scores.read((stop - start) * W * 4), np.float32).reshape(-1, W)
                file.put(np.arange(start, stop), (part - sum_W / len(rows)) @ axes_WK)


def _width(n_components: int, n_genes: int, n_samples: int) -> int:
    """Columns of what the first pass sums: all genes for an exact result, which is also cheaper where a basis has as many."""
    width = sketch_width(n_components, n_genes, n_samples)
    return n_genes if n_genes <= max(EXACT_GENES, width) else width


def _windows(
    width: int, n_components: int, n_genes: int, n_samples: int, context: Context, where: str
) -> tuple[int, int]:
    """Blocks to hand out at a time in the first and in the second pass: as many as have their results fit, once all wait.

    Raises
    ------
    ValueError
        If the memory does not do for two results of each worker.
    """
    is_exact, workers = width == n_genes, context.n_workers
    # First: the sum, its factorisation, the rows of the pilot; of each worker what it multiplies by and what it adds to
    array = n_genes * width
    result = array * (8 if is_exact else 4)
    first = (3 * 8 * array + 2 * workers * result + (0 if is_exact else 8 * _PILOT_NNZ), result)
    # Second: the basis and its float32; of each worker a copy of it and a block of scores; a block in float64
    W = n_components if is_exact else width
    block = 4 * W * min(BLOCK_ROWS, n_samples)
    second = (12 * n_genes * W + workers * (4 * n_genes * W + block) + 2 * block, block)
    needed = max(fixed + 2 * workers * held for fixed, held in (first, second))
    if needed > context.memory:
        raise ValueError(
            f"{where}: a basis of {width} columns over {n_genes:,} genes takes about {needed // 2**20}MiB, and the rule has "
            f"{context.memory // 2**20}MiB; lower n_components, take fewer workers, or give a larger --memory-budget"
        )
    of_first, of_second = ((context.memory - fixed) // held for fixed, held in (first, second))
    return of_first, of_second


def _find_basis(
    reader: _Rows, tasks: list[_Task], n_components: int, width: int, record: DatasetRecord, context: Context,
    progress: Progress, window: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """First pass: mean of each gene (P,) and an orthonormal basis (P, W), both float64."""
    P, n = len(reader.panel), sum(len(task.block.rows) for task in tasks)
    omega_PW = None if width == P else _pilot(reader, tasks, width, record, context)
    sum_P, products_PW = np.zeros(P), np.zeros((P, width))
    for task, (part_P, part_PW) in _in_order(context.pool, _Sums(reader, omega_PW), tasks, window):
        sum_P += part_P
        products_PW += part_PW
        progress(task.start + len(task.block.rows), 2 * n)
    mean_P = sum_P / n
    if omega_PW is not None:
        return mean_P, _orthonormal(products_PW, sum_P, n, omega_PW)
    covariance_PP = np.triu(products_PW) + np.triu(products_PW, 1).T - np.outer(sum_P, mean_P)
    return mean_P, np.ascontiguousarray(np.linalg.eigh(covariance_PP)[1][:, ::-1][:, :n_components])


def _orthonormal(products_PW: np.ndarray, sum_P: np.ndarray, n: int, omega_PW: np.ndarray) -> np.ndarray:
    """Orthonormal basis of C Omega from the sums of x (x Omega) and x over n rows, (P, W) float64."""
    # Sum of (x - mean) ((x - mean) Omega) = sum of x (x Omega) - n mean (mean Omega)
    return np.linalg.qr(products_PW - np.outer(sum_P, sum_P @ omega_PW / n))[0]


def _pilot(reader: _Rows, tasks: list[_Task], width: int, record: DatasetRecord, context: Context) -> np.ndarray:
    """Omega: the leading subspace of some rows spread over the dataset, (P, W) float32, by iteration from a random one."""
    rng = np.random.default_rng([context.seed, context.number, record.obs_start])
    omega_PW = rng.standard_normal((len(reader.panel), width), dtype=np.float32)
    rows = np.concatenate([task.block.rows for task in tasks])
    sizes = np.concatenate([task.sizes for task in tasks])
    n = min(len(rows), _PILOT_ROWS, max(width, _PILOT_NNZ * record.n_obs // max(1, record.nnz)))
    if n < len(rows):
        starts = np.arange(0, n, _PILOT_RUN) * len(rows) // n
        stops = starts + np.minimum(_PILOT_RUN, n - np.arange(0, n, _PILOT_RUN))
        tasks = [
            _Task(a, RowBlock(0, rows[a:b]), sizes[a:b]) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)
        ]
    parts = [part for task in tasks for part in reader.parts(task)]
    z_W = np.empty(width, np.float32)
    for _ in range(_PILOT_ROUNDS):
        sum_P, products_PW = np.zeros(len(omega_PW)), np.zeros_like(omega_PW)
        for part in parts:
            add_sketch(*part, omega_PW, sum_P, products_PW, z_W)
        omega_PW = _orthonormal(products_PW, sum_P, n, omega_PW).astype(np.float32)
    return omega_PW


def _rotation(sum_W: np.ndarray, square_WW: np.ndarray, n: int, n_components: int, basis_PW: np.ndarray) -> np.ndarray:
    """Rotation from the basis to the leading principal axes, (W, K) float64, signs fixed."""
    covariance_WW = square_WW - np.outer(sum_W, sum_W) / n
    axes_WK = np.linalg.eigh(covariance_WW)[1][:, ::-1][:, :n_components]
    loadings_PK = basis_PW @ axes_WK
    largest = np.abs(loadings_PK).argmax(axis=0)
    signs = np.where(loadings_PK[largest, np.arange(n_components)] < 0, -1.0, 1.0)
    return np.ascontiguousarray(axes_WK * signs)
