"""Ragged samples as bytes and back: one byte for a gene id, one for a count, escapes beside them.

The format is docs/format_shards.md, "Packing". Kernels run without the GIL and allocate nothing. They take a slice
of each sample before they index it: the wrap-around check of a computed index would keep loops from becoming vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numba import njit

from txfm_data.ragged import Ragged

ESCAPE = 255
"""Byte that stands for a value too large for one byte."""


@dataclass(frozen=True)
class Packed:
    """Samples as a block holds them, about 4.8 kB for one of 2,400 non-zero counts, against 14 kB as `Ragged`.

    indptr : (n + 1,) int64. Start of each sample in `genes` and `counts`; begins at 0.
    genes : (nnz,) uint8. Genes skipped since the one before, or `ESCAPE`.
    gene_escapes : (e,) uint16.  gene_escape_indptr : (n + 1,) int64. Gaps of 255 and more, by sample.
    counts : (nnz,) uint8. Count less one, or `ESCAPE`.
    count_escapes : (f,) uint32.  count_escape_indptr : (n + 1,) int64. Counts of 256 and more, by sample.
    fractions : (h,) float64.  fraction_indptr : (n + 1,) int64. All values of the samples that are not whole.
    """

    indptr: np.ndarray
    genes: np.ndarray
    gene_escapes: np.ndarray
    gene_escape_indptr: np.ndarray
    counts: np.ndarray
    count_escapes: np.ndarray
    count_escape_indptr: np.ndarray
    fractions: np.ndarray
    fraction_indptr: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def nnz(self) -> int:
        """Number of values above zero."""
        return len(self.genes)

    @property
    def n_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The arrays in the order that kernels take them."""
        return tuple(getattr(self, field.name) for field in fields(self))


@njit(nogil=True, cache=True)
def _pack_genes(indptr, gene_ids, out, escapes, escape_indptr):  # type: ignore[no-untyped-def]
    k = 0
    for b in range(indptr.shape[0] - 1):
        escape_indptr[b] = k
        start = indptr[b]
        n = indptr[b + 1] - start
        ids, packed = gene_ids[start : start + n], out[start : start + n]
        following = np.int64(0)
        for i in range(n):
            gap = np.int64(ids[i]) - following
            following = np.int64(ids[i]) + 1
            if gap < 255:
                packed[i] = gap
            else:
                packed[i] = 255
                escapes[k] = gap
                k += 1
    escape_indptr[indptr.shape[0] - 1] = k
    return k


@njit(nogil=True, cache=True)
def _pack_counts(indptr, counts, out, escapes, escape_indptr):  # type: ignore[no-untyped-def]
    k = 0
    for b in range(indptr.shape[0] - 1):
        escape_indptr[b] = k
        start = indptr[b]
        n = indptr[b + 1] - start
        values, packed = counts[start : start + n], out[start : start + n]
        for i in range(n):
            count = np.int64(values[i])
            if count == 0:
                return -1 - b
            if count < 256:
                packed[i] = count - 1
            else:
                packed[i] = 255
                escapes[k] = count
                k += 1
    escape_indptr[indptr.shape[0] - 1] = k
    return k


@njit(nogil=True, cache=True)
def _whole(indptr, values, out):  # type: ignore[no-untyped-def]
    """Which samples hold whole counts alone, none above uint32."""
    for b in range(indptr.shape[0] - 1):
        start = indptr[b]
        n = indptr[b + 1] - start
        sample = values[start : start + n]
        is_whole = True
        for i in range(n):
            is_whole &= np.floor(sample[i]) == sample[i] and sample[i] <= 4_294_967_295.0
        out[b] = is_whole


@njit(nogil=True, cache=True)
def unpack_genes(indptr, genes, escapes, escape_indptr, rows, out):  # type: ignore[no-untyped-def]
    """Write the gene ids of chosen samples end to end; the arrays have been checked."""
    at = 0
    for r in range(rows.shape[0]):
        b = rows[r]
        start = indptr[b]
        n = indptr[b + 1] - start
        gaps, ids = genes[start : start + n], out[at : at + n]
        gene = np.int64(-1)
        k = escape_indptr[b]
        if escape_indptr[b + 1] == k:
            for i in range(n):
                gene += np.int64(gaps[i]) + 1
                ids[i] = gene
        else:
            for i in range(n):
                gap = np.int64(gaps[i])
                if gap == 255:
                    gap = np.int64(escapes[k])
                    k += 1
                gene += gap + 1
                ids[i] = gene
        at += n


