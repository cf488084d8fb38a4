"""From ragged samples to what the model sees of them: the genes shown, their values, and the target.

Kernels run without the GIL and allocate nothing: `Masking` owns their scratch, one for each thread.
"""

import numpy as np
from numba import njit

from txfm_data.kernels import draw_unmasked, normalize, stream_key
from txfm_data.panels import Panels
from txfm_data.ragged import Ragged
from txfm_data.weighted_draw import draw_weighted, inverse_weights

SMALL = 16
"""Counts below this have their logarithm looked up; a sample has one table of them."""


@njit(nogil=True, cache=True)
def log_table(library_size, target_sum, table):  # type: ignore[no-untyped-def]
    """ln(1 + L c / library size) for c = 0 … len(table) - 1, rounded as values are that are not looked up."""
    scale = target_sum / library_size
    for c in range(table.shape[0]):
        table[c] = np.float32(np.log1p(np.float64(np.float32(c * scale))))


@njit(nogil=True, cache=True)
def show_small(gene_ids, counts, table, shown, normalized, small, beyond, out):  # type: ignore[no-untyped-def]
    """Values of the shown genes of one sample whose counts are mostly small.

    gene_ids, counts, normalized : (nnz,) of the sample.  table : (SMALL + 1,) float32, of `log_table`; its last is not used.
    shown : (n,) uint16, token ids.  small : (G,) uint8 scratch, zero on entry and on return.
    beyond : (> n,) uint32 scratch.  out : (n,) float32, ln(1 + normalised count), 0 for genes that were not seen.
    """
    for j in range(gene_ids.shape[0]):
        # No count fits below 1; one that is no small whole number is found again in the sorted ids.
        count = counts[j]
        small[gene_ids[j]] = np.uint8(count) if count < SMALL and count == np.uint8(count) else np.uint8(SMALL)
    n_beyond = np.int64(0)
    for k in range(shown.shape[0]):
        seen = small[shown[k]]
        out[k] = table[seen]
        # Written always and counted sometimes: a branch here would be guessed wrong for every hundredth gene.
        beyond[n_beyond] = k
        n_beyond += np.int64(seen == SMALL)
    for i in range(n_beyond):
        at = beyond[i]
        out[at] = np.float32(np.log1p(np.float64(normalized[np.searchsorted(gene_ids, shown[at])])))
    small[:] = 0


@njit(nogil=True, cache=True)
def show_any(gene_ids, shown, normalized, place, out):  # type: ignore[no-untyped-def]
    """Values of the shown genes of one sample, whatever its counts are; as `show_small`, which is faster for small ones.

    place : (G,) uint16 scratch, zero on entry and on return.
    """
    for j in range(gene_ids.shape[0]):
        place[gene_ids[j]] = j + 1
    for k in range(shown.shape[0]):
        at = np.uint32(place[shown[k]])
        out[k] = np.float32(np.log1p(np.float64(normalized[at - np.uint32(1)]))) if at != 0 else np.float32(0.0)
    place[:] = 0


@njit(nogil=True, cache=True)
def n_large(counts):  # type: ignore[no-untyped-def]
    """Number of counts that no table of logarithms holds."""
    n = 0
    for j in range(counts.shape[0]):
        n += counts[j] >= SMALL or counts[j] != np.uint8(counts[j])
    return n


