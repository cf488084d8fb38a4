"""Numba kernels over ragged batches: hashing, normalising, drawing genes, and what ingest does to rows.

All run without the GIL and allocate nothing: the caller owns every buffer. Randomness is a hash of
(seed, epoch, sample id, draw), so a mask is the same wherever and whenever it is drawn.
"""

import numpy as np
from numba import njit

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_S11, _S27, _S30, _S31, _S32 = np.uint64(11), np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)
_KEEP = np.uint64(2**59)


@njit(nogil=True, cache=True, inline="always")
def mix(x):  # type: ignore[no-untyped-def]
    """Finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of uint64 that spreads every bit."""
    x = (x ^ (x >> _S30)) * _MULTIPLY_1
    x = (x ^ (x >> _S27)) * _MULTIPLY_2
    return x ^ (x >> _S31)


@njit(nogil=True, cache=True)
def stream_key(seed, epoch, item):  # type: ignore[no-untyped-def]
    """Key of the random stream of one item (a sample id, a lane) in one epoch, uint64."""
    key = mix(np.uint64(seed) + _GOLDEN)
    key = mix((key ^ np.uint64(epoch)) + _GOLDEN)
    return mix((key ^ np.uint64(item)) + _GOLDEN)


@njit(nogil=True, cache=True)
def hash_range(seed, epoch, item, out, start=0):  # type: ignore[no-untyped-def]
    """Fill `out` (n,) uint64 with draws start + 1 to start + n of the stream of `stream_key(seed, epoch, item)`."""
    key = stream_key(seed, epoch, item)
    for i in range(out.shape[0]):
        out[i] = mix(key + np.uint64(start + i + 1) * _GOLDEN)


@njit(nogil=True, cache=True)
def keep_samples(seed, epoch, sample_id, weight, out):  # type: ignore[no-untyped-def]
    """Which samples an epoch serves: each with the probability of its weight, decided by (seed, epoch, sample id) alone.

    sample_id : (n,) int64, below 2^59.  weight : (n,) float64 in (0, 1].  out : (n,) bool.
    """
    for i in range(sample_id.shape[0]):
        key = stream_key(seed, epoch, np.uint64(sample_id[i]) + _KEEP)
        out[i] = np.float64(mix(key + _GOLDEN) >> _S11) < weight[i] * 9_007_199_254_740_992.0


@njit(nogil=True, cache=True)
def draw_unmasked(key, identity, swaps, out):  # type: ignore[no-untyped-def]
    """Draw ``len(out)`` of ``len(identity)`` positions uniformly without replacement.

    Partial Fisher-Yates; the swaps are undone, so the draw depends on `key` alone (paper section 3, masking).

    key : uint64. Of `stream_key`.
    identity : (P,) uint16. Must hold 0..P-1 on entry and holds it again on return.
    swaps : (>= len(out),) uint32. Scratch.
    out : (K,) uint16, K <= P. The positions drawn.
    """
    key = np.uint64(key)
    n = np.uint64(identity.shape[0])
    # Three loops: the hashes of the first depend on nothing before them, so the compiler makes vectors of them.
    # Positions are unsigned, since a signed index would be checked for being negative at every access.
    for i in range(out.shape[0]):
        k = np.uint64(i)
        draw = mix(key + (k + np.uint64(1)) * _GOLDEN) >> _S32
        swaps[i] = np.uint32(k + ((draw * (n - k)) >> _S32))
    for i in range(out.shape[0]):
        other = swaps[i]
        drawn = identity[other]
        identity[other] = identity[i]
        identity[i] = drawn
        out[i] = drawn
    for i in range(out.shape[0]):
        identity[i] = i
        identity[swaps[i]] = swaps[i]


@njit(nogil=True, cache=True)
def normalize(indptr, counts, library_size, target_sum, out):  # type: ignore[no-untyped-def]
    """Scale counts to `target_sum` per library: out = L c / library size (spec A.1), before the logarithm.

    indptr : (n + 1,) int64.  counts : (nnz,) unsigned or float.  library_size : (n,) float64, counts of the whole library.
    out : (nnz,) float32. Computed in float64, rounded once.
    """
    for b in range(indptr.shape[0] - 1):
        start = indptr[b]
        n = indptr[b + 1] - start
        scale = target_sum / library_size[b]
        values, scaled = counts[start : start + n], out[start : start + n]
        for j in range(n):
            scaled[j] = np.float32(values[j] * scale)


@njit(nogil=True, cache=True)
def draw_rows(seed, epoch, items, identity, swaps, out):  # type: ignore[no-untyped-def]
    """Draw positions for several items at once, each as `draw_unmasked` with the key of (seed, epoch, item).

    items : (B,) int64, sample ids or rows.  out : (B, K) uint16.  identity, swaps : as in `draw_unmasked`.
    """
    for b in range(items.shape[0]):
        draw_unmasked(stream_key(seed, epoch, items[b]), identity, swaps, out[b])


@njit(nogil=True, cache=True)
def gather_genes(  # type: ignore[no-untyped-def]
    indptr, columns, values, token, largest, is_whole, out_indptr, out_genes, out_values, row_sum
):  # fmt: skip
    """Rows of a source as samples over the vocabulary: every value checked, sums over all columns, dropped columns gone.

    indptr, columns, values : CSR of the source.  token : (n_vars,) int64. Gene of each column, -1 where it is dropped.
    largest : values above it are refused.  is_whole : refuse values that are not whole.
    out_indptr : (n + 1,) int64.  out_genes : (nnz,) uint16.  out_values : (nnz,).  row_sum : (n,) float64.

    Returns
    -------
    first_bad : position of the first value that is refused (NaN, infinite, negative too), -1 if there is none.
    is_sorted : whether genes ascend strictly in every sample; if not, the caller must sort and sum.
    """
    k, is_sorted = 0, True
    out_indptr[0] = 0
    for b in range(indptr.shape[0] - 1):
        total, last = 0.0, -1
        for j in range(indptr[b], indptr[b + 1]):
            value = values[j]
            if not (value >= 0 and value <= largest) or (is_whole and np.floor(value) != value):
                return j, is_sorted
            total += value
            gene = token[columns[j]]
            if gene >= 0:
                is_sorted &= gene > last
                last = gene
                out_genes[k] = gene
                out_values[k] = value
                k += 1
        out_indptr[b + 1] = k
        row_sum[b] = total
    return -1, is_sorted


@njit(nogil=True, cache=True)
def split_cells(samples, genes, wanted, out_indptr, out_genes):  # type: ignore[no-untyped-def]
    """Cells of a sparse matrix as rows of ragged samples, if they come in order.

    samples, genes : (nnz,) int64 coordinates.  wanted : (n,) int64, ascending; holds every one of `samples`.
    out_indptr : (n + 1,) int64.  out_genes : (nnz,) uint16.

    Returns
    -------
    bool
        Whether cells ascend strictly by sample and gene; if not, the outputs mean nothing.
    """
    row, last_sample, last_gene = 0, -1, -1
    out_indptr[0] = 0
    for j in range(samples.shape[0]):
        sample, gene = samples[j], genes[j]
        if sample < last_sample or (sample == last_sample and gene <= last_gene):
            return False
        while wanted[row] < sample:
            row += 1
            out_indptr[row] = j
        out_genes[j] = gene
        last_sample, last_gene = sample, gene
    for r in range(row, wanted.shape[0]):
        out_indptr[r + 1] = samples.shape[0]
    return True