@njit(nogil=True, cache=True)
def unpack_counts(  # type: ignore[no-untyped-def]
    indptr, counts, escapes, escape_indptr, fractions, fraction_indptr, rows, out
):  # fmt: skip
    """Write the counts of chosen samples end to end; the arrays have been checked."""
    at = 0
    for r in range(rows.shape[0]):
        b = rows[r]
        start = indptr[b]
        n = indptr[b + 1] - start
        packed, values = counts[start : start + n], out[at : at + n]
        for i in range(n):
            values[i] = np.uint32(packed[i]) + np.uint32(1)
        k = escape_indptr[b]
        if escape_indptr[b + 1] > k:
            for i in range(n):
                if packed[i] == 255:
                    values[i] = escapes[k]
                    k += 1
        first = fraction_indptr[b]
        if fraction_indptr[b + 1] > first:
            values[:] = fractions[first : first + n]
        at += n


@njit(nogil=True, cache=True)
def _first_bad(  # type: ignore[no-untyped-def]
    indptr, genes, gene_escapes, gene_escape_indptr, counts, count_escapes, count_escape_indptr, fractions, fraction_indptr,
    n_genes,
):  # fmt: skip
    """First sample whose bytes no packing of `n_genes` genes gives, or -1. Index arrays never fall and end in bounds."""
    for b in range(indptr.shape[0] - 1):
        start = indptr[b]
        n = indptr[b + 1] - start
        if n > n_genes:  # so the sums below fit their 32 bits
            return b
        gaps, packed = genes[start : start + n], counts[start : start + n]
        gap_sum, escaped_genes, escaped_counts, large = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
        for i in range(n):  # in 32 bits, of which vectors hold twice as many as of 64
            gap_sum = np.uint32(gap_sum + np.uint32(gaps[i]))
            escaped_genes = np.uint32(escaped_genes + np.uint32(gaps[i] == 255))
            escaped_counts = np.uint32(escaped_counts + np.uint32(packed[i] == 255))
            large = np.uint32(large + np.uint32(packed[i] != 0))
        total = np.int64(n) + np.int64(gap_sum)
        gaps_beyond = gene_escapes[gene_escape_indptr[b] : gene_escape_indptr[b + 1]]
        counts_beyond = count_escapes[count_escape_indptr[b] : count_escape_indptr[b + 1]]
        if gaps_beyond.shape[0] != escaped_genes or counts_beyond.shape[0] != escaped_counts:
            return b
        for i in range(escaped_genes):
            if gaps_beyond[i] < 255:
                return b
            total += np.int64(gaps_beyond[i]) - 255
        for i in range(escaped_counts):
            if counts_beyond[i] < 256:
                return b
        if total > n_genes:
            return b
        exact = fractions[fraction_indptr[b] : fraction_indptr[b + 1]]
        if exact.shape[0] != 0 and (exact.shape[0] != n or large != 0):
            return b
        for i in range(exact.shape[0]):
            if not (exact[i] > 0.0 and exact[i] < np.inf):
                return b
    return -1


def pack(ragged: Ragged) -> Packed:
    """Pack samples; exact, whatever they hold.

    A sample of a float64 batch whose values are whole and fit uint32 is packed as counts.

    Raises
    ------
    ValueError
        If a value is zero.
    """
    n, indptr, counts = len(ragged), np.ascontiguousarray(ragged.indptr, np.int64), ragged.counts
    fraction_indptr, fractions = np.zeros(n + 1, np.int64), np.empty(0)
    if counts.dtype.kind == "f":
        is_whole = np.empty(n, bool)
        _whole(indptr, counts, is_whole)
        lengths = np.diff(indptr)
        of_value = np.repeat(is_whole, lengths)
        fractions = counts[~of_value].astype(np.float64)
        np.cumsum(np.where(is_whole, 0, lengths), out=fraction_indptr[1:])
        counts = np.where(of_value, counts, 1.0).astype(np.uint32)
    packed = []
    for kernel, values, dtype in ((_pack_genes, ragged.gene_ids, np.uint16), (_pack_counts, counts, np.uint32)):
        out, escapes, escape_indptr = (
            np.empty(ragged.nnz, np.uint8),
            np.empty(ragged.nnz, dtype),
            np.empty(n + 1, np.int64),
        )
        n_escapes = kernel(indptr, values, out, escapes, escape_indptr)
        if n_escapes < 0:
            raise ValueError(
                f"sample {-1 - n_escapes} of the batch stores a count of zero; only counts above zero are stored"
            )
        packed += [out, escapes[:n_escapes].copy(), escape_indptr]
    genes, gene_escapes, gene_escape_indptr, small, count_escapes, count_escape_indptr = packed
    return Packed(
        indptr,
        genes,
        gene_escapes,
        gene_escape_indptr,
        small,
        count_escapes,
        count_escape_indptr,
        fractions,
        fraction_indptr,
    )


