"""Which samples of a dataset are held out for validation; curation and shard building both choose by this code."""

from collections.abc import Sequence

import numpy as np

from txfm_data.random_order import permutation

_SPLIT_BATCHES, _SPLIT_SAMPLES = 2**60 + 2**40, 2**60 + 2**41
"""Streams of the hash; those that `shards.order` names lie elsewhere."""


def hold_out(
    codes: np.ndarray, names: Sequence[str], *, share: float, seed: int
) -> tuple[np.ndarray, str, tuple[str, ...]]:
    """Which samples of one dataset are validation: whole experimental batches, at least one and never all.

    codes : (n,) integers. Batch of each sample, a position in `names`.
    A dataset of a single batch has samples drawn instead, and says so.

    Returns
    -------
    (n,) bool, "batches" | "samples" | "none", and the names of the batches held out.
    """
    is_val = np.zeros(len(codes), bool)
    if share == 0 or len(codes) < 2:
        return is_val, "none", ()
    there = sorted(np.unique(codes).tolist(), key=lambda code: names[code])
    if len(there) == 1:
        n = min(max(1, round(share * len(codes))), len(codes) - 1)
        is_val[permutation(len(codes), seed=seed, epoch=0, item=_SPLIT_SAMPLES)[:n]] = True
        return is_val, "samples", ()
    n = min(max(1, round(share * len(there))), len(there) - 1)
    chosen = [there[i] for i in permutation(len(there), seed=seed, epoch=0, item=_SPLIT_BATCHES)[:n].tolist()]
    is_held = np.zeros(len(names), bool)
    is_held[chosen] = True
    return is_held[codes], "batches", tuple(sorted(names[code] for code in chosen))
