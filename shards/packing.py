"""Numba kernels that pack gene ids and counts into bytes and back (docs/format_shards.md, "Packing")."""

import numpy as np
from numba import njit

from txfm_data.ragged import Ragged

ESCAPE = 255
"""Byte that announces a value too large for one byte."""


@njit(nogil=True, cache=True)
def pack_genes(indptr, gene_ids, out, offsets):  # type: ignore[no-untyped-def]
    """Pack ascending gene ids as gaps: one byte below 255, else 255 and a little-endian uint16.

    The gap is the number of genes skipped since the one before, counted from -1 at the start of a sample.

    indptr : (n + 1,) int64.  gene_ids : (nnz,) uint16.
    out : (>= 3 nnz,) uint8.  offsets : (n + 1,) int32, start of each sample in `out`.
    """
    at = 0
    for b in range(indptr.shape[0] - 1):
        offsets[b] = at
        previous = -1
        for j in range(indptr[b], indptr[b + 1]):
            gap = np.int64(gene_ids[j]) - previous - 1
            previous = int(gene_ids[j])
            if gap < ESCAPE:
                out[at] = gap
                at += 1
            else:
                out[at] = ESCAPE
                out[at + 1] = gap & 255
                out[at + 2] = gap >> 8
                at += 3
    offsets[indptr.shape[0] - 1] = at


@njit(nogil=True, cache=True)
def pack_counts(indptr, counts, out, offsets):  # type: ignore[no-untyped-def]
    """Pack counts above zero: count - 1 in one byte below 255, else 255 and the count as little-endian uint32.

    counts : (nnz,) uint32.  out : (>= 5 nnz,) uint8.  indptr, offsets : as in `pack_genes`.
    """
    at = 0
    for b in range(indptr.shape[0] - 1):
        offsets[b] = at
        for j in range(indptr[b], indptr[b + 1]):
            count = np.int64(counts[j])
            if count <= ESCAPE:
                out[at] = count - 1
                at += 1
            else:
                out[at] = ESCAPE
                for byte in range(4):
                    out[at + 1 + byte] = (count >> (8 * byte)) & 255
                at += 5
    offsets[indptr.shape[0] - 1] = at


@njit(nogil=True, cache=True)
def unpack_genes(data, offsets, indptr, n_genes, out):  # type: ignore[no-untyped-def]
    """Inverse of `pack_genes`; returns the first sample whose bytes do not fit its number of genes, or -1.

    data : (bytes,) uint8.  offsets : (n + 1,) int32.  indptr : (n + 1,) int64, from the numbers of non-zeros.
    out : (nnz,) uint16.
    """
    for b in range(indptr.shape[0] - 1):
        at, stop = offsets[b], offsets[b + 1]
        gene = -1
        for j in range(indptr[b], indptr[b + 1]):
            if at >= stop:
                return b
            gap = np.int64(data[at])
            at += 1
            if gap == ESCAPE:
                if at + 2 > stop:
                    return b
                gap = np.int64(data[at]) | (np.int64(data[at + 1]) << 8)
                at += 2
            gene += int(gap) + 1
            if gene >= n_genes:
                return b
            out[j] = gene
        if at != stop:
            return b
    return -1


@njit(nogil=True, cache=True)
def unpack_counts(data, offsets, indptr, out):  # type: ignore[no-untyped-def]
    """Inverse of `pack_counts`; returns the first sample whose bytes do not fit, or -1.  out : (nnz,) uint32."""
    for b in range(indptr.shape[0] - 1):
        at, stop = offsets[b], offsets[b + 1]
        for j in range(indptr[b], indptr[b + 1]):
            if at >= stop:
                return b
            count = np.int64(data[at]) + 1
            at += 1
            if count == ESCAPE + 1:
                if at + 4 > stop:
                    return b
                count = np.int64(0)
                for byte in range(4):
                    count |= np.int64(data[at + byte]) << (8 * byte)
                at += 4
                if count == 0:
                    return b
            out[j] = count
        if at != stop:
            return b
    return -1


@njit(nogil=True, cache=True)
def gather_rows(indptr, gene_ids, counts, rows, out_indptr, out_gene_ids, out_counts):  # type: ignore[no-untyped-def]
    """Copy chosen samples of a ragged batch to consecutive places of another.

    rows : (m,) int64.  out_indptr : (m + 1,) int64; its first entry says where to begin, the others are written.
    out_gene_ids, out_counts : large enough for all the chosen samples.
    """
    at = out_indptr[0]
    for i in range(rows.shape[0]):
        first, last = indptr[rows[i]], indptr[rows[i] + 1]
        for j in range(first, last):
            out_gene_ids[at] = gene_ids[j]
            out_counts[at] = counts[j]
            at += 1
        out_indptr[i + 1] = at


def take_samples(ragged: Ragged, rows: np.ndarray) -> Ragged:
    """Chosen samples of a ragged batch, in the order given. rows : (m,) int64."""
    lengths = ragged.indptr[rows + 1] - ragged.indptr[rows]
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    gene_ids, counts = np.empty(indptr[-1], np.uint16), np.empty(indptr[-1], np.uint32)
    gather_rows(ragged.indptr, ragged.gene_ids, ragged.counts, rows, indptr, gene_ids, counts)
    return Ragged(indptr, gene_ids, counts)
