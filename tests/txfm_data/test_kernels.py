"""The Numba kernels against plain NumPy, on random ragged input, and the laws that masks obey."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from txfm_data import kernels
from txfm_data.panels import make_panels

N_GENES = 300
L = 1e5


def random_batch(seed: int, n: int = 40):
    """Ragged samples over three panels, one of them a single gene; some samples empty."""
    rng = np.random.default_rng(seed)
    genes = [np.arange(0, 200), np.arange(100, 300, 2), np.array([7])]
    panels = make_panels([g.astype(np.uint16) for g in genes], [np.zeros(len(g)) for g in genes])
    panel_id = rng.integers(0, 3, n)
    ids, counts, lengths = [], [], []
    for b in range(n):
        size = int(rng.integers(0, len(genes[panel_id[b]]) + 1)) if b % 5 else 0
        ids.append(np.sort(rng.choice(genes[panel_id[b]], size, replace=False)))
        counts.append(rng.integers(1, 100_000, size))
        lengths.append(size)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    library_size = np.array([max(1, c.sum()) * 1.5 for c in counts])
    return (
        panels,
        panel_id,
        indptr,
        np.concatenate(ids).astype(np.uint16),
        np.concatenate(counts).astype(np.uint32),
        library_size,
    )


def run_mask(panels, panel_id, indptr, gene_ids, normalized, sample_id, *, k, seed=3, epoch=1):
    n = len(panel_id)
    dense, identity = np.zeros(N_GENES, np.float32), np.arange(panels.largest, dtype=np.int32)
    swaps, drawn = np.empty(k, np.int32), np.empty(k, np.int32)
    out = np.full((n, k), 9, np.uint16), np.full((n, k), 9.0, np.float32), np.empty(n, np.int32)
    kernels.mask_batch(
        indptr, gene_ids, normalized, panel_id, sample_id, panels.indptr, panels.gene_ids, seed, epoch,
        dense, identity, swaps, drawn, *out,
    )  # fmt: skip
    assert not dense.any() and np.array_equal(identity, np.arange(panels.largest))
    return out


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 32, 250])
def test_batch_equals_plain_numpy(seed, k):
    panels, panel_id, indptr, gene_ids, counts, library_size = random_batch(seed)
    normalized = np.empty(len(counts), np.float32)
    kernels.normalize(indptr, counts, library_size, L, normalized)
    rows = np.repeat(np.arange(len(panel_id)), np.diff(indptr))
    expected = (counts * (L / library_size[rows])).astype(np.float32)
    np.testing.assert_array_equal(normalized, expected)

    shown, values, n_unmasked = run_mask(panels, panel_id, indptr, gene_ids, normalized, np.arange(len(panel_id)), k=k)
    full = np.zeros((len(panel_id), N_GENES), np.float32)
    full[rows, gene_ids] = expected
    for b, panel in enumerate(panel_id):
        n = min(k, len(panels.genes(panel)))
        assert n_unmasked[b] == n
        assert len(np.unique(shown[b, :n])) == n and np.isin(shown[b, :n], panels.genes(panel)).all()
        np.testing.assert_allclose(values[b, :n], np.log1p(full[b, shown[b, :n]].astype(np.float64)), rtol=1e-6)
        assert not shown[b, n:].any() and not values[b, n:].any()


def test_float_counts_are_normalised_too():
    out = np.empty(2, np.float32)
    kernels.normalize(np.array([0, 2]), np.array([0.5, 1.5]), np.array([4.0]), L, out)
    np.testing.assert_allclose(out, [12_500, 37_500])


def test_preprocessing_reproduces_the_specified_numbers():
    """Spec A.1: counts (5, 0, 15, 80) with L = 1e5."""
    panels = make_panels([np.arange(4, dtype=np.uint16)], [np.zeros(4)])
    normalized = np.empty(3, np.float32)
    indptr, genes = np.array([0, 3]), np.array([0, 2, 3], np.uint16)
    kernels.normalize(indptr, np.array([5, 15, 80], np.uint32), np.array([100.0]), L, normalized)
    shown, values, _ = run_mask(panels, np.array([0]), indptr, genes, normalized, np.array([0]), k=4)
    expected = [8.517393171418904, 0, 9.61587214452889, 11.289794413577894]
    np.testing.assert_allclose(values[0][np.argsort(shown[0])], expected, rtol=1e-6)


@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10_000), k=st.integers(1, 199))
@settings(max_examples=30, deadline=None)
def test_a_mask_depends_on_seed_epoch_and_sample_alone(seed, epoch, k):
    panels = make_panels([np.arange(200, dtype=np.uint16)], [np.zeros(200)])
    ids = np.array([5, 11, 2**40])
    empty = np.zeros(4, np.int64), np.empty(0, np.uint16), np.empty(0, np.float32)
    together, _, _ = run_mask(panels, np.zeros(3, np.int64), *empty, ids, k=k, seed=seed, epoch=epoch)
    alone, _, _ = run_mask(
        panels, np.zeros(1, np.int64), empty[0][:2], *empty[1:], ids[2:], k=k, seed=seed, epoch=epoch
    )
    np.testing.assert_array_equal(together[2], alone[0])


def test_draws_are_uniform_without_replacement():
    """Each of 20 genes is drawn with probability 5/20, at each place alike (chi-square, 19 degrees of freedom, p > 1e-6)."""
    n = 20_000
    panels = make_panels([np.arange(20, dtype=np.uint16)], [np.zeros(20)])
    empty = np.zeros(n + 1, np.int64), np.empty(0, np.uint16), np.empty(0, np.float32)
    shown, _, _ = run_mask(panels, np.zeros(n, np.int64), *empty, np.arange(n), k=5)
    for drawn in (shown.ravel(), shown[:, 0], shown[:, 4]):
        counts = np.bincount(drawn, minlength=20)
        assert ((counts - len(drawn) / 20) ** 2 / (len(drawn) / 20)).sum() < 66
    other_epoch, _, _ = run_mask(panels, np.zeros(n, np.int64), *empty, np.arange(n), k=5, epoch=2)
    assert (np.sort(other_epoch) != np.sort(shown)).any(axis=1).mean() > 0.9


def test_hash_range_is_the_documented_stream():
    """SplitMix64 of the key plus multiples of the golden ratio, in plain Python integers."""

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    golden, key = 0x9E3779B97F4A7C15, 0
    for part in (12, 7, 99):
        key = mix(((key ^ part) + golden) % 2**64)
    out = np.empty(4, np.uint64)
    kernels.hash_range(12, 7, 99, out)
    assert out.tolist() == [mix((key + i * golden) % 2**64) for i in range(1, 5)]
