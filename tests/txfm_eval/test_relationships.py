"""Relationship recall: the numbers of the specification, a brute-force reference, controls and refusals."""

import numpy as np
import pytest

from txfm_data.simulate import SimulationConfig
from txfm_data.simulate.design import make_design
from txfm_eval import relationships as module
from txfm_eval.annotations import Annotation, find_annotations, read_annotation
from txfm_eval.relationships import evaluate_relationships, make_universe, random_control, relationship_recall

SIX = np.array([[2, 0, 1], [1.9, 0.1, 1], [-1, 1, 0], [0, 2, 1], [0, 1.8, 0.7], [1, 1, 1]])
SIX_PAIRS = [(0, 1), (3, 4), (2, 5), (0, 2)]


def listed(name: str, pairs) -> Annotation:
    unordered = {(min(p), max(p)) for p in pairs}
    return Annotation(name, tuple(sorted(unordered)), len(pairs), "0" * 64)


def names(n: int) -> list[str]:
    return [f"G{i:04d}" for i in range(n)]


def random_lists(n_genes: int, sizes=(200, 350), seed=0) -> list[Annotation]:
    rng, symbols, lists = np.random.default_rng(seed), names(n_genes), []
    for number, size in enumerate(sizes):
        pairs = [sorted(rng.choice(n_genes, 2, replace=False)) for _ in range(size)]
        lists.append(listed(f"DB{number}", [(symbols[a], symbols[b]) for a, b in pairs]))
    return lists


def brute_force(matrix: np.ndarray, pairs: np.ndarray, low: float, high: float) -> tuple[float, float]:
    centred = matrix - matrix.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    cosine = unit @ unit.T
    null = np.sort(cosine[np.triu_indices(len(matrix), 1)])
    hits = cosine[pairs[:, 0], pairs[:, 1]]
    above = np.searchsorted(null, hits, "left") / len(null) >= high
    below = np.searchsorted(null, hits, "right") / len(null) <= low
    return float(above.mean()), float((above | below).mean())


@pytest.fixture(scope="module")
def six():
    symbols = names(6)
    return make_universe(symbols, [listed("TOY", [(symbols[a], symbols[b]) for a, b in SIX_PAIRS])])


def test_six_genes_have_the_cosines_of_the_specification(six):
    vectors = module._directions(SIX, six, "toy")
    found = [float(vectors[a] @ vectors[b]) for a, b in SIX_PAIRS]
    np.testing.assert_allclose(found, [0.999832, 0.961832, -0.992614, -0.784596], atol=1e-6)


@pytest.mark.parametrize(("share", "one", "two"), [(0.05, 0, 0), (0.1, 0.25, 0.5), (0.2, 0.5, 0.75)])
def test_six_genes_have_the_recall_of_the_specification(six, share, one, two):
    recall = relationship_recall(SIX, six, low=share, high=1 - share)["TOY"]
    assert recall.n_pairs == 4
    assert recall.one_sided == pytest.approx(one, abs=1e-6)
    assert recall.two_sided == pytest.approx(two, abs=1e-6)


