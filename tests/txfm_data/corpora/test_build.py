"""Builds: what is done is kept, what was asked for otherwise is refused, what is missing is told."""

import json
import os
import shutil

import pytest

from tests.txfm_data.corpora.corpus_files import NAMES, build, write_corpus, write_sources
from txfm_data.corpora.build import Steps, contents
from txfm_data.corpora.recipe import read_corpus
from txfm_data.corpora.report import compare, report_text
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
    assert "not verified of cells: expected.samples" in text


@pytest.mark.parametrize(
    ("stated", "within", "verdict"), [(82, 2, "as expected"), (83, 2, "differs"), (78, 2, "as expected")]
)
def test_a_rounded_number_is_met_within_its_rounding(stated, within, verdict, made, tmp_path):
    sizes = {"samples": stated, "within": within}
    path = write_corpus(tmp_path, lambda tree: tree["datasets"][0].update(expected=sizes))
    report = compare(read_corpus(path), made / "out" / "store.soma", made / "out" / "selection", built=list(NAMES))
    assert report["datasets"][0]["verdict"] == verdict


def test_a_checkpoint_is_known_by_its_weights(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    assert contents(str(tmp_path / "a")) == contents(str(tmp_path / "b")) != contents("hub/name") == "hub/name"
    (tmp_path / "b" / "model.safetensors").write_bytes(b"others")
    assert contents(str(tmp_path / "a")) != contents(str(tmp_path / "b"))


def test_what_a_killed_rebuild_left_is_removed(again):
    os.rename(again / "out" / "selection", again / "out" / ".selection.old")
    assert build(again / "small.yaml", again / "sources", again / "out")[2]
    assert (
        not (again / "out" / ".selection.old").exists() and (again / "out" / "selection" / "selection.json").is_file()
    )
