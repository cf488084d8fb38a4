"""Stochastic depth: which residual branches of which samples are left out of a training step."""

from collections.abc import Sequence

import numpy as np

_BRANCHES = 2**61
"""Added to a sample id: these draws are a stream of their own, beside those of masks, weights and orders."""


def stochastic_depth_rates(blocks: int, last: float) -> list[float]:
    """Drop rate of each block, rising linearly from 0 at the first to `last` at the last."""
    return [last * block / max(blocks - 1, 1) for block in range(blocks)]


def branch_scales(rates: Sequence[float], seed: int, epoch: int, sample_id_B: np.ndarray) -> np.ndarray:
    """Scale of each branch of each sample, as (seed, epoch, sample id, branch) decide and nothing else.

    Parameters
    ----------
    rates
        Drop rate of each block, as of `stochastic_depth_rates`.
    seed, epoch
        As those of the masks.
    sample_id_B
        (B,) int64, below 2^59.

    Returns
    -------
    numpy.ndarray
        (2 x blocks, B) float32: 0 where the branch is dropped, else 1 / (1 - rate). Row 2i is the attention of
        block i, row 2i + 1 its MLP.
    """
    from txfm_data.kernels import hash_range  # numba, needed only here

    hashes_BR = np.empty((len(sample_id_B), 2 * len(rates)), dtype=np.uint64)
    for row, sample in zip(hashes_BR, sample_id_B.tolist(), strict=True):
        hash_range(seed, epoch, sample + _BRANCHES, row)
    rate_R1 = np.repeat(np.asarray(rates, dtype=np.float64), 2)[:, None]
    is_kept_RB = (hashes_BR.T >> np.uint64(11)).astype(np.float64) * 2.0**-53 >= rate_R1
    return np.where(is_kept_RB, 1 / (1 - rate_R1), 0.0).astype(np.float32)
