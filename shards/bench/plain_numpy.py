"""Normalising and masking in NumPy, as fast as we could write it: what a user without our kernels would add to a loader."""

import numpy as np

from txfm_data.panels import Panels
from txfm_data.ragged import Ragged


def mask_in_numpy(
    samples: Ragged,
    panels: Panels,
    panel_id: np.ndarray,
    library_size: np.ndarray,
    target_sum: float,
    rng: np.random.Generator,
    dense: np.ndarray,
    gene_ids: np.ndarray,
    values: np.ndarray,
) -> np.ndarray:
    """Show K genes of each sample, uniformly without replacement from its panel; the normalised counts, (nnz,) float32.

    dense : (G,) float32 scratch.  gene_ids : (B, K) uint16 and values : (B, K) float32, ln(1 + normalised count): written;
    columns beyond a panel that is smaller than K are 0.

    Tried and slower: keys for all genes with argpartition (a fifth of the rate), masks of Booleans, whole batches made dense,
    dropping repeated draws (equal). Logarithms are taken of the shown values alone, indices are converted once a batch.
    """
    scale = (target_sum / library_size).astype(np.float32)
    normalized: np.ndarray = samples.counts.astype(np.float32)
    normalized *= np.repeat(scale, np.diff(samples.indptr))
    columns, bounds = samples.gene_ids.astype(np.intp), samples.indptr.tolist()
    width = gene_ids.shape[1]
    for b in range(len(samples)):
        part = slice(bounds[b], bounds[b + 1])
        dense.fill(0)
        dense[columns[part]] = normalized[part]
        panel = panels.genes(int(panel_id[b]))
        n = min(width, len(panel))
        if len(panel) == len(dense):  # the panel is all genes
            shown = rng.choice(len(panel), n, replace=False, shuffle=False)
        else:
            shown = panel[rng.choice(len(panel), n, replace=False, shuffle=False)].astype(np.intp)
        gene_ids[b, :n] = shown
        dense.take(shown, out=values[b, :n], mode="clip")
        gene_ids[b, n:] = 0
        values[b, n:] = 0
    np.log1p(values, out=values)
    return normalized
