"""Corpus files: what they may say, variants of a base, and the files of this project."""

import re
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.txfm_data.corpora.corpus_files import NAMES, small_tree, write_corpus
from txfm_data.corpora.recipe import FOLDER, corpus_names, parse_corpus, read_corpus, restricted
from txfm_data.curate.recipe import parse_recipe

DIVERSE = "diverse_rna_1.4m"
SIZES = {
    "glioblastoma": (504_929, 21_310), "k562_gwps": (502_080, 8_248), "mix_seq": (102_205, 15_438), "sci_plex": (99_300, 18_486),
    "gastric_metaplasia": (88_399, 16_445), "tumour_microenvironment": (71_585, 17_619), "breast_cancer": (31_542, 24_712),
    "tcga": (23_733, 19_594), "gtex": (10_526, 36_695),
}  # fmt: skip
VARIANTS = {  # datasets, rules, epochs
    DIVERSE: (9, ["genes_by_cells", "cells_by_genes", "hold_out", "phenoprints"], 200),
    "diverse_rna_bulk_only": (2, ["hold_out"], 200),
    "diverse_rna_no_bulk": (7, ["genes_by_cells", "cells_by_genes", "hold_out", "phenoprints"], 200),
    "diverse_rna_no_k562": (8, ["genes_by_cells", "cells_by_genes", "hold_out"], 200),
    "diverse_rna_k562_controls": (9, ["genes_by_cells", "cells_by_genes", "hold_out", "filter"], 200),
    "diverse_rna_k562_full": (9, ["genes_by_cells", "cells_by_genes", "hold_out"], 101),
    "diverse_rna_k562_full_2x": (9, ["genes_by_cells", "cells_by_genes", "hold_out"], 200),
}


def test_the_paper_corpus_has_the_nine_datasets_of_table_1():
    corpus = read_corpus(DIVERSE)
    assert {d.name: (d.expected.samples, d.expected.genes) for d in corpus.datasets} == SIZES
    assert sum(samples for samples, _ in SIZES.values()) == corpus.expected.samples == 1_434_299
    assert corpus.expected.genes == 44_349
    thresholds = corpus.curation.rules[0].min_cells, corpus.curation.rules[1].min_genes
    assert thresholds == (1_000, 2_000) and corpus.curation.rules[3].calibrate_to == 502_080
    assert {d.modality for d in corpus.datasets if d.name in ("tcga", "gtex")} == {"bulk"}
    assert {d.modality for d in corpus.datasets if d.name not in ("tcga", "gtex")} == {"sc"}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_variants_of_table_5h(name):
    corpus, (n, rules, epochs) = read_corpus(name), VARIANTS[name]
    assert (corpus.name, len(corpus.datasets), [r.name for r in corpus.curation.rules], corpus.epochs) == (
        name,
        n,
        rules,
        epochs,
    )


def test_sizes_that_are_left_when_datasets_are_dropped():
    assert (
        read_corpus("diverse_rna_no_k562").expected.samples == sum(n for n, _ in SIZES.values()) - SIZES["k562_gwps"][0]
    )
    bulk = SIZES["tcga"][0] + SIZES["gtex"][0]
    assert read_corpus("diverse_rna_bulk_only").expected.samples == bulk
    assert read_corpus("diverse_rna_no_bulk").expected.samples == 1_434_299 - bulk


def test_the_only_corpora_are_those_and_the_census():
    assert set(corpus_names()) == VARIANTS.keys() | {"tf_sapiens"}
    assert [path.name for path in FOLDER.iterdir() if path.suffix != ".yaml"] == []


@pytest.mark.parametrize("name", [*VARIANTS, "tf_sapiens"])
def test_every_field_is_shown_to_be_right_or_said_not_to_be(name):
    for dataset in read_corpus(name).datasets:
        silent = [field for field, note in dataset.open_facts().items() if note == "no evidence given"]
        assert silent == [], dataset.name
        both = {f for e in dataset.evidence for f in e.fields} & {e.field for e in dataset.unverified}
        assert both == set(), dataset.name