def unpack_into(packed: Packed, rows: np.ndarray, gene_ids: np.ndarray, counts: np.ndarray) -> int:
    """Write chosen samples end to end into the beginnings of two buffers.

    rows : (m,) int64.  gene_ids : uint16, at least as long as the samples together.
    counts : uint32, or float64, which takes samples that are not whole as well.

    Returns
    -------
    int
        Values written.

    Raises
    ------
    ValueError
        If a buffer is too short, or a sample that is not whole goes to uint32.
    """
    nnz = int((packed.indptr[rows + 1] - packed.indptr[rows]).sum())
    if nnz > len(gene_ids) or nnz > len(counts):
        raise ValueError(f"{nnz} values do not fit buffers of {len(gene_ids)} gene ids and {len(counts)} counts")
    if counts.dtype != np.float64 and _has_fractions(packed, rows):
        raise ValueError("a sample holds values that are not whole; take them as float64")
    unpack_genes(packed.indptr, packed.genes, packed.gene_escapes, packed.gene_escape_indptr, rows, gene_ids)
    unpack_counts(
        packed.indptr, packed.counts, packed.count_escapes, packed.count_escape_indptr, packed.fractions, packed.fraction_indptr,
        rows, counts,
    )  # fmt: skip
    return nnz


def _has_fractions(packed: Packed, rows: np.ndarray) -> bool:
    return bool(len(packed.fractions) and (packed.fraction_indptr[rows + 1] > packed.fraction_indptr[rows]).any())


def unpack(packed: Packed, rows: np.ndarray | None = None, dtype: type[np.generic] | None = None) -> Ragged:
    """Chosen samples in the order given, or all; counts are uint32, or float64 if one of them is not whole."""
    chosen = np.arange(len(packed)) if rows is None else np.asarray(rows, np.int64)
    indptr = np.zeros(len(chosen) + 1, np.int64)
    np.cumsum(packed.indptr[chosen + 1] - packed.indptr[chosen], out=indptr[1:])
    if dtype is None:
        dtype = np.float64 if _has_fractions(packed, chosen) else np.uint32
    gene_ids, counts = np.empty(indptr[-1], np.uint16), np.empty(indptr[-1], dtype)
    unpack_into(packed, chosen, gene_ids, counts)
    return Ragged(indptr, gene_ids, counts)


@njit(nogil=True, cache=True)
def _gather(indptr, values, rows, out):  # type: ignore[no-untyped-def]
    at = 0
    for r in range(rows.shape[0]):
        start = indptr[rows[r]]
        n = indptr[rows[r] + 1] - start
        out[at : at + n] = values[start : start + n]
        at += n


def take(packed: Packed, rows: np.ndarray) -> Packed:
    """Chosen samples in the order given, still packed. rows : (m,) int64."""
    taken: dict[str, np.ndarray] = {}
    for names, index in _RAGGED:
        indptr: np.ndarray = getattr(packed, index)
        new = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(indptr[rows + 1] - indptr[rows], out=new[1:])
        taken[index] = new
        for name in names:
            values: np.ndarray = getattr(packed, name)
            taken[name] = np.empty(new[-1], values.dtype)
            _gather(indptr, values, rows, taken[name])
    return Packed(**taken)


_RAGGED = (
    (("genes", "counts"), "indptr"), (("gene_escapes",), "gene_escape_indptr"), (("count_escapes",), "count_escape_indptr"),
    (("fractions",), "fraction_indptr"),
)  # fmt: skip
"""Arrays of `Packed` and the index that cuts them by sample."""


def join(parts: Sequence[Packed]) -> Packed:
    """Samples of several packings, end to end."""
    joined: dict[str, np.ndarray] = {}
    for names, index in _RAGGED:
        lengths = [np.diff(getattr(part, index)) for part in parts]
        joined[index] = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))
        for name in names:
            arrays = [getattr(part, name) for part in parts]
            joined[name] = np.concatenate(arrays or [_EMPTY[name]])
    return Packed(**joined)


_EMPTY: dict[str, np.ndarray] = {
    "genes": np.empty(0, np.uint8), "counts": np.empty(0, np.uint8), "gene_escapes": np.empty(0, np.uint16),
    "count_escapes": np.empty(0, np.uint32), "fractions": np.empty(0),
}  # fmt: skip


def check(packed: Packed, n_genes: int, where: str) -> None:
    """Refuse bytes that `pack` of samples over `n_genes` genes never gives; unpacking them is safe after that.

    Raises
    ------
    ValueError
        Names `where` and the sample.
    """
    for names, index in _RAGGED:
        indptr = getattr(packed, index)
        for name in names:
            n_values = len(getattr(packed, name))
            if (
                len(indptr) != len(packed.indptr)
                or indptr[0] != 0
                or (np.diff(indptr) < 0).any()
                or indptr[-1] != n_values
            ):
                raise ValueError(
                    f"{where}: the bounds of {name} fall or do not end at {n_values}; the shard is damaged"
                )
    bad = _first_bad(*(*packed.arrays, n_genes))
    if bad >= 0:
        raise ValueError(
            f"{where}: the packed bytes of sample {bad} are no counts over {n_genes} genes; the shard is damaged, build it again"
        )
