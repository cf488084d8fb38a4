"""Simulated corpora: what the files hold, that the seed decides everything, that the truth is in the counts."""

import json
import re

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from txfm_data.simulate import STATEMENT, SimulationConfig, simulate_corpus
from txfm_data.simulate import corpus as corpus_module
from txfm_data.simulate.counts import simulate_block
from txfm_data.simulate.design import BLOCK_SAMPLES, make_design
from txfm_eval.baselines import log_normalize, pca_embedding
from txfm_eval.celltype import linear_probe

SINGLE_CELL = ("sim_blood", "sim_lung", "sim_lines", "sim_screen")
SMALL = {"cells": 1200, "bulk_samples": 40, "genes": 500, "programs": 24, "perturbations": 9}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return simulate_corpus(tmp_path_factory.mktemp("sim") / "corpus", SimulationConfig(seed=4))


@pytest.fixture(scope="module")
def datasets(result):
    return {d["name"]: ad.read_h5ad(d["path"]) for d in result["datasets"]}


@pytest.fixture(scope="module")
def truth(result):
    with open(result["truth"], encoding="utf-8") as file:
        return json.load(file)


def arrays(folder, name):
    with h5py.File(folder / f"{name}.h5ad") as file:
        parts = [file[f"X/{part}"][:] for part in ("data", "indices", "indptr")]
        return [*parts, *(file[f"obs/{c}/codes"][:] for c in file["obs"].attrs["column-order"])]


def test_files_are_plain_anndata_with_integer_counts(result, datasets):
    assert [d["name"] for d in result["datasets"]] == [*SINGLE_CELL, "sim_bulk"]
    for described in result["datasets"]:
        data = datasets[described["name"]]
        assert data.shape == (described["n_obs"], described["n_vars"])
        assert isinstance(data.X, sp.csr_matrix)
        assert data.X.dtype == np.int32
        assert data.X.has_sorted_indices
        assert (data.X.nnz, data.X.data.max()) == (described["nnz"], described["max_count"])
        assert data.X.data.min() > 0
        assert np.asarray(data.X.sum(axis=1)).min() > 0
        assert data.obs_names.is_unique
        assert all(re.fullmatch(r"ENSG99\d{9}", gene) for gene in data.var_names)
        assert [f"SIM{int(gene[6:]):05d}" for gene in data.var_names] == data.var["symbol"].tolist()
        assert {"batch", "cell_type"} <= set(data.obs.columns)
        assert data.obs["batch"].nunique() >= 3
        assert data.uns["simulated"] == STATEMENT
    assert sum(datasets[name].n_obs for name in SINGLE_CELL) == 5000
    assert datasets["sim_bulk"].X.max() > 65_535


def test_panels_differ_and_some_genes_are_in_one_only(datasets):
    panels = {name: set(data.var_names) for name, data in datasets.items()}
    sizes = {len(panel) for panel in panels.values()}
    assert len(sizes) == 5
    assert 600 <= min(sizes) <= max(sizes) <= 1400
    assert len(set.intersection(*panels.values())) >= 0.4 * 1500
    for name, panel in panels.items():
        others = set().union(*(p for other, p in panels.items() if other != name))
        assert len(panel - others) >= 10
    assert set().union(*panels.values()) == {f"ENSG99{i + 1:09d}" for i in range(1500)}


def test_counts_are_as_sparse_as_filtered_single_cell_data(datasets):
    for name in SINGLE_CELL:
        data = datasets[name]
        assert 0.2 < data.X.nnz / (data.n_obs * data.n_vars) < 0.7
        assert 300 < np.median(np.asarray(data.X.sum(axis=1))) < 20_000


@pytest.mark.parametrize("name", ["sim_blood", "sim_lung", "sim_lines"])
def test_cell_types_are_told_apart_by_principal_components(datasets, name):
    data = datasets[name]
    scores = pca_embedding(log_normalize(data.X), 30)
    assert linear_probe(scores, data.obs["cell_type"], data.obs["batch"])["accuracy"] > 0.9


