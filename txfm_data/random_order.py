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


def count_values(codes: np.ndarray, is_in: np.ndarray, n_values: int) -> np.ndarray:
    """How many of the samples that are in have each value: (n_values,) int64.

    codes : (n,) int32, positions of values; those of samples that are not in do not matter.  is_in : (n,) bool.
    """
    sizes = np.zeros(n_values, np.int64)
    _count(codes, is_in, sizes)
    return sizes


def draw_samples(
    first: int, codes: np.ndarray, is_in: np.ndarray, quota: np.ndarray, *, seed: int, number: int
) -> np.ndarray:
    """Which of consecutive samples are drawn: of each value the samples with the smallest keys, as many as its quota.

    Holds 9 bytes a sample, no orders and no ids: keys are sorted no further than to know the last that is drawn.

    first : id of the first sample.  codes : (n,) int32, a position in `quota` where the sample is in.
    is_in : (n,) bool, samples that may be drawn.  quota : (n_values,) int64, at least 1 for a value that occurs.
    seed, number : of `sample_keys`.

    Returns
    -------
    (n,) bool, False where the sample is not in.
    """
    sizes = count_values(codes, is_in, len(quota))
    cut = np.flatnonzero(quota < sizes)  # the other values stay whole, and need no keys
    ends = np.cumsum(sizes[cut])
    places, limits = np.full(len(quota), -1), np.full(len(quota), np.iinfo(np.uint64).max, np.uint64)
    places[cut] = ends - sizes[cut]
    keys = np.empty(int(sizes[cut].sum()), np.uint64)
    _group_keys(seed, number, first, codes, is_in, places, keys)
    for value, end in zip(cut.tolist(), ends.tolist(), strict=True):
        of_value, last = keys[end - sizes[value] : end], quota[value] - 1
        of_value.partition(last)
        limits[value] = of_value[last]
    drawn = np.empty(len(codes), bool)
    _within(seed, number, first, codes, is_in, limits, drawn)
    return drawn


@njit(nogil=True, cache=True)
def _count(codes, is_in, out):  # type: ignore[no-untyped-def]
    for i in range(codes.shape[0]):
        if is_in[i]:
            out[codes[i]] += 1


@njit(nogil=True, cache=True)
def _group_keys(seed, number, first, codes, is_in, places, out):  # type: ignore[no-untyped-def]
    """Keys of the samples that are in, side by side for each value; `places` (-1: leave the value out) are moved on."""
    for i in range(codes.shape[0]):
        if is_in[i] and places[codes[i]] >= 0:
            out[places[codes[i]]] = stream_key(seed, number, np.uint64(first + i) + _SAMPLES)
            places[codes[i]] += 1


@njit(nogil=True, cache=True)
def _within(seed, number, first, codes, is_in, limits, out):  # type: ignore[no-untyped-def]
    for i in range(codes.shape[0]):
        out[i] = is_in[i] and stream_key(seed, number, np.uint64(first + i) + _SAMPLES) <= limits[codes[i]]


@njit(nogil=True, cache=True)
def _sample_keys(seed, number, sample_ids, out):  # type: ignore[no-untyped-def]
    for i in range(sample_ids.shape[0]):
        out[i] = stream_key(seed, number, np.uint64(sample_ids[i]) + _SAMPLES)
