"""Recipes: what is read, what is refused and how."""

import dataclasses

import pytest
import yaml

from txfm_data.curate import recipe
from txfm_data.curate.recipe import EmbeddingSpec, Phenoprints, Recipe, parse_recipe, read_recipe, with_model

PCA = EmbeddingSpec(kind="pca")
CAP = {"rule": "cap", "max_samples": 1}


def of(*rules: dict, **more: object) -> Recipe:
    return parse_recipe({"rules": list(rules), **more}, "r.yaml")


def test_the_defaults_of_quality_control_are_those_of_the_paper() -> None:
    found = of({"rule": "genes_by_cells"}, {"rule": "cells_by_genes", "datasets": ["a"], "note": "why"})
    assert found.rules == (
        recipe.GenesByCells(min_cells=1_000),
        recipe.CellsByGenes(min_genes=2_000, datasets=("a",), note="why"),
    )
    assert (found.seed, found.datasets) == (0, None)


def test_a_recipe_is_read_back_from_its_own_tree() -> None:
    found = of(
        {"rule": "filter", "where": "raw_sum >= 500", "keep_controls": True},
        {"rule": "keep", "column": "is_control", "values": [True]},
        {"rule": "drop", "column": "donor", "values": ["a", 3]},
        {"rule": "subsample", "column": "cell_type", "max_samples": 10},
        {"rule": "cap", "max_samples": 100, "seed": 3},
        {"rule": "hold_out", "share": 0.1},
        {"rule": "genes", "min_datasets": 2},
        {"rule": "phenoprints", "embedding": {"kind": "pca", "n_components": 9}, "calibrate_to": 5},
        seed=7, datasets=["a", "b"],
    )  # fmt: skip
    again = parse_recipe(yaml.safe_load(yaml.safe_dump(found.tree())), "again")
    assert again == found
    assert {type(rule) for rule in found.rules} | {recipe.GenesByCells, recipe.CellsByGenes} == set(
        recipe.RULES.values()
    )


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, ["r.yaml", "list of at least one rule"]),
        ({"rules": []}, ["at least one rule"]),
        ({"rules": "cap"}, ["at least one rule"]),
        ({"rules": [{"rule": "cap", "max_samples": 1}], "sed": 1}, ["'sed'", "seed"]),
        ({"rules": [{"rule": "cap", "max_samples": 1}], "seed": -1}, ["seed", "-1"]),
        ({"rules": [{"rule": "cap", "max_samples": 1}], "seed": True}, ["seed", "True"]),
        ({"rules": [{"rule": "cap", "max_samples": 1}], "datasets": "a"}, ["list of at least one name"]),
        ({"rules": [{"rule": "cap", "max_samples": 1}], "seed": 2**63}, ["seed", "2^63"]),
        ({"rules": [{"rule": "cap", "max_samples": 1, "seed": -1}]}, ["rule 1", "seed", "-1"]),
        ({"rules": [CAP], "datasets": []}, ["at least one name"]),
        ({"rules": [CAP | {"datasets": []}]}, ["rule 1", "datasets are empty"]),
        ({"rules": [{"rule": ["cap"]}]}, ["rule 1", "there is no rule ['cap']"]),
        ({"rules": [{"rule": "drop", "column": "a", "values": [float("nan")]}]}, ["rule 1", "'a'", "NaN"]),
        ({"rules": [{"max_samples": 1}]}, ["rule 1", "key rule"]),
        ({"rules": [{"rule": "gene_by_cells"}]}, ["rule 1", "genes_by_cells"]),
        ({"rules": [{"rule": "cap", "max_samples": 0}]}, ["rule 1", "max_samples", "at least 1"]),
        ({"rules": [{"rule": "cap", "max_samples": "ten"}]}, ["rule 1 (cap)", "max_samples", "'ten'"]),
        ({"rules": [{"rule": "cap", "max_sample": 1}]}, ["rule 1 (cap)", "did you mean max_samples"]),
        ({"rules": [{"rule": "cap"}]}, ["max_samples", "required"]),
        ({"rules": [{"rule": "keep", "column": "a", "values": []}]}, ["'a'", "at least one"]),
        ({"rules": [{"rule": "subsample", "column": "a"}]}, ["fraction or max_samples"]),
        ({"rules": [{"rule": "subsample", "column": "a", "fraction": 2}]}, ["(0, 1]", "2"]),
        ({"rules": [{"rule": "hold_out"}]}, ["share or batches"]),
        ({"rules": [{"rule": "hold_out", "share": 1.0}]}, ["[0, 1)", "1.0"]),
        ({"rules": [{"rule": "genes_by_cells", "min_fraction": 5}]}, ["min_fraction", "5"]),
        ({"rules": [{"rule": "cells_by_genes", "min_genes": 9, "max_genes": 8}]}, ["max_genes 8"]),
        ({"rules": [{"rule": "phenoprints"}]}, ["embedding", "required"]),
        ({"rules": [{"rule": "phenoprints", "embedding": {"kind": "umap"}}]}, ["embedding.kind", "'umap'"]),
        ({"rules": [{"rule": "phenoprints", "embedding": {"kind": "columns"}}]}, ["prefix"]),
        ({"rules": [{"rule": "phenoprints", "embedding": {"kind": "file"}}]}, ["path"]),
        ({"rules": [{"rule": "phenoprints", "embedding": {"kind": "pca", "layer": "2"}}]}, ["layer", "n_components"]),
        ({"rules": [{"rule": "phenoprints", "embedding": {"kind": "pca"}, "tau": 0}]}, ["tau", "(0, 1]"]),
        (
            {"rules": [{"rule": "phenoprints", "embedding": {"kind": "pca"}, "tau": 0.1, "calibrate_to": 5}]},
            ["one of the two"],
        ),
    ],
)
def test_what_is_no_recipe_is_refused(tree: dict, words: list[str]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        parse_recipe(tree, "r.yaml")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_files_that_are_no_yaml_or_not_there(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("rules: [")
    with pytest.raises(ValueError, match=r"bad\.yaml: not YAML"):
        read_recipe(tmp_path / "bad.yaml")
    (tmp_path / "twice.yaml").write_text(
        "rules: [{rule: cap, max_samples: 9}]\nseed: 1\nrules: [{rule: cap, max_samples: 1e1}]"
    )
    with pytest.raises(ValueError, match="the key 'rules' stands twice"):
        read_recipe(tmp_path / "twice.yaml")
    (tmp_path / "deep.yaml").write_text("rules: " + "[" * 5_000)
    with pytest.raises(ValueError, match="nested too deep"):
        read_recipe(tmp_path / "deep.yaml")
    (tmp_path / "code.yaml").write_text("rules: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="not YAML"):
        read_recipe(tmp_path / "code.yaml")


def test_a_model_goes_where_a_checkpoint_is_left_open() -> None:
    open_, named = EmbeddingSpec(kind="checkpoint"), EmbeddingSpec(kind="checkpoint", path="mine")
    rules = tuple(Phenoprints(embedding=spec) for spec in (PCA, open_, named))
    filled = with_model(Recipe(rules=rules), "given")
    assert [rule.embedding.path for rule in filled.rules if isinstance(rule, Phenoprints)] == [None, "given", "mine"]
    with pytest.raises(ValueError, match=r"rule 2 .* give --model"):
        with_model(Recipe(rules=rules), None)
    with pytest.raises(ValueError, match="no rule of the recipe"):
        with_model(Recipe(rules=rules[:1]), "given")
    assert with_model(Recipe(rules=rules[:1]), None) == Recipe(rules=rules[:1])


def test_every_rule_says_what_it_does() -> None:
    for rule in recipe.RULES.values():
        assert rule.__doc__ and all(f.name in f"{rule.__doc__}{recipe.Rule.__doc__}keep_controls column values where" for f in
                                    dataclasses.fields(rule)), rule  # fmt: skip
