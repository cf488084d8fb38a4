"""Rules on labels, against what obs says of each sample."""

import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.samples import read_samples
from shards.select import ShardConfig, select
from tests.conftest import gene_id
from tests.shards.builds import make_store
from tests.txfm_data import stores
from txfm_data.curate import label_rules as rules
from txfm_data.curate import recipe
from txfm_data.curate.labels import values_among
from txfm_data.curate.state import Context, State
from txfm_data.parallel import Workers, pool
from txfm_data.random_order import count_values, draw_samples, sample_keys
from txfm_data.selection import write_selection
from txfm_data.store.opening import open_store
from txfm_data.store.protocol import Store

on_a_fixture = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three datasets with labels that some lack."""
    return open_store(make_store(tmp_path_factory.mktemp("rules"), "zarr"))


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("context")
    with pool(Workers()) as running:
        yield Context(seed=7, number=3, pool=running, scratch=folder, extras=folder)


@pytest.fixture
def state(store: Store) -> State:
    return State.of(store, store.datasets)


def column(store: Store, name: str) -> np.ndarray:
    """A column of obs as Python values."""
    return np.array(store.obs([name])[name].to_pylist(), object)


def rows_of(store: Store, *names: str) -> np.ndarray:
    """(n_obs,) bool, samples of some datasets."""
    found = np.zeros(store.n_obs, bool)
    for record in store.datasets:
        found[record.obs_start : record.obs_stop] = record.name in names
    return found


# --- filter, keep, drop ----------------------------------------------------------------------------------------------


def test_a_filter_touches_the_datasets_of_the_rule_alone(store, state, context):
    rule = recipe.FilterObs(where="cell_type == 'T cell' and nnz > 9")
    assert rules.apply_filter(rule, state, store.datasets[:2], context) == {}
    passes = (column(store, "cell_type") == "T cell") & (column(store, "nnz") > 9)
    assert np.array_equal(state.alive, passes | rows_of(store, "third"))


@pytest.mark.parametrize(
    ("rule", "apply", "passes"),
    [
        (recipe.FilterObs(where="cell_type == 'T cell'", keep_controls=True), rules.apply_filter, ["T cell"]),
        (recipe.Keep(column="cell_type", values=("T cell",), keep_controls=True), rules.apply_keep, ["T cell"]),
        (recipe.Drop(column="cell_type", values=("T cell",), keep_controls=True), rules.apply_drop, ["B cell", "NK cell"]),
    ],
)  # fmt: skip
def test_controls_pass_whatever_the_rule_says(store, state, context, rule, apply, passes):
    controls = column(store, "is_control").astype(bool)
    state.alive[np.flatnonzero(controls)[0]] = False  # what an earlier rule took does not come back
    before = state.alive.copy()
    details = apply(rule, state, store.datasets[:1], context)
    stays = np.isin(column(store, "cell_type"), passes)
    assert np.array_equal(state.alive, before & (stays | controls | ~rows_of(store, "first")))
    assert details == {"first": {"controls_kept_anyway": int((before & controls & ~stays).sum())}}
    without = State.of(store, store.datasets)
    assert apply(replace(rule, keep_controls=False), without, store.datasets[:1], context) == {}
    assert np.array_equal(without.alive, stays | ~rows_of(store, "first"))


@on_a_fixture
@given(
    alive=st.lists(st.booleans(), min_size=93, max_size=93),
    case=st.sampled_from([("tissue", "blood"), ("cell_type", "B cell"), ("is_control", True), ("age", 3)]),
)
def test_keep_and_drop_part_what_is_left(store, context, alive, case):
    name, value = case
    kept, dropped = State.of(store, store.datasets), State.of(store, store.datasets)
    for state in (kept, dropped):
        state.alive &= np.array(alive)
    rules.apply_keep(recipe.Keep(column=name, values=(value,)), kept, store.datasets, context)
    rules.apply_drop(recipe.Drop(column=name, values=(value,)), dropped, store.datasets, context)
    has = column(store, name) == value  # a null is not the value, so drop leaves it
    assert np.array_equal(kept.alive, has & alive) and np.array_equal(dropped.alive, ~has & alive)


CHECKS: dict[type[recipe.Rule], Callable[..., None]] = {
    recipe.FilterObs: rules.check_filter, recipe.Keep: rules.check_keep, recipe.Drop: rules.check_drop,
    recipe.Subsample: rules.check_subsample, recipe.HoldOut: rules.check_hold_out, recipe.Genes: rules.check_genes,
}  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (recipe.FilterObs(where="cel_type == 'T cell'"), "no column 'cel_type'; near it: \\['cell_type'"),
        (recipe.FilterObs(where="cell_type = 'T cell'"), "write '=='"),
        (recipe.FilterObs(where="cell_type == 'T cel'"), "cell_type has no value 'T cel' \\(near it: \\['T cell'"),
        (recipe.FilterObs(where="batch == 'third1'"), "no value 'third1' \\(.* there are 6, such as \\['first0'"),
        (recipe.FilterObs(where="raw_sum == 'many'"), "write it without quotes"),
        (recipe.Keep(column="cel_type", values=("T cell",)), "no column 'cel_type'; did you mean cell_type"),
        (recipe.Keep(column="cell_type", values=("T cell", "B  cel")), "no value 'B  cel' \\(near it: \\['B cell'"),
        (recipe.Keep(column="tissue", values=("bloood",)), "near it: \\['blood'\\]"),
        (recipe.Keep(column="cell_type", values=(3,)), "put the value in quotes"),
        (recipe.Keep(column="age", values=(4,)), "age has no value 4"),
        (recipe.Keep(column="raw_sum", values=(4.5,)), "labels are text, whole numbers or booleans"),
        (recipe.Drop(column="batch", values=("third1",)), "no value 'third1'"),
        (recipe.Subsample(column="cel_type", fraction=0.5), "did you mean cell_type"),
        (recipe.Subsample(column="raw_sum", fraction=0.5), "labels are text, whole numbers or booleans"),
        (recipe.Subsample(column="batch", fraction=0.5, values=("b",)), "batch has no value 'b'"),
        (recipe.HoldOut(batches=("first1", "frist2")), "batch has no value 'frist2' \\(near it: \\['first2'"),
        (
            recipe.Genes(min_datasets=3),
            "min_datasets is 3, but the rule applies to 2 datasets: \\['first', 'second'\\]",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_the_datasets_is_refused_with_the_near_ones(store, rule, message):
    with pytest.raises(ValueError, match=message):
        CHECKS[type(rule)](rule, store, store.datasets[:2])


@pytest.mark.parametrize(
    "rule",
    [
        recipe.FilterObs(where="nnz != 0 and is_control == False and tissue != 'skin' and note == 'note 3'"),
        recipe.Keep(column="is_control", values=(True,)),
        recipe.Keep(column="age", values=(3, 6)),
        recipe.Keep(column="note", values=("note 3",)),
        recipe.Drop(column="batch", values=("first1", "second2")),
        recipe.Subsample(column="batch", fraction=0.5, values=("first1",)),
        recipe.Subsample(column="tissue", max_samples=5),
        recipe.HoldOut(batches=("first1", "second1")),
        recipe.HoldOut(share=0.1),
        recipe.Genes(min_datasets=2),
    ],
    ids=str,
)
def test_what_fits_is_let_through(store, rule):
    CHECKS[type(rule)](rule, store, store.datasets[:2])


def test_values_of_a_column_of_identifiers_are_looked_for_too(store, monkeypatch):
    monkeypatch.setitem(values_among.__kwdefaults__, "most", 10)
    rules.check_keep(recipe.Keep(column="note", values=("note 3", "note 30")), store, store.datasets)
    with pytest.raises(ValueError, match="note has no value 'note 40'"):
        rules.check_keep(recipe.Keep(column="note", values=("note 3", "note 40")), store, store.datasets)


DISEASES = ["flu", "flu || asthma", None, "asthma", "asthma || gout", "normal"]


@pytest.fixture(scope="module")
def ill(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two datasets of 40 cells with diseases, of which the second never has gout, and flu joined with asthma alone."""
    folder = tmp_path_factory.mktemp("ill")
    for name in ("first", "second"):
        adata = stores.dataset("first")
        entries = DISEASES if name == "first" else DISEASES[1:4]
        adata.obs["disease"] = [entries[i % len(entries)] for i in range(adata.n_obs)]
        path = folder / f"{name}.h5ad"
        adata.write_h5ad(path)
        stores.append(path, folder / "store", name, backend="zarr", modality="sc", library_size="library")
    return open_store(folder / "store")


