"""`txfm bench loader` and `train`: every row in the table and in the JSON, and errors that say what to do."""

import json
import os
import sys
from pathlib import Path

import pytest

from shards.bench.corpus import DropletConfig, write_corpus
from tests.test_bare_import import run_blocked
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


TINY = ["--samples", "200", "--genes", "300", "--width", "16", "--blocks", "2", "--heads", "2", "--batch", "8"]
TINY += ["--n-unmasked", "32", "--steps", "1", "--rounds", "1", "--no-memory", "--threads", "1", "--device", "cpu"]


def test_training_is_measured(tmp_path, capsys):
    out = tmp_path / "found.json"
    assert bench.main(["train", "--json", *TINY, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert json.loads(out.read_text()) == result
    assert "simulating 200/200 samples" in shown.err
    assert [row["name"] for row in result["rows"]][:4] == ["plain_float32", "fast_float32", "plain_bf16", "fast_bf16"]
    assert len(result["rows"]) == 4 and result["savings"] == []
    for row in result["rows"]:
        assert row["samples_per_s"] > 0 and row["matmul_share"] > 0
        assert row["flops_per_sample_by_torch"] == pytest.approx(row["flops_executed_per_sample"], rel=1e-9)
    goals = {goal["name"]: goal for goal in result["goals"]}
    assert goals["fast_to_plain"]["value"] > 0 and goals["fast_to_plain"]["is_met"] is None
    assert goals["memory_float32"]["why"] == "memory was not measured"
    assert goals["data_wait"]["value"] >= 0
    assert (result["settings"]["model"]["width"], result["settings"]["batch"]) == (16, 8)
    text = bench.summarize_train(result)
    for entry in (*result["rows"], *result["goals"]):
        assert (entry.get("label") or entry["about"]) in text
    assert max(map(len, text.splitlines())) <= 132


def test_training_on_a_corpus_that_is_there(tmp_path, capsys):
    folder = write_corpus(tmp_path / "c", DropletConfig(samples=300, genes=500, block_rows=32))
    assert bench.main(["train", *TINY, "--shards", str(folder), "--precisions", "no"]) == 1
    assert "multiple of 16" in capsys.readouterr().err
    arguments = ["train", *TINY, "--shards", str(folder), "--precisions", "no", "--batch", "16"]
    assert bench.main(arguments) == 0
    text = capsys.readouterr().out
    assert f"batch 16, samples of {folder}" in text and "bf16" not in text.split("number")[0].splitlines()[-3]


def test_training_is_measured_on_a_bare_image():
    done = run_blocked(
        f"from tools.bench import main\nsys.exit(main(['train', '--json', '--precisions', 'no', *{TINY!r}]))"
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["rows"]) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on the way through its compiler
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_training_is_measured_when_compiled(capsys):
    assert bench.main(["train", "--json", *TINY, "--compile", "--precisions", "no"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][-1]
    assert row["name"] == "fast_float32_compiled"
    assert row["samples_per_s"] > 0 or row["why"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: txfm bench KIND"),
        (["loadr"], "did you mean loader?"),
        (["loader", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["loader", "--annbatch-python", "python"], "--annbatch-collection together"),
        (["loader", "--out", "/nowhere/at/all.json"], "there is no folder"),
        (["train", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["train", "--precisions", "no", "no"], "--precisions takes no, bf16 or both, got no no"),
        (["train", "--preset", "xl"], "preset"),
        (["train", "--out", "/nowhere/at/all.json"], "there is no folder"),
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
