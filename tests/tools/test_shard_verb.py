"""`txfm shard` run as a user runs it: options, --json, --dry-run, errors, nothing left behind."""

import json
from pathlib import Path

import numpy as np
import pytest

from shards.manifest import Corpus
from tools import cli, shard
from txfm_data.selection import write_selection
from txfm_data.store.opening import open_store


@pytest.fixture
def store(tiny_store: Path) -> Path:
    return tiny_store


def build(store: Path, out: Path, *words: object, capsys) -> dict:
    line = ["shard", "--store", store, "--out", out, "--block", 8, "--lanes", 2, *words, "--json"]
    assert cli.main([str(word) for word in line]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_option_reaches_the_corpus(tmp_path, store, capsys):
    result = build(
        store, tmp_path / "c", "--datasets", "second", "first", "--min-cells", 2, "--min-cell-fraction", 0.05, "--val-batches",
        0.4, "--weight", "first=0.5", "--weight=second=0.25", "--obs", "cell_type,nnz", "--seed", 7, "--mix-blocks", 3,
        "--shard-bytes", "1MiB", "--memory-budget", "1GiB", capsys=capsys,
    )  # fmt: skip
    manifest = Corpus(tmp_path / "c").manifest
    assert {d.name: d.weight for d in manifest.datasets} == {"second": 0.25, "first": 0.5}
    assert [d["name"] for d in result["datasets"]] == ["second", "first"]
    assert (manifest.seed, manifest.mix_blocks, manifest.lanes, manifest.block_rows) == (7, 3, 2, 8)
    assert manifest.filter == {"min_cells": 2, "min_cell_fraction": 0.05} and manifest.selection is None
    assert manifest.obs_columns == {"cell_type": "string", "nnz": "int64"}
    assert result["fingerprint"] == manifest.checksum and result["n_train"] + result["n_val"] == 112


def test_a_selection_and_scratch_and_yaml(tmp_path, store, capsys):
    opened = open_store(store)
    panels = {record.name: opened.panel(record) for record in opened.datasets}
    write_selection(tmp_path / "picked", opened, np.arange(0, 112, 2), panels)
    (tmp_path / "run.yaml").write_text(f"selection: {tmp_path / 'picked'}\nweight: [first=0.5]\nobs: [is_control]\n")
    result = build(store, tmp_path / "c", "--config", tmp_path / "run.yaml", "--scratch", tmp_path / "s", capsys=capsys)
    corpus = Corpus(tmp_path / "c")
    assert corpus.manifest.selection is not None and [d.weight for d in corpus.manifest.datasets] == [0.5, 1.0]
    assert result["n_train"] + result["n_val"] == 56 and not list((tmp_path / "s").iterdir())


def test_a_dry_run_writes_nothing(tmp_path, store, capsys):
    plan = build(store, tmp_path / "c", "--dry-run", capsys=capsys)
    assert plan["dry_run"] and plan["n_train"] + plan["n_val"] == 112 and plan["spill_bytes_estimated"] > 0
    assert cli.main(["shard", "--store", str(store), "--out", str(tmp_path / "c"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for words in ("train and", "reads", "writes about", "MiB of memory", "second: ", "dry run, nothing written"):
        assert words in shown
    assert not list(tmp_path.iterdir())


def test_what_is_shown_of_a_build(tmp_path, store, capsys):
    words = [
        "shard",
        "--store",
        store,
        "--out",
        tmp_path / "c",
        "--block",
        "8",
        "--lanes",
        "2",
        "--weight",
        "second=0.5",
    ]
    assert cli.main([str(word) for word in words]) == 0
    shown = capsys.readouterr()
    assert "samples/s" in shown.out and f"shards: {tmp_path / 'c'}" in shown.out
    assert "0.5 of them in each epoch" in shown.out and "held out" in shown.out
    assert "reading, then writing 224/224 samples (100%)" in shown.err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--weight", "first"], 1, "--weight takes NAME=SHARE, such as atlas=0.5; got 'first'"),
        (["--weight", "=0.5"], 1, "--weight takes NAME=SHARE"),
        (["--weight", "first=half"], 1, "--weight takes NAME=SHARE"),
        (["--weight", "first=0.5", "--weight", "first=0.4"], 1, "names dataset 'first' twice"),
        (["--weight", "first=2"], 1, "lower the weights of the others"),
        (["--weight", "fourth=0.5"], 1, "'fourth', which is not taken; taken are ['first', 'second']"),
        (["--weight"], 2, "--weight"),
        (["--obs", "nothing"], 1, "has no such column; it has"),
        (["--obs", "nnz,nnz"], 1, "'nnz' is named twice"),
        (["--selection", "nowhere"], 1, "no selection.json there"),
        (["--selection", "nowhere", "--datasets", "first"], 1, "leave out --datasets"),
        (["--workers", "-1"], 1, "--workers must not be negative"),
        (["--workers", "1", "--dask-scheduler", "tcp://x:1"], 1, "two ways to say where to work"),
        (["--dask-scheduler", "tcp://127.0.0.1:9"], 1, "no Dask scheduler answers there"),
        (["--memory-budget", "100MiB"], 1, "the memory budget is 100 MiB"),
        (["--memory-budget", "lots"], 1, "is not a size"),
        (["--shard-bytes", "1kB"], 1, "is not a size"),
        (["--shard-bytes", "1KB"], 1, "shard_bytes must be at least 1 MiB"),
        (["--block", "0"], 1, "block_rows must lie between 2"),
        (["--lanes", "0"], 1, "lanes and mix_blocks"),
        (["--val-batches", "1"], 1, "val_batches is a share"),
        (["--seed", "-1"], 1, "seed must not be negative"),
        (["--min-cells", "65"], 1, "lower --min-cells"),
        (["--datasets", "fifth"], 1, "no dataset 'fifth'"),
        (["--wieght", "first=1"], 2, "--weight"),
        (["--block", "many"], 2, "--block"),
    ],
)
def test_wrong_options_are_refused_and_leave_nothing(tmp_path, store, capsys, monkeypatch, words, code, message):
    from txfm_data import parallel

    monkeypatch.setattr(parallel, "_ANSWER_S", 0.2)
    assert shard.main(["--store", str(store), "--out", str(tmp_path / "c"), *words]) == code
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == "" and not list(tmp_path.iterdir())


def test_words_behind_weights_stay_options():
    words = ["--weight", "a=1", "b=1", "--seed", "3", "--weight", "c=1", "--weight=d=1", "--dry-run"]
    assert shard._joined(words) == ["--seed", "3", "--dry-run", "--weight", "a=1", "b=1", "c=1", "d=1"]
    assert shard._joined(["--seed", "3"]) == ["--seed", "3"]
