"""The Numba kernels against plain NumPy, on random ragged input, and the laws that masks obey."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from txfm_data import kernels
from txfm_data.masking import Masking
from txfm_data.panels import make_panels
from txfm_data.ragged import Ragged

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


def run_mask(panels, panel_id, indptr, gene_ids, counts, library_size, sample_id, *, k, seed=3, epoch=1, **options):
    """Shown genes, their values and numbers, and the normalised counts; drawn twice, since scratch must come back clean."""
    n = len(panel_id)
    masking = Masking(panels, N_GENES, L, k, seed, **options)
    samples = Ragged(indptr, gene_ids, counts)
    results = []
    for _ in range(2):
        normalized = np.empty(len(counts), np.float32)
        width = masking.width
        out = np.full((n, width), 9, np.uint16), np.full((n, width), 9.0, np.float32), np.empty(n, np.int32)
        masking(samples, panel_id, sample_id, library_size, epoch, normalized, *out)
        results.append((*out, normalized))
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)
    return results[0]


def nothing(n):
    """The CSR of n samples without counts, and their library sizes."""
    return np.zeros(n + 1, np.int64), np.empty(0, np.uint16), np.empty(0, np.uint32), np.ones(n)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 32, 250])
@pytest.mark.parametrize("kind", ["large", "small", "some large", "float"])
def test_batch_equals_plain_numpy(seed, k, kind):
    panels, panel_id, indptr, gene_ids, counts, library_size = random_batch(seed)
    if kind != "large":  # tables of logarithms are used where most counts are small
        rare = np.arange(len(counts)) % 17 == 0 if kind != "small" else np.zeros(len(counts), bool)
        counts = np.where(rare, counts, counts % 15 + 1).astype(np.uint32)
    if kind == "float":
        counts = counts + np.where(np.arange(len(counts)) % 11 == 0, 0.25, 0.0)
    shown, values, n_unmasked, normalized = run_mask(
        panels, panel_id, indptr, gene_ids, counts, library_size, np.arange(len(panel_id)), k=k
    )
    rows = np.repeat(np.arange(len(panel_id)), np.diff(indptr))
    expected = (counts * (L / library_size[rows])).astype(np.float32)
    np.testing.assert_array_equal(normalized, expected)
    full = np.zeros((len(panel_id), N_GENES), np.float32)
    full[rows, gene_ids] = expected
    for b, panel in enumerate(panel_id):
        n = min(k, len(panels.genes(panel)))
        assert n_unmasked[b] == n
        assert len(np.unique(shown[b, :n])) == n and np.isin(shown[b, :n], panels.genes(panel)).all()
        np.testing.assert_allclose(values[b, :n], np.log1p(full[b, shown[b, :n]].astype(np.float64)), rtol=1e-6)
        assert not shown[b, n:].any() and not values[b, n:].any()


def test_masks_are_those_of_the_documented_shuffle():
    """The partial Fisher-Yates of docs/format_shards.md in plain Python."""
    size, k, draws = 50, 12, np.empty(12, np.uint64)
    panels = make_panels([np.arange(100, 100 + size).astype(np.uint16)], [np.zeros(size)])
    shown, *_ = run_mask(panels, np.zeros(2, np.int64), *nothing(2), np.array([7, 12_345]), k=k)
    for row, sample_id in enumerate((7, 12_345)):
        kernels.hash_range(3, 1, sample_id, draws)
        positions = list(range(size))
        for i, draw in enumerate(draws.tolist()):
            other = i + ((draw >> 32) * (size - i) >> 32)
            positions[i], positions[other] = positions[other], positions[i]
        assert shown[row].tolist() == [100 + p for p in positions[:k]]


def test_bad_masks_are_refused():
    panels = make_panels([np.arange(4, dtype=np.uint16)], [np.zeros(4)])
    with pytest.raises(ValueError, match="at least 1 gene, got 0"):
        Masking(panels, 4, L, 0, 0)
    with pytest.raises(ValueError, match=r"temperature 0\.5 needs n_nonzero of all 4 genes"):
        Masking(panels, 4, L, 2, 0, 0.5, np.ones(3, np.int64))


def test_a_temperature_favours_genes_that_are_seen_often():
    panels = make_panels([np.arange(200, dtype=np.uint16)], [np.zeros(200)])
    n_nonzero = np.repeat([1_000, 10], [100, N_GENES - 100])
    share = {}
    for temperature in (-1.0, 0.0, 1.0):
        shown, *_ = run_mask(
            panels,
            np.zeros(50, np.int64),
            *nothing(50),
            np.arange(50),
            k=40,
            temperature=temperature,
            n_nonzero=n_nonzero,
        )
        assert all(len(set(row)) == 40 for row in shown.tolist())
        share[temperature] = (shown < 100).mean()
    assert share[-1.0] < 0.1 and abs(share[0.0] - 0.5) < 0.05 and share[1.0] > 0.9


def test_weights_decide_for_each_sample_of_each_epoch_alone():
    """Realised shares, and that a decision depends on neither its neighbours nor another epoch's."""
    ids, weight = np.arange(20_000), np.repeat([1.0, 0.5, 0.05, 1e-9], 5_000)
    kept = {}
    for epoch in (0, 1):
        kept[epoch] = np.empty(20_000, bool)
        kernels.keep_samples(4, epoch, ids, weight, kept[epoch])
    shares = kept[0].reshape(4, -1).mean(axis=1)
    assert shares[0] == 1 and shares[3] == 0
    assert abs(shares[1] - 0.5) < 0.03 and abs(shares[2] - 0.05) < 0.015
    both = (kept[0] & kept[1])[5_000:10_000].mean()
    assert abs(both - 0.25) < 0.03
    backwards = np.empty(20_000, bool)
    kernels.keep_samples(4, 0, ids[::-1].copy(), weight[::-1].copy(), backwards)
    np.testing.assert_array_equal(backwards[::-1], kept[0])