def test_genes_of_a_program_vary_together_and_decoys_do_not(result, datasets):
    data = datasets["sim_blood"]
    place = {symbol: i for i, symbol in enumerate(data.var["symbol"])}
    values = log_normalize(data.X).toarray()
    correlation = np.corrcoef(values, rowvar=False)
    null = np.quantile(correlation[np.triu_indices(data.n_vars, 1)], 0.95)
    shares = {}
    for path in result["relationships"]:
        with open(path, encoding="utf-8") as file:
            header, *lines = file.read().splitlines()
        assert header == "entity1,entity2"
        pairs = [line.split(",") for line in lines]
        assert len({frozenset(pair) for pair in pairs}) == len(pairs)
        found = [correlation[place[a], place[b]] for a, b in pairs if a in place and b in place]
        shares[path.rpartition("/")[2]] = np.mean(np.array(found) > null)
    assert shares["SIM_PROGRAMS.txt"] > 0.6
    assert shares["SIM_DECOYS.txt"] < 0.12


def test_truth_names_programs_perturbations_and_what_is_held_out(result, datasets, truth):
    assert truth["simulated"] == STATEMENT
    assert truth["held_out"] == ["sim_lung"]
    assert truth["config"] == {**SimulationConfig(seed=4).recorded()}
    assert {"numpy", "anndata"} <= set(truth["versions"])
    members = [symbol for genes in truth["programs"].values() for symbol in genes]
    assert len(members) == len(set(members)) == 900
    program = {symbol: name for name, genes in truth["programs"].items() for symbol in genes}
    related, decoys = result["relationships"]
    for path, same in ((related, True), (decoys, False)):
        with open(path, encoding="utf-8") as file:
            pairs = [line.split(",") for line in file.read().splitlines()[1:]]
        assert all((program[a] == program[b]) is same for a, b in pairs)
    assert len(pairs) == 24 * 200
    for name, data in datasets.items():
        assert set(data.obs["cell_type"]) <= set(truth["cell_types"])
        assert truth["datasets"][name]["file"] == f"{name}.h5ad"


def test_screen_has_controls_and_perturbations_with_their_truth(datasets, truth):
    data = datasets[truth["screen"]]
    labels, effect = data.obs["perturbation"].astype(str), data.obs["simulated_effect"].astype(str)
    assert (labels == truth["control"]).mean() == pytest.approx(0.2, abs=0.03)
    assert set(effect[labels == "non-targeting"]) == {"control"}
    assert set(labels) - {"non-targeting"} == set(truth["perturbations"])
    assert set(truth["perturbations"]) <= set(data.var["symbol"])
    for name, known in truth["perturbations"].items():
        assert set(effect[labels == name]) == {known["effect"]}
        assert bool(known["programs"]) is (known["effect"] == "strong")
    assert [p["effect"] for p in truth["perturbations"].values()].count("strong") == 16
    assert data.obs.groupby("perturbation", observed=True)["batch"].nunique().min() >= 3


def test_strong_perturbations_move_their_programs_and_null_ones_nothing(datasets, truth):
    data = datasets[truth["screen"]]
    values, labels = log_normalize(data.X).toarray(), data.obs["perturbation"].astype(str).to_numpy()
    control = values[labels == "non-targeting"]
    z = (control.mean(axis=0), control.std(axis=0) + 1e-3)
    for name, known in truth["perturbations"].items():
        moved = (values[labels == name].mean(axis=0) - z[0]) / z[1]
        activity = {
            program: moved[data.var["symbol"].isin(genes).to_numpy()].mean()
            for program, genes in truth["programs"].items()
        }
        for program, shift in known["programs"].items():
            assert np.sign(activity[program]) == np.sign(shift)
        if known["effect"] == "null":
            assert max(np.abs(list(activity.values()))) < 0.35
        else:
            strongest = max(known["programs"], key=lambda p: abs(known["programs"][p]))
            assert abs(activity[strongest]) > 0.4


