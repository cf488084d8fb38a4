"""Counts of one block of samples, a pure function of (seed, dataset, block)."""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from txfm_data.simulate.design import BLOCK_SAMPLES, KNOCKDOWN, Dataset, Genes


@dataclass(frozen=True)
class Block:
    """Consecutive samples.

    counts : (n, P) int32 CSR, no row without counts.  type, batch, perturbation : (n,) rows of the dataset's
    tables.
    """

    counts: sp.csr_matrix
    type: np.ndarray
    batch: np.ndarray
    perturbation: np.ndarray


def n_blocks(dataset: Dataset) -> int:
    """Return the number of blocks; the last may be short."""
    return -(-dataset.n_obs // BLOCK_SAMPLES)


def simulate_block(seed: int, genes: Genes, dataset: Dataset, block: int) -> Block:
    """Draw block number `block` of a dataset; takes about 40 bytes per gene and sample of the block."""
    rng = np.random.default_rng([seed, 1 + dataset.number, block])
    start = block * BLOCK_SAMPLES
    rows = np.arange(start, min(start + BLOCK_SAMPLES, dataset.n_obs))

    def dealt(slots: np.ndarray) -> np.ndarray:
        return rng.permutation(slots[rows % len(slots)])

    cell_type, batch = dealt(dataset.type_slots), dealt(dataset.batch_slots)
    perturbation = dealt(dataset.perturbation_slots)
    rate = _rates(rng, genes, dataset, cell_type, batch, perturbation)
    shape = (genes.dispersion[dataset.panel] / dataset.overdispersion).astype(np.float32)
    noisy = rng.standard_gamma(np.broadcast_to(shape, rate.shape), dtype=np.float32)
    noisy *= rate / shape
    counts = rng.poisson(noisy).astype(np.int32)
    empty = np.flatnonzero(~counts.any(axis=1))
    counts[empty, rate[empty].argmax(axis=1)] = 1  # a sample without counts has no profile to simulate
    return Block(sp.csr_matrix(counts), cell_type, batch, perturbation)


def _rates(
    rng: np.random.Generator,
    genes: Genes,
    dataset: Dataset,
    cell_type: np.ndarray,
    batch: np.ndarray,
    perturbation: np.ndarray,
) -> np.ndarray:
    """Return expected counts, (n, P) float32; the sum of a row is the sample's depth."""
    panel, n = dataset.panel, len(cell_type)
    own = rng.normal(0.0, dataset.activity_sd, (n, dataset.activity.shape[1]))
    activity = dataset.activity[cell_type] + own
    knocked = np.full(n, -1)
    if dataset.perturbations is not None:
        activity += dataset.perturbations.shift[perturbation]
        is_strong = dataset.perturbations.is_strong[perturbation]
        knocked[is_strong] = np.searchsorted(panel, dataset.perturbations.target[perturbation[is_strong]])
    log_rate = activity.astype(np.float32)[:, genes.program[panel]]  # -1 reads the last one, times loading 0
    log_rate *= genes.loading[panel].astype(np.float32)
    log_rate += genes.log_base[panel].astype(np.float32)
    log_rate += dataset.batch_shift.astype(np.float32)[batch]
    hit = np.flatnonzero(knocked >= 0)
    log_rate[hit, knocked[hit]] += np.float32(np.log(KNOCKDOWN))
    rate: np.ndarray = np.exp(log_rate, out=log_rate)
    depth = dataset.depth * dataset.batch_depth[batch] * np.exp(rng.normal(0.0, dataset.depth_sd, n))
    rate *= (depth / rate.sum(axis=1, dtype=np.float64))[:, None].astype(np.float32)
    return rate
