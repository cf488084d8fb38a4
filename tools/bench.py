"""Measure the stream of training batches, or training itself, each beside a plain one."""

import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.runner import Terminal, run_kinds, run_verb, to_jsonable


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """Samples per second, and per CPU-second of the whole process, of the stream and of each of its parts alone.

    Medians of rounds in which all rows take turns, after one round that warms up. Goals stand beside the numbers.
    """

    shards: str | None = None
    """Folder of a shard corpus; else a droplet corpus is simulated into a temporary one."""
    samples: int = 100_000
    """Samples to simulate."""
    genes: int = 20_000
    """Genes to simulate; about 12 % of them are above zero in a sample."""
    batch: int = 512
    """Samples of a batch; a multiple of the lanes of the corpus."""
    n_unmasked: int = 2048
    """Genes shown of each sample."""
    rounds: int = 5
    """Rounds that count."""
    threads: int | None = None
    """Threads that read and decode, besides the one that draws masks. Default: none for a local corpus, four for a remote one."""
    annbatch_python: Path | None = None
    """Python in which annbatch can be imported, to measure it in the same rounds."""
    annbatch_collection: Path | None = None
    """Its collection of the same samples; needed with --annbatch-python."""
    out: Path | None = None
    """File to write the result to as JSON, besides printing it."""
    seed: int = 0
    """Seed of the simulation and of the stream."""

    def __post_init__(self) -> None:
        if (self.annbatch_python is None) != (self.annbatch_collection is None):
            raise ValueError("give --annbatch-python and --annbatch-collection together, or neither")
        for name in ("samples", "genes", "batch", "n_unmasked", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        _check_out(self.out)


def _check_out(out: Path | None) -> None:
    if out is not None and not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")


def _write_out(out: Path | None, result: dict[str, Any]) -> None:
    if out is not None:
        out.write_text(json.dumps(to_jsonable(result), indent=1) + "\n", encoding="utf-8")


def run_loader(options: LoaderOptions, terminal: Terminal) -> dict[str, Any]:
    """Simulate if need be, then measure."""
    from shards.bench.corpus import DropletConfig, write_corpus
    from shards.bench.loader import LoaderConfig, bench_loader
    from shards.manifest import Corpus

    config = LoaderConfig(
        batch=options.batch, n_unmasked=options.n_unmasked, rounds=options.rounds, threads=options.threads, seed=options.seed
    )  # fmt: skip
    annbatch: list[str] = []
    if options.annbatch_python is not None:
        script = Path(__file__).resolve().with_name("annbatch_epoch.py")
        annbatch = [*map(str, (options.annbatch_python, script, options.annbatch_collection)), str(options.batch)]
    with ExitStack() as stack:
        address = options.shards
        if address is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="txfm-bench-")))
            droplets = DropletConfig(samples=options.samples, genes=options.genes, seed=options.seed)
            address = str(write_corpus(folder / "shards", droplets, progress=terminal.progress("simulating")))
        progress = terminal.progress("measuring", "runs")
        result = bench_loader(Corpus(address), config, annbatch=annbatch, progress=progress)
        result["corpus"]["is_simulated"] = options.shards is None
    _write_out(options.out, result)
    return result


def summarize_loader(result: dict[str, Any]) -> str:
    """Rates of the rows, then the goals."""
    corpus, machine = result["corpus"], result["machine"]
    name = "simulated samples (no real data)" if corpus["is_simulated"] else f"samples of {corpus['address']}"
    lines = [
        f"{corpus['samples']:,} {name}, {corpus['nonzero']:,.0f} of {corpus['genes']:,} genes above zero; {machine['cpu']}, "
        f"{machine['cores']} cores, load {machine['load']:.1f}; medians of {result['settings']['rounds']} rounds",
        f"{'row':<46}{'samples/s':>12}{'per CPU-s':>12}",
    ]
    for row in result["rows"]:
        if row["samples_per_s"] is None:
            lines.append(f"{row['label']:<46}{'-':>12}{'-':>12}  {row['why']}")
        else:
            lines.append(f"{row['label']:<46}{row['samples_per_s']:>12,.0f}{row['samples_per_cpu_s']:>12,.0f}")
    return "\n".join([*lines, "", *_goal_lines(result["goals"]), *(f"Note: {note}." for note in result["notes"])])