def test_what_is_open_and_what_nobody_spoke_of():
    screen, cells, _ = parse_corpus(small_tree(), "small").datasets
    assert screen.open_facts()["ingest.control"] == "not looked at"
    assert screen.open_facts()["ingest.perturbation"] == "no evidence given"
    assert not {"identity", "ingest.batch", "ingest.cell_type"} & screen.open_facts().keys()
    assert {"identity", "gene_ids", "expected.samples"} <= cells.open_facts().keys()


def test_some_datasets_of_a_corpus_and_their_rules():
    corpus = parse_corpus(small_tree(), "small")
    assert [rule.name for rule in corpus.only(["tissues", "screen"]).curation.rules] == ["hold_out"]
    assert [d.name for d in corpus.only(["tissues", "screen"]).datasets] == ["screen", "tissues"]
    assert corpus.only(NAMES) == corpus and corpus.only(["cells"]).expected.samples is None
    with pytest.raises(ValueError, match="did you mean cells"):
        corpus.only(["cell"])
    with pytest.raises(ValueError, match="no dataset 'cels'; did you mean cells"):
        corpus.with_curation(parse_recipe({"rules": [{"rule": "hold_out", "share": 0.1, "datasets": ["cels"]}]}, "r"))


@given(st.sets(st.sampled_from(NAMES), min_size=1), st.sets(st.sampled_from(NAMES), min_size=1))
def test_a_part_of_a_part_is_the_part_of_both(first, second):
    corpus = parse_corpus(small_tree(), "small")
    part = corpus.only(sorted(first))
    assert {d.name for d in part.datasets} == first
    assert all(set(rule.datasets or ()) <= first for rule in part.curation.rules)
    if both := first & second:
        assert part.only(sorted(both)) == corpus.only(sorted(both))


def test_rules_keep_the_datasets_that_are_left():
    rules = parse_recipe({"rules": [{"rule": "hold_out", "share": 0.1, "datasets": ["a", "b"]}]}, "r")
    assert restricted(rules, ["a"]).rules[0].datasets == ("b",)
    assert restricted(rules, ["a", "b"]).rules == () and restricted(rules, ["c"]) == rules


def test_datasets_that_a_curation_takes_are_those_of_the_corpus():
    tree = {"datasets": ["cells", "tissues"], "rules": [{"rule": "hold_out", "share": 0.1}]}
    corpus = parse_corpus(small_tree(), "small").with_curation(parse_recipe(tree, "r"))
    assert [d.name for d in corpus.taken().datasets] == ["cells", "tissues"]
    assert [d.name for d in corpus.only(["cells", "screen"]).taken().datasets] == ["cells"]
    with pytest.raises(
        ValueError, match="takes the datasets cells, tissues alone, and none of them is among those asked for"
    ):
        corpus.only(["screen"])
    with pytest.raises(ValueError, match="no dataset 'cels'; did you mean cells"):
        corpus.with_curation(parse_recipe(tree | {"datasets": ["cels"]}, "r"))


