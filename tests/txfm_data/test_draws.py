"""Are the genes that a sample shows drawn as promised? Chi-square of what is drawn, exact probabilities, and the key alone.

Every statistic is shown to find a draw that is a little wrong, and seeds are fixed: a p-value here cannot fail by chance.
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from scipy.stats import chi2

from txfm_data import kernels
from txfm_data.weighted_draw import _minus_log, draw_weighted, inverse_weights

SURE = 1e-6
"""A right draw is called wrong by one test in a million seeds; a p-value near 1 is as suspicious as one near 0."""
N_MASKS = 1_000_000


def draw_uniform(seed: int, epoch: int, items: np.ndarray, size: int, k: int) -> np.ndarray:
    out = np.empty((len(items), k), np.uint16)
    kernels.draw_rows(seed, epoch, items, np.arange(size, dtype=np.uint16), np.empty(k, np.uint32), out)
    return out


@njit
def draw_weighted_rows(seed, epoch, items, genes, inverse, race, out):
    for b in range(items.shape[0]):
        draw_weighted(kernels.stream_key(seed, epoch, items[b]), genes, inverse, race, out[b])


def draw_frequent(n_nonzero, temperature: float, items: np.ndarray, k: int, *, seed=5, epoch=3) -> np.ndarray:
    """Masks over a panel of every third gene of a vocabulary, of which the others must not matter."""
    genes = np.arange(1, 3 * len(n_nonzero), 3).astype(np.uint16)
    vocabulary = np.full(3 * len(n_nonzero) + 2, 10**9)
    vocabulary[genes] = n_nonzero
    out = np.empty((len(items), k), np.uint16)
    race = np.full(2 * len(genes), np.nan)
    draw_weighted_rows(seed, epoch, items, genes, inverse_weights(vocabulary, temperature), race, out)
    return out


def shown(masks: np.ndarray, size: int) -> np.ndarray:
    """Masks (n, K) as float32 (n, size): 1 where a position is shown."""
    one_hot = np.zeros((len(masks), size), np.float32)
    np.put_along_axis(one_hot, masks.astype(np.int64), 1, axis=1)
    assert (one_hot.sum(axis=1) == masks.shape[1]).all(), "a position was drawn twice"
    return one_hot


# ---- uniform: every gene, every pair, every place


def p_of_genes(counts: np.ndarray, n: int, k: int) -> float:
    """Chance of inclusion counts (P,) of n uniform masks at least this far from n k / P.

    Inclusions of one mask sum to k: their covariance is p (1 - p) P / (P - 1) on the plane of that sum.
    """
    size = len(counts)
    p = k / size
    return float(chi2.sf(((counts - n * p) ** 2).sum() / (n * p * (1 - p) * size / (size - 1)), size - 1))


def p_of_pairs(together: np.ndarray, n: int, k: int) -> float:
    """Chance of how often pairs came together, (P, P), over n uniform masks, with the covariance of pairs that share genes."""
    size = len(together)
    chance = [math.prod((k - i) / (size - i) for i in range(m)) for m in range(5)]  # that m given genes are all shown
    pairs = np.array(list(itertools.combinations(range(size), 2)))
    overlap = (pairs[:, None, :, None] == pairs[None, :, None, :]).sum(axis=(2, 3))
    covariance = np.array(chance)[4 - overlap] - chance[2] ** 2
    off = together[pairs[:, 0], pairs[:, 1]] - n * chance[2]
    # Counts of all pairs sum to a constant: one direction has no variance.
    statistic = off @ np.linalg.pinv(covariance, rcond=1e-9, hermitian=True) @ off / n
    return float(chi2.sf(statistic, len(pairs) - 1))


def p_of_neighbours(one: np.ndarray, other: np.ndarray) -> float:
    """Chance that gene a in mask i and gene b in mask i + 1 go together this much if masks are independent, over all a, b."""
    n, size = one.shape
    p = float(one[0].sum()) / size
    off = (one - np.float32(p)).T.astype(np.float64) @ (other - np.float32(p)).astype(np.float64)
    variance = p * (1 - p) * size / (size - 1)
    return float(chi2.sf((off**2).sum() / (n * variance**2), (size - 1) ** 2))


def chunks(grid: str):
    """10^6 keys in arrays of one seed and epoch: over sample ids, over epochs, over seeds, over all."""
    n_seeds, n_epochs = {"ids": (1, 1), "epochs": (1, 1000), "seeds": (1000, 1), "all": (20, 50)}[grid]
    ids = np.arange(N_MASKS // (n_seeds * n_epochs))
    for seed in range(n_seeds):
        for epoch in range(n_epochs):
            yield seed, epoch, ids + (2**40 if grid == "all" else 0)


@pytest.mark.parametrize("grid", ["ids", "epochs", "seeds", "all"])
def test_every_gene_and_every_pair_is_shown_alike_over_a_million_masks(grid):
    size, k = 24, 7
    masks = np.concatenate([draw_uniform(seed, epoch, ids, size, k) for seed, epoch, ids in chunks(grid)])
    assert len(masks) == N_MASKS
    first, last = (np.bincount(masks[:, place], minlength=size) for place in (0, k - 1))
    together = sum(part.T @ part for part in np.split(shown(masks, size), 10))
    assert SURE < p_of_genes(np.diag(together), N_MASKS, k) < 1 - SURE
    assert SURE < p_of_pairs(together, N_MASKS, k) < 1 - SURE
    assert SURE < p_of_genes(first, N_MASKS, 1) < 1 - SURE
    assert SURE < p_of_genes(last, N_MASKS, 1) < 1 - SURE


def test_every_gene_of_a_large_panel_is_shown_alike():
    size, k, n = 20_000, 2_048, 2_000
    counts = np.bincount(draw_uniform(1, 2, np.arange(n), size, k).ravel(), minlength=size)
    assert SURE < p_of_genes(counts, n, k) < 1 - SURE
    tilted = draw_frequent(np.linspace(9_650, 10_350, size).astype(int), 1.0, np.arange(n), k)
    assert p_of_genes(np.bincount(tilted.ravel(), minlength=size), n, k) < SURE, "genes 3.5 % off would be found"


def test_a_draw_of_few_bits_is_found():
    """Fisher-Yates with 9 bits a step in place of 32: a step prefers some places by 2 to 5 %."""
    size, k, n, rng = 24, 7, 200_000, np.random.default_rng(0)
    masks = np.tile(np.arange(size), (n, 1))
    rows = np.arange(n)
    for step in range(k):
        other = step + ((rng.integers(0, 2**9, n) * (size - step)) >> 9)
        masks[rows, step], masks[rows, other] = masks[rows, other], masks[rows, step]
    one_hot = shown(masks[:, :k], size)
    assert p_of_genes(one_hot.sum(axis=0, dtype=np.float64), n, k) < SURE


def test_genes_that_travel_together_are_found():
    """Single genes are uniform here: masks are right but for one in 100, which is a run of neighbours."""
    size, k, n = 24, 7, 200_000
    masks = draw_uniform(1, 1, np.arange(n), size, k)
    runs = np.random.default_rng(0).integers(0, size, n // 100)
    masks[::100] = (runs[:, None] + np.arange(k)) % size
    one_hot = shown(masks, size)
    together = one_hot.T @ one_hot
    assert p_of_genes(np.diag(together), n, k) > SURE
    assert p_of_pairs(together, n, k) < SURE


def test_neighbouring_samples_epochs_and_seeds_are_independent():
    size, k, n = 24, 7, 200_000
    ids = np.arange(n)
    masks = shown(draw_uniform(1, 1, ids, size, k), size)
    others = {"sample 1 on": masks[1:], "sample 2 on": masks[2:], "sample 1024 on": masks[1024:]}
    others["epoch"] = shown(draw_uniform(1, 2, ids, size, k), size)
    others["seed"] = shown(draw_uniform(2, 1, ids, size, k), size)
    others["exchanged"] = shown(draw_uniform(1, 2, np.roll(ids, 1), size, k), size)
    for name, other in others.items():
        assert SURE < p_of_neighbours(masks[: len(other)], other) < 1 - SURE, name


def test_streams_that_overlap_are_found():
    """Keys a golden ratio apart: mask i + 1 is drawn from the stream of mask i from its second draw on. Each is uniform."""
    size, k, n = 24, 7, 20_000
    identity, swaps = np.arange(size, dtype=np.uint16), np.empty(k, np.uint32)
    masks = np.empty((n, k), np.uint16)
    with np.errstate(over="ignore"):
        keys = np.uint64(99) + np.arange(n, dtype=np.uint64) * kernels._GOLDEN
    for row, key in zip(masks, keys, strict=True):
        kernels.draw_unmasked(key, identity, swaps, row)
    one_hot = shown(masks, size)
    assert p_of_genes(one_hot.sum(axis=0), n, k) > SURE
    assert p_of_neighbours(one_hot[:-1], one_hot[1:]) < SURE


# ---- weighted: the probabilities of the specification

SPEC = {0.0: (2 / 3, 2 / 3, 2 / 3), 1.0: (0.390476190, 0.714285714, 0.895238095)}
SPEC[0.5] = (0.521005976, 0.679622759, 0.799371265)
SPEC[-1.0], SPEC[-0.5] = SPEC[1.0][::-1], SPEC[0.5][::-1]


def subset_chances(weights: np.ndarray, k: int) -> dict[tuple[int, ...], float]:
    """Chance of every set of k that is drawn one by one, each time in proportion to the weights of those left."""
    chances: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(weights)), k):
        left, chance = float(weights.sum()), 1.0
        for position in order:
            chance *= weights[position] / left
            left -= weights[position]
        chances[tuple(sorted(order))] = chances.get(tuple(sorted(order)), 0.0) + chance
    assert math.isclose(sum(chances.values()), 1.0)
    return chances


def p_of_subsets(masks: np.ndarray, weights: np.ndarray) -> float:
    """Chi-square of how often each set was drawn against successive sampling; it covers genes, pairs and all beyond."""
    chances = subset_chances(weights, masks.shape[1])
    code = (2 ** np.arange(len(weights)))[masks.astype(np.int64)].sum(axis=1)
    counts = np.bincount(code, minlength=2 ** len(weights))
    seen = np.array([counts[sum(2**position for position in subset)] for subset in chances])
    expected = np.array(list(chances.values())) * len(masks)
    assert seen.sum() == len(masks) and expected.min() > 5
    return float(chi2.sf(((seen - expected) ** 2 / expected).sum(), len(expected) - 1))


@pytest.mark.parametrize("temperature", SPEC)
def test_inclusion_is_as_specified(temperature):
    """Spec A.5: genes seen in 1, 2 and 4 samples, two shown."""
    n = 200_000
    enumerated = np.zeros(3)
    for subset, chance in subset_chances(np.array([1.0, 2.0, 4.0]) ** temperature, 2).items():
        enumerated[list(subset)] += chance
    np.testing.assert_allclose(enumerated, SPEC[temperature], atol=1e-8)
    masks = draw_frequent([1, 2, 4], temperature, np.arange(n), 2)
    share = shown(masks, 3).mean(axis=0, dtype=np.float64)
    spread = np.sqrt(enumerated * (1 - enumerated) / n)
    assert (np.abs(share - enumerated) < 5 * spread).all()
    wrong = subset_chances(np.array([1.0, 2.0, 4.0]) ** (temperature + 0.05), 2)
    assert abs(share[0] - sum(c for s, c in wrong.items() if 0 in s)) > 5 * spread[0], "a τ off by 0.05 would be found"


@pytest.mark.parametrize(("temperature", "k"), [(1.0, 1), (1.0, 3), (-0.5, 2), (1.5, 2), (1.0, 5), (0.0, 3)])
def test_sets_come_as_often_as_in_successive_sampling(temperature, k):
    n_nonzero = np.array([3, 0, 9, 1, 2, 5])
    weights = np.maximum(n_nonzero, 1.0) ** temperature
    masks = draw_frequent(n_nonzero, temperature, np.arange(200_000), k)
    assert SURE < p_of_subsets(masks, weights) < 1 - SURE
    assert p_of_subsets(masks, weights * (1 + 0.05 * (np.arange(6) == 0))) < SURE, "a weight off by 5 % would be found"


def test_neighbouring_weighted_masks_are_independent():
    masks = shown(draw_frequent(np.ones(24, int), 1.0, np.arange(100_000), 7), 24)
    assert SURE < p_of_neighbours(masks[1:], masks[:-1]) < 1 - SURE


# ---- weighted: the kernel against plain NumPy


def reference(key: int, genes: np.ndarray, inverse: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k least -ln(u) / w by a stable sort, as docs/format_shards.md has it."""
    with np.errstate(over="ignore"):
        x = np.uint64(key) + np.arange(1, len(genes) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    u = (((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.sort(np.argsort(-np.log(u) * inverse[genes], kind="stable")[:k])


def draw_one(key: int, genes: np.ndarray, inverse: np.ndarray, k: int, race: np.ndarray | None = None) -> np.ndarray:
    out = np.full(k, 9, np.uint16)
    race = np.full(2 * len(genes), np.nan) if race is None else race
    draw_weighted(np.uint64(key), genes, inverse, race, out)
    return out


def random_panel(seed: int, size: int, n_genes: int = 65_536) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    n_nonzero = (rng.beta(0.3, 2, n_genes) * 10**6).astype(np.int64)
    return np.sort(rng.choice(n_genes, size, replace=False)).astype(np.uint16), n_nonzero


@given(data=st.data(), key=st.integers(0, 2**64 - 1), size=st.integers(1, 400), temperature=st.floats(-4, 4))
@settings(max_examples=100, deadline=None)
def test_the_draw_equals_plain_numpy(data, key, size, temperature):
    k = data.draw(st.integers(1, size))
    genes, n_nonzero = random_panel(key % 97, size, 1000)
    inverse = inverse_weights(n_nonzero, temperature)
    np.testing.assert_array_equal(draw_one(key, genes, inverse, k), reference(key, genes, inverse, k))


@pytest.mark.parametrize("temperature", [-1.0, 0.5, 4.0])
@pytest.mark.parametrize(("size", "k"), [(65_535, 1), (65_535, 2_048), (65_535, 65_535), (20_000, 2_048), (1, 1)])
def test_large_panels_and_all_or_one_gene(size, k, temperature):
    genes, n_nonzero = random_panel(size, size)
    inverse = inverse_weights(n_nonzero, temperature)
    drawn = draw_one(77, genes, inverse, k)
    np.testing.assert_array_equal(drawn, reference(77, genes, inverse, k))
    assert len(np.unique(drawn)) == k


@pytest.mark.parametrize(("size", "k"), [(65_535, 1), (65_535, 2_048), (65_535, 65_535), (1, 1)])
def test_the_uniform_draw_takes_all_or_one_of_a_large_panel(size, k):
    drawn = draw_uniform(3, 4, np.array([2**62]), size, k)[0]
    assert len(np.unique(drawn)) == k and drawn.max() < size
    assert size == k or not np.array_equal(np.sort(drawn), np.arange(k))


def test_of_equal_times_the_earlier_positions_are_drawn():
    """A weight without end makes the time 0 whatever the draw; a real tie has a chance of 10^-13 a mask."""
    genes, n_nonzero = random_panel(1, 200)
    inverse = inverse_weights(n_nonzero, 1.0)
    inverse[genes[10:200:2]] = 0.0
    for k in (1, 50, 94, 95):
        np.testing.assert_array_equal(draw_one(5, genes, inverse, k), np.arange(10, 10 + 2 * k, 2))
    drawn = draw_one(5, genes, inverse, 120)
    assert np.isin(np.arange(10, 200, 2), drawn).all()
    np.testing.assert_array_equal(drawn, reference(5, genes, inverse, 120))


def test_the_logarithm_is_right_to_an_ulp():
    rng = np.random.default_rng(0)
    near_one = 1 - np.arange(1, 200) * 2.0**-53
    u = np.concatenate([rng.random(2000), 2.0 ** -rng.uniform(0, 54, 2000), near_one, [2.0**-54, 0.5, 1.0, 2**-0.5]])
    ours = np.array([_minus_log(value) for value in u])
    exact = np.array([-math.log(value) for value in u])
    assert (np.abs(ours - exact) <= 2 * np.spacing(exact)).all()
    assert ours[-2] == 0.0


# ---- both: the key alone


@pytest.mark.parametrize("kind", ["uniform", "weighted"])
def test_a_draw_is_the_same_in_any_order_and_on_any_thread(kind):
    size, k = 3_000, 400
    genes, n_nonzero = random_panel(2, size)
    inverse = inverse_weights(n_nonzero, 0.5)
    keys = np.random.default_rng(1).integers(0, 2**64, 60, dtype=np.uint64)

    def draw(order: np.ndarray) -> np.ndarray:
        """All masks in this order, with scratch that the one before left behind."""
        masks = np.empty((len(keys), k), np.uint16)
        identity, swaps, race = np.arange(size, dtype=np.uint16), np.empty(k, np.uint32), np.empty(2 * size + 7)
        for i in order:
            if kind == "uniform":
                kernels.draw_unmasked(keys[i], identity, swaps, masks[i])
            else:
                draw_weighted(keys[i], genes, inverse, race, masks[i])
        return masks

    alone = draw(np.arange(len(keys)))
    assert len(np.unique(np.sort(alone), axis=0)) == len(keys)
    np.testing.assert_array_equal(draw(np.arange(len(keys))[::-1]), alone)
    orders = [np.random.default_rng(i).permutation(len(keys)) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for masks in pool.map(draw, orders):
            np.testing.assert_array_equal(masks, alone)
    if kind == "weighted":
        for dirt in (0.0, -1.0, np.inf, np.nan):
            drawn = draw_one(int(keys[3]), genes, inverse, k, np.full(2 * size, dirt))
            np.testing.assert_array_equal(drawn, alone[3])


# ---- weights


def test_weights_are_powers_of_how_often_genes_are_seen():
    n_nonzero = np.array([0, 1, 4, 10**8])
    np.testing.assert_allclose(inverse_weights(n_nonzero, 0.5), [1, 1, 0.5, 1e-4])
    np.testing.assert_allclose(inverse_weights(n_nonzero, -1.0), [1, 1, 4, 1e8])
    np.testing.assert_array_equal(inverse_weights(n_nonzero, 0.0), np.ones(4))
    assert inverse_weights(n_nonzero, 1).dtype == np.float64
    assert len(inverse_weights(np.empty(0, np.int64), 1.0)) == 0


@pytest.mark.parametrize(
    ("n_nonzero", "temperature", "words"),
    [
        ([1, -3], 1.0, "gene 1 is -3.*0 or more"),
        ([1, 2], float("nan"), "temperature nan"),
        ([1, 2], float("inf"), "temperature inf"),
        ([1, 10**6], -40.0, "temperature -40.0.*between -4 and 4"),
        ([1.0, 2.0], 1.0, "integers.*float64"),
        ([[1, 2]], 1.0, r"one row.*\(1, 2\)"),
    ],
)
def test_weights_that_make_no_sense_are_refused(n_nonzero, temperature, words):
    with pytest.raises(ValueError, match=words):
        inverse_weights(np.array(n_nonzero), temperature)