def has_term(store: Store, *terms: str) -> np.ndarray:
    """(n_obs,) bool, samples with one of the diseases, alone or among others."""
    return np.array([v is not None and not set(terms).isdisjoint(v.split(" || ")) for v in column(store, "disease")])


@pytest.mark.parametrize("terms", [("flu",), ("asthma",), ("flu", "gout"), ("normal",)])
def test_diseases_are_found_among_others_by_filter_keep_and_drop(ill, context, terms):
    cases = [
        (recipe.FilterObs(where=f"disease in {list(terms)}"), rules.apply_filter, has_term(ill, *terms)),
        (recipe.Keep(column="disease", values=terms), rules.apply_keep, has_term(ill, *terms)),
        (recipe.Drop(column="disease", values=terms), rules.apply_drop, ~has_term(ill, *terms)),  # a null stays
    ]
    for rule, apply, stays in cases:
        state = State.of(ill, ill.datasets)
        CHECKS[type(rule)](rule, ill, ill.datasets)
        apply(rule, state, ill.datasets, context)
        assert np.array_equal(state.alive, stays)
    assert has_term(ill, "flu").sum() > (column(ill, "disease") == "flu").sum() > 0


def test_a_whole_entry_of_diseases_is_that_entry(ill, context):
    state = State.of(ill, ill.datasets)
    rules.apply_keep(recipe.Keep(column="disease", values=("flu || asthma",)), state, ill.datasets, context)
    assert np.array_equal(state.alive, column(ill, "disease") == "flu || asthma")


