"""Perturbation consistency against a plain dense reference, its printed numbers, its laws, and what is read and refused."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from txfm_data.curate.aligned import block_rows, fit_alignment
from txfm_data.curate.consistency import (
    Consistency,
    ConsistencyOptions,
    EmbeddingArray,
    EmbeddingFile,
    draw_cells,
    perturbation_consistency,
)

PLAIN = ConsistencyOptions(align=False)
TOY = np.array([(1, 0), (0, 1), (1, 1), (-1, 0), (-1, 1), (0, -1)], np.float32)
TOY_GROUPS = np.array([0, 0, 0, 1, 1, 1])


def judge(embedding, perturbation, options=PLAIN, *, is_control=None, batch=None, **more) -> Consistency:
    """Consistency of an array; without controls, all in one batch, unless given."""
    n = len(embedding)
    perturbation = np.asarray(perturbation, np.int32)
    more.setdefault("n_perturbations", int(perturbation.max(initial=-1)) + 1)
    is_control = np.zeros(n, bool) if is_control is None else is_control
    batch = np.zeros(n, np.int32) if batch is None else batch
    return perturbation_consistency(EmbeddingArray(embedding), perturbation, is_control, batch, options, **more)


# The plain reference: dense, float64, a line for a line of the definition.


def cosine(a, b) -> float:
    """Cosine; 0 where one is zero but for rounding."""
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.clip(a @ b / lengths, -1, 1)) if lengths > 1e-12 else 0.0


def align_densely(embedding, is_control, batch, use, reference):
    x = embedding.astype(np.float64)
    controls = x[is_control & use]
    center = controls.mean(axis=0)
    _, singular, axes = np.linalg.svd(controls - center, full_matrices=False)
    y = (x - center) @ axes[singular**2 > 1e-10 * singular[0] ** 2].T
    z = np.zeros_like(y)
    for b in np.unique(batch[use]):
        rows = use & (batch == b)
        of = rows & is_control if reference == "controls" else rows
        of = of if of.any() else is_control & use
        sd = y[of].std(axis=0)
        z[rows] = (y[rows] - y[of].mean(axis=0)) / np.where(sd < 1e-9 * singular[0], 1, sd)
    return z


def judge_densely(embedding, perturbation, is_control, batch, options, n_perturbations, use):
    """(statistic, low p, high p, number of null values): p with those near the statistic left out, and counted."""
    z = embedding.astype(np.float64)
    if options.align:
        z = align_densely(embedding, is_control, batch, use, options.reference)
    members = [np.flatnonzero(use & (perturbation == g)) for g in range(n_perturbations)]
    pool = use & ((perturbation >= 0) | (is_control & options.null_controls))
    drawn = draw_cells(pool, options)
    statistic, nulls = np.full(n_perturbations, np.nan), {}
    for g, rows in enumerate(members):
        if len(rows) < 2:
            continue
        total = z[rows].sum(axis=0)
        statistic[g] = np.mean([cosine(z[c], total - z[c]) for c in rows])
        nulls[g] = np.array([cosine(z[c], total / len(rows)) for c in drawn if c not in rows])
    if options.null == "pooled" and nulls:
        nulls = dict.fromkeys(nulls, np.concatenate(list(nulls.values())))
    bounds, n_null = np.full((2, n_perturbations), np.nan), np.zeros(n_perturbations, int)
    for g, null in nulls.items():
        n_null[g] = len(null)
        for i, shift in enumerate((1e-4, -1e-4)):
            bounds[i, g] = (1 + np.count_nonzero(null >= statistic[g] + shift)) / (1 + len(null))
    return statistic, *bounds, n_null


@st.composite
def screens(draw):
    """An embedding with labels: batches with many, one or no controls, cells without a label, zero and equal vectors."""
    n, d = draw(st.integers(24, 80)), draw(st.integers(2, 12))
    n_perturbations, n_batches = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch = rng.permutation(np.arange(n) % n_batches).astype(np.int32)
    perturbation = rng.integers(-1, n_perturbations, n).astype(np.int32)
    is_control = rng.random(n) < draw(st.sampled_from([0.2, 0.5]))
    is_control[:3] = True
    perturbation[is_control] = -1
    embedding = rng.normal(size=(n, d)) * rng.uniform(0.5, 2, d) + rng.normal(size=d) * 3
    embedding += rng.normal(size=(n_batches, d))[batch] + rng.normal(size=(n_perturbations + 1, d))[perturbation]
    embedding[rng.random(n) < 0.1] = 0
    embedding[rng.random(n) < 0.1] = embedding[-1]
    embedding[:3] = rng.normal(size=(3, d))
    use = rng.random(n) < draw(st.sampled_from([0.7, 1.0]))
    use[:3] = True
    options = ConsistencyOptions(
        null=draw(st.sampled_from(["per_perturbation", "pooled"])),
        n_null=draw(st.sampled_from([1, 10, 1_000])),
        null_controls=draw(st.booleans()),
        reference=draw(st.sampled_from(["controls", "all"])),
        seed=draw(st.integers(0, 5)),
        align=draw(st.booleans()),
    )
    return embedding.astype(np.float32), perturbation, is_control, batch, options, n_perturbations, use


@settings(max_examples=150, deadline=None)
@given(screens())
def test_it_equals_the_plain_reference(screen):
    embedding, perturbation, is_control, batch, options, n_perturbations, use = screen
    found = perturbation_consistency(
        EmbeddingArray(embedding), perturbation, is_control, batch, options, n_perturbations=n_perturbations, use=use
    )
    statistic, low, high, n_null = judge_densely(*screen)
    np.testing.assert_allclose(found.statistic, statistic, atol=2e-5)
    tested = ~np.isnan(statistic)
    assert np.array_equal(np.isnan(found.p), ~tested)
    assert ((found.p >= low - 1e-12) & (found.p <= high + 1e-12))[tested].all()
    sizes = np.array([np.count_nonzero(use & (perturbation == g)) for g in range(n_perturbations)])
    assert np.array_equal(found.n_cells, sizes) and np.array_equal(found.n_null, n_null)
    assert found.n_controls == np.count_nonzero(use & is_control)
    without = [b for b in np.unique(batch[use]) if not (is_control & use & (batch == b)).any()]
    assert found.batches_without_controls == tuple(without)


# Numbers that were computed by hand or by an independent program.


def test_six_cells_of_two_perturbations():
    each = judge(TOY, TOY_GROUPS)
    np.testing.assert_allclose(each.statistic, [0.631475730, 0.184262135], atol=1e-9)
    np.testing.assert_allclose(each.p, [1 / 4, 1 / 4], atol=1e-12)
    assert each.n_null.tolist() == [3, 3] and each.n_cells.tolist() == [3, 3] and each.n_components == 2
    pooled = judge(TOY, TOY_GROUPS, replace(PLAIN, null="pooled"))
    np.testing.assert_allclose(pooled.statistic, each.statistic)
    np.testing.assert_allclose(pooled.p, [1 / 7, 1 / 7], atol=1e-12)
    assert pooled.n_null.tolist() == [6, 6]


@pytest.mark.parametrize(
    ("cells", "leave_one_out"), [(TOY[:3], [0.447213595, 0.447213595, 1]), (TOY[3:], [1, 0, -0.447213595])]
)
def test_each_leave_one_out_cosine(cells, leave_one_out):
    """The reference gives the printed cosines of each cell, so what it is compared with is right as well."""
    cells = cells.astype(float)
    total = cells.sum(axis=0)
    assert [cosine(z, total - z) for z in cells] == pytest.approx(leave_one_out, abs=1e-9)
    assert judge(cells, np.zeros(3)).statistic[0] == pytest.approx(np.mean(leave_one_out), abs=1e-9)


def test_cosines_of_cells_and_means():
    means = [TOY[:3].mean(axis=0), TOY[3:].mean(axis=0)]
    expected = [(.707107, -1), (.707107, 0), (1, -.707107), (-.707107, 1), (0, .707107), (-.707107, 0)]  # fmt: skip
    np.testing.assert_allclose([[cosine(z, m) for m in means] for z in TOY], expected, atol=1e-6)


def test_a_generated_perturbation_and_its_pairwise_identity():
    cells = np.random.default_rng(0).normal(size=(5, 4)) + 0.5
    assert judge(cells, np.zeros(5)).statistic[0] == pytest.approx(0.3666893983, abs=1e-7)
    unit = cells / np.linalg.norm(cells, axis=1, keepdims=True)
    pairwise = (unit @ unit.T)[np.triu_indices(5, 1)].mean()
    assert pairwise == pytest.approx(0.1541985637, abs=1e-9)
    assert (np.linalg.norm(unit.sum(axis=0)) ** 2 - 5) / 20 == pytest.approx(pairwise, abs=1e-12)


def test_rows_in_another_order_than_their_labels_are_hardly_ever_consistent():
    """2,392 perturbations of 10 to 40 cells, a third with an effect: those are found, and shuffled rows give 0 to 0.1 %."""
    rng = np.random.default_rng(4)
    n_perturbations, d, n_batches = 2_392, 32, 8
    perturbation = np.repeat(np.arange(n_perturbations), rng.integers(10, 40, n_perturbations))
    perturbation = np.concatenate([np.full(4_000, -1), perturbation]).astype(np.int32)
    is_control = perturbation < 0
    batch = rng.integers(0, n_batches, len(perturbation))
    effect = rng.normal(size=(n_perturbations + 1, d)) * (np.arange(n_perturbations + 1) % 3 == 0)[:, None]
    effect[-1] = 0
    scale, offset = rng.uniform(0.2, 5, (n_batches, d)), rng.normal(size=(n_batches, d)) * 5
    embedding = (rng.normal(size=(len(batch), d)) + effect[perturbation]) * scale[batch] + offset[batch]
    embedding = embedding.astype(np.float32)

    def share(array, options) -> float:
        p = judge(array, perturbation, options, is_control=is_control, batch=batch, n_perturbations=n_perturbations).p
        assert np.array_equal(np.isnan(p), np.bincount(perturbation[~is_control], minlength=n_perturbations) < 2)
        return np.mean(p < 0.05)

    default = ConsistencyOptions()
    assert 0.25 < share(embedding, default) < 0.34
    for options in (default, replace(default, null="pooled"), replace(default, reference="all")):
        assert share(rng.permutation(embedding), options) <= 0.001


@pytest.mark.parametrize(("n_cells", "low", "high"), [(2, 0.03, 0.08), (5, 0.0, 0.015), (20, 0.0, 0.001)])
def test_how_often_random_cells_pass(n_cells, low, high):
    """It is a plain test of two cells, and conservative of more."""
    perturbation = np.repeat(np.arange(1_500), n_cells)
    random = np.random.default_rng(0).normal(size=(len(perturbation), 50)).astype(np.float32)
    assert low <= np.mean(judge(random, perturbation).p < 0.05) <= high


# Laws and edges.


@pytest.mark.parametrize("null", ["per_perturbation", "pooled"])
def test_one_and_two_cells_and_none(null):
    found = judge(TOY[[0, 2, 3, 4]], [1, 1, 2, 3], replace(PLAIN, null=null), n_perturbations=5)
    assert np.isnan(found.statistic).tolist() == [True, False, True, True, True]
    assert np.isnan(found.p).tolist() == [True, False, True, True, True]
    assert found.statistic[1] == pytest.approx(np.sqrt(0.5))
    assert found.n_cells.tolist() == [0, 2, 1, 1, 0] and found.n_null.tolist() == [0, 2, 0, 0, 0]
    assert found.p[1] == pytest.approx(1 / 3)


@pytest.mark.parametrize("null", ["per_perturbation", "pooled"])
def test_no_cells_and_no_perturbations(null):
    nothing = judge(np.zeros((0, 3), np.float32), [], replace(PLAIN, null=null), n_perturbations=2)
    assert np.isnan(nothing.p).all() and nothing.n_null.tolist() == [0, 0] and nothing.batches_without_controls == ()
    assert len(judge(TOY, np.full(6, -1), replace(PLAIN, null=null)).p) == 0


def test_own_cells_are_no_null():
    """A perturbation whose cells are the only ones drawn has nothing to be compared with."""
    found = judge(np.ones((4, 3), np.float32), np.zeros(4))
    assert found.statistic[0] == pytest.approx(1) and found.n_null[0] == 0 and found.p[0] == 1


def test_equal_cosines_count_against():
    """Where all cells are alike none is consistent, whatever rounding does to their cosines."""
    alike = np.tile(np.array([[0.1, 0.3, -0.7]], np.float32), (40, 1)) * np.arange(1, 41, dtype=np.float32)[:, None]
    for null in ("per_perturbation", "pooled"):
        found = judge(alike, np.arange(40) % 4, replace(PLAIN, null=null))
        np.testing.assert_allclose(found.statistic, 1)
        assert (found.p == 1).all()


def test_vectors_that_are_zero_or_cancel_have_cosine_zero():
    vectors = np.array([(0, 0), (1, 0), (1, 2), (-1, -2), (0.1, 0.7), (0.3, 0.1), (-0.3, -0.1)], np.float32)
    found = judge(vectors, [0, 0, 1, 1, 2, 2, 2])
    # A zero cell and the one beside it; two opposite ones; one whose two others cancel.
    cancelled = (2 * cosine(vectors[5], vectors[4] - vectors[5]) + 0) / 3
    assert found.statistic[:2].tolist() == [0, -1]
    others = [cosine(vectors[i], vectors[4:].sum(axis=0) - vectors[i]) for i in (5, 6)]
    assert found.statistic[2] == pytest.approx(sum(others) / 3, abs=1e-6) and cancelled < 0
    assert judge(np.zeros((4, 2), np.float32), [0, 0, 1, 1]).statistic.tolist() == [0, 0]


def test_drawn_cells_depend_on_the_seed_and_are_without_replacement():
    among = np.random.default_rng(0).random(5_000) < 0.5
    options = ConsistencyOptions(n_null=300)
    drawn = draw_cells(among, options)
    assert len(np.unique(drawn)) == 300 and among[drawn].all() and (np.diff(drawn) > 0).all()
    assert np.array_equal(drawn, draw_cells(among, options))
    others = draw_cells(among, replace(options, seed=1))
    assert 0 < len(np.intersect1d(drawn, others)) < 80
    assert set(drawn) <= set(draw_cells(among, replace(options, n_null=301)))
    assert np.array_equal(draw_cells(among, replace(options, n_null=9_999)), np.flatnonzero(among))
    times = sum(np.isin(np.arange(5_000), draw_cells(among, replace(options, seed=s))) for s in range(100))
    assert times[among].mean() == pytest.approx(30_000 / among.sum()) and times[among].std() < 4.2


def test_controls_are_in_the_null_only_when_asked_for():
    vectors = np.vstack([TOY, TOY])
    groups, is_control = np.concatenate([TOY_GROUPS, np.full(6, -1)]), np.arange(12) >= 6
    without, within = (
        judge(vectors, groups, replace(PLAIN, null_controls=flag), is_control=is_control) for flag in (False, True)
    )
    assert without.n_null.tolist() == [3, 3] and within.n_null.tolist() == [9, 9]
    assert without.n_controls == within.n_controls == 6
    assert np.array_equal(without.statistic, judge(TOY, TOY_GROUPS).statistic)


def make_screen(n: int, d: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    is_control = rng.random(n) < 0.2
    perturbation = np.where(is_control, -1, rng.integers(0, 12, n)).astype(np.int32)
    batch = rng.integers(0, 3, n).astype(np.int32)
    effect = np.vstack([rng.normal(size=(12, d)), np.zeros((1, d))])
    return (rng.normal(size=(n, d)) + effect[perturbation]).astype(np.float32), perturbation, is_control, batch


@pytest.mark.parametrize("align", [True, False])
def test_a_file_gives_what_an_array_gives_bit_for_bit(tmp_path, align):
    """More rows than a block has, so that blocks end within, and some are passed over."""
    embedding, perturbation, is_control, batch = make_screen(15_000, 300)
    assert block_rows(300) < 7_500
    np.save(tmp_path / "e.npy", embedding)
    told = []
    found = [
        perturbation_consistency(
            e, perturbation, is_control, batch, ConsistencyOptions(align=align), n_perturbations=12,
            progress=lambda done, total: told.append((done, total)),
        )
        for e in (EmbeddingFile(tmp_path / "e.npy"), EmbeddingArray(embedding), EmbeddingArray(embedding.astype(float)))
    ]  # fmt: skip
    for other in found[1:]:
        for name in ("statistic", "p", "n_cells", "n_null"):
            assert getattr(found[0], name).tobytes() == getattr(other, name).tobytes()
    assert told[-1] == (30_000, 30_000) and (found[0].p < 0.05).all()


def test_what_is_added_to_or_multiplies_a_batch_does_not_matter():
    embedding, perturbation, is_control, batch = make_screen(600, 6)
    labels = {"is_control": is_control, "batch": batch}
    options = ConsistencyOptions()
    found = judge(embedding, perturbation, options, **labels)
    for moved in (
        embedding * 1_000,
        embedding + 50,
        embedding @ np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0],
    ):
        np.testing.assert_allclose(judge(moved, perturbation, options, **labels).statistic, found.statistic, atol=1e-4)


def test_rows_out_of_use_change_nothing():
    embedding, perturbation, is_control, batch = make_screen(600, 6)
    use = np.random.default_rng(1).random(600) < 0.6
    options = ConsistencyOptions(n_null=10_000)
    whole = judge(embedding, perturbation, options, is_control=is_control, batch=batch, use=use)
    kept = judge(embedding[use], perturbation[use], options, is_control=is_control[use], batch=batch[use])
    np.testing.assert_allclose(whole.statistic, kept.statistic, atol=1e-6)
    assert np.array_equal(whole.n_null, kept.n_null) and whole.n_controls == kept.n_controls


def test_batches_without_controls_or_with_one():
    embedding, perturbation, is_control, batch = make_screen(600, 6)
    is_control &= (batch == 0) | (np.arange(600) == np.flatnonzero(is_control & (batch == 1))[0])
    alignment = fit_alignment(
        EmbeddingArray(embedding), is_control, batch, 3, use=np.ones(600, bool), reference="controls", tick=lambda _: None
    )  # fmt: skip
    assert (alignment.factor[1] == 1).all()
    every = (embedding[is_control] - alignment.center) @ alignment.axes
    np.testing.assert_allclose(alignment.shift[2], 0, atol=1e-5)
    np.testing.assert_allclose(1 / alignment.factor[2], every.std(axis=0), rtol=1e-4)
    options = ConsistencyOptions()
    found = judge(embedding, np.where(is_control, -1, perturbation), options, is_control=is_control, batch=batch)
    assert found.batches_without_controls == (2,)


def test_components_without_variance_are_dropped_and_equal_controls_of_a_batch_count_as_no_spread():
    embedding, perturbation, is_control, batch = make_screen(600, 6)
    embedding = np.hstack([embedding, embedding[:, :2] * 2, np.full((600, 1), 7, np.float32)])
    embedding[is_control & (batch == 1)] = embedding[0]
    labels = {"is_control": is_control, "batch": batch}
    found = judge(embedding, perturbation, ConsistencyOptions(), **labels)
    assert found.n_components == 6 and not np.isnan(found.statistic).any()
    with pytest.raises(ValueError, match="all equal"):
        judge(np.where(is_control[:, None], embedding[:1], embedding), perturbation, ConsistencyOptions(), **labels)


# What is refused.


def test_labels_that_do_not_fit_are_refused():
    good = {
        "perturbation": TOY_GROUPS,
        "is_control": np.zeros(6, bool),
        "batch": np.zeros(6, int),
        "use": np.ones(6, bool),
    }

    def run(**changes) -> None:
        labels = good | changes
        perturbation_consistency(
            EmbeddingArray(TOY), labels["perturbation"], labels["is_control"], labels["batch"], PLAIN,
            n_perturbations=labels.get("n", 2), use=labels["use"], memory=labels.get("memory", 1024**3),
        )  # fmt: skip

    run()
    for name in good:
        with pytest.raises(ValueError, match=rf"{name} must be .* of shape \(6,\)"):
            run(**{name: good[name][:5]})
        with pytest.raises(ValueError, match=f"{name} must be"):
            run(**{name: good[name].astype(float)})
    with pytest.raises(ValueError, match="row 3 has a perturbation outside -1 to 0"):
        run(n=1)
    with pytest.raises(ValueError, match="row 4 has a perturbation although it is a control"):
        run(is_control=np.arange(6) == 4)
    with pytest.raises(ValueError, match="row 2 has a negative batch"):
        run(batch=np.array([0, 0, -1, 0, 0, 0]))
    run(batch=np.array([0, 0, -1, 0, 0, 0]), use=np.arange(6) != 2)
    with pytest.raises(ValueError, match="MiB are allowed"):
        run(memory=1024**2)


@pytest.mark.parametrize("wrong", [{"null": "both"}, {"reference": "none"}, {"n_null": 0}, {"seed": -1}])
def test_options_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ConsistencyOptions(**wrong)


@pytest.mark.parametrize("n_controls", [0, 1])
def test_too_few_controls_to_align_on(n_controls):
    groups = np.where(np.arange(6) < n_controls, -1, TOY_GROUPS)
    with pytest.raises(ValueError, match=f"found {n_controls} control cells"):
        judge(TOY, groups, ConsistencyOptions(), is_control=np.arange(6) < n_controls)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [EmbeddingArray, EmbeddingFile])
def test_values_that_are_not_finite_are_refused_by_their_row(tmp_path, kind, value):
    vectors = np.zeros((50, 3), np.float32)
    vectors[[17, 40], 1] = value
    np.save(tmp_path / "e.npy", vectors)
    embedding = kind(vectors if kind is EmbeddingArray else tmp_path / "e.npy")
    for read in (lambda: list(embedding.blocks(8)), lambda: embedding.take(np.array([2, 17, 30, 40]))):
        with pytest.raises(ValueError, match=r"row 17 has a value that is NaN or infinite"):
            read()
    with pytest.raises(ValueError, match="row 17"):
        perturbation_consistency(
            embedding, np.zeros(50, int), np.zeros(50, bool), np.zeros(50, int), PLAIN, n_perturbations=1
        )
    with pytest.raises(ValueError, match="row 0"):
        list(EmbeddingArray(np.full((1, 1), 1e300)).blocks())


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 300), d=st.integers(1, 5), rows=st.integers(1, 400), seed=st.integers(0, 99))
def test_blocks_and_rows_of_a_file_are_those_of_the_array(tmp_path_factory, n, d, rows, seed):
    array = np.arange(n * d, dtype=np.float32).reshape(n, d)
    path = tmp_path_factory.mktemp("e") / "e.npy"
    np.save(path, array)
    rng = np.random.default_rng(seed)
    positions = np.flatnonzero(rng.random(n) < rng.random())
    for embedding in (EmbeddingFile(path), EmbeddingArray(array)):
        assert (embedding.n, embedding.d) == (n, d)
        parts = [(start, block.copy()) for start, block in embedding.blocks(rows)]
        assert [start for start, _ in parts] == list(range(0, n, rows))
        assert np.array_equal(np.concatenate([array[:0], *(block for _, block in parts)]), array)
        taken = embedding.take(positions)
        assert taken.dtype == np.float32 and np.array_equal(taken, array[positions])


def test_rows_far_apart_are_read_one_by_one(tmp_path):
    array = np.arange(40_000 * 64, dtype=np.float32).reshape(40_000, 64)
    np.save(tmp_path / "e.npy", array)
    positions = np.concatenate([np.arange(50), np.arange(1_000, 39_999, 1_300), [39_999]])
    taken = EmbeddingFile(tmp_path / "e.npy").take(positions)
    assert np.array_equal(taken, array[positions])
    taken += 1  # is a copy
    for wrong in ([3, 3], [5, 4], [-1, 2], [40_000]):
        with pytest.raises(ValueError, match="positions must ascend strictly from at least 0 to below 40000"):
            EmbeddingFile(tmp_path / "e.npy").take(np.array(wrong))


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((3, 2)), "<f8"),
        (np.zeros((3, 2), ">f4"), ">f4"),
        (np.zeros((3, 2), np.float16), "<f2"),
        (np.zeros(3, np.float32), r"\(3,\)"),
        (np.zeros((3, 0), np.float32), r"\(3, 0\)"),
        (np.zeros((3, 2), np.float32, order="F"), "Fortran"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, array, said):
    np.save(tmp_path / "e.npy", array)
    with pytest.raises(ValueError, match=f"expected .cells, width. little-endian float32 in C order, found .*{said}"):
        EmbeddingFile(tmp_path / "e.npy")


def test_broken_files_and_arrays_are_refused(tmp_path):
    path = tmp_path / "e.npy"
    np.save(path, np.zeros((3, 2), np.float32))
    whole = path.read_bytes()
    for data in (whole[:-1], whole + b"\0"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"asks for 152 bytes, it has 15[13]"):
            EmbeddingFile(path)
    for data in (b"", b"no array at all", whole[:40]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="not a npy file"):
            EmbeddingFile(path)
    path.write_bytes(whole)
    opened = EmbeddingFile(path)
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="ends before its last row"):
        list(opened.blocks())
    with pytest.raises(OSError, match="No such file"):
        EmbeddingFile(tmp_path / "none.npy")
    with pytest.raises(TypeError, match="array of floats, found int64"):
        EmbeddingArray(np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match=r"shape \(cells, width\), found \(2,\)"):
        EmbeddingArray(np.zeros(2))


def test_pickled_arrays_are_refused(tmp_path):
    np.save(tmp_path / "e.npy", np.array([[None, 1]], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"found \(1, 2\) .O"):
        EmbeddingFile(tmp_path / "e.npy")


# Memory.

_PEAK = """
import re, sys
import numpy as np
from txfm_data.curate.consistency import ConsistencyOptions, EmbeddingFile, perturbation_consistency
embedding = EmbeddingFile(sys.argv[1])
rng = np.random.default_rng(0)
perturbation = rng.integers(-1, 2_391, embedding.n).astype(np.int32)
is_control = (perturbation < 0) | (rng.random(embedding.n) < 0.05)
perturbation[is_control] = -1
batch = rng.integers(0, 20, embedding.n).astype(np.int32)
found = perturbation_consistency(embedding, perturbation, is_control, batch, ConsistencyOptions(), n_perturbations=2_392)
assert found.n_cells.sum() == (perturbation >= 0).sum()
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def peak_mib(path: Path, n: int, d: int) -> float:
    """Most resident memory of a process that judges `n` random cells read from a file, which is written here in parts."""
    rng = np.random.default_rng(0)
    part = rng.normal(size=(min(n, 10_000), d)).astype(np.float32)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (n, d)})
        for start in range(0, n, len(part)):
            (part[: n - start] + np.float32(start % 7)).tofile(file)
    done = subprocess.run([sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=True)
    path.unlink()
    return int(done.stdout) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_embedding(tmp_path):
    """60,000 more cells, 59 MiB more of file, cost little more than their labels."""
    peak_mib(tmp_path / "e.npy", 1_000, 256)  # compiles the kernels, if nobody has
    few, many = (peak_mib(tmp_path / "e.npy", n, 256) for n in (20_000, 80_000))
    assert many - few < 15


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_two_million_cells_fit_two_gib(tmp_path):
    peak = peak_mib(tmp_path / "e.npy", 2_000_000, 768)
    print(f"\npeak of 2,000,000 x 768: {peak:,.0f} MiB")
    assert peak < 2 * 1024
