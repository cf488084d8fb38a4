"""Builds: what is done is kept, what was asked for otherwise is refused, what is missing is told."""

import json
import os
import re
import shutil

import pytest

from tests.txfm_data.corpora.corpus_files import NAMES, build, write_corpus, write_sources
from txfm_data.corpora.build import BuildOptions, check_build
from txfm_data.corpora.recipe import read_corpus
from txfm_data.corpora.report import compare, report_text
from txfm_data.corpora.steps import Steps
from txfm_data.curate.recipe import parse_recipe
from txfm_data.parallel import Workers
from txfm_data.selection import read_selection
from txfm_data.store.opening import open_store


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Corpus file, sources, and a build of them. Copy before you change it."""
    folder = tmp_path_factory.mktemp("corpus")
    path = write_corpus(folder)
    sources = write_sources(folder, read_corpus(path))
    build(path, sources, folder / "out")
    return folder


@pytest.fixture
def again(made, tmp_path):
    """A copy of all that."""
    shutil.copytree(made, tmp_path / "c")
    return tmp_path / "c"


def stamp(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_build_holds_every_dataset_curated(made):
    store = open_store(made / "out" / "store.soma")
    assert [r.name for r in store.datasets] == ["screen", "tissues", "cells"], (
        "symbols come after the ids that explain them"
    )
    chosen = read_selection(made / "out" / "selection", store)
    assert [r.name for r in chosen.records] == ["screen", "tissues", "cells"]
    sizes = {
        r.name: int(((chosen.sample_id >= r.obs_start) & (chosen.sample_id < r.obs_stop)).sum()) for r in chosen.records
    }
    assert sizes == {"screen": 80, "tissues": 24, "cells": 60} and chosen.is_val.any()
    screen = store.obs(["perturbation", "is_control", "batch"], "dataset_id == 'screen'").to_pandas()
    assert set(screen.loc[screen.is_control, "perturbation"]) == {"none"} and screen.batch.nunique() == 6


def test_the_same_build_again_does_nothing(again):
    before, said = stamp(again / "out"), []
    _, _, is_new = build(again / "small.yaml", again / "sources", again / "out", said)
    assert not is_new and stamp(again / "out") == before
    assert [f"{name}: in the store already" for name in ("screen", "tissues", "cells")] == said[:3]


def test_sources_may_go_once_they_are_in_the_store(again):
    shutil.rmtree(again / "sources")
    _, without, is_new = build(again / "small.yaml", again / "sources", again / "out")
    assert not is_new and without == []


def test_other_rules_are_refused_until_a_rebuild_is_asked_for(again):
    write_corpus(again, lambda tree: tree["curation"]["rules"][1].update(max_samples=50))
    before = stamp(again / "out")
    with pytest.raises(FileExistsError, match=r"made from something else \(other rules\); pass --rebuild"):
        build(again / "small.yaml", again / "sources", again / "out")
    assert stamp(again / "out") == before
    assert build(again / "small.yaml", again / "sources", again / "out", rebuild=True)[2]
    chosen = read_selection(again / "out" / "selection", open_store(again / "out" / "store.soma"))
    assert len(chosen.sample_id) == 80 + 24 + 50
    assert not build(again / "small.yaml", again / "sources", again / "out")[2], "what is there is of these rules now"


def test_a_selection_of_which_nothing_is_known_is_not_taken(again):
    steps = json.loads((again / "out" / "steps.json").read_text())
    del steps["steps"]["selection"]
    (again / "out" / "steps.json").write_text(json.dumps(steps))
    with pytest.raises(FileExistsError, match="nothing was written down"):
        build(again / "small.yaml", again / "sources", again / "out")


def test_a_dataset_cannot_be_ingested_otherwise_into_the_same_store(again):
    write_corpus(again, lambda tree: tree["datasets"][0]["ingest"].update(batch="guide"))
    with pytest.raises(ValueError, match=r"'screen' was ingested otherwise \(other batch\)"):
        build(again / "small.yaml", again / "sources", again / "out")


def test_missing_sources_stop_a_build_unless_that_is_allowed(made, tmp_path):
    sources = tmp_path / "sources"
    shutil.copytree(made / "sources", sources)
    (sources / "cells.csv").unlink()
    (sources / "a" / "screen.h5ad").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"screen: a/screen.h5ad \(from X1\); cells: cells.csv.*--allow-missing"
    ):
        build(made / "small.yaml", sources, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing was begun"
    corpus, without, _ = build(made / "small.yaml", sources, tmp_path / "out", allow_missing=True)
    assert [d.name for d in corpus.datasets] == ["tissues"] and without == ["cells", "screen"]
    report = compare(
        read_corpus(made / "small.yaml"),
        tmp_path / "out" / "store.soma",
        tmp_path / "out" / "selection",
        built=["tissues"],
    )
    verdicts = {row["name"]: row["verdict"] for row in report["datasets"]}
    assert verdicts == {"screen": "not built", "cells": "not built", "tissues": "nothing stated"}
    assert report["whole"]["verdict"] == "differs" and report["n_not_built"] == 2
    assert "left out, no source files: cells" in report_text(report | {"missing": without})
    shutil.copyfile(made / "sources" / "cells.csv", sources / "cells.csv")
    with pytest.raises(FileExistsError, match="--rebuild"):  # the selection was made without the cells
        build(made / "small.yaml", sources, tmp_path / "out", allow_missing=True)
    assert build(made / "small.yaml", sources, tmp_path / "out", allow_missing=True, rebuild=True)[2]


def test_no_source_at_all_is_an_error_even_if_some_may_be_missing(made, tmp_path):
    with pytest.raises(FileNotFoundError, match="no dataset of small is there"):
        build(made / "small.yaml", tmp_path / "none", tmp_path / "out", allow_missing=True)


def test_another_file_than_stated_is_refused_or_told_of(made, tmp_path):
    path = write_corpus(tmp_path, lambda tree: tree["datasets"][0]["source"]["files"][0].update(bytes=5))
    with pytest.raises(
        ValueError, match="screen.h5ad: has .* bytes, expected 5; get the file again, or pass --accept-other"
    ):
        build(path, made / "sources", tmp_path / "out")
    assert build(path, made / "sources", tmp_path / "out", accept_other_files=True)[2]


def test_a_folder_that_is_something_else_is_left_alone(made, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is no build of a corpus"):
        Steps(tmp_path, "small")
    with pytest.raises(ValueError, match="holds the build of corpus 'small', not of 'other'"):
        Steps(made / "out", "other")
    for text in (
        "{",
        "[]",
        '{"format": "x"}',
        '{"format": "txfm-corpus-build", "version": 2, "corpus": "a", "steps": {}}',
    ):
        (tmp_path / "steps.json").write_text(text)
        with pytest.raises(ValueError, match="not the steps of a build"):
            Steps(tmp_path, "small")


def test_the_report_tells_every_difference(made):
    corpus = read_corpus(made / "small.yaml")
    report = compare(corpus, made / "out" / "store.soma", made / "out" / "selection", built=list(NAMES))
    rows = {row["name"]: row for row in report["datasets"]}
    assert rows["screen"]["verdict"] == "as expected" and rows["screen"]["genes"] == {
        "expected": 42,
        "found": 42,
        "difference": 0,
    }
    assert (
        rows["cells"]["samples"] == {"expected": 90, "found": 60, "difference": -30}
        and rows["cells"]["verdict"] == "differs"
    )
    assert rows["tissues"]["verdict"] == "nothing stated" and rows["tissues"]["samples"]["found"] == 24
    assert report["whole"]["samples"] == {"expected": 1000, "found": 164, "difference": -836}
    assert (report["n_as_expected"], report["n_differ"], report["n_not_built"], report["n_unstated"]) == (1, 1, 0, 1)
    text = report_text(report)
    assert "-30" in text and "-836" in text and "80 x 42 in the store, 80 x - stated of the source" in text
    assert "not shown of cells: expected.samples" in text


@pytest.mark.parametrize(
    ("stated", "within", "verdict"), [(82, 2, "as expected"), (83, 2, "differs"), (78, 2, "as expected")]
)
def test_a_rounded_number_is_met_within_its_rounding(stated, within, verdict, made, tmp_path):
    sizes = {"samples": stated, "within": within}
    path = write_corpus(tmp_path, lambda tree: tree["datasets"][0].update(expected=sizes))
    report = compare(read_corpus(path), made / "out" / "store.soma", made / "out" / "selection", built=list(NAMES))
    assert report["datasets"][0]["verdict"] == verdict


def built(folder):
    """Datasets and samples of the selection of a build."""
    chosen = read_selection(folder / "out" / "selection", open_store(folder / "out" / "store.soma"))
    return [r.name for r in chosen.records], len(chosen.sample_id)


def with_rules(*rules, **more):
    """Changes the curation of a corpus."""
    return lambda corpus: corpus.with_curation(parse_recipe({"rules": list(rules), **more}, "r"))


def call(folder, change, **options):
    """Build the small corpus, changed."""
    return build(folder / "small.yaml", folder / "sources", folder / "out", change=change, **options)


def test_the_datasets_asked_for_belong_to_what_a_selection_was_made_from(again):
    part = lambda corpus: corpus.only(["cells", "tissues"])  # noqa: E731
    with pytest.raises(FileExistsError, match=r"made from something else \(other datasets\); pass --rebuild"):
        call(again, part)
    assert built(again) == (["screen", "tissues", "cells"], 164)
    assert call(again, part, rebuild=True)[2] and built(again) == (["tissues", "cells"], 84)
    with pytest.raises(FileExistsError, match=r"made from something else \(other datasets\); pass --rebuild"):
        call(again, lambda corpus: corpus)
    assert call(again, lambda corpus: corpus, rebuild=True)[2] and built(again)[1] == 164


def test_files_of_genes_are_compared_by_what_they_hold(again):
    store, genes = open_store(again / "out" / "store.soma"), again / "genes.txt"
    genes.write_text("\n".join(store.vocabulary.gene_ids[:50]))
    change = with_rules({"rule": "genes", "keep": str(genes)})
    assert call(again, change, rebuild=True)[2] and not call(again, change)[2]
    genes.write_text("\n".join(store.vocabulary.gene_ids[:30]))
    with pytest.raises(FileExistsError, match=r"made from something else \(other rules\)"):
        call(again, change)
    assert call(again, change, rebuild=True)[2]
    os.rename(genes, again / "moved.txt")
    moved = with_rules({"rule": "genes", "keep": str(again / "moved.txt")})
    assert not call(again, moved)[2], "the same genes at another place"
    with pytest.raises(FileNotFoundError, match=r"rule 1 \(genes\): .*genes.txt: no such file"):
        call(again, change)


def test_datasets_of_a_curation_are_taken_and_no_others(again):
    rule = {"rule": "hold_out", "share": 0.2}
    corpus, _, is_new = call(again, with_rules(rule, datasets=["tissues"]), rebuild=True)
    assert is_new and [d.name for d in corpus.datasets] == ["tissues"] and built(again) == (["tissues"], 24)
    with pytest.raises(ValueError, match="takes the datasets tissues alone, and none of them"):
        call(again, lambda corpus: with_rules(rule, datasets=["tissues"])(corpus).only(["cells"]))


FAILS = {
    "near it": {"rule": "keep", "column": "batch", "values": ["nowhere"]},  # found before anything is put aside
    "no sample is left": {"rule": "filter", "where": "nnz < 0"},  # found on the way
}


@pytest.mark.parametrize("problem", FAILS)
def test_a_rebuild_that_fails_leaves_the_old_selection(problem, again):
    before = {k: v for k, v in stamp(again / "out").items() if k.startswith("selection/")}
    with pytest.raises(ValueError, match=problem):
        call(again, with_rules(FAILS[problem]), rebuild=True)
    after = {k: v for k, v in stamp(again / "out").items() if k.startswith("selection/")}
    assert after == before and not (again / "out" / ".selection.old").exists()
    assert not call(again, lambda corpus: corpus)[2], "and it is known what it was made from"


def test_the_old_selection_of_a_killed_rebuild_comes_back_when_it_is_asked_for(again):
    steps = Steps(again / "out", "small")
    with steps.making("selection", {"rules": []}, again / "out" / "selection", "selection.json"):
        assert (again / "out" / ".selection.old" / "selection.json").is_file()
        shutil.copytree(again / "out", again / "killed")
        os.rename(again / "out" / ".selection.old", again / "out" / "selection")
    shutil.rmtree(again / "out")
    shutil.copytree(again / "killed", again / "out")
    assert not call(again, lambda corpus: corpus)[2] and built(again)[1] == 164
    assert not (again / "out" / ".selection.old").exists()
    shutil.rmtree(again / "out")
    shutil.copytree(again / "killed", again / "out")
    assert call(again, with_rules({"rule": "cap", "max_samples": 20}))[2] and built(again)[1] == 60
    assert not (again / "out" / ".selection.old").exists(), "the new one is there"


def test_what_needs_no_data_is_checked_before_any_is_read(made, tmp_path):
    corpus = read_corpus(made / "small.yaml")
    options = BuildOptions(sources=made / "sources", out=tmp_path / "out")
    check_build(corpus, options)
    with pytest.raises(ValueError, match=r"--memory-budget 64MiB is too small"):
        check_build(corpus, BuildOptions(sources=made, out=tmp_path / "out", workers=Workers(memory=2**26)))
    with pytest.raises(
        ValueError, match=re.escape("read from files (a/screen.h5ad, cells.csv, cells_labels.tsv, …); name")
    ):
        check_build(corpus, BuildOptions(sources=None, out=tmp_path / "out"))
    (tmp_path / "model").mkdir()
    for path, problem in (("model", "is no checkpoint, it lacks config.json"), ("none", "no checkpoint at")):
        embedding = {"kind": "checkpoint", "path": str(tmp_path / path)}
        rules = with_rules({"rule": "cap", "max_samples": 9}, {"rule": "phenoprints", "embedding": embedding})
        with pytest.raises((ValueError, FileNotFoundError), match=rf"rule 2 \(phenoprints\): embedding: .*{problem}"):
            check_build(rules(corpus), options)
    assert not (tmp_path / "out").exists()


def test_another_file_is_told_of_as_long_as_the_dataset_was_ingested_from_it(made, tmp_path):
    stated = lambda tree: tree["datasets"][0]["source"]["files"][0].update(bytes=5)  # noqa: E731
    path, out = write_corpus(tmp_path, stated), tmp_path / "out"
    shutil.copytree(made / "sources", tmp_path / "sources")
    file = tmp_path / "sources" / "a" / "screen.h5ad"
    right = file.read_bytes()
    file.write_bytes(right[:1000])
    with pytest.raises((ValueError, OSError)):  # no h5ad, so nothing is ingested from it
        build(path, tmp_path / "sources", out, accept_other_files=True)
    assert Steps(out, "small").other_files(["screen"]) == [f"{file} has 1,000 bytes, expected 5"]
    file.write_bytes(right)
    write_corpus(tmp_path, lambda tree: tree["datasets"][0]["source"]["files"][0].update(bytes=len(right)))
    build(path, tmp_path / "sources", out)
    assert Steps(out, "small").other_files(["screen", "cells"]) == []
    write_corpus(tmp_path, stated)
    shutil.copytree(made / "sources", tmp_path / "more")
    build(path, tmp_path / "more", tmp_path / "second", accept_other_files=True)
    shutil.rmtree(tmp_path / "more")
    build(path, tmp_path / "more", tmp_path / "second")
    (told,) = Steps(tmp_path / "second", "small").other_files(["screen"])
    assert told.endswith("expected 5") and Steps(tmp_path / "second", "small").other_files(["cells"]) == []


def test_train_and_held_out_samples_are_told_and_much_is_warned_of(made):
    corpus = read_corpus(made / "small.yaml")
    places = (made / "out" / "store.soma", made / "out" / "selection")
    report = compare(corpus, *places, built=list(NAMES))
    chosen = read_selection(places[1], open_store(places[0]))
    for row in report["datasets"]:
        (record,) = (r for r in chosen.records if r.name == row["name"])
        held = chosen.is_val[(chosen.sample_id >= record.obs_start) & (chosen.sample_id < record.obs_stop)]
        assert (row["train"], row["val"]) == (int((~held).sum()), int(held.sum()))
    assert report["whole"]["val"] == int(chosen.is_val.sum()) > 0
    report = compare(corpus, *places, built=list(NAMES), n_val={"screen": 40, "cells": 18, "tissues": 0})
    assert report["warnings"] == ["screen: 50% of its samples are held out: it has few experimental batches"]
    assert "WARNING: screen: 50%" in report_text(report)


def test_a_number_of_train_samples_is_compared_with_those(made, tmp_path):
    path = write_corpus(tmp_path, lambda tree: tree["datasets"][0].update(expected={"samples": 72, "of": "train"}))
    places = (made / "out" / "store.soma", made / "out" / "selection")
    report = compare(read_corpus(path), *places, built=list(NAMES), n_val={"screen": 8})
    assert report["datasets"][0]["samples"] == {"expected": 72, "found": 72, "difference": 0}
    assert report["datasets"][0]["verdict"] == "as expected" and "are those to train on alone" in report_text(report)