@pytest.mark.parametrize("kind", [recipe.Keep, recipe.Drop])
def test_diseases_that_the_datasets_lack_are_refused(ill, kind):
    second = ill.datasets[1:]
    CHECKS[kind](kind(column="disease", values=("flu",)), ill, second)  # only joined with another there
    with pytest.raises(ValueError, match=r"disease has no value 'goutt' \(near it: \['gout'"):
        CHECKS[kind](kind(column="disease", values=("goutt",)), ill, ill.datasets)
    with pytest.raises(ValueError, match="disease has no value 'gout'"):
        CHECKS[kind](kind(column="disease", values=("gout",)), ill, second)
    # A draw is from entries as they are written.
    with pytest.raises(ValueError, match=re.escape("disease has no value 'flu' (near it: ['flu || asthma']")):
        rules.check_subsample(recipe.Subsample(column="disease", fraction=0.5, values=("flu",)), ill, second)


@pytest.mark.parametrize(
    ("rule", "check", "apply"),
    [
        (recipe.FilterObs(where="disease == 'flu'"), rules.check_filter, rules.apply_filter),
        (recipe.Keep(column="disease", values=("flu",)), rules.check_keep, rules.apply_keep),
        (recipe.Drop(column="disease", values=("flu",)), rules.check_drop, rules.apply_drop),
    ],
)
def test_diseases_too_many_to_look_into_are_refused(ill, context, monkeypatch, rule, check, apply):
    monkeypatch.setitem(values_among.__kwdefaults__, "most", 4)
    with pytest.raises(ValueError, match="'disease' of obs has more than .* too many to look for terms"):
        check(rule, ill, ill.datasets)
    state = State.of(ill, ill.datasets)
    with pytest.raises(ValueError, match="apply the rule to fewer datasets"):
        apply(rule, state, ill.datasets, context)
    assert state.alive.all()
    apply(rule, state, ill.datasets[1:], context)  # two entries


# --- draws -----------------------------------------------------------------------------------------------------------


def drawn_by_hand(rows: np.ndarray, n: int, seed: int, number: int) -> set[int]:
    """The `n` samples with the smallest keys."""
    keys = sample_keys(rows, seed=seed, number=number)
    return {int(row) for _, row in sorted(zip(keys.tolist(), rows.tolist(), strict=True))[:n]}


