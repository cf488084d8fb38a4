"""Whether the cells of a perturbation point the same way more than random cells do (perturbation consistency; paper, B.1).

For each perturbation the statistic is the mean, over its cells, of the cosine between the cell and the sum of the others. The
null are cosines of random cells with the perturbation's mean, its own cells left out. It compares a mean over cells with
single cells, so it is conservative where there are several: of perturbations with 20 cells drawn at random none has p < 0.05
and 0.1 % have p < 0.2. With 5 cells it is 0.6 and 8 %, and with two, whose mean is over one cosine, 5 and 20 %.

The embedding is read twice, and its controls twice more; what is held in memory grows with the number of perturbations and
the width, and by a few dozen bytes a cell.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numba import njit

from txfm_data.curate.aligned import (
    Alignment,
    Embedding,
    EmbeddingArray,
    EmbeddingFile,
    block_rows,
    fit_alignment,
    no_alignment,
    rotated,
)
from txfm_data.kernels import hash_range
from txfm_data.progress import Progress, ignore

__all__ = [
    "Consistency",
    "ConsistencyOptions",
    "Embedding",
    "EmbeddingArray",
    "EmbeddingFile",
    "perturbation_consistency",
]

_SAME = 1e-12
"""A cell whose squared distance to its batch's centre is this share of their squared norms lies there but for rounding."""
_ROUNDING, _ROUNDING_ALIGNED = 1e-24, 1e-12
"""A sum whose square is this share of the squares of what was added is zero but for rounding (float64, or the rotation's)."""
_TIE = 1e-9
"""Cosines that differ by no more are equal, and equal ones count against a perturbation."""
_NULL_BYTES = 16 * 1024**2
_BYTES_PER_CELL = 80


@dataclass(frozen=True, kw_only=True)
class ConsistencyOptions:
    """How consistency is judged.

    null : compare each perturbation with random cells against its own mean, or all with those values pooled.
    n_null : random cells with a perturbation that are drawn once for all, M.  null_controls : whether controls may be among them.
    reference : what each batch is standardised by, its controls or all of its cells.
    seed : of the random cells, at least 0.  align : False takes the embedding as it is.
    """

    null: Literal["per_perturbation", "pooled"] = "per_perturbation"
    n_null: int = 1_000
    null_controls: bool = False
    reference: Literal["controls", "all"] = "controls"
    seed: int = 0
    align: bool = True

    def __post_init__(self) -> None:
        for name, among in (("null", ("per_perturbation", "pooled")), ("reference", ("controls", "all"))):
            if getattr(self, name) not in among:
                raise ValueError(f"consistency: {name} must be one of {among}, got {getattr(self, name)!r}")
        if self.n_null < 1:
            raise ValueError(f"consistency: n_null must be at least 1 cell, got {self.n_null}")
        if self.seed < 0:
            raise ValueError(f"consistency: seed must not be negative, got {self.seed}")


@dataclass(frozen=True)
class Consistency:
    """What was found of P perturbations.

    statistic : (P,) float64, mean cosine of a cell with the sum of the others, -1 to 1; NaN of fewer than 2 cells.
    p : (P,) float64, ``(1 + null values >= statistic) / (1 + null values)``; NaN of fewer than 2 cells, which cannot be tested.
    n_cells : (P,) int64.  n_null : (P,) int64, null values that each was compared with; 0 where not tested.
    n_controls : control cells that took part.
    batches_without_controls : codes of batches with cells but no controls; standardised by all controls, unless by all cells.
    n_components : width of the aligned cells.
    """

    statistic: np.ndarray
    p: np.ndarray
    n_cells: np.ndarray
    n_null: np.ndarray
    n_controls: int
    batches_without_controls: tuple[int, ...]
    n_components: int


