"""The verb corpus: list, plan, and builds from sources to shards, killed on the way and finished."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from shards.manifest import Corpus
from tests.txfm_data.census_fixture import DATASETS, build_census
from tests.txfm_data.corpora.corpus_files import write_corpus, write_sources
from tools import corpus
from txfm_data.corpora.recipe import corpus_names, read_corpus
from txfm_data.simulate.formats import write_small_sources
from txfm_data.store.opening import open_store

ROOT = Path(__file__).resolve().parents[2]
DIVERSE = "diverse_rna_1.4m"
SMALL_RULES = {
    "seed": 0,
    "rules": [
        {"rule": "genes_by_cells", "min_cells": 20},
        {"rule": "cells_by_genes", "min_genes": 60},
        {"rule": "hold_out", "share": 0.1},
        {
            "rule": "phenoprints", "datasets": ["k562_gwps"], "embedding": {"kind": "pca", "n_components": 10}, "tau": 0.1,
            "n_null": 100,
        },
    ],
}  # fmt: skip
"""The rules of the paper's corpus with thresholds for small files."""


@pytest.fixture(scope="module")
def diverse(tmp_path_factory) -> Path:
    """Sources of the nine datasets in their true formats, and rules that fit their size."""
    folder = tmp_path_factory.mktemp("diverse")
    write_small_sources(read_corpus(DIVERSE), folder / "sources", samples=240, genes=200)
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL_RULES))
    return folder


def arguments(diverse: Path, out: Path) -> list[str]:
    """The command that builds them."""
    words = ["build", DIVERSE, "--sources", diverse / "sources", "--out", out, "--curation", diverse / "small.yaml"]
    return [*map(str, words), "--accept-other-files", "--json"]