CHANGES = {
    "unknown key.*did you mean curation": lambda t: t.update(curations=1),
    "title is missing": lambda t: t.pop("title"),
    "two datasets are named 'cells'": lambda t: t["datasets"][0].update(name="cells"),
    "there is no kind 'h5d'; did you mean h5ad": lambda t: t["datasets"][0]["ingest"].update(kind="h5d"),
    "ingest has no values": lambda t: t["datasets"][0]["ingest"].pop("values"),
    "must lie below the folder of sources": lambda t: t["datasets"][0]["ingest"].update(path="../x.h5ad"),
    "neither absolute": lambda t: t["datasets"][1]["ingest"].update(sample_table="/etc/passwd"),
    "rule cap names dataset 'cell'": lambda t: t["curation"]["rules"][1].update(datasets=["cell"]),
    "did you mean ingest.batch": lambda t: t["datasets"][0]["evidence"][0].update(fields=["ingest.bacth"]),
    "gene_ids: expected ensembl": lambda t: t["datasets"][0].update(gene_ids="entrez"),
    "ingest names the dataset": lambda t: t["datasets"][0]["ingest"].update(dataset="x"),
    "expected.samples: expected int": lambda t: t["expected"].update(samples="many"),
    "ingest.batch is the date 2025-01-30; put text in quotes": lambda t: t["datasets"][0]["ingest"].update(
        batch=date(2025, 1, 30)
    ),
    "datasets must be a list": lambda t: t.update(datasets=[]),
    "notes must be a list of texts.*got 'one'": lambda t: t.update(notes="one"),
    "notes must be a list of texts.*got None": lambda t: t.update(notes=None),
    "name must be text, got 5": lambda t: t.update(name=5),
    "title must be text, got None": lambda t: t.update(title=None),
    "epochs must be a whole number, got 'many'": lambda t: t.update(epochs="many"),
    "epochs must be at least 1, got 0": lambda t: t.update(epochs=0),
    "shard must hold keys and values, got None": lambda t: t.update(shard=None),
    "curation: expected a recipe with the key rules, got NoneType": lambda t: t.update(curation=None),
    "dataset 1: expected a mapping with name, title and ingest, got None": lambda t: t.update(datasets=[None]),
    "dataset 1: ingest must hold keys and values": lambda t: t["datasets"][0].update(ingest=["h5ad"]),
    "dataset 1.evidence: expected a list of .*got None": lambda t: t["datasets"][0].update(evidence=None),
    "dataset 1: path of a source file: '../x' must lie below": lambda t: t["datasets"][0]["source"]["files"][0].update(
        path="../x"
    ),
    "dataset 1: ingest: kind h5ad has no option 'bacth'; did you mean batch": lambda t: t["datasets"][0][
        "ingest"
    ].update(bacth="x"),
    "dataset 2: ingest.values: expected counts|normalized, got 'raw'": lambda t: t["datasets"][1]["ingest"].update(
        values="raw"
    ),
    "dataset 2: ingest: kind table needs orientation, genes-by-samples or": lambda t: t["datasets"][1]["ingest"].pop(
        "orientation"
    ),
    "dataset 2: ingest.orientation: expected genes-by-samples|samples-by-genes, got 'x'": lambda t: t["datasets"][1][
        "ingest"
    ].update(orientation="x"),
    "dataset 2: ingest: --min-matched is a fraction": lambda t: t["datasets"][1]["ingest"].update(min_matched=2.0),
    "dataset 3: ingest: --perturbation and --control go together": lambda t: t["datasets"][2]["ingest"].update(
        control="x"
    ),
    "dataset 3: ingest.batch: expected str | None, got 5": lambda t: t["datasets"][2]["ingest"].update(batch=5),
    "dataset 3: ingest: kind gct has no option 'workers'": lambda t: t["datasets"][2]["ingest"].update(workers=4),
    "two datasets are of kind census": lambda t: [t["datasets"][at].update(ingest={"kind": "census"}) for at in (0, 1)],
    "dataset 2: unknown key 'ingests'; did you mean ingest": lambda t: t["datasets"][1].update(ingests={}),
}


@pytest.mark.parametrize("problem", CHANGES)
def test_a_corpus_that_is_wrong_is_refused(problem, tmp_path):
    path = write_corpus(tmp_path, CHANGES[problem])
    # alternatives and options of a type are text, not patterns; .* alone stands for something
    pattern = ".*".join(re.escape(part) for part in problem.split(".*"))
    with pytest.raises((ValueError, TypeError), match=pattern) as error:
        read_corpus(path)
    assert str(error.value).startswith(str(path)), "which file it is"


def test_keys_that_stand_twice_are_refused_and_small_numbers_are_numbers(tmp_path):
    path = write_corpus(tmp_path)
    text = path.read_text()
    path.write_text(text + "epochs: 4\n")
    with pytest.raises(ValueError, match="small.yaml: not YAML .*the key 'epochs' stands twice"):
        read_corpus(path)
    path.write_text(text.replace("share: 0.2", "share: 2e-1"))
    assert read_corpus(path).curation.rules[0].share == 0.2


