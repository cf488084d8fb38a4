"""The rule phenoprints on simulated screens, whose strong perturbations are known, and on small ones with given embeddings."""

import csv
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.txfm_data.curate.contexts import context_of
from tests.txfm_data.stores import adata_of
from txfm_data import ingest
from txfm_data.curate.figures import plot_phenoprints
from txfm_data.curate.phenoprint import Screen, _CellsByTau, apply_phenoprints, check_phenoprints
from txfm_data.curate.recipe import EmbeddingSpec, Phenoprints
from txfm_data.curate.rows import RowFile
from txfm_data.curate.state import State
from txfm_data.parallel import Workers, pool
from txfm_data.simulate.config import SimulationConfig
from txfm_data.simulate.design import CONTROL, make_design
from txfm_data.simulate.h5ad import write_h5ad
from txfm_data.store.opening import open_store

LABELS = {"batch": "batch", "perturbation": "perturbation", "control": CONTROL}
PCA = EmbeddingSpec(kind="pca", n_components=50)
COLUMNS = EmbeddingSpec(kind="columns", prefix="z")
BATCHES = 3


def simulate_screen(path: Path, seed: int) -> None:
    """Write the screen of a simulated corpus of default size."""
    design = make_design(SimulationConfig(seed=seed))
    for _ in write_h5ad(path, design, next(d for d in design.datasets if d.name == "sim_screen")):
        pass


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """A store of a simulated screen, and of the same with perturbations shuffled among the cells that are no controls."""
    folder = tmp_path_factory.mktemp("simulated")
    simulate_screen(folder / "screen.h5ad", 0)
    adata = ad.read_h5ad(folder / "screen.h5ad")
    perturbed = np.flatnonzero(adata.obs["perturbation"] != CONTROL)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    labels[perturbed] = labels[np.random.default_rng(7).permutation(perturbed)]
    adata.obs["perturbation"] = labels
    adata.write_h5ad(folder / "shuffled.h5ad")
    for name in ("screen", "shuffled"):
        ingest.h5ad(folder / f"{name}.h5ad", folder / "store.soma", name, **LABELS)
    return folder / "store.soma"


NOISE = {f"noise{i}": 10 for i in range(5)}
GROUPS = {"strong": 9, "twice": 12, **NOISE, "alone": 1, None: 6, CONTROL: 24}