@on_a_fixture
@given(
    alive=st.lists(st.booleans(), min_size=93, max_size=93),
    size=st.floats(0.05, 1.0) | st.integers(1, 20),
    name=st.sampled_from(["cell_type", "tissue", "batch", "age"]),
    keep_controls=st.booleans(),
    seed=st.none() | st.integers(0, 2**40),
    number=st.integers(1, 9),
)
def test_subsamples_are_those_with_the_smallest_keys(store, context, alive, size, name, keep_controls, seed, number):
    rule = recipe.Subsample(
        column=name, seed=seed, keep_controls=keep_controls,
        **({"fraction": size} if isinstance(size, float) else {"max_samples": size}),
    )  # fmt: skip
    state = State.of(store, store.datasets)
    state.alive &= np.array(alive)
    rules.apply_subsample(rule, state, store.datasets[:2], replace(context, number=number))
    values, controls = column(store, name), column(store, "is_control").astype(bool) & keep_controls
    expected = set(np.flatnonzero(alive & (rows_of(store, "third") | (values == None) | controls)).tolist())  # noqa: E711
    for dataset in ("first", "second"):
        for value in set(values) - {None}:
            rows = np.flatnonzero(alive & rows_of(store, dataset) & (values == value) & ~controls)
            n = max(1, round(size * len(rows))) if isinstance(size, float) else size
            expected |= drawn_by_hand(rows, n, context.seed if seed is None else seed, number)
    assert set(np.flatnonzero(state.alive).tolist()) == expected


def test_only_the_values_named_are_drawn_from(store, state, context):
    rule = recipe.Subsample(column="perturbation", values=("KO",), max_samples=4)
    details = rules.apply_subsample(rule, state, store.datasets[:1], context)
    label = column(store, "perturbation")
    assert state.alive[label == "KO"].sum() == 4
    assert state.alive[label != "KO"].all()
    assert details == {
        "first": {"values_drawn_from": 1, "samples_drawn_from": 30, "samples_kept": 4, "samples_without_value": 0}
    }


@pytest.mark.parametrize("keep_controls", [False, True])
def test_a_cap_draws_from_all_but_the_controls_it_keeps(store, state, context, keep_controls):
    details = rules.apply_cap(recipe.Cap(max_samples=12, keep_controls=keep_controls), state, store.datasets, context)
    controls = column(store, "is_control").astype(bool) & keep_controls
    expected = set(np.flatnonzero(controls).tolist())
    for record in store.datasets:
        rows = np.flatnonzero(rows_of(store, record.name) & ~controls)
        expected |= drawn_by_hand(rows, 12, context.seed, context.number)
        assert details[record.name] == {"samples_drawn_from": len(rows), "samples_kept": 12}
    assert set(np.flatnonzero(state.alive).tolist()) == expected


@given(
    codes=st.lists(st.integers(-1, 4), max_size=60),
    quota=st.lists(st.integers(1, 12), min_size=5, max_size=5),
    first=st.integers(0, 2**58),
    number=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
)
def test_draws_are_the_samples_of_each_value_with_the_smallest_keys(codes, quota, first, number, seed):
    values = np.array(codes, np.int32)
    is_in = (values >= 0) & (np.arange(len(codes)) % 4 > 0)
    drawn = draw_samples(first, values, is_in, np.array(quota), seed=seed, number=number)
    rows = np.arange(len(codes)) + first
    expected = [drawn_by_hand(rows[is_in & (values == value)], n, seed, number) for value, n in enumerate(quota)]
    assert set(rows[drawn].tolist()) == set().union(*expected)
    assert count_values(values, is_in, 5).tolist() == [int((is_in & (values == v)).sum()) for v in range(5)]


