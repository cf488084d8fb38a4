"""Keys of samples against plain Python; `permutation` is tested with the order of training that is made of it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from txfm_data.random_order import sample_keys

WORD, GOLDEN = 2**64 - 1, 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def reference(seed: int, number: int, sample_id: int) -> int:
    key = mix((seed + GOLDEN) & WORD)
    key = mix(((key ^ number) + GOLDEN) & WORD)
    return mix(((key ^ (sample_id + 2**60 + 2**59)) + GOLDEN) & WORD)


@given(seed=st.integers(0, 2**63 - 1), number=st.integers(0, 100), ids=st.lists(st.integers(0, 2**59 - 1), unique=True))
def test_keys_are_the_hash_of_seed_draw_and_sample(seed, number, ids):
    keys = sample_keys(np.array(ids, np.int64), seed=seed, number=number)
    assert keys.tolist() == [reference(seed, number, i) for i in ids]
    assert len(set(keys.tolist())) == len(ids)


def test_the_smallest_keys_are_spread_over_the_samples():
    ids = np.arange(100_000)
    first = sample_keys(ids, seed=3, number=1).argsort()[:10_000]
    second = sample_keys(ids, seed=3, number=2).argsort()[:10_000]
    assert abs(np.bincount(first // 10_000) - 1_000).max() < 150  # five standard deviations
    assert abs(len(np.intersect1d(first, second)) - 1_000) < 150
