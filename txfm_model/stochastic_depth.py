"""Stochastic depth: which residual branches of which samples are left out of a training step."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BranchScales = np.ndarray | Tensor
"""(2 x blocks, B) float32, see `branch_scales`. As an array they are known before the device computes, and what they leave
out is not computed; as a tensor every branch is computed and multiplied (shapes stay the same, as torch.compile wants)."""
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


class BranchShare(NamedTuple):
    """Which samples of a batch have a branch, and what it is multiplied by.

    kept : (b,) int64, samples that have it; None is all of them.  scale : (b,) or (B,) float32; None is 1.
    """

    kept: Tensor | None
    scale: Tensor | None

    def choose(self, x_BTD: Tensor) -> Tensor:
        """The samples that have the branch, (b, T, D)."""
        return x_BTD if self.kept is None else x_BTD[self.kept]

    def add(self, x_BTD: Tensor, branch_bTD: Tensor) -> Tensor:
        """Add the branch to those samples, (B, T, D)."""
        scaled_bTD = branch_bTD if self.scale is None else branch_bTD * self.scale[:, None, None]
        if self.kept is None:
            return x_BTD + scaled_bTD
        return x_BTD.index_add(0, self.kept, scaled_bTD.to(x_BTD.dtype))


WHOLE = BranchShare(None, None)


def branch_shares(scale_RB: BranchScales | None, rates: Sequence[float], device: torch.device) -> list[BranchShare]:
    """The share of each branch, attention and MLP of each block in turn.

    A branch that no sample of the batch has is computed and multiplied by zeros, so that its weights have a gradient, 0, as
    they have everywhere else: AdamW decays them in every step.

    Parameters
    ----------
    scale_RB
        Scales; None is 1 for all.
    rates
        Drop rate of each block.
    device
        Of the model.
    """
    if scale_RB is None:
        return [WHOLE] * (2 * len(rates))
    if isinstance(scale_RB, Tensor):
        return [BranchShare(None, scale_RB[row]) if rates[row // 2] > 0 else WHOLE for row in range(2 * len(rates))]
    kept = [np.flatnonzero(scale_B) for scale_B in scale_RB]
    is_whole = [(scale_B == 1).all() for scale_B in scale_RB]
    is_part = [0 < len(rows) < scale_RB.shape[1] for rows in kept]
    # One copy to the device for all branches; where each begins is known here.
    kept_rows = torch.from_numpy(np.concatenate([*kept, np.empty(0, np.int64)])).to(device, non_blocking=True)
    pieces = kept_rows.split([len(rows) for rows in kept])
    scales = torch.from_numpy(scale_RB).to(device, non_blocking=True)
    return [
        WHOLE if whole else BranchShare(piece, scale_B[piece]) if part else BranchShare(None, scale_B)
        for whole, part, piece, scale_B in zip(is_whole, is_part, pieces, scales, strict=True)
    ]