@njit(nogil=True, cache=True)
def mask_batch(  # type: ignore[no-untyped-def]
    indptr, gene_ids, counts, normalized, library_size, target_sum, panel_id, sample_id, panel_indptr, panel_genes, seed, epoch,
    weights, small, place, identity, swaps, race, table, out_gene_ids, out_values, out_n_unmasked,
):  # fmt: skip
    """Choose the unmasked genes of each sample from its panel, zeros included, and look up their values.

    indptr, gene_ids, counts, normalized : the batch as CSR; `normalized` as `normalize` writes it.
    library_size : (B,) float64, counts.  panel_id, sample_id : (B,) int64.  panel_indptr, panel_genes : of `Panels`.
    weights : (G,) float64 of `inverse_weights`, or of length 0 for a uniform draw.
    small : (G,) uint8, place : (G,) uint16: scratch, zero on entry and on return.
    identity : (>= largest panel,) uint16 scratch, 0, 1, 2, …  swaps : (> K,) uint32 scratch.
    race : (>= 2 x largest panel,) float64 scratch; may be empty for a uniform draw.  table : (SMALL + 1,) float32 scratch.
    out_gene_ids : (B, K) uint16, token ids.  out_values : (B, K) float32, ln(1 + normalised count).
    out_n_unmasked : (B,) int32. Genes shown: K, or the whole panel where it is smaller; columns beyond are 0.
    """
    width = out_gene_ids.shape[1]
    for b in range(indptr.shape[0] - 1):
        panel = panel_genes[panel_indptr[panel_id[b]] : panel_indptr[panel_id[b] + 1]]
        size = panel.shape[0]
        n = min(width, size)
        shown, values = out_gene_ids[b, :n], out_values[b, :n]
        if n == size:
            shown[:] = panel
        else:
            key = stream_key(seed, epoch, sample_id[b])
            if weights.shape[0] == 0:
                draw_unmasked(key, identity[:size], swaps, shown)
            else:
                draw_weighted(key, panel, weights, race, shown)
            for k in range(n):
                shown[k] = panel[shown[k]]
        start = indptr[b]
        nnz = indptr[b + 1] - start
        sample_genes, sample_counts = gene_ids[start : start + nnz], counts[start : start + nnz]
        sample_normalized = normalized[start : start + nnz]
        if n_large(sample_counts) * 8 < nnz:
            log_table(library_size[b], target_sum, table)
            show_small(sample_genes, sample_counts, table, shown, sample_normalized, small, swaps, values)
        else:
            show_any(sample_genes, shown, sample_normalized, place, values)
        out_gene_ids[b, n:] = 0
        out_values[b, n:] = 0.0
        out_n_unmasked[b] = n


class Masking:
    """Masks of one corpus, and the scratch to draw them; used by one thread at a time.

    panels : of the corpus.  n_genes : of its vocabulary.  target_sum : L, counts that libraries are scaled to.
    n_unmasked : K, genes shown of each sample; a smaller panel is shown whole.  seed : of the run.
    temperature : 0 draws genes uniformly; above 0 favours those seen in many samples, below 0 the rare ones (spec A.5).
    n_nonzero : (n_genes,) int64, train samples in which each gene is above zero; needed unless `temperature` is 0.

    Attributes
    ----------
    width : columns of a masked batch: K, or the size of the largest panel if that is smaller.
    """

    def __init__(
        self,
        panels: Panels,
        n_genes: int,
        target_sum: float,
        n_unmasked: int,
        seed: int,
        temperature: float = 0.0,
        n_nonzero: np.ndarray | None = None,
    ) -> None:
        if n_unmasked < 1:
            raise ValueError(f"n_unmasked must be at least 1 gene, got {n_unmasked}")
        if temperature and (n_nonzero is None or len(n_nonzero) != n_genes):
            raise ValueError(f"a draw at temperature {temperature} needs n_nonzero of all {n_genes} genes")
        self.width = min(n_unmasked, panels.largest)
        self._panels, self._target_sum, self._seed = panels, target_sum, seed
        self._weights = np.empty(0) if n_nonzero is None or not temperature else inverse_weights(n_nonzero, temperature)
        self._small, self._place = np.zeros(n_genes, np.uint8), np.zeros(n_genes, np.uint16)
        self._identity = np.arange(panels.largest, dtype=np.uint16)
        self._swaps = np.empty(self.width + 1, np.uint32)
        self._race = np.empty(2 * panels.largest if temperature else 0)
        self._table = np.zeros(SMALL + 1, np.float32)

    def __call__(
        self,
        samples: Ragged,
        panel_id: np.ndarray,
        sample_id: np.ndarray,
        library_size: np.ndarray,
        epoch: int,
        normalized: np.ndarray,
        gene_ids: np.ndarray,
        values: np.ndarray,
        n_unmasked: np.ndarray,
    ) -> None:
        """Normalise a batch of B samples and draw its masks, into the buffers given.

        panel_id, sample_id : (B,) int64.  library_size : (B,) float64, counts.
        normalized : (nnz,) float32, L c / library size.  gene_ids : (B, width) uint16.  values : (B, width) float32,
        ln(1 + normalised count).  n_unmasked : (B,) int32; columns beyond are 0.
        """
        normalize(samples.indptr, samples.counts, library_size, self._target_sum, normalized)
        mask_batch(
            samples.indptr, samples.gene_ids, samples.counts, normalized, library_size, self._target_sum, panel_id, sample_id,
            self._panels.indptr, self._panels.gene_ids, self._seed, epoch, self._weights, self._small, self._place,
            self._identity, self._swaps, self._race, self._table, gene_ids, values, n_unmasked,
        )  # fmt: skip