@pytest.mark.parametrize("block_bytes", [1, 40_000, 6 * 1024**2])
@pytest.mark.parametrize("keep", [50, 1 << 21])
def test_recall_equals_brute_force(monkeypatch, block_bytes, keep):
    monkeypatch.setattr(module, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr("txfm_eval.order_statistics._KEEP", keep)
    n, lists = 150, random_lists(150)
    matrix = np.random.default_rng(1).normal(size=(n, 8)) + 3
    matrix[::2] += np.random.default_rng(2).normal(size=8)
    universe = make_universe(names(n), lists)
    recall = relationship_recall(matrix.astype(np.float32), universe)
    used = matrix.astype(np.float32).astype(float)[universe.rows]
    for name, pairs in universe.pairs.items():
        expected = brute_force(used, pairs, 0.05, 0.95)
        assert (recall[name].one_sided, recall[name].two_sided) == pytest.approx(expected, abs=1e-12)
    stacked = np.concatenate(list(universe.pairs.values()))
    assert recall["combined"].n_pairs == len(stacked)
    assert recall["combined"].one_sided == pytest.approx(brute_force(used, stacked, 0.05, 0.95)[0], abs=1e-12)
    union = np.unique(stacked, axis=0)
    assert recall["union"].n_pairs == len(union) < len(stacked)
    assert recall["union"].two_sided == pytest.approx(brute_force(used, union, 0.05, 0.95)[1], abs=1e-12)


def test_gaussian_vectors_recall_five_and_ten_percent():
    n = 3000
    universe = make_universe(names(n), random_lists(n, sizes=(150_000,)))
    recall = relationship_recall(np.random.default_rng(0).normal(size=(n, 128)), universe)["union"]
    assert 100 * recall.one_sided == pytest.approx(5.0, abs=0.2)
    assert 100 * recall.two_sided == pytest.approx(10.0, abs=0.3)


def test_universe_leaves_out_and_counts_ambiguous_unlisted_and_nameless_genes():
    symbols = ["A", "B", "B", "", "C", "Z"]
    universe = make_universe(symbols, [listed("X", [("A", "B"), ("A", "C"), ("C", "Q")]), listed("Y", [("B", "C")])])
    assert universe.symbols == ("A", "C")
    assert universe.rows.tolist() == [0, 4]
    assert {name: pairs.tolist() for name, pairs in universe.pairs.items()} == {"X": [[0, 1]], "Y": []}
    assert (universe.n_ambiguous, universe.n_without_symbol, universe.n_unlisted) == (2, 1, 1)


def test_centring_is_over_the_universe_only():
    lists, matrix = random_lists(80), np.random.default_rng(3).normal(size=(80, 5))
    with_others = np.concatenate([matrix, np.full((40, 5), 1e3)])
    alone = relationship_recall(matrix, make_universe(names(80), lists))
    beside = relationship_recall(with_others, make_universe([*names(80), *("other" + n for n in names(40))], lists))
    assert alone == beside


def test_simulated_programs_are_recalled_from_their_loadings():
    """The truth of a simulated corpus: vectors that hold the program of a gene recall its pairs, random ones 5 %."""
    design = make_design(SimulationConfig(genes=800))
    genes, n_programs = design.genes, design.config.programs
    loadings = np.zeros((len(genes), n_programs))
    members = np.flatnonzero(genes.program >= 0)
    loadings[members, genes.program[members]] = genes.loading[members]
    rng = np.random.default_rng(0)
    noisy = loadings + rng.normal(0, 0.05, loadings.shape)
    pairs = [
        (genes.symbols[a], genes.symbols[b])
        for p in range(n_programs)
        for a in members[genes.program[members] == p]
        for b in members[genes.program[members] == p]
        if a < b
    ]
    result = evaluate_relationships({"truth": noisy}, genes.symbols.tolist(), [listed("SIM_PROGRAMS", pairs)])
    scores = result["matrices"]["truth"]
    assert scores["recall"]["union"]["one_sided_percent"] > 99
    assert scores["random"]["union"]["one_sided_percent"] == pytest.approx(5, abs=1)
    assert scores["random"]["union"]["two_sided_percent"] == pytest.approx(10, abs=1.5)
    assert result["universe"]["n_genes"] == len(members)
    assert result["notes"] == []


def test_control_is_seeded():
    universe = make_universe(names(60), random_lists(60))
    first = random_control(8, universe, seed=1)
    assert first == random_control(8, universe, seed=1)
    assert first != random_control(8, universe, seed=2)
    with pytest.raises(ValueError, match="at least 2"):
        random_control(8, universe, draws=1)


def test_collapsed_matrix_recalls_nothing():
    """All genes alike: every cosine is 0, none is above another."""
    universe = make_universe(names(60), random_lists(60))
    matrix = np.full((60, 7), 0.1, np.float32)
    assert relationship_recall(matrix, universe)["union"].n_two_sided == 0
    scores = evaluate_relationships({"codebook": matrix}, names(60), random_lists(60))
    assert scores["matrices"]["codebook"]["n_genes_without_direction"] == len(universe)


def test_few_pairs_and_empty_lists_are_noted():
    symbols = names(6)
    lists = [
        listed("TOY", [(symbols[a], symbols[b]) for a, b in SIX_PAIRS]),
        listed("OTHER", [("G0000", "Q")]),
    ]
    result = evaluate_relationships({"head": SIX}, symbols, lists)
    assert "15 pairs" in result["notes"][0]
    assert "OTHER" in result["notes"][1]
    assert result["matrices"]["head"]["recall"]["OTHER"] == {
        "n_pairs": 0,
        "one_sided_percent": None,
        "two_sided_percent": None,
    }
    assert result["matrices"]["head"]["random"]["OTHER"]["one_sided_percent"] is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_refused_by_the_name_of_the_gene(six, value):
    matrix = SIX.copy()
    matrix[4, 1] = value
    with pytest.raises(ValueError, match=r"head: NaN or infinity in the vectors of 1 genes, for example \['G0004'\]"):
        relationship_recall(matrix, six, name="head")


def test_other_bad_input_is_refused(six):
    with pytest.raises(ValueError, match=r"gene matrix: shape \(3, 2\), expected a row for each gene"):
        relationship_recall(np.zeros((3, 2)), six)
    with pytest.raises(TypeError, match="expected numbers"):
        relationship_recall(SIX.astype(str), six)
    with pytest.raises(ValueError, match=r"0 of 2 genes .* at least 2"):
        make_universe(["Q", "R"], [listed("X", [("A", "B")])])
    with pytest.raises(ValueError, match="no pair of"):
        make_universe(["A", "B"], [listed("X", [("A", "C"), ("B", "C")])])
    with pytest.raises(ValueError, match="no annotation list"):
        make_universe(["A"], [])


def test_public_lists_have_the_counts_of_the_specification(real_data):
    folder = real_data / "relationships"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    databases = ("CORUM", "HuMAP", "Reactome", "SIGNOR", "StringDB")
    lists = [read_annotation(p) for p in find_annotations([folder / f"{name}.txt" for name in databases])]
    assert [len(a.pairs) for a in lists] == [37_649, 58_538, 18_565, 11_617, 58_059]
    digests = [
        "edaafc77a184ef45",
        "6d08074df77f1a72",
        "ed3cd0fc32d2fe35",
        "00525d3a90198378",
        "7955c846a551530c",
    ]
    assert [a.sha256[:16] for a in lists] == digests
    symbols = sorted({symbol for a in lists for pair in a.pairs for symbol in pair})
    universe = make_universe(symbols, lists)
    assert len(universe) == 13_183
    recall = relationship_recall(np.random.default_rng(0).normal(size=(len(universe), 32)), universe)
    assert (recall["combined"].n_pairs, recall["union"].n_pairs) == (184_428, 143_252)
    assert 100 * recall["combined"].one_sided == pytest.approx(5.0, abs=0.2)
    assert 100 * recall["combined"].two_sided == pytest.approx(10.0, abs=0.3)
