"""Random orders from hashes: of positions 0 to n - 1, and of samples by their ids. They depend on no library's generator."""

import numpy as np
from numba import njit

from txfm_data.kernels import hash_range, stream_key

_SAMPLES = np.uint64(2**60 + 2**59)
"""Streams of `sample_keys`: above sample ids, which end below 2^59, and away from the streams that `shards.order` names."""


def permutation(n: int, *, seed: int, epoch: int, item: int) -> np.ndarray:
    """Random order of 0..n-1, (n,) int64, from the hash stream (seed, epoch, item)."""
    keys = np.empty(n, np.uint64)
    hash_range(seed, epoch, item, keys)
    return np.argsort(keys, kind="stable")


def sample_keys(sample_ids: np.ndarray, *, seed: int, number: int) -> np.ndarray:
    """Keys of samples, (n,) uint64: those with the smallest are drawn first. Keys of one draw never tie.

    A sample's key depends on the seed, the number of the draw and its own id, not on which others there are.

    sample_ids : (n,) int64, below 2^59.
    """
    keys = np.empty(len(sample_ids), np.uint64)
    _sample_keys(seed, number, sample_ids, keys)
    return keys


@njit(nogil=True, cache=True)
def _sample_keys(seed, number, sample_ids, out):  # type: ignore[no-untyped-def]
    for i in range(sample_ids.shape[0]):
        out[i] = stream_key(seed, number, np.uint64(sample_ids[i]) + _SAMPLES)