def perturbation_consistency(
    embedding: Embedding, perturbation: np.ndarray, is_control: np.ndarray, batch: np.ndarray, options: ConsistencyOptions, *,
    n_perturbations: int, use: np.ndarray | None = None, memory: int = 1024**3, progress: Progress = ignore,
) -> Consistency:  # fmt: skip
    """Statistic and p of each perturbation (paper, B.1), with cells aligned on controls first (`ConsistencyOptions.align`).

    The same input gives the same result, bit for bit, on one machine with one number of BLAS threads.

    Parameters
    ----------
    embedding : n rows, as an `EmbeddingFile` or an `EmbeddingArray`.
    perturbation : (n,) integer codes below `n_perturbations`; -1 for controls and for cells without one. Cells that have none and
        are not controls enter nothing but the statistics of their batch where that is standardised by all cells.
    is_control : (n,) bool.
    batch : (n,) integer codes from 0.
    use : (n,) bool, rows that take part; all by default.
    memory : bytes it may use beyond the embedding; refused beforehand if it would not do.
    progress : told rows read, of all passes.

    Raises
    ------
    ValueError
        On codes or shapes that do not fit, a value of the embedding that is not finite (names the row), fewer than two controls
        to align on, or too little memory.
    """
    use = np.ones(embedding.n, bool) if use is None else use
    _check(embedding, perturbation, is_control, batch, use, n_perturbations)
    group = np.where(use, perturbation, -1).astype(np.int32)
    batch = np.where(use, batch, 0).astype(np.int32)
    n_batches = int(batch[use].max()) + 1 if use.any() else 1
    _check_memory(embedding, n_perturbations, n_batches, options, memory)
    tick = _ticker(progress, embedding.n * (3 if options.align and options.reference == "all" else 2))

    is_control = is_control & use
    alignment = no_alignment(embedding.d, n_batches)
    if options.align:
        alignment = fit_alignment(
            embedding, is_control, batch, n_batches, use=use, reference=options.reference, tick=tick
        )
    cells = _Cells(embedding, group, batch, alignment)
    sums, squares = cells.add_up(n_perturbations, tick)
    n_cells = np.bincount(group[group >= 0], minlength=n_perturbations)
    is_tested = n_cells >= 2
    least = squares * (_ROUNDING_ALIGNED if options.align else _ROUNDING)
    statistic = np.full(n_perturbations, np.nan)
    np.divide(cells.sum_cosines(sums, least, tick), n_cells, out=statistic, where=is_tested)

    drawn = draw_cells((group >= 0) | is_control if options.null_controls else group >= 0, options)
    directions = _directions(sums, least)
    del sums
    count = _exceed_pooled if options.null == "pooled" else _exceed_each
    exceed, n_null = count(cells.unit(drawn), group[drawn], directions, statistic, is_tested)
    present = np.bincount(batch[use], minlength=n_batches) > 0
    controlled = np.bincount(batch[is_control], minlength=n_batches) > 0
    return Consistency(
        statistic=statistic,
        p=np.where(is_tested, (1 + exceed) / (1 + n_null), np.nan),
        n_cells=n_cells,
        n_null=np.where(is_tested, n_null, 0),
        n_controls=int(np.count_nonzero(is_control)),
        batches_without_controls=tuple(np.flatnonzero(present & ~controlled).tolist()),
        n_components=alignment.n_components,
    )


def draw_cells(among: np.ndarray, options: ConsistencyOptions) -> np.ndarray:
    """Positions of `n_null` random cells without replacement, ascending; all of them if there are no more.

    among : (n,) bool. Those of them with the smallest hash of (seed, position) are drawn.
    """
    hashes = np.empty(len(among), np.uint64)
    hash_range(options.seed, 0, 0, hashes)
    positions = np.flatnonzero(among)
    if options.n_null >= len(positions):
        return positions
    return np.sort(positions[np.argpartition(hashes[positions], options.n_null)[: options.n_null]])


def _check(
    embedding: Embedding,
    perturbation: np.ndarray,
    is_control: np.ndarray,
    batch: np.ndarray,
    use: np.ndarray,
    n_perturbations: int,
) -> None:
    labels = {"perturbation": perturbation, "is_control": is_control, "batch": batch, "use": use}
    for name, values in labels.items():
        kind, expected = ("b", "bool") if name in ("is_control", "use") else ("iu", "integers")
        if values.shape != (embedding.n,) or values.dtype.kind not in kind:
            raise ValueError(
                f"consistency: {name} must be {expected} of shape ({embedding.n},), one for each row of the embedding; found "
                f"{values.dtype} of shape {values.shape}"
            )
    for what, is_wrong in (
        (f"a perturbation outside -1 to {n_perturbations - 1}", (perturbation < -1) | (perturbation >= n_perturbations)),
        ("a perturbation although it is a control; its code must be -1", is_control & (perturbation >= 0)),
        ("a negative batch; cells without one must be left out (use) or get a code of their own", use & (batch < 0)),
    ):  # fmt: skip
        if is_wrong.any():
            raise ValueError(f"consistency: row {int(np.argmax(is_wrong))} has {what}")


