"""The first run on real counts: every step of the road, and the document with what came out.

    python docs/results/first_run.py --data FOLDER --out first_run

FOLDER holds the h5ad files and gene pairs named below. Writes first_run.md and first_run.png beside this script; no
number in them is typed by hand. Puts the main figures into the README. Needs the installed `txfm` command.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp

from txfm_eval.baselines import log_normalize, pca_embedding
from txfm_eval.celltype.probe import linear_probe

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMMON = ["--values", "counts", "--gene-ids", "ensembl_id", "--symbols", "gene_symbol", "--batch", "batch"]
COMMON += ["--duplicates", "sum", "--empty-samples", "drop"]
TRAIN_SETS = {
    "sc_pbmc_facs_zheng": ["--cell-type", "cell_type"],
    "sc_pbmc_ifnb_kang": ["--cell-type", "cell_type"],
    "sc_pbmc_frozen_donorA": [],
    "sc_lung_lines_cellbench": ["--cell-type", "cell_type"],
    "bulk_immune_sorted": ["--modality", "bulk"],
    "perturb_papalexi_thp1": [
        "--perturbation", "perturbation", "--control", "non-targeting", "--library-size", "full_n_umi",
    ],
}  # fmt: skip
# 20,729 cells of 299 genes would be two thirds of the corpus: a seeded sample keeps the whole transcriptomes in front.
THINNED = {"perturb_papalexi_thp1": 3_000}
HELD_OUT = {"sc_pbmc3k": "cell_type"}
EMBEDDED = "sc_pbmc3k"


class Road:
    """Runs `txfm` commands, keeping each as typed, its seconds and its result.

    Results are kept in the folder `steps`: a run that was stopped goes on after the last step that ended.
    """

    def __init__(self, data: Path, out: Path) -> None:
        self.data, self.out = data, out
        self.commands: list[tuple[str, float]] = []

    def run(self, arguments: list[str], launcher: list[str] | None = None) -> dict[str, Any]:
        """Run one verb and return its JSON result."""
        command = launcher or [str(Path(sys.executable).parent / "txfm")]
        program = ["accelerate", "launch", *launcher[3:]] if launcher else ["txfm"]  # past: python -m its module
        shown = " ".join([*program, *arguments])
        for path, name in ((self.data, "$DATA"), (self.out, "$OUT"), (ROOT, ".")):
            shown = shown.replace(str(path), name)
        step = self.out / "steps" / f"{len(self.commands):02d}.json"
        if step.is_file() and (kept := json.loads(step.read_text()))["command"] == shown:
            self.commands.append((shown, kept["seconds"]))
            return dict(kept["result"])
        print(f"$ {shown}", flush=True)
        since = time.monotonic()
        done = subprocess.run(
            [*command, *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ)
        )
        self.commands.append((shown, time.monotonic() - since))
        result: dict[str, Any] = json.loads(done.stdout)
        step.write_text(json.dumps({"command": shown, "seconds": self.commands[-1][1], "result": result}))
        return result


def thin(source: Path, target: Path, n: int) -> Path:
    """Write a seeded sample of `n` samples of a file."""
    adata = ad.read_h5ad(source)
    rows = np.sort(np.random.default_rng(0).choice(adata.n_obs, n, replace=False))
    adata[rows].copy().write_h5ad(target)
    return target


def probe(file: Path, label: str) -> dict[str, Any]:
    """Accuracy and macro-F1 of a linear probe on the embedding and on the two baselines, over five seeds."""
    adata = ad.read_h5ad(file)
    keep = adata.obs[label].notna().to_numpy()
    labels = adata.obs[label].astype(str).to_numpy()[keep]
    logged = log_normalize(sp.csr_matrix(adata.X)[keep])
    expressed = np.asarray((logged > 0).mean(axis=0)).ravel() >= 0.05
    embedding = adata.obsm["X_txfm"][keep]
    width = embedding.shape[1]
    matrices = {
        "TxFM": embedding,
        f"PCA, {width} components (fitted on these cells)": pca_embedding(logged, width),
        "library size + log1p, genes in ≥ 5 % of cells": logged[:, expressed],
    }
    scores = {}
    for name, matrix in matrices.items():
        runs = [linear_probe(matrix, labels, seed=seed, name=name) for seed in range(5)]
        scores[name] = {
            key: (float(np.mean([r[key] for r in runs])), float(np.std([r[key] for r in runs])))
            for key in ("accuracy", "macro_f1", "majority_accuracy")
        }
    return {"n": len(labels), "classes": len(set(labels)), "scores": scores}


def travel(data: Path, out: Path, steps: int) -> dict[str, Any]:
    """Run the road; everything that the document needs."""
    (out / "steps").mkdir(parents=True, exist_ok=True)
    road = Road(data, out)
    store, corpus, run_folder = out / "store.soma", out / "corpus.shards", out / "run"
    ingested = []
    for name, options in TRAIN_SETS.items():
        file = data / f"{name}.h5ad"
        if name in THINNED:
            target = out / f"{name}.sample.h5ad"
            file = target if target.is_file() else thin(file, target, THINNED[name])
        ingested.append(
            road.run(["ingest", "h5ad", str(file), "--store", str(store), "--dataset", name, *COMMON, *options])
        )
    shards = road.run(
        ["shard", "--store", str(store), "--out", str(corpus), "--min-cell-fraction", "0.05", "--val-batches", "0.1"]
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "tools" / "train.py")]
    settings = ["--config", str(ROOT / "configs" / "txfm_tiny.yaml"), "--shards", str(corpus), "--out", str(run_folder)]
    schedule = [
        "--loop.steps",
        str(steps),
        "--loop.precision",
        "bf16",
        "--loop.validate_every",
        str(max(1, steps // 4)),
    ]
    trained = road.run([*settings, *schedule], launcher)
    model = str(run_folder / "checkpoint")
    embedded = out / f"{EMBEDDED}.embedded.h5ad"
    embed = road.run(
        ["embed", str(data / f"{EMBEDDED}.h5ad"), "--model", model, "--out", str(embedded), "--gene-ids", "ensembl_id",
         "--symbols", "gene_symbol", "--duplicates", "sum", "--min-cell-fraction", "0.05", "--n-unmasked", "1024"]
    )  # fmt: skip
    road.run(["genes", "--model", model, "--out", str(out / "genes.parquet")])
    recall = road.run(["evaluate", "relationships", "--model", model, "--annotations", str(data / "relationships")])
    for path in (store, corpus, Path(model)):
        road.run(["verify", str(path)])
    metrics = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "commands": road.commands, "ingest": ingested, "shards": shards, "train": trained, "embed": embed, "recall": recall,
        "probe": probe(embedded, HELD_OUT[EMBEDDED]), "metrics": metrics, "machine": machine(Path(model)),
    }  # fmt: skip


def machine(checkpoint: Path) -> dict[str, Any]:
    """What ran it."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    origin = json.loads((checkpoint / "config.json").read_text())["provenance"]
    packages = {name: version(name) for name in ("torch", "tiledbsoma", "numba", "accelerate", "numpy")}
    return {
        "processor": model or platform.processor(), "cores": os.cpu_count(), "python": platform.python_version(),
        "commit": str(origin["commit"])[:12], "packages": packages, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def plot(metrics: list[dict[str, Any]], panel_mean: float, target: Path) -> None:
    """Excess loss over the steps, train and validation, with the panel-mean predictor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for split, style in (("train", "-"), ("val", "o-")):
        rows = [row for row in metrics if row["split"] == split]
        axes.plot(
            [r["step"] for r in rows], [r["excess"] for r in rows], style, label={"val": "validation"}.get(split, split)
        )
    axes.axhline(panel_mean, color="grey", linestyle="--", label="panel-mean predictor, validation")
    axes.set(xlabel="optimizer step", ylabel="loss above its floor, per gene")
    axes.legend()
    figure.savefig(target, dpi=110, metadata={"Software": None})


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def document(result: dict[str, Any]) -> str:
    """Write what came out as Markdown."""
    host = result["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in host["packages"].items())
    lines = [
        "# First run on real counts", "",
        "Written by `docs/results/first_run.py` from what its commands printed; nothing here was typed by hand. A run of",
        "minutes on a CPU shows that the road works and that the model learns. It is no measure of what TxFM can reach.", "",
        f"{host['date']}, commit {host['commit']}, {host['processor']}, {host['cores']} cores, Python {host['python']},",
        f"{packages}.", "",
        *data_section(result), *training_section(result["train"]), *probe_section(result["probe"]),
        *recall_section(result["recall"]),
        "", "## Commands", "",
        "<!-- not run: needs the data sets and half an hour; docs/results/first_run.py runs them -->", "```bash",
        *(f"{command}    # {seconds:.0f} s" for command, seconds in result["commands"]), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def data_section(result: dict[str, Any]) -> list[str]:
    """What was trained on."""
    shards, rows = result["shards"], []
    for ingested, kept in zip(result["ingest"], shards["datasets"], strict=True):
        batches = len(kept["val_batches"])
        how = {"batches": f"{batches} batch(es)", "samples": "samples: it is one batch", "none": "nothing"}
        numbers = (ingested["n_obs"], ingested["n_panel"], kept["n_genes"], kept["n_train"], kept["n_val"])
        rows.append([ingested["dataset"], *(f"{n:,}" for n in numbers), how[kept["held_out"]]])
    header = [
        "dataset",
        "samples",
        "genes measured",
        "genes kept (≥ 5 % of its samples)",
        "train",
        "validation",
        "held out",
    ]
    embed = result["embed"]
    return [
        "## Data", "", *table(header, rows), "",
        f"Vocabulary {shards['n_genes']:,} genes; shards {shards['bytes_per_sample']:,.0f} bytes a sample.",
        *(f"`{name}` is a seeded sample of {n:,} of its cells." for name, n in THINNED.items()),
        f"`{EMBEDDED}` was in no training set: it was embedded afterwards, {embed['genes_matched']:,} of its",
        f"{embed['genes_in_file']:,} genes matched, the {embed['genes_shown']:,} above zero in ≥ 5 % of its cells were used,",
        "1,024 of them shown for each cell (all of them would take a CPU too long).", "",
    ]  # fmt: skip


def training_section(trained: dict[str, Any]) -> list[str]:
    """How the training went."""
    below = "below" if trained["val_excess"] < trained["panel_mean_val_excess"] else "NOT below"
    rows = [
        ["TxFM", f"{trained['val_loss']:.4f}", f"{trained['val_excess']:.4f}"],
        ["panel-mean predictor", f"{trained['panel_mean_val_loss']:.4f}", f"{trained['panel_mean_val_excess']:.4f}"],
    ]
    return [
        "## Training", "",
        f"{trained['parameters']:,} parameters, {trained['steps']:,} steps of {trained['samples'] // trained['steps']} samples",
        f"in {trained['seconds'] / 60:.1f} minutes: {trained['samples_per_s']:.0f} samples/s,",
        f"precision {trained['precision']}.", "",
        *table(["validation, held-out batches", "loss", "above its floor"], rows), "",
        f"TxFM is {below} the panel-mean predictor, which knows the mean normalised count of every gene in every dataset",
        "(the best constant prediction under this loss).", "",
        "![Loss above its floor over the steps, training and validation, with the panel-mean predictor](first_run.png)", "",
    ]  # fmt: skip


def probe_section(result: dict[str, Any]) -> list[str]:
    """Cell types from the embedding."""
    rows = []
    for name, score in result["scores"].items():
        rows.append([name, *(f"{score[key][0]:.3f} ± {score[key][1]:.3f}" for key in ("accuracy", "macro_f1"))])
    majority = next(iter(result["scores"].values()))["majority_accuracy"][0]
    return [
        f"## Cell type from the embedding of {EMBEDDED}", "",
        f"Linear probe, {result['n']:,} cells, {result['classes']} types, a quarter of the cells of each type held out;",
        f"mean ± sd of five splits. Always naming the commonest type gives {majority:.3f}.", "",
        *table(["representation", "accuracy", "macro-F1"], rows), "",
    ]  # fmt: skip


def recall_section(result: dict[str, Any]) -> list[str]:
    """Relationship recall of both gene matrices."""
    rows = []
    for matrix, scores in result["matrices"].items():
        for name, recall in scores["recall"].items():
            parts = (recall, scores["random"][name])
            values = [f"{part[f'{side}_percent']:.2f}" for side in ("one_sided", "two_sided") for part in parts]
            rows.append([matrix, name, f"{recall['n_pairs']:,}", *values])
    return [
        "## Relationship recall of the gene representations", "",
        "Percent of known pairs among the 5 % most similar of all pairs (one-sided), or among the 5 % most and the 5 % least",
        f"similar (two-sided), over {result['universe']['n_genes']:,} genes. Random: Gaussian vectors of the same width.", "",
        *table(["matrix", "list", "pairs", "one-sided", "random", "two-sided", "random"], rows),
    ]  # fmt: skip


def readme_rows(result: dict[str, Any]) -> list[list[str]]:
    """The few figures that the README shows."""
    trained, probes, recall = result["train"], result["probe"]["scores"], result["recall"]["matrices"]["head"]
    combined = {part: recall[part]["combined"]["one_sided_percent"] for part in ("recall", "random")}
    cores = result["machine"]["cores"]
    return [
        [
            f"validation loss above its floor, {trained['steps']:,} steps of the tiny preset on {cores} cores",
            f"{trained['val_excess']:.3f}; panel-mean predictor {trained['panel_mean_val_excess']:.3f}",
        ],
        [
            f"linear probe of cell type on {EMBEDDED}, not in training (accuracy)",
            "; ".join(f"{name.split(',')[0]} {score['accuracy'][0]:.3f}" for name, score in probes.items()),
        ],
        [
            "relationship recall of the gene head, five public lists, one-sided",
            f"{combined['recall']:.1f} %; random vectors {combined['random']:.1f} %",
        ],
        ["training rate, tiny preset", f"{trained['samples_per_s']:.0f} samples/s on {cores} cores"],
        ["size of the shards of that corpus", f"{result['shards']['bytes_per_sample']:,.0f} bytes a sample"],
    ]


def update_readme(path: Path, rows: list[list[str]]) -> None:
    """Put the figures between the README's two markers."""
    before, start, rest = path.read_text().partition("<!-- measured -->\n")
    _, end, after = rest.partition("<!-- /measured -->")
    if not start or not end:
        raise ValueError(f"{path}: has no place for figures; expected <!-- measured --> and <!-- /measured -->")
    path.write_text(before + start + "\n".join(["", *table(["what", "figure"], rows), "", ""]) + end + after)


def main() -> None:
    """Run the road, or write the document again from an earlier run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--steps", type=int, default=1_200, help="optimizer steps")
    arguments = parser.parse_args()
    saved = arguments.out / "first_run.json"
    if not saved.is_file():
        saved.write_text(
            json.dumps(travel(arguments.data.resolve(), arguments.out.resolve(), arguments.steps), indent=1)
        )
    result = json.loads(saved.read_text())
    plot(result["metrics"], result["train"]["panel_mean_val_excess"], HERE / "first_run.png")
    (HERE / "first_run.md").write_text(document(result))
    update_readme(ROOT / "README.md", readme_rows(result))


if __name__ == "__main__":
    main()
