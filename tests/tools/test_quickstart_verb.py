"""The quickstart: every step on small files of one's own, again into the same folder, and on the simulated corpus."""

import json
from pathlib import Path

import pytest

from tools import quickstart


def test_own_files_from_counts_to_table(tmp_path, tiny_files, capsys):
    pairs = tmp_path / "PAIRS.txt"
    lines = [f"G{i},G{i + 1}" for i in range(30, 59)]
    pairs.write_text("\n".join(["entity1,entity2", *lines]) + "\n")
    out = tmp_path / "quick"
    arguments = ["--data", *map(str, tiny_files), "--out", str(out), "--annotations", str(pairs)]
    arguments += ["--steps", "3", "--global-batch", "16", "--n-unmasked", "20"]
    assert quickstart.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["train"]["steps"] == 3 and result["train"]["processes"] == 1
    assert [d["name"] for d in result["shards"]["datasets"]] == ["first", "second"]
    assert result["embed"]["n_obs"] == 48 and result["verified"] == ["store", "shards", "checkpoint"]
    assert result["relationships"]["databases"]["PAIRS"]["n_pairs"] == 29
    assert set(result["relationships"]["matrices"]) == {"codebook", "head"}
    for place in (result["store"], result["shards"]["out"], result["train"]["checkpoint"], result["embed"]["out"]):
        assert Path(place).exists()
    assert quickstart.main([*arguments[:-6], *arguments[-6:]]) == 0, "a second run replaces the first"
    table = capsys.readouterr().out
    for word in ("checkpoint", "embedding", "panel-mean predictor", "recall of codebook", "random vectors"):
        assert word in table


def test_what_was_not_made_by_a_quickstart_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    assert quickstart.main(["--out", str(tmp_path)]) == 1
    assert "was not made by a quickstart" in capsys.readouterr().err
    assert quickstart.main(["--data", str(tmp_path / "none.h5ad"), "--out", str(tmp_path / "q")]) == 1
    assert "no such file" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_the_simulated_corpus_beats_random_vectors(tmp_path, capsys):
    assert quickstart.main(["--out", str(tmp_path / "q"), "--steps", "200", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    recall = result["relationships"]
    assert recall["truth"]["combined"]["one_sided_percent"] == 100
    head = recall["matrices"]["head"]
    assert head["recall"]["combined"]["one_sided_percent"] > 2 * head["random"]["combined"]["one_sided_percent"]
    assert result["is_simulated"] and result["embed"]["n_obs"] == 1000
