"""Plans: which files are needed, which are there, what is not verified."""

import hashlib

import pytest

from tests.txfm_data.corpora.corpus_files import small_tree, write_sources
from txfm_data.corpora.plan import file_states, needed_files, plan_corpus, plan_text
from txfm_data.corpora.recipe import corpus_names, parse_corpus, read_corpus


def test_files_are_those_of_the_source_and_of_the_ingest():
    screen, cells, tissues = parse_corpus(small_tree(), "small").datasets
    assert [file.path for file in needed_files(screen)] == ["a/screen.h5ad"]
    assert [file.path for file in needed_files(cells)] == ["cells.csv", "cells_labels.tsv"]
    assert [file.path for file in needed_files(tissues)] == ["tissues.gct"]


def test_a_plan_says_what_is_missing_and_what_is_there(tmp_path):
    corpus = parse_corpus(small_tree(), "small")
    nothing = plan_corpus(corpus)
    assert nothing["n_missing"] == 4 and "not looked for" in plan_text(nothing)
    sources = write_sources(tmp_path, corpus)
    (sources / "cells.csv").unlink()
    plan = plan_corpus(corpus, sources)
    assert plan["missing"] == ["cells.csv"] and plan["n_other"] == 0
    text = plan_text(plan)
    assert "[missing] cells.csv" in text and "[there] a/screen.h5ad" in text and "https://x" in text
    assert "3 of 4 files there, 1 missing" in text
    assert "  not shown: ingest.control: not looked at" in text and "  shown: ingest.batch: the test" in text
    assert "  used by the paper: shown: the test" in text, "which is something else than what is shown of the source"
    assert "1,000 samples, 60 genes in all" in text and "2. cap datasets=['cells'], max_samples=60" in text


@pytest.mark.parametrize("name", ["md5", "sha256"])
def test_sizes_are_compared_always_and_checksums_when_asked(name, tmp_path):
    tree = small_tree()
    sources = write_sources(tmp_path, parse_corpus(tree, "small"))
    file = sources / "a" / "screen.h5ad"
    stated = tree["datasets"][0]["source"]["files"][0]
    stated |= {"bytes": file.stat().st_size, name: hashlib.new(name, file.read_bytes()).hexdigest()}
    (state,) = file_states(parse_corpus(tree, "small").datasets[0], sources, checksums=True)
    assert state.state == "there"
    damaged = bytearray(file.read_bytes())
    damaged[1000] ^= 1
    file.write_bytes(damaged)
    dataset, seen = parse_corpus(tree, "small").datasets[0], []
    assert file_states(dataset, sources)[0].state == "there", "a size tells nothing of a flipped bit"
    (state,) = file_states(dataset, sources, checksums=True, progress=lambda done, total: seen.append((done, total)))
    assert state.state == "other" and f"has {name}" in state.problem and seen[-1][0] == seen[-1][1] == len(damaged)
    file.write_bytes(damaged[:-1])
    (state,) = file_states(dataset, sources)
    assert state.state == "other" and "bytes, expected" in state.problem


def test_a_folder_where_a_file_should_be(tmp_path):
    tree = small_tree()
    tree["datasets"][0]["source"]["files"][0]["bytes"] = 7
    (tmp_path / "a" / "screen.h5ad" / "more").mkdir(parents=True)
    (state,) = file_states(parse_corpus(tree, "small").datasets[0], tmp_path)
    assert state.state == "other" and state.problem == "is a folder, expected a file"


@pytest.mark.parametrize("name", corpus_names())
def test_every_corpus_of_the_project_can_be_planned(name):
    plan = plan_corpus(read_corpus(name))
    text = plan_text(plan)
    assert name in text and plan["store_bytes_estimated"] > 0
    for dataset in plan["datasets"]:
        assert f"{dataset['name']} (" in text
        head = text.split(f"{dataset['name']} (")[1].split("\n")[0]
        assert ("[not shown that the paper used this]" in head) == ("identity" in dataset["not_shown"])


def test_an_empty_folder_is_missing(tmp_path):
    tree = small_tree()
    tree["datasets"][0]["ingest"] |= {"kind": "10x", "path": "a/mtx"}
    tree["datasets"][0]["source"]["files"][0]["path"] = "a/mtx"
    (tmp_path / "a" / "mtx").mkdir(parents=True)
    dataset = parse_corpus(tree, "small").datasets[0]
    assert [state.state for state in file_states(dataset, tmp_path)] == ["missing"]
    (tmp_path / "a" / "mtx" / "matrix.mtx").write_text("x")
    assert [state.state for state in file_states(dataset, tmp_path)] == ["there"]


def test_shards_of_a_whole_screen_are_estimated_by_its_source():
    full, reduced = (
        {d["name"]: d["shard_bytes_estimated"] for d in plan_corpus(read_corpus(name))["datasets"]}["k562_gwps"]
        for name in ("diverse_rna_k562_full", "diverse_rna_1.4m")
    )
    assert full / reduced == pytest.approx(1_989_578 / 502_080)


def test_files_of_a_part_alone_are_looked_for_where_a_curation_names_datasets():
    tree = small_tree()
    tree["curation"] = {"datasets": ["tissues"], "rules": [{"rule": "hold_out", "share": 0.2}]}
    assert [d["name"] for d in plan_corpus(parse_corpus(tree, "small").taken())["datasets"]] == ["tissues"]