def test_float_counts_are_normalised_too():
    out = np.empty(2, np.float32)
    kernels.normalize(np.array([0, 2]), np.array([0.5, 1.5]), np.array([4.0]), L, out)
    np.testing.assert_allclose(out, [12_500, 37_500])


def test_preprocessing_reproduces_the_specified_numbers():
    """Spec A.1: counts (5, 0, 15, 80) with L = 1e5."""
    panels = make_panels([np.arange(4, dtype=np.uint16)], [np.zeros(4)])
    indptr, genes = np.array([0, 3]), np.array([0, 2, 3], np.uint16)
    counts = np.array([5, 15, 80], np.uint32)
    shown, values, *_ = run_mask(panels, np.array([0]), indptr, genes, counts, np.array([100.0]), np.array([0]), k=4)
    expected = [8.517393171418904, 0, 9.61587214452889, 11.289794413577894]
    np.testing.assert_allclose(values[0][np.argsort(shown[0])], expected, rtol=1e-6)


@given(
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10_000),
    k=st.integers(1, 199),
    temperature=st.sampled_from([0.0, 0.5]),
)
@settings(max_examples=30, deadline=None)
def test_a_mask_depends_on_seed_epoch_and_sample_alone(seed, epoch, k, temperature):
    panels = make_panels([np.arange(200, dtype=np.uint16)], [np.zeros(200)])
    ids = np.array([5, 11, 2**40])
    options = {"k": k, "seed": seed, "epoch": epoch, "temperature": temperature, "n_nonzero": np.arange(N_GENES)}
    together, *_ = run_mask(panels, np.zeros(3, np.int64), *nothing(3), ids, **options)
    alone, *_ = run_mask(panels, np.zeros(1, np.int64), *nothing(1), ids[2:], **options)
    np.testing.assert_array_equal(together[2], alone[0])


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
