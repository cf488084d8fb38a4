"""Phenoprints of a real screen, with PCA and with a TxFM: curates the same store twice and writes the tables of phenoprints.md.

python docs/results/phenoprints.py STORE DATASET CHECKPOINT OUT
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from tools.curate import embedder
from txfm_data.curate.recipe import parse_recipe
from txfm_data.curate.run import CurateOptions, curate

TAU, SHOWN = 0.1, 30


def recipe_tree(dataset: str, embedding: dict[str, object]) -> dict[str, object]:
    """Recipe of both runs: nothing but the phenoprints of one dataset, of all its batches."""
    return {
        "datasets": [dataset],
        "rules": [{"rule": "phenoprints", "embedding": embedding, "tau": TAU, "batches": "all"}],
    }


def table_of(folder: Path) -> pd.DataFrame:
    """Table of perturbations that a curation wrote."""
    (path,) = [p for p in folder.glob("phenoprints_*.tsv") if not p.name.endswith("_curve.tsv")]
    return pd.read_csv(path, sep="\t").set_index("perturbation")


def main() -> None:
    """Curate with both embeddings and write one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("store", "dataset", "checkpoint"):
        parser.add_argument(name)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    tables = {}
    for name, embedding in (
        ("pca", {"kind": "pca", "n_components": 50}),
        ("txfm", {"kind": "checkpoint", "path": options.checkpoint}),
    ):
        recipe = parse_recipe(recipe_tree(options.dataset, embedding), name)
        curate(options.store, recipe, options.out / name, CurateOptions(embed=embedder(None)))
        tables[name] = table_of(options.out / name)
    both = tables["pca"][["n_cells"]].copy()
    for name, table in tables.items():
        both[f"s, {name}"], both[f"p, {name}"], both[f"kept, {name}"] = table["statistic"], table["p"], table["kept"]
    both = both.sort_values("p, txfm")
    rows = [f"| {' | '.join(['perturbation', *both.columns])} |", f"|{'---|' * (len(both.columns) + 1)}"]
    for label, row in both.head(SHOWN).iterrows():
        cells = [f"{v:,.3f}" if isinstance(v, float) else str(v) for v in row]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    (options.out / "table.md").write_text("\n".join(rows) + "\n")
    kept = {name: int(np.asarray(table["kept"], bool).sum()) for name, table in tables.items()}
    (options.out / "kept.json").write_text(json.dumps({"kept": kept, "of": len(both)}) + "\n")


if __name__ == "__main__":
    main()