def killed(words: list[str], is_due: Callable[[], bool]) -> None:
    """Run the verb in a process of its own and kill it at a moment."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "corpus.py"), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not is_due():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def has_begun(out: Path, step: str) -> Callable[[], bool]:
    """Whether a step was written down."""
    steps = out / "steps.json"
    return lambda: steps.is_file() and step in json.loads(steps.read_text())["steps"]


def has_file(out: Path, pattern: str) -> Callable[[], bool]:
    """Whether there is a file of some name below the folder of a build, beside or in its results."""

    def is_there() -> bool:
        try:
            return any(out.glob(pattern))
        except FileNotFoundError:  # a folder went away while it was listed
            return False

    return is_there


def test_the_nine_datasets_are_built_though_killed_in_every_step(diverse, tmp_path, capsys):
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = arguments(diverse, out)
    killed(words, has_begun(out, "ingest sci_plex"))
    assert [r.name for r in open_store(out / "store.soma").datasets][:2] == ["k562_gwps", "glioblastoma"]
    assert not (out / "selection").exists() and not (out / "report.txt").exists()
    killed(words, has_file(out, ".selection.curate*/**/rule-4-*"))
    assert has_file(out, ".selection.curate*/**/rule-4-*")() and not (out / "selection").exists(), (
        "while phenoprints are looked for"
    )
    killed(words, has_file(out, ".corpus.shards*/**/*.tar*"))
    assert has_file(out, ".corpus.shards*/**/*.tar*")() and not (out / "corpus.shards").exists(), "among the shards"
    assert not (out / "report.txt").exists()
    assert corpus.main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["datasets"]] == [d.name for d in read_corpus(DIVERSE).datasets]
    assert result["n_differ"] == 9 and result["n_not_built"] == 0
    check_numbers(result, out)
    assert corpus.main(arguments(diverse, whole)) == 0
    assert json.loads(capsys.readouterr().out)["shards"]["fingerprint"] == result["shards"]["fingerprint"]
    before = (out / "corpus.shards" / "manifest.json").stat().st_mtime_ns
    assert corpus.main(words) == 0, "a finished build may be asked for again"
    said = capsys.readouterr()
    assert json.loads(said.out)["whole"] == result["whole"] and "shards: made from the same before, kept" in said.err
    assert (out / "corpus.shards" / "manifest.json").stat().st_mtime_ns == before


def check_numbers(result: dict[str, Any], out: Path) -> None:
    """What is said of each dataset, and of the phenoprints, in the result and in the report."""
    by_name = {row["name"]: row for row in result["datasets"]}
    for name, row in by_name.items():
        assert 0 < row["samples"]["found"] == row["train"] + row["val"] <= 240, name
        assert row["samples"]["difference"] == row["samples"]["found"] - row["samples"]["expected"] < 0, name
        assert 0 < row["genes"]["found"] <= 140 and row["genes"]["difference"] < 0, name
    assert by_name["k562_gwps"]["samples"]["found"] < 200, "perturbations without a phenoprint are gone"
    assert result["whole"]["val"] == result["shards"]["n_val"] > 0
    table = (out / "selection" / "phenoprints_4_k562_gwps.tsv").read_text().splitlines()
    kept = {line.split("\t")[0] for line in table[1:] if line.endswith("true")}
    assert kept == {"SIM00001", "SIM00002", "SIM00003"}, "those that do something, see txfm_data.simulate.formats"
    assert result["whole"]["samples"]["expected"] == 1_434_299 and result["whole"]["genes"]["found"] <= 200
    text = (out / "report.txt").read_text()
    assert "502,080" in text and "0 of 9 datasets are as expected, 9 differ" in text
    assert re.search(
        r"other file than stated: \S*K562_gwps_raw_singlecell_01.h5ad has [\d,]+ bytes, expected 65,830,941,948", text
    )
    assert json.loads((out / "report.json").read_text())["whole"] == result["whole"]


@pytest.mark.slow
def test_workers_change_nothing(diverse, tmp_path, capsys):
    prints = set()
    for name, more in (("serial", ()), ("two", ("--workers", "2"))):
        words = [*arguments(diverse, tmp_path / name), *more, "--datasets", "k562_gwps", "tcga"]
        assert corpus.main(words) == 0
        prints.add(json.loads(capsys.readouterr().out)["shards"]["fingerprint"])
    assert len(prints) == 1


def test_some_of_the_datasets_and_of_the_rules(diverse, tmp_path, capsys):
    out = tmp_path / "out"
    assert corpus.main([*arguments(diverse, out), "--datasets", "tcga", "gtex"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["samples"]["found"]) for row in result["datasets"]] == [("tcga", 60), ("gtex", 60)]
    assert result["shards"]["n_val"] > 0


@pytest.fixture
def small(tmp_path) -> Path:
    """A small corpus file and its sources."""
    write_corpus(tmp_path, lambda tree: tree.update(shard={"lanes": 4, "block": 8, "obs": ["cell_type"]}))
    write_sources(tmp_path, read_corpus(tmp_path / "small.yaml"))
    return tmp_path


def build(folder: Path, *more: str) -> int:
    """Build the small corpus."""
    words = ["build", folder / "small.yaml", "--sources", folder / "sources", "--out", folder / "out", *more]
    return corpus.main([str(word) for word in words])


def test_shards_are_made_as_the_corpus_says_and_again_only_when_asked(small, capsys):
    assert build(small) == 0
    said = capsys.readouterr().out
    assert "as expected" in said and "report: " in said and f"shards: {small / 'out' / 'corpus.shards'}" in said
    assert Corpus(small / "out" / "corpus.shards").lanes == 4
    write_corpus(small, lambda tree: tree.update(shard={"lanes": 2, "block": 8}))
    assert build(small) == 1
    assert (
        "corpus.shards: was made from something else (other lanes, obs_columns); pass --rebuild"
        in capsys.readouterr().err
    )
    assert build(small, "--rebuild") == 0
    assert Corpus(small / "out" / "corpus.shards").lanes == 2
    capsys.readouterr()
    write_corpus(small, lambda tree: tree.update(shard={"lanes": 2, "block": 8, "obs": ["organ"]}))
    assert build(small, "--rebuild") == 1 and "organ" in capsys.readouterr().err
    assert Corpus(small / "out" / "corpus.shards").lanes == 2, "what cannot be built replaces nothing"
    write_corpus(small, lambda tree: tree.update(shard={"lanes": 2, "block": 8}))
    assert build(small) == 0 and "shards: made from the same before, kept" in capsys.readouterr().err


def test_what_a_build_cannot_do_is_said_before_it_begins(small, diverse, capsys):
    write_corpus(small, lambda tree: tree.update(shard={"store": "elsewhere"}))
    assert build(small) == 1 and "shard sets store, which the build chooses" in capsys.readouterr().err
    write_corpus(small, lambda tree: tree.update(shard={"lane": 2}))
    assert build(small) == 1 and "lane: unknown key; did you mean lanes" in capsys.readouterr().err
    write_corpus(small, lambda tree: tree.update(shard={"lanes": 0}))
    assert build(small) == 1 and "corpus small: shard: lanes and mix_blocks must lie between" in capsys.readouterr().err
    write_corpus(small, lambda tree: tree["datasets"][2]["ingest"].update(bacth="x"))
    assert build(small) == 1 and "kind gct has no option 'bacth'; did you mean batch" in capsys.readouterr().err
    write_corpus(small, lambda tree: tree["datasets"][2]["ingest"].update(values="tpm"))
    assert corpus.main(["plan", str(small / "small.yaml")]) == 1
    assert "dataset 3: ingest.values: expected counts|normalized, got 'tpm'" in capsys.readouterr().err
    write_corpus(small)
    assert build(small, "--memory-budget", "700MiB") == 1 and "give at least 768MiB" in capsys.readouterr().err
    assert corpus.main(["build", str(small / "small.yaml"), "--out", str(small / "out")]) == 1
    assert "name their folder with --sources" in capsys.readouterr().err
    (small / "sources" / "tissues.gct").unlink()
    assert build(small) == 1 and "tissues: tissues.gct" in capsys.readouterr().err
    words = arguments(diverse, small / "out")
    assert corpus.main(words[:6]) == 1 and "give --model" in capsys.readouterr().err, "phenoprints need a checkpoint"
    assert corpus.main([*words[:6], "--model", str(small)]) == 1
    assert "rule 4 (phenoprints): embedding: " in (said := capsys.readouterr().err) and "is no checkpoint" in said
    assert corpus.main(words[:8]) == 1 and "bytes, expected 65,830,941,948" in capsys.readouterr().err
    assert build(small, "--datasets", "cels") == 1 and "did you mean cells" in capsys.readouterr().err
    assert corpus.main(["build", "small"]) == 2
    assert not (small / "out").exists(), "nothing was begun"


def test_missing_sources_are_told_of_in_the_report(small, capsys):
    (small / "sources" / "tissues.gct").unlink()
    assert build(small, "--allow-missing", "--json") == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["missing"] == ["tissues"] and "WARNING: left out, no source files: tissues" in said.err
    assert {row["name"]: row["verdict"] for row in result["datasets"]}["tissues"] == "not built"
    assert "left out, no source files: tissues" in (small / "out" / "report.txt").read_text()


def test_plans_and_the_list(small, capsys):
    assert corpus.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in corpus_names())
    assert corpus.main(["list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["corpora"]) == len(corpus_names()) >= 8
    assert corpus.main(["plan", str(small / "small.yaml"), "--sources", str(small / "sources"), "--checksums"]) == 0
    assert "4 of 4 files there, 0 missing" in capsys.readouterr().out
    assert corpus.main(["plan", DIVERSE, "--datasets", "gtex", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [d["name"] for d in plan["datasets"]] == ["gtex"] and plan["n_missing"] == 2
    assert corpus.main(["plan", "diverse_rna"]) == 1
    assert "configs/corpora; did you mean diverse_rna_1.4m" in capsys.readouterr().err


def test_a_corpus_of_a_census(tmp_path, capsys):
    build_census(tmp_path / "census")
    tree = yaml.safe_load((ROOT / "configs" / "corpora" / "tf_sapiens.yaml").read_text())
    tree |= {"name": "lungs", "shard": {"lanes": 2, "block": 8}}
    tree["datasets"][0]["ingest"] |= {"obs_filter": "tissue_general == 'lung'"}
    words = [
        "build",
        str(tmp_path / "lungs.yaml"),
        "--out",
        str(tmp_path / "out"),
        "--census",
        str(tmp_path / "census"),
        "--json",
    ]
    write = (tmp_path / "lungs.yaml").write_text
    tree["datasets"][0]["ingest"]["obs_filter"] = "tissu == 'lung'"
    write(yaml.safe_dump(tree))
    assert corpus.main(words) == 1 and "tissu" in capsys.readouterr().err
    tree["datasets"][0]["ingest"]["obs_filter"] = "tissue_general == 'lung'"
    write(yaml.safe_dump(tree))
    assert corpus.main(words) == 0, "a filter that failed does not stand in the way of the right one"
    (row,) = json.loads(capsys.readouterr().out)["datasets"]
    held = open_store(tmp_path / "out" / "store.soma").datasets
    assert {record.name for record in held} == {DATASETS[0], DATASETS[2]}
    assert row["samples"]["found"] == sum(record.n_obs for record in held) > 50 and row["verdict"] == "differs"
    assert corpus.main(words) == 0, "again, with nothing left to do"
    assert json.loads(capsys.readouterr().out)["datasets"] == [row]
    (tmp_path / "census").rename(tmp_path / "other")
    assert corpus.main([*words[:-2], str(tmp_path / "other"), "--json"]) == 1
    assert "dataset 'census' was ingested otherwise (other census)" in capsys.readouterr().err
    tree["datasets"][0]["ingest"]["obs_filter"] = "tissue_general == 'blood'"
    write(yaml.safe_dump(tree))
    assert corpus.main(words) == 1
    assert "dataset 'census' was ingested otherwise (other obs_filter)" in capsys.readouterr().err


def test_without_corpora_the_list_says_where_it_looked(monkeypatch, tmp_path, capsys):
    from txfm_data.corpora import recipe

    monkeypatch.setattr(recipe, "FOLDER", tmp_path)
    assert corpus.main(["list"]) == 0
    said = capsys.readouterr().out
    assert f"no corpora in {tmp_path}" in said and "the path of a YAML file" in said
    assert corpus.main(["plan", "diverse_rna_1.4m"]) == 1 and f"in {tmp_path}" in capsys.readouterr().err
