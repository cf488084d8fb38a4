"""Embeddings read in blocks, and their alignment on control cells: principal axes, then each batch by its controls.

A file is read with plain reads, so what is resident does not grow with it. The size of a block depends on the width of the
embedding alone: results do not change with the memory that is allowed.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import numpy as np
from numba import njit

_BLOCK_BYTES = 8 * 1024**2
_SEEK_BYTES = 16 * 1024
"""What could be read in the time that it takes to ask for one more row."""
_LEAST_VARIANCE = 1e-10
"""Components with less than this share of the first one's variance hold nothing but rounding (EFAAR would divide by it)."""
_LEAST_BATCH_VARIANCE = 1e-14
"""Of the total variance; a smaller one within a batch is that of float32 rounding, and counts as none."""


class Embedding(Protocol):
    """Vectors of cells: n rows of width d, float32.

    Both ways to read refuse values that are not finite, naming the first row that has one.
    """

    n: int
    d: int

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """All rows in order: (number of the first, (k, d) float32). A block may be overwritten when the next is asked for."""
        ...

    def take(self, positions: np.ndarray) -> np.ndarray:
        """Copy some rows, named by strictly ascending positions: (m, d) float32."""
        ...


def block_rows(d: int) -> int:
    """Rows of a block of an embedding of width `d`."""
    return max(1, _BLOCK_BYTES // (4 * d))


class EmbeddingFile:
    """An embedding in a npy file, (n, d) little-endian float32 in C order.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is not such a file, or shorter or longer than its header says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            shape, is_fortran, dtype = _read_header(file, self.path)
            self._start = file.tell()
        if dtype != np.dtype("<f4") or len(shape) != 2 or is_fortran or shape[1] < 1:
            order = "Fortran" if is_fortran else "C"
            raise ValueError(
                f"{self.path}: expected (cells, width) little-endian float32 in C order, found {shape} {dtype.str} in {order} "
                "order; write it with np.save(path, np.ascontiguousarray(array, np.float32))"
            )
        self.n, self.d = shape
        expected, found = self._start + 4 * self.n * self.d, self.path.stat().st_size
        if found != expected:
            raise ValueError(
                f"{self.path}: its header {shape} asks for {expected:,} bytes, it has {found:,}; it was cut or not written "
                "whole, write it again"
            )

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """See `Embedding`. All blocks share one buffer."""
        rows = block_rows(self.d) if rows is None else rows
        buffer = np.empty((min(rows, self.n), self.d), np.float32)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start)
            for start in range(0, self.n, rows):
                block = buffer[: min(rows, self.n - start)]
                self._fill(file, block)
                bad = _first_not_finite(block)
                if bad is not None:
                    raise _not_finite(str(self.path), start + bad)
                yield start, block

    def take(self, positions: np.ndarray) -> np.ndarray:
        """See `Embedding`. Rows that lie close together are read together."""
        _check_positions(positions, self.n, str(self.path))
        out = np.empty((len(positions), self.d), np.float32)
        row_bytes, window, low = 4 * self.d, block_rows(self.d), 0
        with self.path.open("rb", buffering=0) as file:
            while low < len(positions):
                first = int(positions[low])
                high = int(np.searchsorted(positions, first + window))
                near = positions[low:high] - first
                span = int(near[-1]) + 1
                if span * row_bytes <= len(near) * (row_bytes + _SEEK_BYTES):
                    file.seek(self._start + first * row_bytes)
                    buffer = np.empty((span, self.d), np.float32)
                    self._fill(file, buffer)
                    np.take(buffer, near, axis=0, out=out[low:high], mode="clip")
                else:
                    for i in range(low, high):
                        file.seek(self._start + int(positions[i]) * row_bytes)
                        self._fill(file, out[i])
                low = high
        bad = _first_not_finite(out)
        if bad is not None:
            raise _not_finite(str(self.path), int(positions[bad]))
        return out

    def _fill(self, file: FileIO, block: np.ndarray) -> None:
        rest = block.data.cast("B")
        while len(rest):
            n_read = file.readinto(rest)
            if not n_read:
                raise ValueError(f"{self.path}: ends before its last row; it was changed while it was read")
            rest = rest[n_read:]


class EmbeddingArray:
    """An embedding in memory, (n, d) of floats. What is not float32 already is converted block by block.

    Raises
    ------
    TypeError, ValueError
        If it does not hold floats, or is not a matrix.
    """

    def __init__(self, array: np.ndarray) -> None:
        if not np.issubdtype(array.dtype, np.floating):
            raise TypeError(f"embedding: expected an array of floats, found {array.dtype}; convert it to float32")
        if array.ndim != 2 or array.shape[1] < 1:
            raise ValueError(f"embedding: expected an array of shape (cells, width), found {array.shape}")
        self._array = array
        self.n, self.d = array.shape

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """See `Embedding`. Blocks of a float32 array in C order are views of it."""
        rows = block_rows(self.d) if rows is None else rows
        for start in range(0, self.n, rows):
            block = _float32(self._array[start : start + rows])
            bad = _first_not_finite(block)
            if bad is not None:
                raise _not_finite("embedding", start + bad)
            yield start, block

    def take(self, positions: np.ndarray) -> np.ndarray:
        """See `Embedding`."""
        _check_positions(positions, self.n, "embedding")
        taken = _float32(self._array[positions])
        bad = _first_not_finite(taken)
        if bad is not None:
            raise _not_finite("embedding", int(positions[bad]))
        return taken


def _read_header(file: BinaryIO, path: Path) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, whether the order is Fortran's, and dtype that a npy file states."""
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"npy version {version}, expected (1, 0) or (2, 0)")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found: tuple[tuple[int, ...], bool, np.dtype[np.generic]] = read(file)
    except ValueError as error:
        raise ValueError(f"{path}: not a npy file ({error}); write it with np.save") from error
    return found


