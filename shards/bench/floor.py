"""What drawing, and normalising and masking, cost at the least: kernels that keep fewer promises than ours.

They let the permutation and the generator run on from sample to sample, so a mask depends on what was drawn before it; they
take library sizes to be sums, counts to fit uint16 and all samples to have one panel of all genes. No training may use them.
"""

import numpy as np
from numba import njit

SEED = np.uint64(0x9E3779B97F4A7C15)
"""A state that the generator may start from."""
N_LOGS = 64
"""Counts below this have their logarithm looked up."""

_MULTIPLY = np.uint64(2_685_821_657_736_338_717)
_S12, _S25, _S27, _S32 = np.uint64(12), np.uint64(25), np.uint64(27), np.uint64(32)


@njit(nogil=True, cache=True, inline="always")
def _advance(state):  # type: ignore[no-untyped-def]
    """Next state of xorshift64* (Vigna 2016); its draw is the state times `_MULTIPLY`."""
    state ^= state >> _S12
    state ^= state << _S25
    return state ^ (state >> _S27)


@njit(nogil=True, cache=True)
def draw(permutation, generator, out):  # type: ignore[no-untyped-def]
    """Draw genes of each sample by a partial Fisher-Yates shuffle that goes on where the sample before left it.

    permutation : (P,) uint16, some order of 0..P-1, and another one on return.  generator : (1,) uint64, its state, not 0.
    out : (B, K) uint16, K <= P.
    """
    n_genes, state = np.uint64(permutation.shape[0]), generator[0]
    for b in range(out.shape[0]):
        shown = out[b]
        for i in range(out.shape[1]):
            k = np.uint64(i)
            state = _advance(state)
            other = k + ((((state * _MULTIPLY) >> _S32) * (n_genes - k)) >> _S32)
            gene = permutation[other]
            permutation[other] = permutation[k]
            permutation[k] = gene
            shown[i] = gene
    generator[0] = state


@njit(nogil=True, cache=True, fastmath=True)
def full_lut(  # type: ignore[no-untyped-def]
    indptr, gene_ids, counts, target_sum, permutation, generator, dense, logs, out_gene_ids, out_values
):  # fmt: skip
    """Normalise samples and show genes of each, in one pass: ln(1 + L c / sum of the counts).

    indptr, gene_ids, counts : CSR; counts uint16.  target_sum : L.  permutation, generator : as in `draw`.
    dense : (P,) float32 scratch, zero on entry and on return.  logs : (N_LOGS,) float32 scratch.
    out_gene_ids : (B, K) uint16.  out_values : (B, K) float32.
    """
    n_genes, n_logs, state = np.uint64(permutation.shape[0]), logs.shape[0], generator[0]
    for b in range(indptr.shape[0] - 1):
        genes, values = gene_ids[indptr[b] : indptr[b + 1]], counts[indptr[b] : indptr[b + 1]]
        total = np.uint64(0)
        for j in range(values.shape[0]):
            total += np.uint64(values[j])
        scale = np.float32(target_sum / max(np.float64(total), 1.0))
        for c in range(n_logs):
            logs[c] = np.log1p(np.float32(c) * scale)
        for j in range(genes.shape[0]):
            count = values[j]
            dense[genes[j]] = logs[count] if count < n_logs else np.log1p(np.float32(count) * scale)
        shown, log1p = out_gene_ids[b], out_values[b]
        for i in range(shown.shape[0]):
            k = np.uint64(i)
            state = _advance(state)
            other = k + ((((state * _MULTIPLY) >> _S32) * (n_genes - k)) >> _S32)
            gene = permutation[other]
            permutation[other] = permutation[k]
            permutation[k] = gene
            shown[i] = gene
            log1p[i] = dense[gene]
        for j in range(genes.shape[0]):
            dense[genes[j]] = 0.0
    generator[0] = state
