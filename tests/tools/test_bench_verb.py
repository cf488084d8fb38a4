"""`txfm bench loader`: every row in the table and in the JSON, and errors that say what to do."""

import json
import os
import sys
from pathlib import Path

import pytest

from shards.bench.corpus import DropletConfig, write_corpus
from tools import bench

SMALL = ["--samples", "3000", "--genes", "8000", "--rounds", "1"]
GOALS = [
    "raw_to_annbatch", "masked_to_annbatch_numpy", "masked_to_annbatch_mask", "masked_to_decode_mask", "decode_mask_to_floor",
    "draw_to_floor", "mask_to_floor", "mask_to_numpy", "bytes_per_sample", "first_batch_s", "longest_stall_ms", "stall_p99_ms",
    "peak_anonymous_mb",
]  # fmt: skip


def test_every_row_is_measured(tmp_path, capsys):
    out = tmp_path / "found.json"
    assert bench.main(["loader", "--json", *SMALL, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert json.loads(out.read_text()) == result
    assert "simulating 3,000/3,000 samples" in shown.err
    rows = {row["name"]: row for row in result["rows"]}
    no_peer = rows.pop("annbatch")
    assert no_peer["samples_per_s"] is None and "--annbatch-python" in no_peer["why"]
    assert list(rows) == [
        "draw", "draw_floor", "mask", "mask_floor", "mask_numpy", "decode", "decode_mask", "raw", "masked",
    ]  # fmt: skip
    for row in rows.values():
        assert row["samples_per_s"] > 0 and row["samples_per_cpu_s"] > 0
        assert row["rounds"] == [row["samples_per_cpu_s"]]
    goals = {goal["name"]: goal for goal in result["goals"]}
    assert list(goals) == GOALS
    for name, goal in goals.items():
        if "annbatch" in name:
            assert goal["value"] is None and goal["is_met"] is None and "--annbatch-python" in goal["why"]
        elif sys.platform == "linux" or name != "peak_anonymous_mb":
            assert goal["value"] > 0
    assert goals["mask_to_floor"]["value"] == pytest.approx(
        rows["mask"]["samples_per_cpu_s"] / rows["mask_floor"]["samples_per_cpu_s"]
    )
    corpus = result["corpus"]
    assert (corpus["samples"], corpus["genes"], corpus["is_simulated"]) == (3_000, 8_000, True)
    assert not Path(corpus["address"]).exists()
    # The same as a table.
    text = bench.summarize_loader(result)
    assert "simulated samples (no real data)" in text
    for entry in (*rows.values(), *goals.values()):
        assert (entry.get("label") or entry["about"]) in text
    assert max(map(len, text.splitlines())) <= 132


def test_a_corpus_that_is_there_and_a_batch_that_does_not_fit_it(tmp_path, capsys):
    folder = write_corpus(tmp_path / "c", DropletConfig(samples=300, genes=500, block_rows=32))
    assert bench.main(["loader", "--shards", str(folder), "--batch", "100"]) == 1
    assert "multiple of 16" in capsys.readouterr().err


def test_a_python_without_annbatch(tmp_path, capsys):
    folder = write_corpus(tmp_path / "c", DropletConfig(samples=300, genes=500, block_rows=32))
    arguments = ["loader", "--shards", str(folder), "--batch", "32", "--annbatch-collection", str(tmp_path)]
    assert bench.main([*arguments, "--annbatch-python", sys.executable]) == 1
    assert "annbatch ended early: ModuleNotFoundError: No module named 'annbatch'" in capsys.readouterr().err
    assert bench.main([*arguments, "--annbatch-python", str(tmp_path / "nothing")]) == 1
    assert "nothing does not start" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: txfm bench KIND"),
        (["loadr"], "did you mean loader?"),
        (["loader", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["loader", "--annbatch-python", "python"], "--annbatch-collection together"),
        (["loader", "--out", "/nowhere/at/all.json"], "there is no folder"),
    ],
)
def test_wrong_use(capsys, arguments, message):
    assert bench.main(arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == ""


@pytest.mark.slow
@pytest.mark.skipif(
    "TXFM_ANNBATCH_PYTHON" not in os.environ, reason="TXFM_ANNBATCH_PYTHON and …_COLLECTION are not set"
)
def test_annbatch_takes_part(capsys):
    arguments = ["loader", "--json", *SMALL, "--annbatch-python", os.environ["TXFM_ANNBATCH_PYTHON"]]
    assert bench.main([*arguments, "--annbatch-collection", os.environ["TXFM_ANNBATCH_COLLECTION"]]) == 0
    result = json.loads(capsys.readouterr().out)
    assert all(row["samples_per_cpu_s"] > 0 for row in result["rows"])
    assert all(goal["value"] > 0 for goal in result["goals"])
    assert result["corpus"]["annbatch"]["annbatch"]
    assert "ratios compare different data" in result["notes"][0]
