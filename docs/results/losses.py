"""Minutes of training with every loss and every activation on real counts, and the document with what came out.

    python docs/results/losses.py --shards CORPUS --out FOLDER --steps 500

Runs that are finished are kept and runs that were stopped go on, so the same command may be given again. Writes losses.md and
losses.png beside this script; no number in them is typed by hand.
"""

import argparse
import json
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNS = [
    ("poisson", "rect_tanh"),
    ("mse", "rect_tanh"),
    ("smooth_l1", "rect_tanh"),
    ("nb", "rect_tanh"),
    ("zinb", "rect_tanh"),
    ("poisson", "relu"),
    ("poisson", "clamped_relu"),
    ("poisson", "softmax"),
]
FIXED = [
    "--config",
    "configs/txfm_tiny.yaml",
    "--loop.log_every=20",
    "--loop.validate_every=100",
    "--loop.checkpoint_every=100",
]
FIXED += ["--loop.precision=bf16", "--loop.cpu_threads=1", "--resume=auto", "--json"]


def train(shards: Path, out: Path, steps: int, loss: str, activation: str) -> dict[str, Any]:
    """Run one training to its end, and return what it said."""
    folder = out / f"{loss}_{activation}"
    command = [
        sys.executable,
        "tools/train.py",
        *FIXED,
        f"--shards={shards}",
        f"--out={folder}",
        f"--loop.steps={steps}",
    ]
    command += [f"--loss.kind={loss}", f"--model.activation={activation}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads(done.stdout) if done.returncode == 0 else {}
    last_words = done.stderr.strip().splitlines()[-1:] or [""]
    print(f"{loss} {activation}: exit code {done.returncode} {'' if result else last_words[0]}", flush=True)
    return {
        "loss": loss, "activation": activation, "code": done.returncode, "result": result, "lines": lines,
        "said": last_words[0],
    }  # fmt: skip


def number(lines: list[dict[str, Any]], name: str) -> str:
    """What the one line says, or a dash."""
    return "-" if not lines or lines[0][name] is None else f"{lines[0][name]:.4g}"


def row(run: dict[str, Any]) -> str:
    """A row of the table."""
    train_lines = [line for line in run["lines"] if line["split"] == "train"]
    val_lines = [line for line in run["lines"] if line["split"] == "val"]
    first, last = val_lines[:1], val_lines[-1:]  # none of a run that died before its first validation
    minutes = f"{run['result']['seconds'] / 60:.1f}" if run["result"] else "-"
    cells = [
        run["loss"], run["activation"], train_lines[-1]["step"], minutes, number(first, "excess"), number(last, "excess"),
        number(last, "panel_mean_excess"),
        f"{train_lines[-1]['dead_gene_fraction']:.3f}", "finished" if run["code"] == 0 else f"stopped: {run['said']}",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Validation excess over the steps, one panel a run: losses are not comparable with each other."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(14, 6), layout="constrained")
    for run, axis in zip(runs, axes.flat, strict=True):
        for split, style in (("train", "-"), ("val", "o-")):
            chosen = [line for line in run["lines"] if line["split"] == split]
            axis.plot([line["step"] for line in chosen], [line["excess"] for line in chosen], style, label=split, ms=3)
        panel = run["lines"][-1].get("panel_mean_excess")
        if panel is not None:
            axis.axhline(panel, color="grey", ls=":", label="panel mean")
        axis.set(title=f"{run['loss']}, {run['activation']}", xlabel="step", ylabel="loss above its floor")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)


def write(runs: list[dict[str, Any]], shards: Path, steps: int) -> None:
    """Write the document and the figure."""
    sys.path.insert(0, str(ROOT))
    from shards.manifest import open_corpus

    corpus = open_corpus(shards)
    names = ", ".join(f"`{dataset.name}`" for dataset in corpus.manifest.datasets)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate", "numba", "numpy"))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout[
        :12
    ]
    text = [
        "# Every loss and activation on real counts",
        "",
        "Written by `docs/results/losses.py`; nothing here was typed by hand. Minutes of training on a CPU show that a loss trains",
        "and does not die. They do not rank the losses.",
        "",
        f"Commit {commit or 'unknown'}, "
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {versions}.",
        f"Corpus: {names};",
        f"{corpus.n_samples('train'):,} train and {corpus.n_samples('val'):,} validation samples,",
        f"{len(corpus.vocabulary):,} genes. Preset `txfm_tiny`, {steps} steps, one thread, bf16, two runs at a time.",
        "",
        "| loss | activation | steps | minutes | validation excess, first | last | panel-mean predictor | dead genes | end |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *map(row, runs),
        "",
        "Excess is the mean loss of a gene above the lowest that its target allows. It has the unit of its loss, so rows with",
        "different losses cannot be compared. nb and zinb have no panel-mean predictor: it would need a dispersion.",
        "Dead genes: share of the measured genes that no sample of the last log window predicted above 0.",
        "",
        "![Loss above its floor over the steps, training and validation, a panel for each run](losses.png)",
        "",
    ]  # fmt: skip
    (HERE / "losses.md").write_text("\n".join(text))
    plot(runs, HERE / "losses.png")


def main() -> None:
    """Train what is missing, then write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(lambda run: train(options.shards, options.out, options.steps, *run), RUNS))
    write(runs, options.shards, options.steps)


if __name__ == "__main__":
    main()
