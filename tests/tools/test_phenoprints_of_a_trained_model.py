"""Phenoprints of the simulated screen in the embedding of a model that the quickstart trained, told from the truth.

The model sees 360 steps, which takes it little past the mean profile of each dataset. So the recipe has what makes most of a weak
embedding (docs/explain/phenoprints.md): a layer in the middle, batches standardised by all of their cells, since 300 controls
are few for 128 dimensions, controls among the random cells, and tau from the number of cells.
"""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tools import curate, quickstart

pytestmark = pytest.mark.slow

RECIPE = """\
datasets: [sim_screen]
rules:
  - rule: phenoprints
    embedding: {{kind: checkpoint, layer: "2"}}
    reference: all
    null_controls: true
    calibrate_to: {n_cells}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quickstart on simulated data, at its defaults."""
    out = tmp_path_factory.mktemp("trained") / "quickstart"
    assert quickstart.main(["--out", str(out)]) == 0
    return out


def test_strong_perturbations_are_kept_and_null_ones_are_not(trained, tmp_path, capsys):
    from txfm_data.store.opening import open_store

    truth = json.loads((trained / "simulated" / "truth.json").read_text())["perturbations"]
    strong = {name for name, what in truth.items() if what["effect"] == "strong"}
    obs = open_store(trained / "store.soma").obs(["perturbation", "is_control"]).to_pandas()
    n_cells = int((obs["is_control"] | obs["perturbation"].isin(strong)).sum())
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(n_cells=n_cells))
    arguments = [tmp_path / "recipe.yaml", "--store", trained / "store.soma", "--out", tmp_path / "selection"]
    assert curate.main([*map(str, arguments), "--model", str(trained / "run"), "--json"]) == 0
    table = pq.read_table(tmp_path / "selection" / "phenoprints_1_sim_screen.parquet").to_pandas()
    assert len(table) == len(truth) and not table["p"].isna().any()
    kept = set(table["perturbation"][table["kept"]])
    recall, precision = len(kept & strong) / len(strong), len(kept & strong) / len(kept)
    assert recall >= 0.95 and precision >= 0.95, table.to_string()