def small_screen(seed: int) -> ad.AnnData:
    """Cells whose embedding stands in obs (z0 to z5): two perturbations point their own way, the others are noise."""
    rng = np.random.default_rng(seed)
    labels = [label for label, n in GROUPS.items() for _ in range(n)]
    cells = rng.normal(size=(len(labels), 6))
    for axis, name in enumerate(("strong", "twice")):
        cells[[label == name for label in labels], axis] += 4
    order = rng.permutation(len(labels))
    obs = {"batch": [f"b{i % BATCHES}" for i in range(len(labels))], "perturbation": np.array(labels, object)[order]}
    obs |= {f"z{i}": cells[order, i] for i in range(6)}
    counts = rng.poisson(2.0, (len(labels), 8)) + 1
    return adata_of(counts, list(range(8)), pd.DataFrame(obs, index=[f"cell{i}" for i in range(len(labels))]))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A store of two small screens and a dataset that is none."""
    folder = tmp_path_factory.mktemp("small")
    plain = small_screen(9)
    del plain.obs["perturbation"]
    for name, adata in (("one", small_screen(1)), ("plain", plain), ("two", small_screen(2))):
        adata.write_h5ad(folder / f"{name}.h5ad")
        options = {"batch": "batch"} if name == "plain" else LABELS
        ingest.h5ad(folder / f"{name}.h5ad", folder / "store.soma", name, **options)
    return folder / "store.soma"


def state_of(path: Path, *names: str, held_out: str | None = None) -> State:
    """All samples of some datasets, or of all; held_out: a batch."""
    store = open_store(path)
    state = State.of(store, tuple(r for r in store.datasets if not names or r.name in names))
    if held_out is not None:
        state.is_val = (obs_of(state).batch == held_out).to_numpy()
    return state


def apply(rule: Phenoprints, state: State, folder: Path, workers: int = 0):
    """Apply the rule and hand back its details, which must be JSON."""
    folder.mkdir(exist_ok=True)
    with pool(Workers(n=workers)) as running:
        context = context_of(folder, number=3, pool=running, n_workers=max(1, workers))
        check_phenoprints(rule, state.store, state.records)
        details = apply_phenoprints(rule, state, state.records, context)
        assert list(context.scratch.iterdir()) == [], "nothing of the embedding is left"
    return json.loads(json.dumps(details, allow_nan=False))


def obs_of(state: State) -> pd.DataFrame:
    return state.store.obs(["perturbation", "is_control", "batch", "dataset_id"]).to_pandas()


def read_table(folder: Path, name: str) -> pd.DataFrame:
    return pq.read_table(folder / "extras" / f"phenoprints_3_{name}.parquet").to_pandas()


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((folder / "extras").iterdir())}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_strong_perturbations_of_a_simulated_screen_are_kept_and_null_ones_are_not(simulated, tmp_path, seed):
    if seed:
        simulate_screen(tmp_path / "screen.h5ad", seed)
        ingest.h5ad(tmp_path / "screen.h5ad", tmp_path / "store.soma", "screen", obs_columns=(), **LABELS)
        simulated = tmp_path / "store.soma"
    perturbations = next(d for d in make_design(SimulationConfig(seed=seed)).datasets if d.perturbations).perturbations
    effect = dict(zip(perturbations.names, perturbations.effects(), strict=True))
    state = state_of(simulated, "screen")
    before, obs = state.alive.copy(), obs_of(state)
    details = apply(Phenoprints(embedding=PCA), state, tmp_path / "run")["screen"]
    table = read_table(tmp_path / "run", "screen")
    kept, strong = set(table.perturbation[table.kept]), {name for name, what in effect.items() if what == "strong"}
    assert len(kept & strong) / len(kept) >= 0.95 and len(kept & strong) / len(strong) >= 0.95
    assert np.array_equal(state.alive, before & (obs.is_control | obs.perturbation.isin(kept)).to_numpy())
    assert details["n_kept"] == len(kept) and details["tau"] == 0.1 and details["n_untestable"] == 0
    assert 950 < details["n_null"] < 1_000 and details["warning"].startswith("no batch is held out yet")


def test_nothing_is_consistent_once_labels_are_shuffled(simulated, tmp_path):
    state = state_of(simulated, "shuffled")
    details = apply(Phenoprints(embedding=PCA, tau=0.2), state, tmp_path)["shuffled"]
    assert details["n_kept"] == 0 and details["p_quantiles"]["0.05"] > 0.2
    obs = obs_of(state)
    assert np.array_equal(state.alive, (obs.is_control & (obs.dataset_id == "shuffled")).to_numpy())


def test_the_files_are_the_same_bytes_however_they_are_made(simulated, tmp_path):
    runs = []
    for number, workers in enumerate((0, 0, 2)):
        state = state_of(simulated)
        apply(Phenoprints(embedding=PCA, datasets=("screen",)), state, tmp_path / f"{number}", workers)
        runs.append((digests(tmp_path / f"{number}"), state.alive.tobytes()))
    assert runs[0] == runs[1] == runs[2]
    assert [name.removeprefix("phenoprints_3_") for name in runs[0][0]] == [
        "screen.parquet", "screen.png", "screen.tsv", "screen_curve.tsv",
        "shuffled.parquet", "shuffled.png", "shuffled.tsv", "shuffled_curve.tsv",
    ]  # fmt: skip


def reference(obs: pd.DataFrame, cells: np.ndarray, rule: Phenoprints) -> dict[str, float]:
    """Statistic of each perturbation as the text says it, all in float64, on cells that are aligned by all of their kind."""
    control = obs.is_control.to_numpy()
    center = cells[control].mean(axis=0)
    axes = np.linalg.svd(cells[control] - center, full_matrices=False)[2]
    aligned = (cells - center) @ axes.T
    for batch in obs.batch.unique():
        own = (obs.batch == batch).to_numpy()
        by = aligned[own & (control if rule.reference == "controls" else True)]
        aligned[own] = (aligned[own] - by.mean(axis=0)) / by.std(axis=0)
    statistic = {}
    for name in ("strong", "twice", *NOISE):
        own = aligned[(obs.perturbation == name).to_numpy()]
        others = own.sum(axis=0) - own
        cosines = (own * others).sum(axis=1) / np.linalg.norm(own, axis=1) / np.linalg.norm(others, axis=1)
        statistic[name] = float(cosines.mean())
    return statistic


@pytest.mark.parametrize("rule", [
    Phenoprints(embedding=COLUMNS), Phenoprints(embedding=COLUMNS, reference="all", tau=0.05),
    Phenoprints(embedding=COLUMNS, null="pooled", null_controls=True, n_null=20, seed=5, tau=0.25),
], ids=["default", "all", "pooled"])  # fmt: skip
def test_the_tables_say_what_was_kept_and_why(small, tmp_path, rule):
    state = state_of(small, "one")
    details = apply(rule, state, tmp_path)["one"]
    obs = obs_of(state)[: len(small_screen(1))]
    table = read_table(tmp_path, "one").set_index("perturbation")
    assert set(table.index) == {"strong", "twice", "alone", *NOISE}
    assert table.n_cells.to_dict() == {name: GROUPS[name] for name in table.index} == table.n_cells_train.to_dict()
    assert set(table.index[table.kept]) == {"strong", "twice"}
    assert table.loc["alone"].isna()[["statistic", "p"]].all() and details["n_untestable"] == 1
    assert table.index[-1] == "alone" and table.p.dropna().is_monotonic_increasing
    tested = obs[obs.perturbation != "na"]
    cells = small_screen(1).obs[[f"z{i}" for i in range(6)]].to_numpy()[tested.index]
    expected = reference(tested.reset_index(drop=True), cells.astype(np.float32).astype(float), rule)
    for name in ("strong", "twice", *NOISE):
        assert table.statistic[name] == pytest.approx(expected[name], abs=1e-5)
    kept = obs.is_control | obs.perturbation.isin(["strong", "twice"])
    assert np.array_equal(state.alive[: len(obs)], kept.to_numpy())
    with open(tmp_path / "extras" / "phenoprints_3_one.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["perturbation"] for row in rows] == table.index.tolist()
    assert rows[-1] | {"n_cells": "1"} == rows[-1] and rows[-1]["p"] == "" and rows[0]["kept"] == "true"
    with open(tmp_path / "extras" / "phenoprints_3_one_curve.tsv", newline="") as file:
        curve = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file, delimiter="\t")]
    taus = [row["tau"] for row in curve]
    assert taus == sorted(set(taus)) and {*rule.taus, details["tau"], 1.0} <= set(taus)
    for row in curve:
        below = table[table.p < row["tau"]]
        assert (row["n_perturbations"], row["n_cells"]) == (len(below), below.n_cells.sum() + GROUPS[CONTROL])
    assert (tmp_path / "extras" / "phenoprints_3_one.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_perturbations_of_few_cells_are_dropped_untested(small, tmp_path):
    rule = Phenoprints(embedding=COLUMNS, min_cells=GROUPS["strong"] + 1, datasets=("one",))
    details = apply(rule, state_of(small, "one"), tmp_path)["one"]
    table = read_table(tmp_path, "one").set_index("perturbation")
    assert table.kept["twice"] and not table.kept["strong"] and np.isnan(table.p["strong"])
    assert details["n_untestable"] == sum(GROUPS[name] < rule.min_cells for name in table.index)
    with pytest.raises(ValueError, match=r"no perturbation has 100 cells .* lower min_cells"):
        apply(replace(rule, min_cells=100), state_of(small, "one"), tmp_path / "none")


def test_cells_without_a_perturbation_are_dropped_or_kept_but_change_nothing(small, tmp_path):
    found = {}
    for choice in ("drop", "keep"):
        state = state_of(small, "one")
        obs = obs_of(state)
        details = apply(Phenoprints(embedding=COLUMNS, unassigned=choice), state, tmp_path / choice)["one"]
        of_one = (obs.dataset_id == "one") & (obs.perturbation == "na")
        assert (state.alive[of_one.to_numpy()] == (choice == "keep")).all() and details["n_unassigned"] == GROUPS[None]
        found[choice] = read_table(tmp_path / choice, "one")
    pd.testing.assert_frame_equal(found["drop"], found["keep"])


def test_held_out_batches_are_not_looked_at_but_lose_the_same_perturbations(small, tmp_path):
    state = state_of(small, "one")
    obs = obs_of(state)
    held_out = ((obs.batch == "b1") & (obs.dataset_id == "one")).to_numpy()
    state.is_val = held_out
    apply(Phenoprints(embedding=COLUMNS), state, tmp_path / "train")
    without = state_of(small, "one")
    without.alive &= ~held_out
    apply(Phenoprints(embedding=COLUMNS), without, tmp_path / "without")
    train, alone = read_table(tmp_path / "train", "one"), read_table(tmp_path / "without", "one")
    shared = ["perturbation", "n_cells_train", "statistic", "p", "kept"]
    tested = train[train.n_cells_train > 0]
    pd.testing.assert_frame_equal(tested[shared].reset_index(drop=True), alone[shared])
    assert train.n_cells.sum() > train.n_cells_train.sum() == alone.n_cells.sum()
    assert np.array_equal(state.alive & ~held_out, without.alive)
    kept = obs.is_control | obs.perturbation.isin(train.perturbation[train.kept])
    assert np.array_equal(state.alive[held_out], kept[held_out]) and state.alive[held_out].any()
    every = state_of(small, "one")
    every.is_val = held_out
    apply(Phenoprints(embedding=COLUMNS, batches="all"), every, tmp_path / "all")
    assert read_table(tmp_path / "all", "one").n_cells_train.sum() == train.n_cells.sum()


def test_tau_is_chosen_by_the_number_of_cells(small, tmp_path):
    always, strong = GROUPS[CONTROL], GROUPS["strong"] + GROUPS["twice"]
    rule = Phenoprints(embedding=COLUMNS, calibrate_to=always + strong, taus=(0.9, 0.001, 0.2, 0.15), datasets=("one",))
    state = state_of(small, "one")
    details = apply(rule, state, tmp_path / "near")["one"]
    assert details["tau"] == 0.15, "of two that are as near, the smaller"
    assert state.alive.sum() == always + strong and "asked for" not in details["warning"]
    far = apply(replace(rule, calibrate_to=1_000), state_of(small, "one"), tmp_path / "far")["one"]
    assert far["tau"] == 0.9 and "% off the 1,000 asked for" in far["warning"]
    keeping = replace(rule, unassigned="keep", calibrate_to=always + strong + GROUPS[None])
    assert apply(keeping, state_of(small, "one"), tmp_path / "keeping")["one"]["tau"] == 0.15
    with pytest.raises(ValueError, match=r"^calibrate_to is the number of cells of one screen, but there are 2"):
        apply(replace(rule, datasets=None), state_of(small), tmp_path / "both")


def test_each_screen_is_judged_by_itself_and_what_is_none_is_left_alone(small, tmp_path):
    state = state_of(small)
    before = state.alive.copy()
    details = apply(Phenoprints(embedding=COLUMNS), state, tmp_path / "all")
    plain = (obs_of(state).dataset_id == "plain").to_numpy()
    assert details["plain"] == {"skipped": "not a screen: no sample has a perturbation"}
    assert np.array_equal(state.alive[plain], before[plain])
    alone = state_of(small, "two")
    apply(Phenoprints(embedding=COLUMNS), alone, tmp_path / "two")
    assert np.array_equal(state.alive & alone.alive, alone.alive)
    assert read_table(tmp_path / "all", "two").equals(read_table(tmp_path / "two", "two"))
    with pytest.raises(ValueError, match="^no sample of dataset 'plain' has a perturbation; ingest it with"):
        apply(Phenoprints(embedding=COLUMNS, datasets=("plain",)), state_of(small, "plain"), tmp_path / "named")


def test_a_screen_whose_perturbed_cells_are_gone_is_left_alone(small, tmp_path):
    state = state_of(small, "one")
    state.alive &= obs_of(state).is_control.to_numpy()
    before = state.alive.copy()
    details = apply(Phenoprints(embedding=COLUMNS), state, tmp_path)
    assert details["one"].pop("warning").startswith("nothing is done: none of the 1 datasets")
    assert details["one"] == {"skipped": "no sample with a perturbation is left"}
    assert np.array_equal(state.alive, before)


@pytest.mark.parametrize(("kept", "message"), [
    (["strong", "twice"], "0 controls are left, at least 2 are needed to align cells on; keep more controls"),
    ([CONTROL, "alone"], "of 1 perturbations none has two cells left, so none can be tested"),
    ([CONTROL, "strong"], "a single perturbation has cells left, .* set null_controls: true"),
])  # fmt: skip
def test_a_screen_that_nothing_can_be_said_about_is_refused(small, tmp_path, kept, message):
    state = state_of(small, "one")
    state.alive &= obs_of(state).perturbation.isin(kept).to_numpy()
    with pytest.raises(ValueError, match=rf"^rule 3 \(phenoprints\): dataset 'one': {message}"):
        apply(Phenoprints(embedding=COLUMNS), state, tmp_path)


def test_controls_that_are_all_held_out_are_missed(small, tmp_path):
    state = state_of(small, "one")
    state.is_val = obs_of(state).is_control.to_numpy()
    with pytest.raises(ValueError, match="0 controls are left in the batches that are looked at"):
        apply(Phenoprints(embedding=COLUMNS), state, tmp_path)


def test_one_perturbation_can_be_compared_with_controls(small, tmp_path):
    state = state_of(small, "one")
    state.alive &= obs_of(state).perturbation.isin([CONTROL, "strong"]).to_numpy()
    details = apply(Phenoprints(embedding=COLUMNS, null_controls=True), state, tmp_path)["one"]
    assert details["n_kept"] == 1 and details["n_null"] == GROUPS[CONTROL]


def test_too_few_random_cells_and_batches_without_controls_are_told(small, tmp_path):
    state = state_of(small, "one")
    obs = obs_of(state)
    state.alive &= ~((obs.batch == "b2") & obs.is_control).to_numpy()
    details = apply(Phenoprints(embedding=COLUMNS, tau=0.02, n_null=20), state, tmp_path)["one"]
    assert details["batches_without_controls"] == ["b2"] and details["n_batches_without_controls"] == 1
    assert "had fewer than 50 random cells to compare with, so their p cannot be below 0.02" in details["warning"]


@pytest.mark.parametrize("batches", ["train", "all"])
@pytest.mark.parametrize("held_out", [None, "b1", "no batch"])
def test_a_choice_that_later_held_out_batches_take_part_in_is_told(small, tmp_path, batches, held_out):
    state = state_of(small, "one", held_out=held_out)
    details = apply(Phenoprints(embedding=COLUMNS, batches=batches), state, tmp_path)["one"]
    is_told = batches == "train" and held_out != "b1"
    assert 0 < details["n_kept"] < details["n_perturbations"] - 1
    assert ("no batch is held out yet" in details.get("warning", "")) == is_told == ("warning" in details)


@pytest.mark.parametrize(("tau", "said"), [
    (0.005, r"no perturbation is kept: of 7 that can be tested none has p below 0.005, the least is 0\.0\d+; look"),
    (1.0, "all 7 perturbations that can be tested are kept, none has p of 1 or above; lower tau"),
])  # fmt: skip
def test_a_tau_that_makes_no_choice_is_told(small, tmp_path, tau, said):
    rule = Phenoprints(embedding=COLUMNS, tau=tau, batches="all")
    state = state_of(small, "one")
    details = apply(rule, state, tmp_path)["one"]
    assert details["n_kept"] == (7 if tau == 1 else 0) and re.search(said, details["warning"])
    assert state.alive.any()


def test_a_rule_without_any_screen_says_so(small, tmp_path):
    state = state_of(small, "plain")
    details = apply(Phenoprints(embedding=COLUMNS), state, tmp_path)
    assert "nothing is done: none of the 1 datasets that the rule looks at is a screen" in details["plain"]["warning"]
    assert state.alive.sum() == sum(GROUPS.values())


def test_controls_without_axes_are_told_with_what_a_recipe_can_do(small, tmp_path):
    def embed(spec, store, record, rows, panel, out, progress):
        with RowFile(out, rows, 2, "test") as file:
            file.put(np.arange(len(rows)), np.ones((len(rows), 2)))

    rule, state = Phenoprints(embedding=EmbeddingSpec(kind="checkpoint")), state_of(small, "one")
    said = r"^rule 1 \(phenoprints\): dataset 'one': alignment: the 24 control cells are all equal, .* name others \(datasets\)$"
    with pytest.raises(ValueError, match=said):
        apply_phenoprints(rule, state, state.records, context_of(tmp_path, embed=embed))


def test_the_details_tell_one_embedding_from_another(small, tmp_path):
    path, told = tmp_path / "e.h5ad", []
    rule = Phenoprints(embedding=EmbeddingSpec(kind="file", path=str(path)), datasets=("one",))
    for seed in (0, 1, 1):
        state = state_of(small, "one")
        obs = state.store.obs(["raw_sum"]).to_pandas()
        values = np.random.default_rng(seed).normal(size=(len(obs), 6)).astype(np.float32)
        ad.AnnData(obs=obs.set_axis(obs.index.astype(str)), obsm={"X_txfm": values}).write_h5ad(path)
        told.append(apply(rule, state, tmp_path / f"{len(told)}")["one"]["embedding_sha256"])
        assert told[-1] == {"e.h5ad": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert told[0] != told[1]
    assert (
        "embedding_sha256" not in apply(Phenoprints(embedding=COLUMNS), state_of(small, "one"), tmp_path / "c")["one"]
    )


def test_a_screen_without_controls_is_refused_before_any_rule(tmp_path):
    adata = small_screen(1)
    counts = adata.X.toarray()
    counts[(adata.obs["perturbation"] == CONTROL).to_numpy()] = (
        0  # the only way to ingest a screen whose controls are gone
    )
    adata.X = counts
    adata.write_h5ad(tmp_path / "one.h5ad")
    ingest.h5ad(tmp_path / "one.h5ad", tmp_path / "store.soma", "one", empty_samples="drop", **LABELS)
    store = open_store(tmp_path / "store.soma")
    with pytest.raises(ValueError, match=r"^no sample of dataset 'one' is a control \(is_control\)"):
        check_phenoprints(Phenoprints(embedding=COLUMNS), store, store.datasets)


def test_an_embedding_that_cannot_be_had_is_refused_before_any_rule(small):
    store = open_store(small)
    with pytest.raises(ValueError, match="prefix|column"):
        check_phenoprints(Phenoprints(embedding=EmbeddingSpec(kind="columns", prefix="nothing")), store, store.datasets)
    with pytest.raises(FileNotFoundError):
        check_phenoprints(Phenoprints(embedding=EmbeddingSpec(kind="file", path="none.h5ad")), store, store.datasets)


@settings(deadline=None)
@given(
    cells=st.lists(st.tuples(st.integers(0, 30), st.sampled_from([np.nan, 0.01, 0.1, 0.25, 0.25, 1.0])), min_size=1, max_size=12),
    n_controls=st.integers(0, 5), n_unassigned=st.integers(0, 5), keeps=st.booleans(),
    tau=st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.3, 1.0]),
)  # fmt: skip
def test_what_a_tau_keeps_is_counted_right(cells, n_controls, n_unassigned, keeps, tau):
    n_cells, p = (np.array(part) for part in zip(*cells, strict=True))
    group = np.concatenate([np.repeat(np.arange(len(p)), n_cells), np.full(n_controls + n_unassigned, -1)]).astype(
        np.int32
    )
    is_control = np.arange(len(group)) < 0
    is_control[n_cells.sum() : n_cells.sum() + n_controls] = True
    names = tuple(f"g{i}" for i in range(len(p)))
    screen = Screen(np.arange(len(group)), group, names, is_control, np.ones(len(group), bool))
    below = p < tau
    expected = int(below.sum()), int(n_cells[below].sum()) + n_controls + n_unassigned * keeps
    assert _CellsByTau(p.astype(float), screen, keeps).kept(tau) == expected


def test_a_figure_is_drawn_of_no_and_of_many_values(tmp_path):
    for n in (0, 3_000):
        p = np.linspace(0, 1, n)
        for name in ("a", "b"):
            path, cells = tmp_path / f"{n}{name}.png", 10 * np.arange(n + 1)
            plot_phenoprints(path, title="a $ and a _", p=p, cells=cells, tau=0.1, n_asked=50, n_untestable=2)
        assert (tmp_path / f"{n}a.png").read_bytes() == (tmp_path / f"{n}b.png").read_bytes()
