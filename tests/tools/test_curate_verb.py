"""`txfm curate` run as a user runs it, and `info`, `verify` and `shard` on what it wrote."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shards.manifest import Corpus
from tools import cli, curate

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
seed: 3
rules:
  - rule: genes_by_cells
    min_cells: 40
    note: rare genes say little
  - rule: keep
    column: cell_type
    values: [T cell]
    keep_controls: true
  - rule: hold_out
    share: 0.3
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_from_a_recipe_to_shards(tmp_path, tiny_store, recipe, capsys):
    out = tmp_path / "s"
    assert run("curate", recipe, "--store", tiny_store, "--out", out, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [step["rule"] for step in result["steps"]] == ["genes_by_cells", "keep", "hold_out"]
    assert run("info", out, "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["kind"], info["n_samples"], info["n_val"]) == ("selection", result["n_samples"], result["n_val"])
    assert info["sha256"] == result["selection_sha256"]
    assert run("info", out) == 0 and run("verify", out) == 0
    shown = capsys.readouterr().out
    assert "audit.png" in shown and "sound: selection" in shown and "held out" in shown
    assert (
        run(
            "shard",
            "--store",
            tiny_store,
            "--selection",
            out,
            "--out",
            tmp_path / "c",
            "--lanes",
            2,
            "--block",
            8,
            "--json",
        )
        == 0
    )
    built = json.loads(capsys.readouterr().out)
    assert (built["n_train"] + built["n_val"], built["n_val"]) == (result["n_samples"], result["n_val"])
    manifest = Corpus(tmp_path / "c").manifest
    assert manifest.selection == result["selection_sha256"] and built["n_genes"] == result["n_genes"]


def test_a_damaged_selection_is_found(tmp_path, tiny_store, recipe, capsys):
    assert run("curate", recipe, "--store", tiny_store, "--out", tmp_path / "s") == 0
    text = capsys.readouterr().out
    assert "1. genes_by_cells: " in text and "audit.txt" in text and "held out" in text
    path = tmp_path / "s" / "samples.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert run("verify", tmp_path / "s") == 1
    assert "damaged" in capsys.readouterr().err


def test_a_dry_run_and_warnings_are_shown(tmp_path, tiny_store, recipe, capsys):
    assert run("curate", recipe, "--store", tiny_store, "--out", tmp_path / "s", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert (
        "112 samples of 2 datasets" in shown
        and "2. keep: first, second" in shown
        and "dry run, nothing written" in shown
    )
    assert not (tmp_path / "s").exists()
    (tmp_path / "all.yaml").write_text("rules: [{rule: filter, where: 'raw_sum >= 0'}]")
    assert run("curate", tmp_path / "all.yaml", "--store", tiny_store, "--out", tmp_path / "s") == 0
    captured = capsys.readouterr()
    assert "WARNING: keeps everything" in captured.out and "WARNING: rule 1 (filter): keeps everything" in captured.err


@pytest.mark.parametrize(
    ("recipe_text", "more", "words"),
    [
        ("rules: [{rule: cap}]", [], ["max_samples"]),
        ("rules: [{rule: cap, max_samples: 3}]", ["--model", "m"], ["no rule of the recipe"]),
        ("rules: [{rule: phenoprints, embedding: {kind: checkpoint}}]", [], ["--model"]),
        ("rules: [{rule: cap, max_samples: 3}]", ["--memory-budget", "10MiB"], ["at least 768MiB"]),
        ("rules: [{rule: cap, max_samples: 3}]", ["--memory-budget", "much"], ["'much'", "256MiB"]),
        ("rules: [{rule: drop, column: cell_type, values: [T cel]}]", [], ["rule 1 (drop)", "T cell"]),
    ],
)
def test_errors_say_what_to_do(tmp_path, tiny_store, capsys, recipe_text, more, words):
    (tmp_path / "r.yaml").write_text(recipe_text)
    assert run("curate", tmp_path / "r.yaml", "--store", tiny_store, "--out", tmp_path / "s", *more) == 1
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.yaml"]


def test_the_script_runs_as_a_file(tmp_path, tiny_store, recipe):
    command = [
        sys.executable,
        str(ROOT / "tools" / "curate.py"),
        str(recipe),
        "--store",
        str(tiny_store),
        "--out",
        str(tmp_path / "s"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "selection: " in done.stdout and (tmp_path / "s" / "audit.json").is_file()
    assert curate.Options.__doc__