def _check_memory(
    embedding: Embedding, n_perturbations: int, n_batches: int, options: ConsistencyOptions, memory: int
) -> None:
    d, n_null = embedding.d, min(options.n_null, embedding.n)
    rows = 2 * n_perturbations + 6 * n_batches + 3 * n_null + 10 * min(block_rows(d), embedding.n)
    if options.align:
        rows += 6 * d
    needed = 8 * d * rows + 6 * _NULL_BYTES + _BYTES_PER_CELL * embedding.n
    if needed > memory:
        raise ValueError(
            f"consistency: {embedding.n:,} cells of width {d}, {n_perturbations:,} perturbations, {n_batches:,} batches and "
            f"{n_null:,} random cells need about {needed / 1024**2:,.0f} MiB, {memory / 1024**2:,.0f} MiB are allowed; allow "
            "more, or take a narrower embedding or fewer random cells"
        )


def _ticker(progress: Progress, total: int) -> Callable[[int], None]:
    done = 0

    def tick(rows: int) -> None:
        nonlocal done
        done += rows
        progress(done, total)

    return tick


@dataclass(frozen=True)
class _Cells:
    """The perturbed cells of an embedding, aligned as they are read.

    group : (n,) int32, perturbation; -1 for cells that are none.  batch : (n,) codes.
    """

    embedding: Embedding
    group: np.ndarray
    batch: np.ndarray
    alignment: Alignment

    def add_up(self, n_perturbations: int, tick: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
        """Sum (P, k) and sum of squared norms (P,) of the cells of each perturbation, float64."""
        sums, squares = np.zeros((n_perturbations, self.alignment.n_components)), np.zeros(n_perturbations)
        for rows, coordinates in rotated(self.embedding, self.group >= 0, self.alignment, tick):
            _add_up(
                coordinates, self.group[rows], self.batch[rows], self.alignment.shift, self.alignment.factor,
                sums, squares,
            )  # fmt: skip
        return sums, squares

    def sum_cosines(self, sums: np.ndarray, least: np.ndarray, tick: Callable[[int], None]) -> np.ndarray:
        """Sum, over the cells of each perturbation, of the cosine with the sum of the others: (P,) float64.

        least : (P,). A sum whose square is no larger is zero, and has cosine 0 with all.
        """
        out = np.zeros(len(sums))
        for rows, coordinates in rotated(self.embedding, self.group >= 0, self.alignment, tick):
            _add_cosines(
                coordinates, self.group[rows], self.batch[rows], self.alignment.shift, self.alignment.factor,
                sums, least, out,
            )  # fmt: skip
        return out

    def unit(self, rows: np.ndarray) -> np.ndarray:
        """Some cells, aligned, of length 1 (or zero): (m, k) float64."""
        cells = np.empty((len(rows), self.alignment.n_components))
        coordinates = self.alignment.rotate(self.embedding.take(rows))
        _align_rows(coordinates, self.batch[rows], self.alignment.shift, self.alignment.factor, cells)
        return _directions(cells, np.zeros(len(rows)))


# "reassoc" lets the compiler add in vectors; it still adds in one order that does not change from run to run.
@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _align(coordinates, shift, factor, out):  # type: ignore[no-untyped-def]
    """Standardise one cell into `out` (k,) float64; its squared length. Zero if it lies where its batch's centre is."""
    distance, size, length = 0.0, 0.0, 0.0
    for j in range(len(out)):
        own = np.float64(coordinates[j])
        moved = own - shift[j]
        distance += moved * moved
        size += own * own + shift[j] * shift[j]
        out[j] = moved * factor[j]
        length += out[j] * out[j]
    if distance <= _SAME * size:
        out[:] = 0.0
        return 0.0
    return length


@njit(nogil=True, cache=True)
def _align_rows(coordinates, batch, shift, factor, out):  # type: ignore[no-untyped-def]
    for i in range(len(coordinates)):
        _align(coordinates[i], shift[batch[i]], factor[batch[i]], out[i])


@njit(nogil=True, cache=True)
def _add_up(coordinates, group, batch, shift, factor, sums, squares):  # type: ignore[no-untyped-def]
    cell = np.empty(sums.shape[1])
    for i in range(len(coordinates)):
        squares[group[i]] += _align(coordinates[i], shift[batch[i]], factor[batch[i]], cell)
        total = sums[group[i]]
        for j in range(len(cell)):
            total[j] += cell[j]


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _add_cosines(coordinates, group, batch, shift, factor, sums, least, out):  # type: ignore[no-untyped-def]
    cell = np.empty(sums.shape[1])
    for i in range(len(coordinates)):
        length = _align(coordinates[i], shift[batch[i]], factor[batch[i]], cell)
        total = sums[group[i]]
        dot, others = 0.0, 0.0
        for j in range(len(cell)):
            other = total[j] - cell[j]
            dot += cell[j] * other
            others += other * other
        if length > 0.0 and others > least[group[i]]:
            out[group[i]] += min(1.0, max(-1.0, dot / np.sqrt(length * others)))


def _directions(vectors: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Vectors divided by their length; zero where its square is at most `least`."""
    squares = np.einsum("ij,ij->i", vectors, vectors)
    factor = np.zeros(len(vectors))
    np.divide(1.0, np.sqrt(squares), out=factor, where=squares > least)
    return vectors * factor[:, None]


def _null_cosines(unit: np.ndarray, group: np.ndarray, directions: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Cosines of the drawn cells with the means of perturbations start to stop: (m, stop - start), -2 for own cells."""
    cosines: np.ndarray = np.clip(unit @ directions[start:stop].T, -1.0, 1.0)
    own = np.flatnonzero((group >= start) & (group < stop))
    cosines[own, group[own] - start] = -2.0
    return cosines


def _exceed_each(
    unit: np.ndarray, group: np.ndarray, directions: np.ndarray, statistic: np.ndarray, is_tested: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each perturbation, how many of its own null values reach its statistic, and how many it has: (P,) int64 both."""
    n, exceed = len(directions), np.zeros(len(directions), np.int64)
    step = max(1, _NULL_BYTES // (8 * max(len(unit), 1)))
    for start in range(0, n, step):
        stop = min(start + step, n)
        cosines = _null_cosines(unit, group, directions, start, stop)
        exceed[start:stop] = np.count_nonzero(cosines >= statistic[start:stop] - _TIE, axis=0)
    return exceed, _n_null(group, n)


def _n_null(group: np.ndarray, n_perturbations: int) -> np.ndarray:
    """Drawn cells that are not the perturbation's own: (P,) int64."""
    return len(group) - np.bincount(group[group >= 0], minlength=n_perturbations)


def _exceed_pooled(
    unit: np.ndarray, group: np.ndarray, directions: np.ndarray, statistic: np.ndarray, is_tested: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each perturbation, how many null values of all that are tested reach its statistic, and how many there are."""
    tested = np.flatnonzero(is_tested)
    order = np.argsort(statistic[tested], kind="stable")
    limits = statistic[tested][order] - _TIE
    reached = np.zeros(len(tested) + 1, np.int64)  # null values that reach so many of the limits, and no more
    step = max(1, _NULL_BYTES // (8 * max(len(unit), 1)))
    for start in range(0, len(directions), step):
        stop = min(start + step, len(directions))
        values = _null_cosines(unit, group, directions, start, stop)[:, is_tested[start:stop]].ravel()
        reached += np.bincount(np.searchsorted(limits, values, side="right"), minlength=len(reached))
    exceed = np.zeros(len(directions), np.int64)
    exceed[tested[order]] = np.cumsum(reached[::-1])[::-1][1:]
    return exceed, np.full(len(directions), _n_null(group, len(directions))[tested].sum())
