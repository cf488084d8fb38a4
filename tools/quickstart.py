"""Run the whole road, from counts to an evaluation, on simulated data or on your own h5ad files."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.runner import Terminal, run_verb

_MARK = ".txfm_quickstart"
_GENES_SHOWN = 1_024  # in the embedding: work grows with the square, and a full panel would take a CPU hours


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run every step on the simulated corpus, or on your own files, with a model small enough for two CPU cores."""

    data: tuple[Path, ...] = ()
    """h5ad files with raw counts. Default: a simulated corpus, which has known answers."""
    out: Path = Path("txfm_quickstart")
    """Folder for all results; one that an earlier quickstart made is replaced."""
    annotations: tuple[Path, ...] = ()
    """Files (or folders of them) of gene pairs, header entity1,entity2, to score your own data's genes with."""
    min_cell_fraction: float = 0.05
    """A dataset keeps a gene that is above zero in at least this share of its samples, 0 to 1."""
    steps: int = 360
    """Optimizer steps."""
    global_batch: int = 48
    """Samples of one step."""
    n_unmasked: int = 256
    """Genes shown to the encoder per sample."""
    seed: int = 0
    """Seed of everything."""


def run(options: Options, terminal: Terminal) -> dict[str, Any]:
    """Run the steps one after the other; each is the verb of the same name."""
    started = time.monotonic()
    missing = [str(path) for path in options.data if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]}: no such file; give the paths of h5ad files")
    out = _fresh_folder(options.out)
    steps: dict[str, float] = {}

    def step(name: str, work: Callable[[], Any]) -> Any:
        terminal.say(f"step {len(steps) + 1} of 8: {name}")
        since = time.monotonic()
        result = work()
        steps[name] = time.monotonic() - since
        return result

    files, held_out, annotations = step("data", lambda: _data(options, out, terminal))
    ingested = step("ingest", lambda: [_ingest(path, modality, out, terminal) for path, modality in files])
    shards = step("shard", lambda: _shard(options, out, terminal))
    trained = step("train", lambda: _train(options, out))
    embedded = step("embed", lambda: _embed(options, held_out, out, terminal))
    genes = step("genes", lambda: _genes(out, terminal))
    recall = step("evaluate", lambda: _evaluate(annotations, out, terminal))
    verified = step("verify", lambda: _verify(out, terminal))
    result = {
        "out": str(out), "is_simulated": not options.data, "seconds": time.monotonic() - started, "step_seconds": steps,
        "store": ingested[0]["store"], "ingest": ingested, "shards": shards, "train": trained, "embed": embedded, "genes": genes,
        "relationships": recall, "verified": verified,
    }  # fmt: skip
    (out / "quickstart.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _fresh_folder(out: Path) -> Path:
    if out.exists():
        if not (out / _MARK).is_file() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(f"{out}: exists and was not made by a quickstart; name another --out, or remove it")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / _MARK).write_text("made by txfm quickstart, which may replace this folder\n")
    return out


def _data(
    options: Options, out: Path, terminal: Terminal
) -> tuple[list[tuple[Path, Literal["sc", "bulk"]]], Path, tuple[Path, ...]]:
    """Files to train on with their modality, the file to embed, and gene pairs to score with."""
    if options.data:
        return [(path, "sc") for path in options.data], options.data[-1], options.annotations
    from tools import simulate

    folder = out / "simulated"
    result = simulate.run(simulate.Options(out=folder, seed=options.seed), terminal)
    train = [(Path(d["path"]), d["modality"]) for d in result["datasets"] if not d["held_out"]]
    held_out = next(Path(d["path"]) for d in result["datasets"] if d["held_out"])
    return train, held_out, (folder / "relationships",)


def _ingest(path: Path, modality: Literal["sc", "bulk"], out: Path, terminal: Terminal) -> dict[str, Any]:
    """Ingest one file with the columns that it has under their usual names."""
    from tools import ingest
    from txfm_data.sources.h5ad import H5adSource

    with H5adSource(path) as source:
        ids = source.columns_with_ensembl_ids()
        columns = set(source.obs_columns)
        obs = source.obs(0, source.n_obs)
    best = max(ids, key=lambda name: ids[name], default="index")
    if best != "index":
        terminal.say(f"{path.name}: Ensembl ids taken from column {best!r} of var")
    has_control = "perturbation" in columns and bool((obs["perturbation"] == "non-targeting").any())
    options = ingest.H5adOptions(
        file=str(path), store=str(out / "store.soma"), dataset=path.name.removesuffix(".h5ad"), values="counts",
        gene_ids=None if best == "index" else best, batch="batch" if "batch" in columns else None,
        cell_type="cell_type" if "cell_type" in columns else None, perturbation="perturbation" if has_control else None,
        control="non-targeting" if has_control else None, modality=modality,
        duplicates="sum", empty_samples="drop",
    )  # fmt: skip
    return ingest.run_h5ad(options, terminal)


def _shard(options: Options, out: Path, terminal: Terminal) -> dict[str, Any]:
    from tools import shard

    return shard.run(
        shard.Options(
            store=str(out / "store.soma"), out=str(out / "corpus.shards"), min_cell_fraction=options.min_cell_fraction,
            seed=options.seed,
        ),
        terminal,
    )  # fmt: skip