def test_a_draw_holds_nine_bytes_a_sample():
    codes, is_in = np.zeros(400_000, np.int32), np.ones(400_000, bool)
    draw_samples(0, codes[:10], is_in[:10], np.array([3]), seed=1, number=1)  # compiled
    tracemalloc.start()
    try:
        drawn = draw_samples(0, codes, is_in, np.array([1_000]), seed=1, number=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert drawn.sum() == 1_000 and peak < 9.5 * len(codes), peak / len(codes)


@pytest.mark.parametrize("size", [{"max_samples": 6}, {"fraction": 0.4}], ids=str)
def test_a_value_is_drawn_from_in_each_dataset_for_itself(store, state, context, size):
    rules.apply_subsample(recipe.Subsample(column="cell_type", **size), state, store.datasets[:2], context)
    labels = column(store, "cell_type")
    for value in set(labels[rows_of(store, "first", "second")]):
        for name in ("first", "second"):
            before = labels[rows_of(store, name)] == value
            n = int((state.alive[rows_of(store, name)] & before).sum())
            assert n == (6 if "max_samples" in size else max(1, round(0.4 * before.sum())))


def test_draws_are_nested_and_differ_between_rules_and_seeds(store, context):
    def kept(n: int, **changes: Any) -> set[int]:
        state = State.of(store, store.datasets)
        rules.apply_cap(recipe.Cap(max_samples=n), state, store.datasets, replace(context, **changes))
        return set(np.flatnonzero(state.alive).tolist())

    assert kept(5) < kept(6) < kept(12) < kept(1_000) == set(range(store.n_obs))
    assert kept(5) == kept(5)
    assert len({frozenset(kept(5, number=number, seed=seed)) for number in (1, 2) for seed in (1, 2)}) == 4


# --- hold out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "seed"), [(0.0, 1), (0.1, 1), (0.1, 2), (0.5, 3), (0.9, 4)])
@pytest.mark.parametrize("is_filtered", [False, True])
def test_a_share_holds_out_what_shard_building_would(store, state, context, tmp_path, share, seed, is_filtered):
    config = ShardConfig(val_batches=share, seed=seed)
    if is_filtered:
        state.alive &= column(store, "batch") != "second1"
        state.alive[40:71] &= column(store, "batch")[40:71] != "second2"  # one batch left: samples are drawn
        panels = {record.name: store.panel(record) for record in store.datasets}
        write_selection(tmp_path / "selection", store, np.flatnonzero(state.alive), panels)
        config = replace(config, selection=str(tmp_path / "selection"))
    details = rules.apply_hold_out(recipe.HoldOut(share=share), state, store.datasets, replace(context, seed=seed))
    table = read_samples(store, select(store, config), config)
    assert np.array_equal(np.flatnonzero(state.is_val), table.sample_id[table.is_val])
    for dataset, how, names in zip(store.datasets, table.held_out, table.val_batches, strict=True):
        held = int(state.is_val[dataset.obs_start : dataset.obs_stop].sum())
        assert details[dataset.name] == {
            "by": how, "samples_held_out": held, "batches_held_out": len(names), "batches": list(names),
        }  # fmt: skip


def test_a_name_of_a_batch_means_it_in_every_dataset_of_the_rule(ill, context):
    for records in (ill.datasets, ill.datasets[1:]):
        state = State.of(ill, ill.datasets)
        rules.apply_hold_out(recipe.HoldOut(batches=("first1",)), state, records, context)
        held = (column(ill, "batch") == "first1") & rows_of(ill, *(record.name for record in records))
        assert np.array_equal(state.is_val, held) and held.sum() in (13, 26)


def test_what_several_rules_hold_out_adds_up(store, state, context):
    batch = column(store, "batch")
    for names in (("first1",), ("first2", "second0")):
        details = rules.apply_hold_out(recipe.HoldOut(batches=names), state, store.datasets, context)
    assert np.array_equal(state.is_val, np.isin(batch, ["first1", "first2", "second0"]))
    assert details["first"] == {
        "by": "batches", "samples_held_out": int((batch == "first2").sum()), "batches_held_out": 1, "batches": ["first2"]
    }  # fmt: skip
    assert details["third"]["by"] == "none"
    assert state.alive.all()
    before = state.is_val.copy()
    with pytest.raises(
        ValueError, match=r"rule 3 \(hold_out\): dataset 'first': all of its 40 samples would be held out"
    ):
        rules.apply_hold_out(recipe.HoldOut(batches=("first0",)), state, store.datasets, context)
    assert np.array_equal(state.is_val, before)


# --- genes -----------------------------------------------------------------------------------------------------------


def panel_ids(state: State, name: str) -> list[str]:
    return [state.store.vocabulary.gene_ids[token] for token in state.panels[name].tolist()]


@pytest.mark.parametrize(("least", "left"), [(1, 61), (2, 12)])
def test_genes_are_counted_in_the_datasets_of_the_rule(store, state, context, least, left):
    assert rules.apply_genes(recipe.Genes(min_datasets=least), state, store.datasets[:2], context) == {}
    first, second, third = (set(map(gene_id, g)) for g in (range(30), range(20, 60), (70, 3, 71, 25, 58)))
    shared = first & second if least == 2 else first | second
    assert set(panel_ids(state, "first")) == first & shared
    assert set(panel_ids(state, "second")) == second & shared
    assert set(panel_ids(state, "third")) == third
    assert all((np.diff(panel) > 0).all() for panel in state.panels.values())


def test_a_panel_that_lost_a_gene_no_longer_counts_for_it(store, state, context):
    state.panels["second"] = np.setdiff1d(state.panels["second"], store.vocabulary.index_of([gene_id(25)]))
    rules.apply_genes(recipe.Genes(min_datasets=2), state, store.datasets, context)
    assert gene_id(25) in panel_ids(state, "first")  # by the third
    assert set(panel_ids(state, "third")) == {gene_id(3), gene_id(25), gene_id(58)}


def test_genes_of_files_are_kept_or_left_out(store, state, context, tmp_path):
    keep, drop = tmp_path / "keep.txt", tmp_path / "drop.txt"
    lines = [
        f"{gene_id(3)}.12",
        "",
        "# a comment",
        f"  {gene_id(21)}  # why",
        gene_id(3),
        "ENSG00000000001",
        gene_id(25),
    ]
    keep.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    drop.write_text(gene_id(25))
    rule = recipe.Genes(keep=str(keep), drop=str(drop))
    rules.check_genes(rule, store, store.datasets)
    details = rules.apply_genes(rule, state, store.datasets, context)
    assert panel_ids(state, "first") == [gene_id(3), gene_id(21)]
    assert panel_ids(state, "second") == [gene_id(21)]
    assert panel_ids(state, "third") == [gene_id(3)]
    expected = {"keep_file": {"genes": 4, "unknown": 1}, "drop_file": {"genes": 1, "unknown": 0}}
    warning = details["first"].pop("warning")
    assert warning == f"keep: {keep}: the store does not know 1 of its 4 genes: ENSG00000000001"
    assert details == dict.fromkeys(("first", "second", "third"), expected)


def test_genes_that_the_store_does_not_know_are_warned_of_once_and_have_no_effect(store, state, context, tmp_path):
    keep, drop = tmp_path / "keep.txt", tmp_path / "drop.txt"
    known = [gene_id(g) for g in (3, 21, 25)]
    drop.write_text("\n".join([gene_id(25), *(f"ENSG0000000000{n}.1" for n in range(7))]))
    keep.write_text("\n".join(known))
    rule = recipe.Genes(keep=str(keep), drop=str(drop))
    rules.check_genes(rule, store, store.datasets)
    details = rules.apply_genes(rule, state, store.datasets, context)
    unknown = ", ".join(f"ENSG0000000000{n}" for n in range(5))
    warning = f"drop: {drop}: the store does not know 7 of its 8 genes: {unknown}, …"
    assert {name: found.get("warning") for name, found in details.items()} == {
        "first": warning, "second": None, "third": None
    }  # fmt: skip
    assert details["third"]["drop_file"] == {"genes": 8, "unknown": 7}
    assert panel_ids(state, "first") == known[:2]
    drop.write_text(gene_id(25))
    again = State.of(store, store.datasets)
    details = rules.apply_genes(rule, again, store.datasets, context)
    assert "warning" not in details["first"]
    assert {n: p.tolist() for n, p in again.panels.items()} == {n: p.tolist() for n, p in state.panels.items()}


def test_a_dataset_without_genes_is_refused_and_nothing_changes(store, state, context, tmp_path):
    (tmp_path / "genes.txt").write_text(gene_id(45))
    before = {name: panel.tolist() for name, panel in state.panels.items()}
    with pytest.raises(ValueError, match=r"rule 3 \(genes\): none of the 30 genes of dataset 'first' would be left"):
        rules.apply_genes(recipe.Genes(keep=str(tmp_path / "genes.txt")), state, store.datasets, context)
    assert {name: panel.tolist() for name, panel in state.panels.items()} == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ENSG90000000099\n", "the store has none of the 1 genes; near 'ENSG90000000099' of 62: \\['ENSG900000000"),
        (b"G3\nG21\n", "Ensembl ids in place of symbols: G3 is ENSG90000000003, G21 is ENSG90000000021"),
        (b"# nothing\n\n", "names no gene"),
        (b"ENSG90000000003\tG3\n", "line 1 holds \\['ENSG90000000003', 'G3'\\]"),
        (b"\xff\xfe\x00", "not text"),
    ],
)
def test_files_of_genes_that_name_none_are_refused(store, tmp_path: Path, content, message):
    path = tmp_path / "genes.txt"
    path.write_bytes(content)
    for rule in (recipe.Genes(keep=str(path)), recipe.Genes(drop=str(path))):
        with pytest.raises(ValueError, match=message):
            rules.check_genes(rule, store, store.datasets)


def test_a_file_of_genes_that_is_not_there_is_refused(store):
    with pytest.raises(FileNotFoundError, match="drop: nowhere.txt: no such file"):
        rules.check_genes(recipe.Genes(drop="nowhere.txt"), store, store.datasets)
