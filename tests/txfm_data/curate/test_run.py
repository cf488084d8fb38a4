"""A whole curation on real stores: equal to plain NumPy, the same bytes every time, nothing half-written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import GENES_A, GENES_B, gene_id, make_adata
from txfm_data import ingest
from txfm_data.curate.recipe import Recipe, parse_recipe
from txfm_data.curate.run import CurateOptions, curate
from txfm_data.curate.scratch import scratch_folder
from txfm_data.parallel import Workers
from txfm_data.selection import Selection, inspect_selection, read_selection
from txfm_data.store.opening import open_store

CELL_TYPES = ("T cell", "B cell")
DATASETS = (("a", 1, GENES_A, "sc"), ("b", 2, GENES_B, "sc"), ("bulk", 3, GENES_A, "bulk"))
CAP = {"rule": "cap", "max_samples": 9}


def recipe_of(*rules: dict[str, Any], **more: Any) -> Recipe:
    return parse_recipe({"rules": list(rules), **more}, "recipe")


@pytest.fixture(scope="module", params=["soma", "zarr"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    labels: dict[str, Any] = {
        "batch": "batch",
        "cell_type": "cell_type",
        "perturbation": "guide",
        "control": "non-targeting",
    }
    for name, seed, genes, modality in DATASETS:
        make_adata(seed, genes, scale=0.5).write_h5ad(folder / f"{name}.h5ad")
        ingest.h5ad(
            folder / f"{name}.h5ad", folder / "store", name, **labels, modality=modality, backend=request.param,
            duplicates="error",
        )  # fmt: skip
    return folder / "store"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


RULES = [
    {"rule": "filter", "where": "raw_sum >= 20", "keep_controls": True},
    {"rule": "genes_by_cells", "min_cells": 12},
    {"rule": "cells_by_genes", "min_genes": 9},
    {"rule": "subsample", "column": "cell_type", "fraction": 0.8},
    {"rule": "hold_out", "share": 0.3},
    {"rule": "cap", "max_samples": 50},
    {"rule": "genes", "min_datasets": 2},
]


def test_two_runs_and_two_processes_give_the_same_bytes(store: Path, tmp_path: Path) -> None:
    result = curate(store, recipe_of(*RULES, seed=5), tmp_path / "one")
    curate(store, recipe_of(*RULES, seed=5), tmp_path / "two")
    curate(store, recipe_of(*RULES, seed=5), tmp_path / "many", CurateOptions(workers=Workers(n=2)))
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "many")
    assert {"audit.json", "audit.txt", "audit.png", "selection.json"} <= files(tmp_path / "one").keys()
    assert 0 < result["n_val"] < result["n_samples"] < 3 * 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one", "two"]
    curate(store, recipe_of(*RULES, seed=6), tmp_path / "other")
    assert files(tmp_path / "one")["samples.parquet"] != files(tmp_path / "other")["samples.parquet"]


def test_the_audit_says_what_the_selection_holds(store: Path, tmp_path: Path) -> None:
    result = curate(store, recipe_of(*RULES), tmp_path / "s")
    audit = json.loads((tmp_path / "s" / "audit.json").read_text())
    selection = read_selection(tmp_path / "s", open_store(store))
    assert [step["rule"] for step in audit["steps"]] == [rule["rule"] for rule in RULES]
    for before, after in zip(audit["steps"], audit["steps"][1:], strict=False):
        left = {d["dataset"]: d["samples_out"] for d in before["datasets"]}
        assert all(d["samples_in"] == left.get(d["dataset"], d["samples_in"]) for d in after["datasets"])
        assert after["genes_union_in"] == before["genes_union_out"]
    assert len(selection.sample_id) == result["n_samples"] == sum(d["samples"] for d in audit["result"])
    assert selection.is_val is not None and int(selection.is_val.sum()) == result["n_val"] == sum(
        d["samples_val"] for d in audit["result"]
    )
    assert [len(panel) for panel in selection.genes] == [d["genes"] for d in audit["result"]]
    assert len(set(np.concatenate(selection.genes).tolist())) == audit["genes_union"] == result["n_genes"]
    assert parse_recipe(audit["recipe"], "again") == recipe_of(*RULES)
    text = (tmp_path / "s" / "audit.txt").read_text()
    assert (
        all(f"{n}. {rule['rule']}" in text for n, rule in enumerate(RULES, 1))
        and f"{result['n_samples']:,} samples" in text
    )


class Plain:
    """The same rules on dense arrays."""

    def __init__(self) -> None:
        self.data = {
            name: make_adata(seed, genes, scale=0.5) for name, seed, genes, _ in DATASETS
        }  # fmt: skip
        self.counts = {name: adata.X.toarray() for name, adata in self.data.items()}
        self.alive = {name: np.ones(64, bool) for name in self.data}
        self.genes = {name: np.ones(60, bool) for name in self.data}

    def apply(self, rule: dict[str, Any]) -> None:
        scope = rule.get("datasets") or (["a", "b"] if rule["rule"].endswith(("cells", "genes")) else list(self.data))
        for name in scope:
            obs, counts = self.data[name].obs, self.counts[name]
            control = (obs["guide"] == "non-targeting").to_numpy() & rule.get("keep_controls", False)
            match rule["rule"]:
                case "genes_by_cells":
                    self.genes[name] &= (counts[self.alive[name]] > 0).sum(axis=0) >= rule["min_cells"]
                    continue
                case "cells_by_genes":
                    passes = (counts[:, self.genes[name]] > 0).sum(axis=1) >= rule["min_genes"]
                case "keep":
                    passes = obs["cell_type"].isin(rule["values"]).to_numpy()
                case "drop":
                    passes = ~obs["cell_type"].isin(rule["values"]).to_numpy()
                case _:
                    passes = counts.sum(axis=1) >= rule["least"]
            self.alive[name] &= passes | control


@st.composite
def rule_lists(draw: st.DrawFn) -> list[dict[str, Any]]:
    rules = []
    for kind in draw(
        st.lists(
            st.sampled_from(["genes_by_cells", "cells_by_genes", "keep", "drop", "filter"]), min_size=1, max_size=4
        )
    ):
        rule: dict[str, Any] = {"rule": kind}
        if draw(st.booleans()):
            rule["datasets"] = draw(st.lists(st.sampled_from(["a", "b"]), min_size=1, unique=True))
        if kind == "genes_by_cells":
            rule["min_cells"] = draw(st.integers(0, 45))
        else:
            rule["keep_controls"] = draw(st.booleans())
        if kind == "cells_by_genes":
            rule["min_genes"] = draw(st.integers(0, 30))
        elif kind in ("keep", "drop"):
            rule |= {
                "column": "cell_type",
                "values": draw(st.lists(st.sampled_from(CELL_TYPES), min_size=1, unique=True)),
            }
        elif kind == "filter":
            rule["least"] = draw(st.integers(0, 60))
        rules.append(rule)
    return rules


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rules=rule_lists())
def test_random_recipes_equal_plain_numpy(
    store: Path, tmp_path_factory: pytest.TempPathFactory, rules: list[dict[str, Any]]
) -> None:
    plain = Plain()
    for rule in rules:
        plain.apply(rule)
    given_rules = [
        {k: v for k, v in rule.items() if k != "least"}
        | ({"where": f"raw_sum >= {rule['least']}"} if "least" in rule else {})
        for rule in rules
    ]
    out = tmp_path_factory.mktemp("c") / "s"
    expected = {name: (plain.alive[name], plain.genes[name]) for name in plain.data if plain.alive[name].any()}
    if not expected or not all(genes.any() for _, genes in expected.values()):
        with pytest.raises(
            ValueError, match=r"no sample is left|rule \d \(genes_by_cells\): leaves dataset .* no gene"
        ):
            curate(store, recipe_of(*given_rules), out)
        assert not out.exists()
        return
    try:
        curate(store, recipe_of(*given_rules), out)
    except ValueError as error:  # a dataset lost its genes before it lost its samples
        assert "leaves dataset" in str(error) and "no gene" in str(error)
        return
    found: Selection = read_selection(out, open_store(store))
    ids = open_store(store).vocabulary.gene_ids
    assert [record.name for record in found.records] == list(expected)
    for record, panel in zip(found.records, found.genes, strict=True):
        alive, genes = expected[record.name]
        inside = (found.sample_id >= record.obs_start) & (found.sample_id < record.obs_stop)
        assert (found.sample_id[inside] - record.obs_start).tolist() == np.flatnonzero(alive).tolist()
        first = GENES_B[0] if record.name == "b" else GENES_A[0]
        assert {ids[token] for token in panel} == {gene_id(first + g) for g in np.flatnonzero(genes)}


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([{"rule": "drop", "column": "cell_type", "values": ["T cell"], "datasets": ["b"]}] * 2, ["keeps everything"]),
        ([{"rule": "filter", "where": "raw_sum >= 0"}], ["keeps everything"]),
        ([{"rule": "genes_by_cells", "min_cells": 0}], ["keeps every gene"]),
        ([{"rule": "cells_by_genes", "min_genes": 61, "datasets": ["a"]}], ["keeps no sample of a"]),
        ([{"rule": "keep", "column": "cell_type", "values": ["T cell"]}, {"rule": "hold_out", "share": 0}], ["holds out nothing"]),
        (
            [{"rule": "hold_out", "batches": ["b1"]}, {"rule": "keep", "column": "batch", "values": ["b1"], "datasets": ["b"]}],
            ["leaves no sample of b to train on"],
        ),
        (
            [{"rule": "hold_out", "batches": ["b1"]}, {"rule": "drop", "column": "batch", "values": ["b1"]}],
            ["drops every sample that was held out"],
        ),
        (
            [{"rule": "filter", "where": "raw_sum < 0", "datasets": ["a"]}, {"rule": "cap", "max_samples": 9, "datasets": ["a"]}],
            ["keeps no sample of a", "applies to no dataset"],
        ),
    ],
)  # fmt: skip
def test_rules_that_keep_nothing_or_everything_warn(
    store: Path, tmp_path: Path, rules: list[dict], words: list[str]
) -> None:
    said: list[str] = []
    result = curate(store, recipe_of(*rules), tmp_path / "s", CurateOptions(say=said.append))
    for word in words:
        assert any(word in text for text in result["warnings"]), result["warnings"]
        assert any("WARNING" in text and word in text for text in said)
        assert word in (tmp_path / "s" / "audit.txt").read_text()


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"rules": [{"rule": "cap", "max_samples": 9, "datasets": ["c"]}]}, ["rule 1", "'c'", "'a'"]),
        ({"rules": [{"rule": "cap", "max_samples": 9}], "datasets": ["bulks"]}, ["'bulks'", "bulk"]),
        ({"rules": [CAP, {"rule": "keep", "column": "celltype", "values": ["x"]}]}, ["rule 2 (keep)", "cell_type"]),
        ({"rules": [{"rule": "drop", "column": "cell_type", "values": ["T cells"]}]}, ["rule 1 (drop)", "T cell"]),
        ({"rules": [{"rule": "filter", "where": "raw_sums > 3"}]}, ["rule 1 (filter)", "raw_sum"]),
        ({"rules": [{"rule": "filter", "where": "raw_sum < 0"}]}, ["no sample is left", "Rule 1 (filter)"]),
        ({"rules": [{"rule": "genes_by_cells", "min_cells": 65}]}, ["rule 1 (genes_by_cells)", "'a' no gene", "64 samples"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_store_is_refused_and_nothing_written(
    store: Path, tmp_path: Path, tree: dict, words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        curate(store, parse_recipe(tree, "r"), tmp_path / "s")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_taken_and_a_budget_that_is_too_small(store: Path, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine").touch()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        curate(store, recipe_of(*RULES), tmp_path / "s")
    with pytest.raises(ValueError, match="at least 1536MiB"):
        CurateOptions(workers=Workers(n=2, memory=1024**3))


def test_a_disease_is_found_where_cells_have_several(tmp_path: Path) -> None:
    adata = make_adata(1, GENES_A)
    adata.obs["disease"] = np.array(["normal", "flu", "flu || asthma", "asthma"])[np.arange(64) % 4]
    adata.write_h5ad(tmp_path / "a.h5ad")
    ingest.h5ad(tmp_path / "a.h5ad", tmp_path / "store", "a")
    for name, where, wanted in (
        ("one", "disease == 'flu'", {1, 2}),
        ("none", "disease not in ['flu']", {0, 3}),
        ("both", "disease == 'flu || asthma'", {2}),
    ):
        curate(tmp_path / "store", recipe_of({"rule": "filter", "where": where}), tmp_path / name)
        ids = read_selection(tmp_path / name, open_store(tmp_path / "store")).sample_id
        assert set((ids % 4).tolist()) == wanted and len(ids) == 16 * len(wanted)
    with pytest.raises(ValueError, match="asthma"):
        curate(tmp_path / "store", recipe_of({"rule": "filter", "where": "disease == 'astma'"}), tmp_path / "bad")


@pytest.mark.parametrize("inside", ["sel", "a/b", "."])
def test_nothing_is_written_into_the_store(tmp_path: Path, inside: str) -> None:
    make_adata(1, GENES_A).write_h5ad(tmp_path / "a.h5ad")
    ingest.h5ad(tmp_path / "a.h5ad", tmp_path / "store", "a")
    rules = recipe_of({"rule": "cap", "max_samples": 9})
    out = tmp_path / "store" / inside
    with pytest.raises((ValueError, FileExistsError), match=r"would lie in the store|not an empty folder"):
        curate(tmp_path / "store", rules, out)
    with pytest.raises(ValueError, match="--scratch would lie in the store"):
        curate(
            tmp_path / "store", rules, tmp_path / "s", CurateOptions(scratch=tmp_path / "store" / "deep"), dry_run=True
        )
    with pytest.raises(ValueError, match="--scratch would lie in the selection"):
        curate(tmp_path / "store", rules, tmp_path / "s", CurateOptions(scratch=tmp_path / "s" / "deep"))
    assert curate(tmp_path / "store", rules, tmp_path / "s")["n_samples"] == 9
    assert open_store(tmp_path / "store").n_obs == 64


def test_folders_that_cannot_be_written_are_refused_at_once(store: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "file").touch()
    for out, message in (
        ("s3://bucket/sel", "local folder"), (tmp_path / "link", "is a link"), (tmp_path / "file" / "s", "cannot be written"),
    ):  # fmt: skip
        with pytest.raises((ValueError, OSError), match=message):
            curate(store, recipe_of(*RULES), out, dry_run=True)
    with pytest.raises(ValueError, match="no sample is left"):
        curate(store, recipe_of({"rule": "filter", "where": "raw_sum < 0"}), tmp_path / "p" / "q" / "r")
    assert not (tmp_path / "p").exists()


def test_what_a_killed_run_left_is_removed_and_a_living_one_is_not_disturbed(store: Path, tmp_path: Path) -> None:
    left = tmp_path / ".s.curate" / "work"
    left.mkdir(parents=True)
    (left / "embedding.npy").write_bytes(b"x" * 100)
    with scratch_folder(tmp_path / "other", tmp_path) as held, pytest.raises(ValueError, match="another process"):
        assert held.is_dir()
        curate(store, recipe_of(*RULES), tmp_path / "other")
    curate(store, recipe_of(*RULES), tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_selection_that_does_not_say_what_it_holds_is_found(store: Path, tmp_path: Path) -> None:
    for name, change in (
        ("audit", lambda head, folder: (folder / "audit.json").write_text("{}")),
        ("count", lambda head, folder: head["datasets"][0].update(n_samples=5_000)),
    ):
        folder = tmp_path / name
        curate(store, recipe_of(*RULES), folder)
        inspect_selection(folder)
        head = json.loads((folder / "selection.json").read_text())
        change(head, folder)
        (folder / "selection.json").write_text(json.dumps(head))
        with pytest.raises(ValueError, match=r"damaged|make the selection again"):
            inspect_selection(folder)


def test_a_dry_run_checks_and_writes_nothing(store: Path, tmp_path: Path) -> None:
    plan = curate(store, recipe_of(*RULES), tmp_path / "s", dry_run=True)
    assert plan["dry_run"] and plan["n_samples"] == 3 * 64 and not list(tmp_path.iterdir())
    assert [step["datasets"] for step in plan["steps"]][:2] == [["a", "b", "bulk"], ["a", "b"]]
    with pytest.raises(ValueError, match=r"rule 1 \(keep\)"):
        curate(store, recipe_of({"rule": "keep", "column": "no", "values": [1]}), tmp_path / "s", dry_run=True)