def _train(options: Options, out: Path) -> dict[str, Any]:
    """Train in a process of its own, started by `accelerate launch` as any training is."""
    root = Path(__file__).resolve().parents[1]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", str(root / "tools" / "train.py"), "--json",
        "--config", str(root / "configs" / "txfm_tiny.yaml"), "--shards", str(out / "corpus.shards"), "--out", str(out / "run"),
        "--mask.n_unmasked", str(options.n_unmasked), "--loop.steps", str(options.steps),
        "--loop.global_batch", str(options.global_batch), "--loop.validate_every", str(max(1, options.steps // 3)),
        "--loop.seed", str(options.seed), "--optim.lr", "1.5e-3",
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"}, text=True)
    if done.returncode != 0:
        raise ValueError(f"training ended with exit code {done.returncode}; its message stands above")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _embed(options: Options, file: Path, out: Path, terminal: Terminal) -> dict[str, Any]:
    from tools import embed
    from txfm_data.sources.h5ad import H5adSource

    with H5adSource(file) as source:
        ids = source.columns_with_ensembl_ids()
    best = max(ids, key=lambda name: ids[name], default="index")
    chosen = embed.Options(
        input=str(file), model=str(out / "run" / "checkpoint"), out=str(out / f"{file.name.removesuffix('.h5ad')}.embedded.h5ad"),
        gene_ids=None if best == "index" else best, duplicates="sum", empty_samples="nan",
        min_cell_fraction=options.min_cell_fraction, n_unmasked=_GENES_SHOWN, seed=options.seed,
    )  # fmt: skip
    return embed.run(chosen, terminal)


def _genes(out: Path, terminal: Terminal) -> dict[str, Any]:
    from tools import genes

    return dict(genes.run(genes.Options(model=str(out / "run" / "checkpoint"), out=out / "genes.parquet"), terminal))


def _evaluate(annotations: tuple[Path, ...], out: Path, terminal: Terminal) -> dict[str, Any] | None:
    """Relationship recall of both gene matrices, and of the true programs where the data is simulated."""
    from tools import evaluate
    from txfm_eval.annotations import find_annotations

    try:
        find_annotations(annotations)
    except (ValueError, FileNotFoundError) as error:
        terminal.say(f"no relationship recall: {error}")
        return None
    options = evaluate.RelationshipOptions(genes=out / "genes.parquet", annotations=annotations)
    result = dict(evaluate.run_relationships(options, terminal))
    truth = out / "simulated" / "truth.json"
    if truth.is_file():
        result["truth"] = _truth_recall(truth, annotations)
    return result


def _truth_recall(truth: Path, annotations: tuple[Path, ...]) -> dict[str, Any]:
    """Recall of the true memberships of genes in programs: the best that any representation could reach."""
    import numpy as np

    from txfm_eval.annotations import find_annotations, read_annotation
    from txfm_eval.relationships import evaluate_relationships

    members = [set(genes) for genes in json.loads(truth.read_text())["programs"].values()]
    symbols = sorted(set().union(*members))
    matrix = np.array([[float(symbol in program) for program in members] for symbol in symbols])
    lists = [read_annotation(path) for path in find_annotations(annotations)]
    return evaluate_relationships({"truth": matrix}, symbols, lists)["matrices"]["truth"]["recall"]


def _verify(out: Path, terminal: Terminal) -> list[str]:
    from tools import verify

    paths = [out / "store.soma", out / "corpus.shards", out / "run" / "checkpoint"]
    return [verify.run(verify.Options(path=str(path)), terminal)["kind"] for path in paths]


def summary(result: dict[str, Any]) -> str:
    """A short table: where everything is, and what came out."""
    trained = result["train"]
    rows = [
        ("data", "simulated (no real sample or gene)" if result["is_simulated"] else "your files"),
        ("store", f"{result['store']}  ({sum(i['n_obs'] for i in result['ingest']):,} samples)"),
        ("shards", f"{result['shards']['out']}  ({result['shards']['n_genes']:,} genes)"),
        ("checkpoint", f"{trained['checkpoint']}  ({trained['parameters']:,} parameters)"),
        ("training", f"{trained['steps']:,} steps, {trained['samples_per_s']:,.0f} samples/s"),
        ("embedding", f"{result['embed']['out']}  (obsm[{result['embed']['obsm']!r}])"),
        ("genes", str(result["genes"]["path"])),
    ]  # fmt: skip
    if trained["val_loss"] is None:
        rows.append(("validation", "none: no batch was held out"))
    else:
        loss, mean = trained["val_loss"], trained["panel_mean_val_loss"]
        rows.append(("validation loss", f"{loss:.3f}; panel-mean predictor {mean:.3f} (lower is better)"))
    rows += _recall_rows(result["relationships"])
    rows.append(("time", f"{result['seconds']:.0f} s, of which training {result['step_seconds']['train']:.0f} s"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _recall_rows(recall: dict[str, Any] | None) -> list[tuple[str, str]]:
    if recall is None:
        return [("relationship recall", "not scored: no gene pairs given (ANNOTATIONS=folder)")]
    rows = []
    for name, scores in recall["matrices"].items():
        value, random = (scores[part]["combined"]["one_sided_percent"] for part in ("recall", "random"))
        if value is None:
            rows.append((f"recall of {name}", "not scored: none of the pairs lies among the genes"))
            continue
        truth = recall.get("truth", {}).get("combined", {}).get("one_sided_percent")
        best = f"; true programs {truth:.1f} %" if truth is not None else ""
        rows.append((f"recall of {name}", f"{value:.1f} %; random vectors {random:.1f} %{best}"))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart."""
    return run_verb("quickstart", Options, run, summary, argv)


if __name__ == "__main__":
    sys.exit(main())