def test_unknown_names_and_files_that_are_no_corpus(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("did you mean diverse_rna_no_bulk")):
        read_corpus("diverse_rna_no_bluk")
    (tmp_path / "x.yaml").write_text("- 1\n")
    with pytest.raises(TypeError, match="expected a corpus"):
        read_corpus(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("a: [\n")
    with pytest.raises(ValueError, match="not YAML"):
        read_corpus(tmp_path / "x.yaml")


BASE_CHANGES = {
    "its base has no dataset 'cell'; did you mean cells": {"drop_datasets": ["cell"]},
    "replace_rules names 'caps', which occurs 0 times": {"replace_rules": {"caps": []}},
    "expected_datasets names 'cells'": {"drop_datasets": ["cells"], "expected_datasets": {"cells": {"samples": 3}}},
    "unknown key 'datasets'": {"datasets": []},
    "keep_datasets must be a list of texts, such as [first, second]; got 'cells'": {"keep_datasets": "cells"},
    "drop_datasets must be a list of texts, such as [first, second]; got None": {"drop_datasets": None},
    "replace_rules.cap must be a list of rules, such as [] to remove it, got None": {"replace_rules": {"cap": None}},
    "replace_rules.cap must be a list of rules, such as [] to remove it, got {'rule'": {
        "replace_rules": {"cap": {"rule": "cap"}}
    },
    "replace_rules must hold keys and values, got ['cap']": {"replace_rules": ["cap"]},
    "expected_datasets must hold keys and values, got [{'cells'": {"expected_datasets": [{"cells": {"samples": 3}}]},
    "expected_datasets: cells must hold keys and values, got None": {"expected_datasets": {"cells": None}},
    "shard must hold keys and values, got None": {"shard": None},
    "expected must hold keys and values, got None": {"expected": None},
    "name must be text, got 3": {"name": 3},
    "base must be text, got 3": {"base": 3},
    "leaves no dataset of its base": {"keep_datasets": []},
}


@pytest.mark.parametrize("problem", BASE_CHANGES)
def test_a_variant_that_does_not_fit_its_base_is_refused(problem, tmp_path):
    import yaml

    write_corpus(tmp_path)
    path = tmp_path / "variant.yaml"
    path.write_text(yaml.safe_dump({"name": "variant", "title": "t", "base": "small"} | BASE_CHANGES[problem]))
    with pytest.raises((ValueError, TypeError), match=re.escape(problem)) as error:
        read_corpus(path)
    assert str(error.value).startswith(str(path)), "which file it is"


def test_without_a_checkout_it_is_said_where_corpora_were_looked_for(tmp_path, monkeypatch):
    from txfm_data.corpora import recipe

    monkeypatch.setattr(recipe, "FOLDER", tmp_path / "configs")
    assert corpus_names() == []
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'configs'}, which holds none")) as error:
        read_corpus(DIVERSE)
    assert "give the path of a YAML file" in str(error.value)
    assert read_corpus(write_corpus(tmp_path)).name == "small"


def test_a_variant_of_a_file_beside_it(tmp_path):
    write_corpus(tmp_path)
    path = tmp_path / "variant.yaml"
    path.write_text(
        "{name: variant, title: Fewer, base: small, keep_datasets: [screen, tissues], epochs: 9,\n"
        " replace_rules: {hold_out: [{rule: drop, column: lane, values: [batch1], datasets: [screen, cells]}]},\n"
        " expected_datasets: {screen: {samples: null}}}\n"
    )
    corpus = read_corpus(path)
    assert [d.name for d in corpus.datasets] == ["screen", "tissues"] and corpus.epochs == 9
    assert [(rule.name, rule.datasets) for rule in corpus.curation.rules] == [("drop", ("screen",))]
    assert corpus.expected.samples is None and corpus.datasets[0].expected.samples is None
    assert corpus.datasets[0].expected.genes == 42, "what the variant does not state stays"
    path.write_text("{name: other, title: t, base: variant2}\n")
    (tmp_path / "variant2.yaml").write_text("{name: variant2, title: t, base: small}\n")
    with pytest.raises(ValueError, match="is a variant itself"):
        read_corpus(path)