def _float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # becomes infinite, which is refused by its row
        return np.ascontiguousarray(array, np.float32)


def _first_not_finite(block: np.ndarray) -> int | None:
    is_finite = np.isfinite(block)
    return None if is_finite.all() else int(np.argmin(is_finite.all(axis=1)))


def _not_finite(where: str, row: int) -> ValueError:
    return ValueError(f"{where}: row {row} has a value that is NaN or infinite; embed the cells again, or leave it out")


def _check_positions(positions: np.ndarray, n: int, where: str) -> None:
    if len(positions) and (positions[0] < 0 or positions[-1] >= n or not (np.diff(positions) > 0).all()):
        raise ValueError(f"{where}: positions must ascend strictly from at least 0 to below {n}")


@dataclass(frozen=True)
class Alignment:
    """What makes aligned cells of an embedding: ``((x - center) @ axes - shift[batch]) * factor[batch]``.

    center : (d,) float32, mean of the controls.  axes : (d, k) float32, principal axes of the controls, the first with most
    variance; None leaves cells as they are, then k = d and center is zero.
    shift, factor : (n_batches, k) float64, what each batch is centred by and multiplied by.
    """

    center: np.ndarray
    axes: np.ndarray | None
    shift: np.ndarray
    factor: np.ndarray

    @property
    def n_components(self) -> int:
        """Width of aligned cells, k."""
        return int(self.shift.shape[1])

    def rotate(self, vectors: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Coordinates on the principal axes, before any batch is standardised: (m, k) float32.

        vectors : (m, d) float32; overwritten.  out : (m, k) float32 to write to.
        """
        if self.axes is None:
            return vectors
        vectors -= self.center
        return np.matmul(vectors, self.axes, out=out)


def no_alignment(d: int, n_batches: int) -> Alignment:
    """Leave cells of width `d` as they are."""
    return Alignment(np.zeros(d, np.float32), None, np.zeros((n_batches, d)), np.ones((n_batches, d)))


def fit_alignment(
    embedding: Embedding, is_control: np.ndarray, batch: np.ndarray, n_batches: int, *, use: np.ndarray,
    reference: Literal["controls", "all"], tick: Callable[[int], None],
) -> Alignment:  # fmt: skip
    """Principal axes of all controls, then mean and standard deviation of each batch along them (paper, B.1).

    is_control, use : (n,) bool.  batch : (n,) codes below `n_batches`.  Rows that are not of use are not looked at.
    reference : a batch is standardised by its controls, one without any by all controls; or by all of its cells.
    tick : told how many rows of a pass over the embedding were read.

    The standard deviation divides by the number of cells; where there is none (one cell, or equal ones), it counts as 1.

    Raises
    ------
    ValueError
        If there are fewer than two controls, or all are equal.
    """
    controls = np.flatnonzero(is_control & use)
    if len(controls) < 2:
        raise ValueError(
            f"alignment: found {len(controls)} control cells, at least 2 are needed for the principal axes; mark or keep more "
            "controls (is_control)"
        )
    center, axes, variances = _principal_axes(embedding, controls)
    moments = _Moments(n_batches, axes.shape[1])
    wide = axes.astype(np.float64)
    for positions, vectors in _in_parts(embedding, controls):
        moments.add((vectors - center.astype(np.float64)) @ wide, batch[positions])
    mean, sd = moments.of_all()
    if reference == "all":
        moments = _Moments(n_batches, axes.shape[1])
        for start, block in embedding.blocks():
            rows = np.flatnonzero(use[start : start + len(block)])
            if len(rows):
                moments.add((block[rows] - center.astype(np.float64)) @ wide, batch[start + rows])
            tick(len(block))
    shift, factor = moments.of_batches(mean, sd, _LEAST_BATCH_VARIANCE * float(variances.sum()))
    return Alignment(center, axes, shift, factor)


class _Moments:
    """Sums and sums of squares of each batch."""

    def __init__(self, n_batches: int, k: int) -> None:
        self.n = np.zeros(n_batches, np.int64)
        self.sums, self.squares = np.zeros((n_batches, k)), np.zeros((n_batches, k))

    def add(self, vectors: np.ndarray, batch: np.ndarray) -> None:
        _add_moments(vectors, batch, self.n, self.sums, self.squares)

    def of_all(self) -> tuple[np.ndarray, np.ndarray]:
        n = self.n.sum()
        mean = self.sums.sum(axis=0) / n
        return mean, np.sqrt(np.maximum(self.squares.sum(axis=0) / n - mean**2, 0))

    def of_batches(self, mean: np.ndarray, sd: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
        """Mean and 1 / sd of each batch; those given for a batch without cells, 1 for a variance up to `least`."""
        n = np.maximum(self.n, 1)[:, None]
        means = self.sums / n
        variances = self.squares / n - means**2
        is_empty = self.n == 0
        means[is_empty], variances[is_empty] = mean, sd**2
        return means, 1 / np.sqrt(np.where(variances <= least, 1.0, variances))


@njit(nogil=True, cache=True)
def _add_moments(vectors, batch, n, sums, squares):  # type: ignore[no-untyped-def]
    for i in range(vectors.shape[0]):
        b = batch[i]
        n[b] += 1
        for j in range(vectors.shape[1]):
            sums[b, j] += vectors[i, j]
            squares[b, j] += vectors[i, j] * vectors[i, j]


def _principal_axes(embedding: Embedding, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (d,) float32, axes (d, k) float32 and their variances (k,) of some rows; float64 on the way."""
    n, mean, scatter = 0, np.zeros(embedding.d), np.zeros((embedding.d, embedding.d))
    for _, part in _in_parts(embedding, rows):
        vectors = part.astype(np.float64)
        m, own = len(vectors), vectors.mean(axis=0)
        vectors -= own
        between = own - mean
        # Chan, Golub and LeVeque 1983: no cancellation however far the cells are from the origin.
        scatter += vectors.T @ vectors + np.outer(between, between) * (n * m / (n + m))
        mean += between * (m / (n + m))
        n += m
    variances, axes = np.linalg.eigh(scatter / n)
    variances, axes = variances[::-1], axes[:, ::-1]
    # Below this the spread is rounding of the values themselves.
    if variances[0] <= 1e-14 * float(mean @ mean) or variances[0] <= 0:
        raise ValueError(
            f"alignment: the {n} control cells are all equal, so they have no principal axes; look whether the embedding "
            "is that of these cells"
        )
    kept = int(np.count_nonzero(variances > _LEAST_VARIANCE * variances[0]))
    return mean.astype(np.float32), np.ascontiguousarray(axes[:, :kept], np.float32), variances[:kept]


def _in_parts(embedding: Embedding, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some rows in parts of bounded memory: (their positions, (m, d) float32)."""
    size = block_rows(embedding.d)
    for part in np.array_split(rows, math.ceil(len(rows) / size)):
        yield part, embedding.take(part)


def rotated(
    embedding: Embedding, wanted: np.ndarray, alignment: Alignment, tick: Callable[[int], None]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The wanted rows of an embedding on the principal axes: (their positions, (m, k) float32, overwritten by the next).

    wanted : (n,) bool.  tick : told how many rows were read.
    """
    size = min(block_rows(embedding.d), max(embedding.n, 1))
    own = np.empty((size, embedding.d), np.float32)
    out = np.empty((size, alignment.n_components), np.float32)
    for start, block in embedding.blocks(size):
        rows = np.flatnonzero(wanted[start : start + len(block)])
        if len(rows):
            np.take(block, rows, axis=0, out=own[: len(rows)], mode="clip")
            yield start + rows, alignment.rotate(own[: len(rows)], out[: len(rows)])
        tick(len(block))