def test_seed_decides_the_counts_and_threads_do_not(tmp_path):
    first = simulate_corpus(tmp_path / "a", SimulationConfig(seed=1, threads=1, **SMALL))
    simulate_corpus(tmp_path / "b", SimulationConfig(seed=1, threads=3, **SMALL))
    simulate_corpus(tmp_path / "c", SimulationConfig(seed=2, **SMALL))
    for described in first["datasets"]:
        one, same, other = (arrays(tmp_path / folder, described["name"]) for folder in "abc")
        assert all(np.array_equal(x, y) for x, y in zip(one, same, strict=True))
        assert not np.array_equal(one[0], other[0])
    for name in ("truth.json", "relationships/SIM_PROGRAMS.txt", "decoys/SIM_DECOYS.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


def test_a_block_is_a_function_of_its_number_alone(tmp_path):
    config = SimulationConfig(seed=1, **{**SMALL, "cells": 3000})
    design = make_design(config)
    blood = design.datasets[0]
    simulate_corpus(tmp_path / "out", config)
    with h5py.File(tmp_path / "out" / "sim_blood.h5ad") as file:
        start, stop = file["X/indptr"][BLOCK_SAMPLES], file["X/indptr"][2 * BLOCK_SAMPLES]
        assert np.array_equal(file["X/data"][start:stop], simulate_block(1, design.genes, blood, 1).counts.data)
        assert file["X/indptr"].dtype == np.int64


def test_samples_without_counts_do_not_occur_even_at_no_depth():
    design = make_design(SimulationConfig(**SMALL))
    shallow = design.datasets[0].__class__(**{**vars(design.datasets[0]), "depth": 0.01})
    counts = simulate_block(0, design.genes, shallow, 0).counts
    assert np.asarray(counts.sum(axis=1)).min() == 1


def test_progress_ends_at_the_number_of_samples(tmp_path):
    seen = []
    simulate_corpus(tmp_path / "out", SimulationConfig(**SMALL), progress=lambda *at: seen.append(at))
    assert seen[-1] == (1240, 1240)
    assert seen == sorted(seen)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_a_run_that_stops_leaves_nothing(tmp_path, error):
    def stop(done, total):
        if done > 400:
            raise error

    with pytest.raises((KeyboardInterrupt, OSError)):
        simulate_corpus(tmp_path / "out", SimulationConfig(**SMALL), progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_failure_while_the_truth_is_written_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(corpus_module, "_write_truth", fail)
    with pytest.raises(OSError, match="disk full"):
        simulate_corpus(tmp_path / "out", SimulationConfig(**SMALL))
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_overwritten(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    with pytest.raises(ValueError, match="full: the folder is not empty"):
        simulate_corpus(tmp_path / "full", SimulationConfig(**SMALL))
    with pytest.raises(ValueError, match="file: is a file"):
        simulate_corpus(tmp_path / "file", SimulationConfig(**SMALL))
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    simulate_corpus(tmp_path / "empty", SimulationConfig(**SMALL))
    assert (tmp_path / "empty" / "truth.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"cells": 10}, "cells must be at least 200 over four datasets, got 10"),
        ({"bulk_samples": 3}, "bulk_samples must be at least 40, got 3"),
        ({"programs": 4}, "programs must be at least 24, got 4"),
        ({"genes": 100}, "genes must be between 240 .* and 65535, got 100"),
        ({"genes": 70_000}, "genes must be between 240 .* and 65535, got 70000"),
        ({"perturbations": 400}, "perturbations must be at most an eighth of the genes"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SimulationConfig(**change)


@pytest.mark.parametrize("seed", range(20))
def test_smallest_and_fullest_designs_can_be_made(seed):
    make_design(SimulationConfig(seed=seed, genes=321, programs=32, perturbations=40))
    make_design(SimulationConfig(seed=seed, genes=240, programs=24, perturbations=30))
