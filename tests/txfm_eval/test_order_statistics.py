"""Exact ranks without sorting everything: against NumPy's sort, with ties and with values that hardly differ."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from txfm_eval import order_statistics as module
from txfm_eval.order_statistics import order_statistics, outside


def pieces(values: np.ndarray, size: int = 7):
    return lambda: (values[i : i + size] for i in range(0, len(values), size))


def values_of(kind: str, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return {
        "spread": rng.uniform(-1, 1, n),
        "ties": rng.integers(-2, 3, n) / 2.0,
        "constant": np.full(n, 0.25),
        "narrow": 0.5 + 1e-15 * rng.integers(0, 4, n),
        "two ends": np.where(rng.random(n) < 0.5, -1.0, 1.0),
    }[kind]


@given(
    kind=st.sampled_from(["spread", "ties", "constant", "narrow", "two ends"]),
    n=st.integers(1, 200),
    seed=st.integers(0, 9),
    keep=st.sampled_from([2, 50, 1 << 21]),
)
@settings(max_examples=60, deadline=None)
def test_ranks_equal_a_full_sort(kind, n, seed, keep):
    values = values_of(kind, n, seed)
    ranks = sorted({0, n // 3, n // 2, n - 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_KEEP", keep)
        found = order_statistics(pieces(values), n, ranks, low=-1.0, high=1.0)
    assert found == np.sort(values)[ranks].tolist()


def test_number_of_passes_is_small():
    values, passes = np.random.default_rng(0).normal(size=300_000).clip(-4, 4), []

    def chunks():
        passes.append(1)
        yield from np.array_split(values, 13)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_KEEP", 1000)
        found = order_statistics(chunks, len(values), [15_000, 285_000], low=-4.0, high=4.0)
    assert found == np.sort(values)[[15_000, 285_000]].tolist()
    assert len(passes) == 2


def test_rank_outside_is_refused():
    with pytest.raises(ValueError, match=r"ranks \[5\] of 5 values; expected 0 to 4"):
        order_statistics(pieces(np.zeros(5)), 5, [0, 5], low=-1, high=1)


def test_shares_out_of_order_are_refused():
    with pytest.raises(ValueError, match="expected 0 <= lower < upper <= 1"):
        outside(np.zeros(1), pieces(np.zeros(5)), 5, (0.9, 0.1), (-1, 1))


@pytest.mark.parametrize(("shares", "recall"), [((0.1, 0.9), 0.0), ((0.2, 0.8), 1.0)])
def test_toy_null_of_five(shares, recall):
    """The toy of efaar_benchmarking: null 1..5, query 1 and 5."""
    null = np.arange(1.0, 6.0)
    above, below = outside(np.array([1.0, 5.0]), pieces(null), 5, shares, (1.0, 5.0))
    assert np.mean(above | below) == recall


@given(n=st.integers(1, 120), seed=st.integers(0, 5), low=st.floats(0, 0.4), high=st.floats(0.6, 1))
@settings(max_examples=60, deadline=None)
def test_outside_equals_ranks_in_the_sorted_null(n, seed, low, high):
    rng = np.random.default_rng(seed)
    null = np.sort(rng.integers(-10, 11, n) / 10)
    values = np.concatenate([null, rng.uniform(-1, 1, 5)])
    above, below = outside(values, pieces(null), n, (low, high), (-1.0, 1.0))
    assert np.array_equal(above, np.searchsorted(null, values, "left") / n >= high)
    assert np.array_equal(below, np.searchsorted(null, values, "right") / n <= low)