def _goal_lines(goals: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"{'number':<46}{'found':>16}{'goal':>16}"]
    for goal in goals:
        found = "-" if goal["value"] is None else _number(goal["value"], goal["unit"])
        wanted = (
            "" if goal["goal"] is None else f"{'≥' if goal['is_least'] else '≤'} {_number(goal['goal'], goal['unit'])}"
        )
        verdict = {True: "met", False: "MISSED", None: goal["why"]}[goal["is_met"]]
        lines.append(f"{goal['about']:<46}{found:>16}{wanted:>16}  {verdict}".rstrip())
    return lines


def _number(value: float, unit: str) -> str:
    text = f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if unit in ("x", "s") else f"{value:.1f}"
    return text if unit == "x" else f"{text} {unit}"


@dataclass(frozen=True, kw_only=True)
class TrainBenchOptions:
    """Training steps per second of the model and of a plain one, in the same run: forward, loss, backward, optimizer.

    Work, share of the device's matmul rate, peak memory and waiting for data stand beside; goals below. Medians of rounds in which
    all rows take turns, after one round that warms up.
    """

    shards: str | None = None
    """Folder of a shard corpus; else a droplet corpus is simulated into a temporary one."""
    samples: int = 4_096
    """Samples to simulate."""
    genes: int = 20_000
    """Genes to simulate; about 12 % of them are above zero in a sample."""
    preset: Literal["cpu", "tiny", "s", "b", "l"] = "cpu"
    """Model, genes shown and batch: cpu is what the goals on a CPU are of (width 384, 6 blocks), the others are TxFM-tiny to -L."""
    width: int | None = None
    """Width of the model, in components; null takes that of the preset, as below."""
    blocks: int | None = None
    """Blocks of the encoder."""
    heads: int | None = None
    """Attention heads."""
    decoder_blocks: int | None = None
    """Residual blocks of the decoder."""
    batch: int | None = None
    """Samples of a step."""
    n_unmasked: int | None = None
    """Genes shown of each sample."""
    steps: int | None = None
    """Steps of each row in a round. Default: 1 on a CPU, 20 on a GPU."""
    rounds: int = 5
    """Rounds that count."""
    precisions: tuple[Literal["no", "bf16"], ...] = ("no", "bf16")
    """no is float32, bf16 is bf16 autocast."""
    compile: bool = False
    """Add rows of the model compiled by torch.compile, with the seconds of their first step."""
    without: tuple[
        Literal["all", "last_block", "gathered", "dense_loss", "all_branches", "masked", "unfused", "checkpointed"], ...
    ] = ()
    """Add rows of the model without one saving each, or without all in turn: what each of them gains."""
    memory: bool = True
    """Measure peak memory, of each row in a process of its own, some seconds each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    threads: int | None = None
    """Threads of PyTorch on a CPU; null leaves its default."""
    out: Path | None = None
    """File to write the result to as JSON, besides printing it."""
    seed: int = 0
    """Seed of the simulation, the stream and the weights."""

    def __post_init__(self) -> None:
        names = ("samples", "genes", "width", "blocks", "heads", "batch", "n_unmasked", "steps", "rounds", "threads")
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if not self.precisions or len(set(self.precisions)) < len(self.precisions):
            raise ValueError(f"--precisions takes no, bf16 or both, got {' '.join(self.precisions) or 'nothing'}")
        _check_out(self.out)


def run_train(options: TrainBenchOptions, terminal: Terminal) -> dict[str, Any]:
    """Simulate if need be, then measure."""
    import torch

    from shards.bench.corpus import DropletConfig, write_corpus
    from shards.manifest import Corpus
    from txfm_model.bench.train import PRESETS, BenchConfig, bench_train
    from txfm_model.bench.variants import SAVINGS

    preset = PRESETS[options.preset]
    shape = {name: getattr(options, name) for name in ("width", "blocks", "heads", "decoder_blocks")}
    batch = preset.batch if options.batch is None else options.batch
    without = SAVINGS if "all" in options.without else options.without
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here; take --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = options.steps or (20 if device == "cuda" else 1)
    config = BenchConfig(
        model=replace(preset.model, **{name: value for name, value in shape.items() if value is not None}),
        batch=batch, n_unmasked=preset.n_unmasked if options.n_unmasked is None else options.n_unmasked, steps=steps,
        rounds=options.rounds, precisions=options.precisions, compiles=options.compile, without=without,
        measures_memory=options.memory, device=device,
        threads=options.threads, seed=options.seed,
    )  # fmt: skip
    with ExitStack() as stack:
        address = options.shards
        if address is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="txfm-bench-")))
            droplets = DropletConfig(
                samples=options.samples, genes=options.genes, seed=options.seed, lanes=gcd(batch, 16)
            )
            address = str(write_corpus(folder / "shards", droplets, progress=terminal.progress("simulating")))
        result = bench_train(Corpus(address), config, progress=terminal.progress("measuring", "runs"))
        result["corpus"]["is_simulated"] = options.shards is None
    _write_out(options.out, result)
    return result


def summarize_train(result: dict[str, Any]) -> str:
    """Rates of the rows, what each saving gains, then the goals."""
    corpus, machine, settings = result["corpus"], result["machine"], result["settings"]
    model = settings["model"]
    name = "simulated samples (no real data)" if corpus["is_simulated"] else f"samples of {corpus['address']}"
    lines = [
        f"{result['parameters']:,} parameters: width {model['width']}, {model['blocks']} blocks; K {settings['n_unmasked']:,} of "
        f"{corpus['genes']:,} genes, batch {settings['batch']}, {name}",
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} of {machine['cores']} cores, load {machine['load']:.1f}, torch "
        f"{machine['torch']}; medians of {settings['rounds']} rounds of {settings['steps']} step(s); matmul "
        + ", ".join(f"{_KINDS[p]} {rate / 1e9:,.0f} GFLOP/s" for p, rate in result["matmul"].items()),
        f"{'row':<44}{'samples/s':>10}{'tokens/s':>12}{'GFLOP':>9}{'torch':>9}{'GFLOP/s':>10}{'matmul':>8}{'peak MB':>9}{'wait':>7}"
        f"{'first s':>9}",
    ]
    for row in result["rows"]:
        lines.append(_train_row(row))
    if result["savings"]:
        lines += ["", f"{'without':<44}{'work':>10}{'time':>10}{'memory':>10}   beside the fast model"]
        for saving in result["savings"]:
            cells = [f"{saving[key]:.3f}x" if saving[key] is not None else "-" for key in ("work", "gain", "memory")]
            lines.append(
                f"{saving['label'] + ', ' + _KINDS[saving['precision']]:<44}" + "".join(f"{c:>10}" for c in cells)
            )
    return "\n".join([*lines, "", *_goal_lines(result["goals"])])


_KINDS = {"no": "float32", "bf16": "bf16"}


def _train_row(row: dict[str, Any]) -> str:
    by_torch, peak = row["flops_per_sample_by_torch"], row["peak_bytes"]
    work = f"{row['flops_executed_per_sample'] / 1e9:>9.3g}" + (f"{by_torch / 1e9:>9.3g}" if by_torch else f"{'-':>9}")
    if row["samples_per_s"] is None:
        return f"{row['label']:<44}{'-':>10}{'-':>12}{work}  {row['why']}"
    return (
        f"{row['label']:<44}{row['samples_per_s']:>10,.2f}{row['tokens_per_s']:>12,.0f}{work}{row['flops_per_s'] / 1e9:>10,.0f}"
        f"{row['matmul_share']:>8.1%}" + (f"{peak / 1e6:>9,.0f}" if peak is not None else f"{'-':>9}")
        + f"{row['data_wait_share']:>7.2%}{row['first_step_s']:>9.1f}"
    )  # fmt: skip


def main_loader(argv: Sequence[str] | None = None) -> int:
    """The stream of training batches, its kernels and their floors; annbatch beside them where it is installed."""
    return run_verb("bench loader", LoaderOptions, run_loader, summarize_loader, argv)


def main_train(argv: Sequence[str] | None = None) -> int:
    """Training steps of the model beside those of a plain one: rate, work, memory, waiting for data."""
    return run_verb("bench train", TrainBenchOptions, run_train, summarize_train, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the kind that is named first."""
    return run_kinds("bench", {"loader": main_loader, "train": main_train}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
