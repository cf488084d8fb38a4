"""Phenoprints of a simulated screen in the embedding of the tiny preset, trained on the simulated corpus, told from the truth.

A model of 600 steps has learned little, and its p are larger than those of PCA (docs/explain/phenoprints.md): tau is 0.25. It was
fixed on a corpus of another seed. The screen has 6,000 cells, so that there are ten controls for each dimension.
"""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tools import cli

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
datasets: [screen]
rules:
  - rule: phenoprints
    embedding: {kind: checkpoint}
    tau: 0.25
"""


def run(*words: object) -> None:
    assert cli.main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a simulated corpus, its store, and a run of the preset; a quarter of an hour on two cores."""
    folder = tmp_path_factory.mktemp("trained")
    store, shards = folder / "store.soma", folder / "corpus.shards"
    run("simulate", folder / "sim", "--seed", 1, "--cells", 20_000)
    for name in ("blood", "lines", "screen", "bulk"):
        more = ["--perturbation", "perturbation", "--control", "non-targeting"] if name == "screen" else []
        run(
            "ingest", "h5ad", folder / "sim" / f"sim_{name}.h5ad", "--store", store, "--dataset", name, "--values", "counts",
            "--batch", "batch", "--cell-type", "cell_type", "--modality", "bulk" if name == "bulk" else "sc", *more,
        )  # fmt: skip
    run("shard", "--store", store, "--out", shards, "--min-cell-fraction", 0.05)
    preset = [
        "--config",
        str(ROOT / "configs" / "txfm_tiny.yaml"),
        "--shards",
        str(shards),
        "--out",
        str(folder / "run"),
    ]
    subprocess.run([sys.executable, str(ROOT / "tools" / "train.py"), *preset], check=True, cwd=folder)
    return folder


def test_strong_perturbations_are_kept_and_null_ones_are_not(trained, tmp_path):
    truth = json.loads((trained / "sim" / "truth.json").read_text())["perturbations"]
    strong = {name for name, what in truth.items() if what["effect"] == "strong"}
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    model = trained / "run" / "checkpoint"
    run(
        "curate", tmp_path / "recipe.yaml", "--store", trained / "store.soma", "--out", tmp_path / "s", "--model", model
    )
    table = pq.read_table(tmp_path / "s" / "phenoprints_1_screen.parquet").to_pandas()
    assert len(table) == len(truth) and not table["p"].isna().any()
    kept = set(table["perturbation"][table["kept"]])
    recall, precision = len(kept & strong) / len(strong), len(kept & strong) / len(kept)
    assert recall >= 0.95 and precision >= 0.95, table.to_string()
